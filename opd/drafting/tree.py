"""Trees of proposals: how they grow, what their nodes see, and which line of one the target keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from opd.distributions import Head
from opd.drafting.base import Drafter, Embed, Pair
from opd.drafting.proposing import Tree


@dataclass(frozen=True)
class Grown:
    """A tree of n nodes in each of B rows. The anchor is node 0, parents stand before their children, and children of
    one parent in the order of their likelihood, no token twice.

    Attributes:
        tokens: int64 `[B, n]`.
        parents: int64 `[B, n]`, places in the row; the anchor's is its own.
        depths: int64 `[B, n]`, 0 of the anchor.
        log_q: float32 `[B, n]`, the drafter's log-probability of each token behind its parent, at a temperature of 1;
            0 of the anchor.
        deepest: K, the depth of the line of likeliest children.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    log_q: torch.Tensor
    deepest: int

    def seen(self) -> torch.Tensor:
        """bool `[B, n, n]`: which nodes each one sees, itself and those that it stands behind."""
        count = self.tokens.shape[1]
        at = torch.arange(count, device=self.tokens.device).expand_as(self.tokens)
        found = torch.zeros(len(at), count, count, dtype=torch.bool, device=at.device)
        for _ in range(self.deepest + 1):
            found.scatter_(2, at[:, :, None], True)
            at = self.parents.gather(1, at)
        return found


class Line(NamedTuple):
    """What is kept of a tree: the nodes of which the target wrote the tokens, then what the drafter finds likeliest
    behind the last of them, as far as the tree goes.

    `nodes`, int64 `[B, K + 1]`, the anchor first; behind a line's end its last one again. `sizes`, int64 `[B]`, its
    nodes without the anchor. `accepted`, int64 `[B]`, how many of them stand.
    """

    nodes: torch.Tensor
    sizes: torch.Tensor
    accepted: torch.Tensor


def grow(
    drafter: Drafter,
    tree: Tree,
    head: Head,
    kept: Sequence[Pair],
    before: torch.Tensor,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    depth: int,
    embed: Embed,
) -> Grown:
    """The trees of B rows, each of as many nodes as `tree` has at most, if the drafter has so many ids.

    Args:
        head: the drafter's, at a temperature of 1.
        kept, before, tokens, anchors, embed: as `Drafter.branch`, of one block a row: `[B, 1, F]`, `[B, 1]`, `[B, 1]`.
        depth: K.
    """
    rows = len(tokens)
    nothing = torch.zeros(rows, 1, device=tokens.device)
    found, parents, depths, log_q, ranks = [tokens], [torch.zeros_like(tokens)], [0], [nothing], [nothing + math.inf]
    # Of the nodes that have children: where they stand, and the sum of the log-probabilities on the way to each.
    going, so_far = torch.zeros_like(tokens), nothing

    def choose(k: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal going, so_far
        here = head.logits(hidden.flatten(0, 1)).log_softmax(-1).unflatten(0, hidden.shape[:2])
        each = min(tree.width, here.shape[2] - (0 if head.excluded is None else len(head.excluded)))
        # Of equals a line has the first, as `chosen` has, and so does the target that it is to agree with.
        first = here.argmax(-1, keepdim=True)
        others = here.scatter(2, first, -math.inf).topk(each - 1, dim=-1)
        values = torch.cat([here.gather(2, first), others.values], 2)
        total = (so_far[:, :, None] + values).nan_to_num(nan=-math.inf, neginf=-math.inf).flatten(1)
        ids = head.vocabulary.named(torch.cat([first, others.indices], 2)).flatten(1)
        # The line of likeliest children goes on and stays, whatever else is likely; it is the first at each depth.
        rank = total.clone()
        rank[:, 0] = math.inf
        offset = sum(level.shape[1] for level in found)
        found.append(ids)
        parents.append(going.repeat_interleave(each, dim=1))
        depths.extend([k] * ids.shape[1])
        log_q.append(values.flatten(1))
        ranks.append(rank)
        on = rank.topk(min(tree.width, rank.shape[1]), dim=1).indices
        going, so_far = on + offset, total.gather(1, on)
        return ids.gather(1, on), on // each

    drafter.branch(kept, before, tokens, anchors, depth, choose, embed)
    # No child is likelier than its parent, and of equals the one that stands first is kept: no child without it.
    order = torch.cat(ranks, 1).sort(dim=1, descending=True, stable=True).indices
    keep = order[:, : tree.nodes + 1].sort(dim=1).values
    above = torch.searchsorted(keep, torch.cat(parents, 1).gather(1, keep))
    all_depths = torch.tensor(depths, device=tokens.device).expand(rows, -1)
    return Grown(
        torch.cat(found, 1).gather(1, keep),
        above,
        all_depths.gather(1, keep),
        torch.cat(log_q, 1).gather(1, keep),
        depth,
    )


def followed(grown: Grown, drawn: torch.Tensor) -> Line:
    """The line that the target's own draws take through a tree.

    A node's children are tried in order: each is accepted with the probability that is left for it when those before
    are out, and where none is, a token is drawn from what is left of all. That is one draw from the whole distribution
    that either is a child or is not, so that it is made once, and a text does not depend on what was proposed.

    Args:
        drawn: int64 `[B, n]`, what the target draws behind each node.
    """
    nobody = torch.arange(grown.tokens.shape[1], device=drawn.device) == 0
    at = torch.zeros_like(drawn[:, :1])
    accepting = torch.ones_like(at, dtype=torch.bool)
    nodes, stood, held = [at], list[torch.Tensor](), list[torch.Tensor]()
    for _ in range(grown.deepest):
        children = (grown.parents == at) & ~nobody
        right = children & (grown.tokens == drawn.gather(1, at))
        accepting = accepting & right.any(1, keepdim=True)
        # Of several the first, which is the likeliest.
        following = torch.where(accepting, right, children).byte().argmax(1, keepdim=True)
        held.append(children.any(1))
        at = torch.where(held[-1][:, None], following, at)
        nodes.append(at)
        stood.append(accepting[:, 0])
    return Line(torch.cat(nodes, 1), torch.stack(held, 1).sum(1), torch.stack(stood, 1).sum(1))
