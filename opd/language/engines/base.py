"""The interface of an engine: read a prompt, write completions while somebody may look, score given completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from opd.context import Context
from opd.distributions import Distribution, TopK
from opd.language.identity import template_hash, tokenizer_hash
from opd.prompts import Prompt


@dataclass(frozen=True)
class PromptInputs:
    """A prompt of which ids are not all that a model reads.

    Attributes:
        ids: int64 `[P]`, placeholders of images among them.
        inputs: what a processor returned besides, of this prompt alone, by the name under which the model takes it
            (`pixel_values`, `image_grid_thw`, ...). Nobody but the engine that made it looks inside.
        pictures: `sha256:...` over the pixels of each picture in it, in order, as they were opened; empty where the
            engine does not say.
    """

    ids: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    pictures: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


EncodedPrompt = torch.Tensor | PromptInputs
"""What an engine's `encode` may return, and so what a trajectory's context may be in language: int64 `[P]` ids of plain
text, which can be packed without padding, or ids with other inputs. `len` is P for both."""


def ids_of(context: EncodedPrompt) -> torch.Tensor:
    """int64 `[P]`."""
    return context.ids if isinstance(context, PromptInputs) else context


def followed_by(context: EncodedPrompt, tokens: torch.Tensor) -> EncodedPrompt:
    """The prompt with int64 `[T]` tokens behind it, on the CPU, as a prompt of P + T."""
    ids = torch.cat([ids_of(context).cpu(), tokens.cpu()])
    return replace(context, ids=ids) if isinstance(context, PromptInputs) else ids


def same_prompt(a: EncodedPrompt, b: EncodedPrompt) -> bool:
    """Whether two prompts read alike, their inputs included."""
    if a is b:
        return True
    if isinstance(a, PromptInputs) != isinstance(b, PromptInputs) or not torch.equal(ids_of(a), ids_of(b)):
        return False
    if not (isinstance(a, PromptInputs) and isinstance(b, PromptInputs)):
        return True
    return a.inputs.keys() == b.inputs.keys() and all(torch.equal(a.inputs[n], b.inputs[n]) for n in a.inputs)


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        context: gives temperature, the ids that count and those that end a completion.
        top_p, top_k: cuts of the distribution that is drawn from; 1 and 0 cut nothing.
        batch: rows written side by side; an engine that does its own batching need not look.
        training: whether a step of training learns from the rows; others are measured, asked about or kept.
    """

    context: Context
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64
    training: bool = False


class Row(NamedTuple):
    """One completion.

    `actions` int64 `[T]`, the end token included; `log_probs` float32 `[T]` under the distribution drawn from;
    `finished`: it ended by itself; `stopped`: why somebody who looked ended it, else None; `lost`: it could not be
    written, whatever is there of it.
    """

    actions: torch.Tensor
    log_probs: torch.Tensor
    finished: bool
    stopped: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class Written:
    """Rows that began together, as far as they are written.

    Attributes:
        rows: indices of the W rows among all that were asked for.
        actions: W int64 `[T_i]` drawn so far, the end token included.
        log_probs: W float32 `[T_i]`.
        going: places (0 to W - 1) of the rows that are still being written.
        candidates: W times the likeliest ids at each of the T_i states, whatever cuts the distribution drawn from;
            empty where nobody asks for them.
    """

    rows: Sequence[int]
    actions: Sequence[torch.Tensor]
    log_probs: Sequence[torch.Tensor]
    going: Sequence[int]
    candidates: Sequence[TopK] = ()


class Looker(ABC):
    """Who looks at rows while an engine writes them. Rows that begin together are a batch, of which an engine asks
    once, when nothing is drawn, who looks at it. Looking changes no draw.

    Attributes:
        segment: tokens between two looks.
        candidates: likeliest ids of each state that it wants to see.
    """

    segment: int
    candidates: int = 0

    @abstractmethod
    def begin(self, written: Written) -> Look:
        """Who looks at these rows from now on. Another batch may begin before this one has ended."""


class Look(ABC):
    """Who looks at one batch."""

    @abstractmethod
    def look(self, written: Written) -> Mapping[int, str]:
        """Called after every segment as long as a row of the batch is being written. All that are have then drawn the
        same number of tokens: a segment, times the number of looks.

        Returns:
            Reasons, by place, of the rows that end here.
        """

    @abstractmethod
    def end(self, written: Written) -> None:
        """Every row is as long as it gets."""


Ended = Callable[[int, Row], None]
"""Told of a row by its index among all that were asked for, perhaps from another thread."""


class Scorer(ABC):
    """Scores completions as they grow, without gradient; B rows, each begun by its prompt."""

    @abstractmethod
    def extend(self, tokens: Mapping[int, torch.Tensor]) -> Distribution:
        """Distributions at the new positions of the rows named, packed in the mapping's order.

        Args:
            tokens: by row (0 to B - 1), int64 `[n_i]` with n_i >= 1: what follows all that the row was given before.
                The distribution at a position is the one from which its token would be drawn.
        """

    @abstractmethod
    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows; they are not named again."""


class Engine(ABC):
    """A language model, wherever it runs. One that lies in this process and can be trained is an `InProcess`.

    Attributes:
        tokenizer: ids to text and back.
        template: `chat` or `plain`, with `template_options`: how a prompt becomes ids.
        owner: who this model is in the run, as messages name it.
        notes: what was changed on the way to ids, or could not be handed on; each sentence once.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    template_options: dict[str, Any]
    owner: str
    notes: list[str]

    @abstractmethod
    def encode(self, prompt: Prompt, column: str | None = None) -> EncodedPrompt:
        """A prompt's view, up to where the completion starts.

        Args:
            column: the view, as a teacher's `sees` names it; default the student's.

        Raises:
            DataError: the prompt has no such view, or one that this engine cannot read.
        """

    @abstractmethod
    def sample(
        self,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
        looker: Looker | None = None,
        ended: Ended | None = None,
    ) -> list[Row]:
        """`group` completions of each prompt, neighbours those of one, from the weights as they are now.

        Args:
            budget: most tokens of one.
            seeds: of each row; its draws depend on its own seed and on nothing else.
            looker: sees the rows between segments and may end some.
            ended: hears of every row when it is as long as it gets.
        """

    @abstractmethod
    def score(
        self, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], context: Context
    ) -> Distribution:
        """Distributions at the N positions of B completions, int64 `[T_i]`, packed in order.

        Args:
            context: gives temperature and the ids that count.
        """

    @abstractmethod
    def scorer(self, contexts: Sequence[EncodedPrompt], context: Context) -> Scorer:
        """What `score` says, for completions that are still being written."""

    def decode(self, ids: torch.Tensor) -> str:
        """A completion's text, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def say(self, note: str) -> None:
        """Add a sentence to `notes`, unless it is there."""
        if note not in self.notes:
            self.notes.append(note)

    @property
    def tokenizer_hash(self) -> str:
        """`sha256:...` over every token's id and how a probe text is split; the same on every machine."""
        return tokenizer_hash(self.tokenizer)

    @property
    def template_hash(self) -> str:
        """`sha256:...` over how a prompt becomes ids: the kind of template, its options and its text."""
        return template_hash(self.tokenizer, self.template, self.template_options)

    @property
    def processor_hash(self) -> str | None:
        """`sha256:...` over the settings by which pictures become a model's inputs; None where none are read."""
        return None
