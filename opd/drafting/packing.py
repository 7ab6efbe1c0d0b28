"""Answers that were written with a drafter's help, as trajectories whose positions are the slots of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.distributions import Categorical, Head, Target
from opd.drafting.decoding import Answer
from opd.drafting.record import Drafted, numbered
from opd.prompts import Prompt
from opd.trajectories import AUTHORS, Trajectories


def packed(
    written: Head, answers: Sequence[Answer], prompts: Sequence[Prompt], group: int, head: Head, teacher: str | None
) -> Trajectories:
    """Trajectories of B answers, with what the target says at every slot, those behind a rejection too.

    Columns by position: `slot` int64, 1 to K; `accepted` bool; `rejected` bool, the first slot of a block that did not
    stand and all behind it; `corrected` bool, that first slot alone; `verified` int64, the text's token at an accepted
    or corrected slot, -1 elsewhere and where the drafter may not propose it; `log_q` float32, the drafter's
    log-probability of its proposal when it proposed, at a temperature of 1. Slots that a text's end cut off are neither
    accepted nor rejected, and in no loss; nor are those at which the target's likeliest token is none that the drafter
    may propose.

    Args:
        written: the target's over the ids that a text may hold.
        prompts: B of them, those of one group next to each other.
        group: answers of a prompt.
        head: the target's over the ids that the drafter may propose, detached, at the temperature of the loss.
        teacher: what the recipe calls the target.
    """
    records, device, vocabulary = [answer.record for answer in answers], head.weight.device, head.vocabulary
    none = torch.zeros(0, dtype=torch.int64)
    actions = torch.cat([none, *(answer.proposed for answer in answers)]).to(device)
    sizes = [answer.record.slots(len(answer.proposed)) for answer in answers]
    of_block, slot = numbered(torch.cat([none, *sizes]).to(device))
    stood, added = (
        torch.cat([none, *(getattr(record, name) for record in records)]).to(device)
        for name in ("accepted", "committed")
    )
    accepted = slot <= stood[of_block]
    # The target's own token behind what stood was added only if nothing cut the step before it.
    whole = (added == stood + 1)[of_block]
    nothing = head.weight.new_zeros(0, head.weight.shape[1])
    hidden = torch.cat([answer.hidden for answer in answers]).to(device) if answers else nothing
    learn = accepted | whole
    if vocabulary.ids is not None and len(actions):
        learn &= ~vocabulary.outside(written.vocabulary.named(_likeliest(hidden, written)))
    corrected = whole & (slot == stood[of_block] + 1)
    verified = torch.cat([none, *(_written(*each) for each in zip(records, sizes, strict=True))]).to(device)
    verified = verified.where((accepted | corrected) & ~vocabulary.outside(verified), -1)
    log_q, drawn_log_q = (
        torch.cat([torch.zeros(0), *(getattr(answer, name) for answer in answers)]).to(device)
        for name in ("log_q", "drawn_log_q")
    )
    return Trajectories(
        prompts=list(prompts),
        contexts=records,
        actions=actions,
        lengths=torch.tensor([len(answer.proposed) for answer in answers], dtype=torch.int64),
        behaviour_log_probs=drawn_log_q,
        finished=torch.tensor([answer.finished for answer in answers], dtype=torch.bool),
        learn=learn,
        authors=torch.full_like(actions, AUTHORS.index("student"), dtype=torch.uint8),
        groups=torch.arange(len(answers) // group).repeat_interleave(group),
        columns={
            "slot": slot,
            "accepted": accepted,
            "rejected": ~accepted & whole,
            "corrected": corrected,
            "verified": verified,
            "log_q": log_q,
        },
        answers=(Target(Categorical(hidden, head), teacher=teacher),),
    )


def _written(record: Drafted, sizes: torch.Tensor) -> torch.Tensor:
    """int64 `[N]`: the text's token at the place of each slot of blocks of int64 `[M]` sizes; behind the text's end its
    last one."""
    of_block, slot = numbered(sizes)
    places = record.anchors[of_block] - len(record.prompt) + slot
    return record.response[places.clamp(max=len(record.response) - 1)]


def _likeliest(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """int64 `[N]`, columns; a few rows at a time."""
    return torch.cat([head.logits(part).argmax(-1) for part in torch.split(hidden, 512)])
