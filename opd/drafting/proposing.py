"""What a recipe says of proposals, wherever a drafter proposes: how many, how they are chosen, and in which shape."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from opd.choice import Settings
from opd.drafting.base import Drafter
from opd.errors import IncompatibleError

Proposing = Literal["likeliest", "drawn"]
"""How a slot's token is chosen from the drafter's distribution."""


class Tree(Settings):
    """Proposals in the shape of a tree, of which the target keeps one line (EAGLE-2, arXiv 2406.16858): at each depth
    the likeliest nodes get their likeliest tokens as children, and the likeliest nodes of all are kept, likely by the
    product of the drafter's probabilities from the anchor on. The line of likeliest children is always among them, so
    of the same block never fewer proposals stand than without a tree. Its depth is the number of `proposals`."""

    width: int = Field(10, ge=2, le=256, description="Children of a node, and nodes of a depth that have some")
    nodes: int = Field(59, ge=2, le=4096, description="Most proposals of a tree; the target reads them in one pass")


class Proposes(Settings):
    """The settings of whoever has a drafter propose."""

    place: ClassVar[str]
    """Where a recipe has them."""

    proposals: int | None = Field(
        None, ge=1, le=256, description="Tokens of a block, one behind the other; default the drafter's"
    )
    proposing: Proposing = Field(
        "likeliest",
        description="Whether a slot's likeliest token is proposed, or one drawn from the drafter at the text's "
        "temperature; at 0 they are the same",
    )
    tree: Tree | None = Field(
        None, description="Several tokens for each place, as a tree of depth `proposals`; default one line"
    )

    @model_validator(mode="after")
    def _likeliest_children(self) -> Self:
        if self.tree is not None and self.proposing == "drawn":
            raise ValueError("proposing is 'drawn', and the children in a tree are a node's likeliest; remove tree")
        return self

    def check(self, drafter: Drafter) -> None:
        """Raise `IncompatibleError` where it asks for what the drafter does not allow."""
        most, count = drafter.most, self.proposals or drafter.proposals
        if most is not None and count > most:
            raise IncompatibleError(
                f"{self.place}.proposals is {count}, and this drafter proposes {most} at most; lower it"
            )
        if self.proposing == "drawn" and drafter.parallel:
            raise IncompatibleError(
                f"{self.place}.proposing is 'drawn', and the slots of this drafter do not see each other: drawn apart "
                "they are no text. Leave it at 'likeliest'"
            )
        if self.tree is None:
            return
        if drafter.parallel:
            raise IncompatibleError(
                f"{self.place}.tree is set, and the slots of this drafter do not see each other: what it proposes "
                "behind a token is the same behind another, which is no tree. Remove tree"
            )
        if self.tree.nodes < count:
            raise IncompatibleError(
                f"{self.place}.tree.nodes is {self.tree.nodes}, and one line has {count} proposals already: raise "
                f"nodes, or lower {self.place}.proposals"
            )
