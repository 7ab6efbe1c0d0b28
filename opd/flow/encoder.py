"""How a prompt becomes what a flow transformer is conditioned on: text encoders of a pipeline, or a small table."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd.errors import DataError, ModelError, first_line
from opd.prompts import Prompt

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

REMEMBERED = 512
"""Prompts whose encoding by a pipeline's text encoders is kept, on the CPU; one takes a few megabytes."""

Condition: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A prompt as an encoder reads it: ids of a table, or what text encoders made of it."""

C = TypeVar("C", bound=Condition)


class Shared:
    """Parts that no training moves and that copies of a model have in common."""

    def __init__(self, **parts: object):
        vars(self).update(parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no part {name!r}")


class PromptEncoder(torch.nn.Module, ABC, Generic[C]):
    """Makes a condition `C` of a prompt: `encode` once a prompt, `forward` at every pass. The empty prompt is the
    unconditional one."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[C]:
        """One condition a text, to be kept in trajectories."""

    @abstractmethod
    def forward(self, conditions: Sequence[C]) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, L, E]` embeddings and `[B, P]` pooled ones of B conditions."""

    @abstractmethod
    def check(self, text: str, limit: int | None) -> None:
        """Raise `DataError` for a text that cannot be encoded whole, with at most `limit` tokens."""


class PromptTable(PromptEncoder[torch.Tensor]):
    """Embeddings of tokens and of their places, and the mean of a second table: what a small model needs of a closed
    vocabulary. A condition is the prompt's ids, padded to `places`.

    Args:
        tokenizer: with a padding token; nothing else is asked of it.
        width: E, of the embeddings.
        pooled: P, of the mean.
        places: L, tokens of the longest prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, pooled: int, places: int):
        super().__init__()
        self.tokenizer, self.length = tokenizer, places
        self.tokens = torch.nn.Embedding(len(tokenizer), width)
        self.places = torch.nn.Embedding(places, width)
        self.means = torch.nn.Embedding(len(tokenizer), pooled)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        padding = self.tokenizer.pad_token_id
        rows = [self.ids(text)[: self.length] for text in texts]
        return [torch.tensor(row + [padding] * (self.length - len(row))) for row in rows]

    def forward(self, conditions: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.stack(list(conditions)).to(self.tokens.weight.device)
        present = (ids != self.tokenizer.pad_token_id).unsqueeze(-1)
        pooled = (self.means(ids) * present).sum(1) / present.sum(1).clamp(min=1)
        return self.tokens(ids) + self.places.weight, pooled

    def check(self, text: str, limit: int | None) -> None:
        ids, most = self.ids(text), self.length if limit is None else min(limit, self.length)
        if self.tokenizer.unk_token_id in ids:
            raise DataError(f"the student's prompt table has no token for a part of {text[:60]!r}")
        if len(ids) > most:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and the student reads at most {most} (places of its prompt table, "
                "max_prompt_tokens)"
            )

    def save(self, folder: Path) -> None:
        """`table.safetensors` (tokens, places, means) and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}, _table(folder))
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> PromptTable:
        """What `save` wrote.

        Raises:
            ModelError: files that are missing or damaged, or that do not belong together.
        """
        try:
            weights = load_file(_table(folder))
            (places, width), pooled = weights["places.weight"].shape, weights["means.weight"].shape[1]
            made = cls(AutoTokenizer.from_pretrained(folder), width, pooled, places)
            made.load_state_dict(weights)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"prompt table {str(folder)!r} cannot be loaded ({first_line(error, 'size mismatch')}); give a folder "
                "with table.safetensors and the files of its tokenizer"
            ) from None
        return made


def _table(folder: Path) -> Path:
    return folder / "table.safetensors"


class TextEncoders(PromptEncoder[tuple[torch.Tensor, torch.Tensor]]):
    """The text encoders of a diffusers pipeline, frozen. A condition is their output; each text is encoded once."""

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__()
        # Not a submodule: what is frozen and shared with teachers is no part of what is trained.
        self.shared = Shared(pipeline=pipeline, known=OrderedDict())

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        known: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = self.shared.known
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            hidden, _, pooled, _ = self.shared.pipeline.encode_prompt(
                prompt=new, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
            )
            for text, h, p in zip(new, hidden.cpu(), pooled.cpu(), strict=True):
                known[text] = (h.clone(), p.clone())
        found = [known[text] for text in texts]
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return found

    def forward(self, conditions: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.shared.pipeline.device
        return torch.stack([h for h, _ in conditions]).to(device), torch.stack([p for _, p in conditions]).to(device)

    def check(self, text: str, limit: int | None) -> None:
        """Text encoders cut what is too long for them, each in its own place, as their pipeline does."""


def check_prompts(
    prompts: Sequence[Prompt], encoder: PromptEncoder | None, limit: int | None, column: str | None = None
) -> None:
    """Raise `DataError` for a prompt of which `column` (default: the student's) is no text, or one that the encoder,
    where it is at hand, cannot read whole."""
    for prompt in prompts:
        text = prompt.view(column)
        where = prompt.where if column is None else f"{prompt.where}: column {column!r}, which a teacher sees"
        if not isinstance(text, str):
            kind = "a list of messages" if isinstance(text, list) else f"of type {type(text).__name__}"
            raise DataError(f"{where}: the prompt is {kind}; a flow model takes a string")
        try:
            if encoder is not None:
                encoder.check(text, limit)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def same_vocabulary(one: PromptEncoder, other: PromptEncoder) -> bool:
    """Whether conditions made by one mean the same to the other."""
    if isinstance(one, PromptTable) and isinstance(other, PromptTable):
        vocabularies = [json.dumps(e.tokenizer.get_vocab(), sort_keys=True) for e in (one, other)]
        return vocabularies[0] == vocabularies[1] and one.length == other.length
    return type(one) is type(other)
