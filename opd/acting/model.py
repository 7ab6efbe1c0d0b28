"""The policy's network: pictures, numbers and an instruction in, M hidden states out in one pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerBase

from opd.acting.layout import Layout, Tower, read_statistics, write_statistics
from opd.acting.seeing import Seen, Statistics
from opd.choice import Settings
from opd.distributions import Head, Vocabulary
from opd.errors import IncompatibleError, ModelError, first_line

if TYPE_CHECKING:
    from opd.policies import Student
    from opd.teachers import LiveTeacher

WEIGHTS = "model.safetensors"


class PolicySettings(Settings):
    """How a policy over action tokens is loaded."""

    model: str = Field(description="Folder of a policy over action tokens; opd create-policy writes a blank one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("float32", description="dtype of the weights")
    statistics: str | None = Field(
        None, description="Whose action statistics the tokens have, where the model names several data sets"
    )


class FusedTowers(torch.nn.Module):
    """Vision transformers side by side and the projector of their features, as OpenVLA has them."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.towers = torch.nn.ModuleList(tower(each, layout) for each in layout.towers)
        width = sum(each.width for each in layout.towers)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width),
            torch.nn.GELU(),
            torch.nn.Linear(4 * width, layout.width),
            torch.nn.GELU(),
            torch.nn.Linear(layout.width, layout.width),
        )
        # Each tower was trained on pictures of its own scale.
        scales = [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if t.kind == "dinov2" else ((0.5,) * 3,) * 2
                  for t in layout.towers]  # fmt: skip
        self.register_buffer("scales", torch.tensor(scales), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[B, patches, D]` of pictures `[B, 3, H, W]` in 0..1."""
        features = []
        scales: Any = self.scales
        towers: Any = self.towers
        for own, (mean, spread) in zip(towers, scales, strict=True):
            shown = (pixels - mean.view(3, 1, 1)) / spread.view(3, 1, 1)
            places = (shown.shape[-1] // own.config.patch_size) ** 2
            hidden = own(shown, output_hidden_states=True).hidden_states[-2]
            # Behind the class token and the registers stand the patches.
            features.append(hidden[:, -places:])
        return self.projector(torch.cat(features, -1))


def tower(settings: Tower, layout: Layout) -> torch.nn.Module:
    """One of transformers' vision models, without weights of its own."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "image_size": layout.pixels,
        "patch_size": layout.patch,
    }
    if settings.kind == "siglip":
        siglip = SiglipVisionConfig(**sizes, intermediate_size=settings.feed_forward, vision_use_head=False)
        return SiglipVisionModel(siglip)
    if settings.kind == "dinov2":
        ratio = settings.feed_forward // settings.width
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, mlp_ratio=ratio, num_register_tokens=4))
    raise ModelError(f"a tower of kind {settings.kind!r} is unknown; siglip and dinov2 are known")


class Patches(torch.nn.Module):
    """Patches as they are, each with its place: enough for small pictures."""

    def __init__(self, layout: Layout):
        super().__init__()
        self.project = torch.nn.Conv2d(3, layout.width, layout.patch, layout.patch)
        self.places = torch.nn.Parameter(torch.zeros((layout.pixels // layout.patch) ** 2, layout.width))
        torch.nn.init.normal_(self.places, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.project(pixels * 2 - 1).flatten(2).transpose(1, 2) + self.places


class ActionModel(torch.nn.Module):
    """A policy over action tokens.

    Args:
        tokenizer: of instructions.
        statistics: what a token means in the environment's units.
    """

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerBase, statistics: Statistics):
        super().__init__()
        if len(statistics.low) != layout.dimensions:
            raise ModelError(
                f"actions have {layout.dimensions} dimensions and the statistics of {statistics.key!r} "
                f"{len(statistics.low)}"
            )
        for name, count in (("proprio", layout.proprio), ("state", layout.state)):
            if count and any(len(bound) != count for bound in statistics.seen.get(name, ())):
                raise ModelError(
                    f"the policy reads {count} numbers of {name}, and statistics of {statistics.key!r} are of others"
                )
        self.layout, self.tokenizer, self.statistics = layout, tokenizer, statistics
        config = LlamaConfig(
            vocab_size=layout.vocabulary,
            hidden_size=layout.width,
            intermediate_size=layout.feed_forward,
            num_hidden_layers=layout.layers,
            num_attention_heads=layout.heads,
            num_key_value_heads=layout.heads,
            max_position_embeddings=2048,
            bos_token_id=layout.begin,
            eos_token_id=layout.stop,
        )
        self.backbone = LlamaModel(config)
        self.lm_head = torch.nn.Linear(layout.width, layout.vocabulary, bias=False)
        torch.nn.init.normal_(self.lm_head.weight, std=0.02)
        self.vision: torch.nn.Module | None = None
        if layout.cameras:
            self.vision = FusedTowers(layout) if layout.towers else Patches(layout)
        self.queries = torch.nn.Parameter(0.1 * torch.randn(layout.tokens, layout.width)) if layout.queries else None
        self.body = _numbers(layout.proprio, layout.width) if layout.proprio else None
        self.privileged = _numbers(layout.state, layout.width) if layout.state else None

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def vocabulary(self) -> Vocabulary:
        """The K ids that are actions."""
        return Vocabulary.of(self.layout.actions.ids)

    def head(self, temperature: float) -> Head:
        """Over the actions alone."""
        head = Head(self.lm_head.weight, temperature=temperature)
        return head.over(self.vocabulary, "the policy's head")

    def words(self, instruction: str) -> list[int]:
        """Ids of an instruction, without begin and end."""
        return self.tokenizer(instruction, add_special_tokens=False)["input_ids"]

    def forward(self, seen: Sequence[Seen], instructions: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states `[B, M, D]` of B observations, those that the tokens' logits are read from (`Layout`).

        Args:
            instructions: B lists of ids.
        """
        embed, device, dtype = self.backbone.embed_tokens, self.device, self.lm_head.weight.dtype
        count, width, moves = len(seen), self.layout.width, self.layout.tokens
        begin, stop = (
            embed(torch.tensor(i, device=device)).expand(count, 1, width) for i in (self.layout.begin, self.layout.stop)
        )
        parts = [begin]
        if self.vision is not None:
            # Of each observation all cameras, one behind the other.
            pixels = torch.from_numpy(np.stack([each.images for each in seen])).to(device).flatten(0, 1)
            features = self.vision((pixels.permute(0, 3, 1, 2).float() / 255).to(dtype))
            parts.append(features.reshape(count, -1, width))
        for name, part in (("proprio", self.body), ("state", self.privileged)):
            if part is not None:
                values = self.statistics.read(name, np.stack([getattr(each, name) for each in seen]))
                numbers = torch.from_numpy(values).to(device, dtype)
                parts.append(part(numbers)[:, None])
        longest = max(map(len, instructions))
        ids = torch.zeros(count, longest, dtype=torch.int64)
        known = torch.zeros(count, longest, dtype=torch.bool)
        for i, words in enumerate(instructions):
            # On the left, so that the last word stands before the first placeholder.
            ids[i, longest - len(words) :] = torch.tensor(words)
            known[i, longest - len(words) :] = True
        ids, known = ids.to(device), known.to(device)
        zeros = torch.zeros(count, moves, width, device=device, dtype=dtype)
        parts += [embed(ids), zeros if self.queries is None else zeros + self.queries, stop]
        states = torch.cat(parts, 1)
        before = sum(part.shape[1] for part in parts[:-3])
        there = torch.ones(count, states.shape[1], dtype=torch.bool, device=device)
        there[:, before : before + longest] = known
        # What is not there has no place of its own, so nothing depends on what else is in the batch.
        places = (there.long().cumsum(1) - 1).clamp(min=0)
        if bool(known.all()):
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(count, 1, *states.shape[1:2] * 2)
        else:
            mask = there[:, None, None, :].expand(count, 1, states.shape[1], -1)
        hidden = self.backbone(
            inputs_embeds=states, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        first = before + longest - (self.queries is None)
        return hidden[:, first : first + moves]

    def save(self, folder: Path) -> None:
        """Everything that `load_policy` reads."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        self.layout.write(folder)
        write_statistics(folder, self.statistics)
        self.tokenizer.save_pretrained(folder)


def _numbers(count: int, width: int) -> torch.nn.Module:
    """Numbers as one token: what OpenVLA-OFT's projector of proprioception is."""
    return torch.nn.Sequential(torch.nn.Linear(count, width), torch.nn.GELU(), torch.nn.Linear(width, width))


def load_policy(settings: PolicySettings, device: torch.device | str) -> ActionModel:
    """A policy in eval mode on `device`.

    Raises:
        ModelError: no such folder, or files that are missing or damaged.
    """
    folder = Path(settings.model).expanduser()
    layout = Layout.read(folder)
    statistics = read_statistics(folder, settings.statistics)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        with torch.random.fork_rng(devices=[]):
            model = ActionModel(layout, tokenizer, statistics)
        dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelError(
            f"model {settings.model!r} cannot be loaded ({first_line(error)}); give the folder of a policy over action "
            "tokens (opd create-policy writes a blank one)"
        ) from None
    return model.to(device, dtype).eval()


def policy_of(part: Student | LiveTeacher, which: str) -> ActionModel:
    """The model of a built student or teacher that acts; `which` names it.

    Raises:
        IncompatibleError: it has none.
    """
    found = getattr(part, "model", None)
    if not isinstance(found, ActionModel):
        raise IncompatibleError(
            f"{which} ({type(part).__name__}) has no policy over action tokens, and another part of the recipe asks "
            "for one; take a student of kind action_tokens and a teacher of kind policy or self"
        )
    return found
