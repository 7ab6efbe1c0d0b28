"""Theorem 3.5 of Lightning OPD at a trained student: how far the offline gradient lies from the online one, and how far
it may at most, estimated from stored trajectories that training never saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from opd.assembly import load_data
from opd.distributions import Sampled
from opd.recipe import parse_recipe
from opd.store import Store, Targets


def gap(student: Path, recipe: Mapping[str, Any], store: Path, targets: str, *, seed: int) -> dict[str, float]:
    """`bounds` of a saved student, on the rows of a store that a run of `recipe` with `seed` holds out.

    Args:
        student: folder of a causal language model.
        store: sampled from the student that this one was trained from.
        targets: name of the teacher's answers, kind `sampled`.
    """
    opened = Store.open(store)
    _, unseen = load_data(parse_recipe({**recipe, "seed": seed}, "recipe of this gap"))
    rows = [opened.rows_of(prompt.id)[0] for prompt in unseen]
    found = [opened.row(row) for row in rows]
    answer = Targets.open(opened, targets).answer(rows, [len(row.actions) for row in found])
    assert isinstance(answer, Sampled)
    parts = torch.split(answer.log_probs, [len(row.actions) for row in found])
    language = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    # As everywhere, a distribution is over the leading ids alone, and without those that nobody may write.
    covered = opened.header.covered()
    left_out = torch.zeros(covered.width(language.config.vocab_size), dtype=torch.bool)
    left_out[list(covered.excluded)] = True
    each = [
        update(language, left_out, row.context, row.actions, row.behaviour, log_p)
        for row, log_p in zip(found, parts, strict=True)
    ]
    updates, advantages, ratios = zip(*each, strict=True)
    return bounds(torch.stack(updates), torch.stack(advantages), torch.stack(ratios))


def update(
    language: PreTrainedModel,
    left_out: torch.Tensor,
    context: torch.Tensor,
    actions: torch.Tensor,
    then: torch.Tensor,
    log_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one trajectory says.

    Args:
        left_out: bool `[V]`, which of the leading ids have no probability.
        context, actions: int64 `[P]`, `[T]`.
        then, log_p: float32 `[T]` log-probabilities of the actions, of who wrote them and of the teacher.

    Returns:
        float32 `[weights]`, the sum over t of `A_t grad log q(a_t)`, with A detached; the sum of `|A_t|`; and the
        ratio of the trajectory's probability now to that when it was written.
    """
    weights = [weight for weight in language.parameters() if weight.requires_grad]
    logits = language(input_ids=torch.cat([context, actions])[None]).logits[0, len(context) - 1 : -1]
    compared = logits[:, : len(left_out)].float().masked_fill(left_out, -torch.inf)
    log_q = torch.log_softmax(compared, -1).gather(1, actions[:, None])[:, 0]
    advantage = (log_p - log_q).detach()
    gradient = torch.autograd.grad((advantage * log_q).sum(), weights)
    ratio = (log_q.detach() - then).sum().exp()
    return torch.cat([part.flatten() for part in gradient]), advantage.abs().sum(), ratio


def bounds(updates: torch.Tensor, advantages: torch.Tensor, ratios: torch.Tensor) -> dict[str, float]:
    """The theorem's sides on N trajectories, from their updates `[N, weights]`, the sums of their `|A_t|` `[N]` and
    their ratios `[N]`.

    Returns:
        `gradient_gap`: norm of the covariance of ratio and update, which online less offline is by theorem 3.7;
        `gradient_bound`: `G sigma_A sqrt(chi2)`, where G is the least constant by which the proof's step holds on these
        trajectories, `|f| <= G sum_t |A_t|`; on them the gap is below it by the inequality of Cauchy and Schwarz.
        `gradient_size`: norm of the offline gradient; `chi2`: variance of the ratios. Few trajectories miss the rare
        large ratios, so both sides are too small where the student has gone far.
    """
    centred = ratios - ratios.mean()
    chi2 = centred.square().mean()
    steepest = (updates.norm(dim=1) / advantages.clamp(min=1e-9)).max()
    return {
        "gradient_gap": float((centred[:, None] * updates).mean(0).norm()),
        "gradient_bound": float(steepest * advantages.square().mean().sqrt() * chi2.sqrt()),
        "gradient_size": float(updates.mean(0).norm()),
        "chi2": float(chi2),
    }
