"""Which proposals stand: rules under which a text is distributed as if the target had written it alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from opd.language.engines.sampler import inverse_cdf


class Verdict(NamedTuple):
    """`accepted`, int64 `[B]`, 0 to K: how many proposals of each row stand. `token`, int64 `[B]`: the target's own
    behind them, which corrects the first that does not stand, or follows where all do."""

    accepted: torch.Tensor
    token: torch.Tensor


def agreeing(drawn: torch.Tensor, proposed: torch.Tensor) -> Verdict:
    """For proposals without randomness: they stand as far as they are what the target draws, which is then what it
    would have drawn without them.

    Args:
        drawn: int64 `[B, K + 1]`, draws of the target at each slot and behind the last, given the proposals before.
        proposed: int64 `[B, K]`.
    """
    accepted = (drawn[:, :-1] == proposed).long().cumprod(1).sum(1)
    return Verdict(accepted, drawn.gather(1, accepted[:, None])[:, 0])


def by_ratio(
    p: torch.Tensor, q: torch.Tensor, proposed: torch.Tensor, chances: torch.Tensor, uniforms: torch.Tensor
) -> Verdict:
    """For proposals drawn from q: each stands with probability min(1, p / q); the first that does not is replaced by a
    draw from what p has more than q (Leviathan et al. 2023).

    Args:
        p: float32 `[B, K + 1, V]`, probabilities of the target.
        q: float32 `[B, K, V]`, those that the proposals were drawn from.
        proposed: int64 `[B, K]`.
        chances: float32 `[B, K]`, uniform: whether each stands.
        uniforms: float32 `[B]`, uniform: the token behind them.
    """
    rows, most = torch.arange(len(p), device=p.device), proposed.shape[1]
    of_target, of_drafter = (x[:, :most].gather(2, proposed[:, :, None])[:, :, 0] for x in (p, q))
    accepted = (chances * of_drafter < of_target).long().cumprod(1).sum(1)
    behind = p[rows, accepted]
    taken = q[rows, accepted.clamp(max=most - 1)] * (accepted < most)[:, None]
    rest = (behind - taken).clamp(min=0)
    # Rounding may leave nothing where p and q are equal; then any draw from p is right.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, behind)
    return Verdict(accepted, inverse_cdf(rest.log(), uniforms))
