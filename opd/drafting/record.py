"""What a rollout by drafts leaves of one answer: the text, where the target verified, and what the drafter had read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from opd.drafting.base import Blocks


@dataclass(frozen=True)
class Drafted:
    """The context of a trajectory whose N positions are the slots of M blocks, K of each or fewer: `actions` are what
    was proposed, `[N]`, whether it was accepted or not.

    Attributes:
        prompt: int64 `[P]`.
        response: int64 `[T]`, what stands: the first token is the target's own, from reading the prompt.
        features: `[S, F]`, the target's tapped hidden states at positions 0 to S - 1, up to the last anchor; detached.
        anchors: int64 `[M]`, the position in `prompt + response` of the last token that stood before each block.
        accepted: int64 `[M]`, how many proposals of each block the target accepted.
        committed: int64 `[M]`, how many tokens each step of verifying added: one more than were accepted, unless the
            answer ended before.
        sizes: int64 `[M]`, slots of each block; None where all have as many.
        steps: bool `[M]`, which blocks are steps of verifying in which the drafter's proposals were read on the way
            along the text; None for all. Others are placed in it otherwise.
    """

    prompt: torch.Tensor
    response: torch.Tensor
    features: torch.Tensor
    anchors: torch.Tensor
    accepted: torch.Tensor
    committed: torch.Tensor
    sizes: torch.Tensor | None = None
    steps: torch.Tensor | None = None

    def slots(self, positions: int) -> torch.Tensor:
        """int64 `[M]`: slots of each block, of N `positions` in all."""
        if self.sizes is not None:
            return self.sizes
        return torch.full_like(self.anchors, positions // max(1, len(self.anchors)))

    @property
    def walked(self) -> bool:
        """Whether its blocks go along the whole text as steps of verifying do, so that they say in how many passes of
        the target it is written."""
        return self.steps is None or bool(self.steps.any())

    def of_steps(self) -> Drafted:
        """This record without the blocks that are no steps of verifying."""
        if self.steps is None:
            return self
        kept = {name: getattr(self, name)[self.steps] for name in ("anchors", "accepted", "committed")}
        sizes = None if self.sizes is None else self.sizes[self.steps]
        return replace(self, steps=None, sizes=sizes, **kept)

    def __len__(self) -> int:
        """P."""
        return len(self.prompt)


def numbered(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the N slots of M blocks of int64 `[M]` sizes: int64 `[N]`, which block each is in, and int64 `[N]`, its number
    there, from 1."""
    of_block = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    return of_block, torch.arange(len(of_block), device=sizes.device) - first[of_block] + 1


def acceptance_length(drafted: Sequence[Drafted]) -> float:
    """Tokens that a pass of the target added while it verified: all tokens over all steps. The first token of an
    answer, which comes from reading the prompt, is not among them; NaN where nothing was verified."""
    drafted = [each.of_steps() for each in drafted]
    steps = sum(len(each.anchors) for each in drafted)
    return sum(int(each.committed.sum()) for each in drafted) / steps if steps else float("nan")


def saved(passes: float, tokens: float) -> dict[str, float]:
    """What a drafter's help comes to: `target_passes`, the rows of all passes of the target, of which one reads each
    prompt and the others verify; `written_tokens`, as many as it had made alone; `passes_saved`, the share it did
    without."""
    return {
        "target_passes": passes,
        "written_tokens": tokens,
        "passes_saved": 1 - passes / tokens if tokens else 0.0,
    }


def blocks_of(drafted: Sequence[Drafted], proposals: Sequence[torch.Tensor], device: torch.device) -> Blocks:
    """The blocks of B records, to be drafted again; where there are none at all, one that is not `present`, so that
    every process makes its pass.

    Args:
        proposals: B int64 `[N_i]`.
    """
    rows, most = len(drafted), max(1, *(len(each.anchors) for each in drafted))
    sizes = [each.slots(len(p)) for p, each in zip(proposals, drafted, strict=True)]
    slots = max([1, *(int(each.max()) for each in sizes if len(each))])
    length = max(1, *(len(each.features) for each in drafted))
    first = drafted[0].features
    found = Blocks(
        features=first.new_zeros(rows, length, first.shape[1], device=device),
        tokens=torch.zeros(rows, length + 1, dtype=torch.int64, device=device),
        anchors=torch.ones(rows, most, dtype=torch.int64, device=device),
        proposals=torch.zeros(rows, most, slots, dtype=torch.int64, device=device),
        present=torch.zeros(rows, most, slots, dtype=torch.bool, device=device),
    )
    for i, (each, tokens) in enumerate(zip(drafted, proposals, strict=True)):
        count, read = len(each.anchors), len(each.features)
        held = (torch.arange(slots) < sizes[i][:, None]).to(device)
        text = torch.cat([each.prompt.cpu(), each.response.cpu()])[: read + 1]
        found.features[i, :read] = each.features.to(device)
        found.tokens[i, : len(text)] = text.to(device)
        found.anchors[i, :count] = each.anchors.to(device)
        found.proposals[i, :count][held] = tokens.to(device)
        found.present[i, :count] = held
    return found
