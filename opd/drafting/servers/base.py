"""What is known of a program that loads drafters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from opd.drafting.base import Drafter
from opd.drafting.block import BlockDrafter
from opd.drafting.chain import ChainDrafter


@dataclass(frozen=True)
class Served:
    """A drafter and its target, as far as servers see them; no weight is looked at.

    Attributes:
        drafter: on any device, meta among them.
        target: likewise.
        dropped: layers that the recipe takes from the target, as it numbers them.
        dtype: in which the recipe loads the target, `auto` as it is stored.
    """

    drafter: Drafter
    target: PreTrainedModel
    dropped: Sequence[int] = ()
    dtype: str = "auto"

    @property
    def dtype_option(self) -> str:
        """For a server that would load the target as it is stored: the word of its command line that changes it."""
        return "" if self.dtype == "auto" else f" --dtype {self.dtype}"

    @property
    def last_layer(self) -> int:
        """Of the target, counted from 0."""
        return int(self.target.config.get_text_config(decoder=True).num_hidden_layers) - 1

    @property
    def head_bias(self) -> bool:
        """Whether the target adds a number to each id's logit."""
        return getattr(self.target.get_output_embeddings(), "bias", None) is not None

    @property
    def plain_embedding(self) -> bool:
        """Whether the target's embedding hands over its rows as they are."""
        return type(self.target.get_input_embeddings()).forward is torch.nn.Embedding.forward


class Server(ABC):
    """One program; it holds nothing."""

    @abstractmethod
    def misreads(self, served: Served) -> str | None:
        """What it would read otherwise than it was trained, in a sentence with key, value, what is accepted and what to
        do; None where it reads all as it is."""

    @abstractmethod
    def launch(self, served: Served) -> str:
        """How it is started with the folder `student` of a run, in words of its own command line."""


def own_form(served: Served) -> str | None:
    """The refusal of a form that none of them knows."""
    if isinstance(served.drafter, ChainDrafter | BlockDrafter):
        return None
    return f"it loads the forms chain and block alone, and no {type(served.drafter).__name__}; leave it out"


def dropped_layers(served: Served) -> str | None:
    """The refusal that all of them share: they load the target whole."""
    if not served.dropped:
        return None
    return (
        f"student.target.drop_layers is {list(served.dropped)}, and a server loads the target whole, so that the "
        "drafter reads other layers; write the shorter model into a folder, and name that as student.target.model"
    )


def last_tap(served: Served, why: str) -> str | None:
    """The refusal of a drafter that reads the target's last layer; `why` says what is handed over in its place."""
    last = served.last_layer
    if last not in served.drafter.taps:
        return None
    return f"student.drafter.taps names {last}, the target's last layer, {why}; accepted are 0 to {last - 1}"


def head_bias(served: Served) -> str | None:
    """The refusal of a drafter that borrows a head whose bias is left behind."""
    if not served.head_bias or served.drafter.own_head() is not None:
        return None
    return (
        "the target's head has a bias, and of a head that a drafter borrows only the matrix is used; take "
        "student.drafter chain, which has a head of its own"
    )
