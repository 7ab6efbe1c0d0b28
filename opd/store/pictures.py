"""Pictures of prompts in a shard: by what is in them. They themselves stay where the prompts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from opd.errors import DataError
from opd.language.engines.base import EncodedPrompt, PromptInputs
from opd.prompts import Prompt
from opd.store.shards import Shard

PREFIX = "sha256:"
SHOWN = len(PREFIX) + 12
"""Characters of a hash that messages give."""


def pictures_of(prompt: Prompt, context: EncodedPrompt) -> tuple[str, ...]:
    """Hashes of the pictures in a prompt as it was read; none in one of text.

    Raises:
        DataError: it holds more than text and pictures, which no hash names.
    """
    if not isinstance(context, PromptInputs):
        return ()
    if not context.pictures or any("video" in name for name in context.inputs):
        raise DataError(
            f"{prompt.where}: prompt {prompt.id!r} holds more than text and pictures, and a store knows the content of "
            "these alone; train without a store (rollout: student)"
        )
    return context.pictures


def packed_pictures(pictures: Sequence[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Of B rows the arrays `pictures` uint8 `[F, 32]` and `picture_counts` int32 `[B]` of a shard."""
    hashes = [list(bytes.fromhex(each.removeprefix(PREFIX))) for row in pictures for each in row]
    return {
        "pictures": torch.tensor(hashes, dtype=torch.uint8).reshape(-1, 32),
        "picture_counts": torch.tensor([len(row) for row in pictures], dtype=torch.int32),
    }


def by_row(packed: Mapping[str, torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    """What each of `count` rows has of the arrays: one tensor uint8 `[F_i, 32]`, or nothing where there are no
    arrays."""
    if not packed:
        return [[] for _ in range(count)]
    return [[part] for part in torch.split(packed["pictures"], packed["picture_counts"].tolist())]


def pictures_at(shard: Shard, place: int) -> torch.Tensor:
    """uint8 `[F, 32]`: the hashes of one row's pictures, as bytes."""
    counts = shard.of_rows("picture_counts")
    stop = int(counts[: place + 1].sum())
    return shard.slice("pictures", stop - int(counts[place]), stop)


def named(pictures: torch.Tensor) -> tuple[str, ...]:
    """The hashes as texts."""
    return tuple(PREFIX + bytes(row).hex() for row in pictures.tolist())


def check_pictures(prompt: Prompt, found: Sequence[str], kept: Sequence[str], where: str, whose: str = "") -> None:
    """Compare a prompt's pictures with those that were kept.

    Args:
        where: the row and what keeps it.
        whose: what the pictures are called beside the student's own.

    Raises:
        DataError: another picture, or another number of them; it names the prompt's row and both hashes.
    """
    again = "; put it back, or make the store again"
    if len(found) != len(kept):
        raise DataError(
            f"{prompt.where}: prompt {prompt.id!r} has {len(found)} {whose}pictures and {len(kept)} in {where}{again}"
        )
    for i, (now, then) in enumerate(zip(found, kept, strict=True)):
        if now != then:
            which = f"{whose}picture" + (f" {i + 1}" if len(kept) > 1 else "")
            raise DataError(
                f"{prompt.where}: the {which} of prompt {prompt.id!r} is another than in {where}: its pixels are "
                f"{now[:SHOWN]}, and there {then[:SHOWN]}{again}"
            )
