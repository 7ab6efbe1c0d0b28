"""Where blocks are placed in a text that is written already. Places are counted from the first token of a response, and
the last token is no anchor: nothing stands behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def walked(agreed: Sequence[int]) -> list[int]:
    """The anchors of speculative decoding that writes this text, each behind what stood and the target's own token.

    Args:
        agreed: at each place, how many proposals of the block there are the text's next tokens.
    """
    found, at = [], 0
    while at < len(agreed):
        found.append(at)
        at += agreed[at] + 1
    return found


def uniform(places: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` of so many places, or all where there are fewer, ascending; each set of them is as likely."""
    return sorted(torch.randperm(places, generator=generator)[:count].tolist())


def shuffled(lengths: Sequence[int], places: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Segments in another order and at random anchors, so that no two cover one token: a segment of length n covers the
    n tokens behind its anchor.

    Args:
        lengths: of M segments; their sum is at most `places`.
        places: tokens that can be covered, those behind the first.

    Returns:
        M anchors, ascending, and which segment each is now that of.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    free = places - sum(lengths)
    # Which of `free` empty tokens and M segments in a line are segments: each line is as likely.
    line = sorted(torch.randperm(free + len(lengths), generator=generator)[: len(lengths)].tolist())
    anchors, covered = [], 0
    for i, (place, segment) in enumerate(zip(line, order, strict=True)):
        anchors.append(place - i + covered)
        covered += lengths[segment]
    return anchors, order
