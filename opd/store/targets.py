"""What one teacher said about the trajectories of a store: sampled tokens, the top K and the tail, or everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from opd.distributions import Categorical, Distribution, Head, Sampled, Spans, TopK, append_tail, spans_in
from opd.errors import DataError, RunError, nearest
from opd.language.engines.base import EncodedPrompt
from opd.store.pictures import by_row, named, packed_pictures, pictures_at, pictures_of
from opd.store.shards import (
    Shard,
    check_of,
    check_shard,
    digest,
    is_written,
    recorded_checksum,
    write_json,
    write_shard,
)
from opd.store.store import Store, VocabularyHeader, damaged, shortened
from opd.trajectories import Trajectories

Kind = Literal["sampled", "top_k", "exact"]

Kept = Literal["sampled", "top_k", "exact", "spans"]
"""What is in a file: `spans` is what `sampled` comes to under a teacher of another tokenizer."""

KINDS: tuple[Kind, ...] = ("sampled", "top_k", "exact")

ANSWERS: dict[str, type[Distribution]] = {"sampled": Sampled, "top_k": TopK, "exact": Categorical, "spans": Spans}
"""The distribution that a stored teacher answers with."""

FIELDS: dict[str, tuple[str, ...]] = {
    "sampled": ("log_probs",),
    "top_k": ("ids", "log_probs", "tail"),
    "exact": ("hidden",),
    "spans": ("log_probs", "marks"),
}
"""Tensors of a shard with an entry a position."""

BEGINS, COMPARED, SINGLE, LEFT_OUT = 1, 2, 4, 8
"""Bits of `marks`: the fields of `Spans`, and a row that the teacher's tokenizer does not give back."""


class TargetsHeader(VocabularyHeader):
    """`targets.json`.

    Attributes:
        kind: `sampled`, `top_k` or `exact`; `spans` of a teacher with another tokenizer than the store's.
        top_k: K, with kind top_k.
        dtype: of the hidden states, with kind exact.
        teacher: name of the teacher's model and hash of its weights.
        sees: column with the teacher's view of a prompt; None is the student's.
        tokenizer: hash of the teacher's, where it is another one than the store's.
        shown: hash of the system text and the examples that the teacher alone saw before it.
        template: hash of the teacher's template.
        processor: hash of the settings by which the teacher read pictures; None where it read text alone.
        images: column with its pictures, where `sees` names none.
        temperature: of the stored log-probabilities; with kind exact of nothing, the head has it.
        scale, softcap: of the head, with kind exact.
        versions: of the software that scored.
    """

    format: Literal[1] = 1
    kind: Kept
    top_k: int | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    teacher: dict[str, str]
    sees: str | None = None
    tokenizer: str | None = None
    shown: str | None = None
    template: str
    processor: str | None = None
    images: str | None = None
    temperature: float
    scale: float = 1.0
    softcap: float | None = None
    versions: dict[str, str]


class Targets:
    """The opened targets of one teacher in a store."""

    def __init__(self, store: Store, path: Path, header: TargetsHeader):
        self.store, self.path, self.header = store, path, header
        self._open: dict[int, Shard] = {}
        self._head: Head | None = None

    @classmethod
    def open(cls, store: Store, name: str | None) -> Targets:
        """Those called `name`; without a name the only ones."""
        folder = store.path / "targets"
        names = sorted(p.parent.name for p in folder.glob("*/targets.json"))
        if not names:
            raise DataError(f"{store.path} holds no targets; opd score {store.path} --recipe RECIPE writes them")
        if name is None and len(names) > 1:
            raise DataError(f"{store.path} holds several targets ({', '.join(names)}); say which: teacher.targets")
        if name is not None and name not in names:
            raise DataError(f"{store.path} has no targets {name!r}{nearest(name, names)}; it has {', '.join(names)}")
        path = folder / (name or names[0])
        try:
            header = TargetsHeader.model_validate_json((path / "targets.json").read_text(encoding="utf-8"))
        except ValidationError as error:
            raise DataError(f"{path / 'targets.json'}: {error.errors()[0]['msg']}") from None
        return cls(store, path, header)

    @classmethod
    def create_or_continue(cls, store: Store, name: str, header: TargetsHeader) -> Targets:
        path = store.path / "targets" / name
        if not (path / "targets.json").is_file():
            write_json(path / "targets.json", header.model_dump())
        found = cls.open(store, name)
        here, wanted = found.header.model_dump(exclude={"versions"}), header.model_dump(exclude={"versions"})
        for key, value in wanted.items():
            if value != here[key]:
                raise RunError(
                    f"{path} was made with another {key} ({shortened(here[key])}, now {shortened(value)}); "
                    "give these targets a name of their own with --name"
                )
        return found

    def shard_path(self, shard: int) -> Path:
        return self.path / f"{shard:06d}.safetensors"

    @property
    def head_path(self) -> Path:
        return self.path / "head.safetensors"

    def missing(self) -> list[int]:
        return [s for s in range(self.store.header.shards) if not is_written(self.shard_path(s))]

    def write(
        self,
        shard: int,
        answer: Distribution,
        trajectories: Trajectories,
        views: Sequence[EncodedPrompt] = (),
        left_out: torch.Tensor | None = None,
    ) -> None:
        """Write a shard from the teacher's answer at the positions of the shard's trajectories.

        Args:
            views: B prompts as the teacher read them, where it reads pictures.
            left_out: bool `[B]`, with kind spans: trajectories that the teacher cannot read.
        """
        fields = self._fields(answer, trajectories)
        if left_out is not None:
            fields["marks"] |= LEFT_OUT * left_out.repeat_interleave(trajectories.lengths).to(torch.uint8)
        pictures: dict[str, torch.Tensor] = {}
        if self.header.processor is not None:
            pairs = zip(trajectories.prompts, views, strict=True)
            pictures = packed_pictures([pictures_of(prompt, view) for prompt, view in pairs])
        lengths = trajectories.lengths.tolist()
        parts = [torch.split(fields[name], lengths) for name in FIELDS[self.header.kind]]
        # A target belongs to the exact row that was scored.
        bound = self.store.shard(shard).tensor("checks").tolist()
        checks = [
            check_of(*seen, *row, before=before)
            for seen, row, before in zip(by_row(pictures, len(bound)), zip(*parts, strict=True), bound, strict=True)
        ]
        tensors = {
            **fields,
            **pictures,
            "lengths": trajectories.lengths.int(),
            "checks": torch.tensor(checks, dtype=torch.int64),
        }
        write_shard(self.shard_path(shard), tensors)

    def _fields(self, answer: Distribution, trajectories: Trajectories) -> dict[str, torch.Tensor]:
        if self.header.kind == "spans":
            spans = spans_in(answer)
            assert spans is not None
            bits = ((spans.begins, BEGINS), (spans.compared, COMPARED), (spans.single, SINGLE))
            marks = torch.stack([field.to(torch.uint8).cpu() * bit for field, bit in bits]).sum(0, dtype=torch.uint8)
            return {"log_probs": spans.log_probs.cpu(), "marks": marks}
        assert isinstance(answer, Categorical | Sampled | TopK)
        if self.header.kind == "sampled":
            return {"log_probs": Sampled.of(answer, trajectories.actions).log_probs.cpu()}
        if self.header.kind == "top_k":
            assert self.header.top_k is not None
            # A server answers with them at once.
            top = TopK.of(answer, self.header.top_k) if isinstance(answer, Categorical) else answer
            assert isinstance(top, TopK)
            log_probs = top.log_probs.float().cpu()
            return {
                "ids": top.ids.int().cpu(),
                "log_probs": log_probs,
                "tail": append_tail(log_probs)[:, -1].clone(memory_format=torch.contiguous_format),
            }
        assert self.header.dtype is not None
        assert isinstance(answer, Categorical)
        return {"hidden": answer.hidden.to(getattr(torch, self.header.dtype)).cpu()}

    def write_head(self, head: Head) -> None:
        """The one copy of the teacher's output head, with kind exact."""
        tensors = {"weight": head.weight}
        if head.bias is not None:
            tensors["bias"] = head.bias
        write_shard(self.head_path, tensors)

    def head(self) -> Head:
        """The stored head on the CPU, at temperature 1 and over the targets' vocabulary."""
        if self._head is None:
            if not is_written(self.head_path):
                raise DataError(f"{self.head_path} is missing; run opd score again")
            check_shard(self.head_path)
            from safetensors.torch import load_file

            found = load_file(self.head_path)
            self._head = Head(
                found["weight"],
                found.get("bias"),
                scale=self.header.scale,
                softcap=self.header.softcap,
                vocabulary=self.header.covered(),
            )
        return self._head

    def answer(self, rows: Sequence[int], lengths: Sequence[int], head: Head | None = None) -> Distribution:
        """The stored distributions at the first `lengths[i]` positions of each row, packed, on the CPU.

        Args:
            rows: the store's row numbers.
            lengths: how many positions of each are wanted.
            head: with kind exact, the head to answer with.

        Raises:
            DataError: for a shard that is missing and for a damaged row, which it names.
        """
        found: dict[str, list[torch.Tensor]] = {name: [] for name in FIELDS[self.header.kind]}
        for row, length in zip(rows, lengths, strict=True):
            values = self._row(row)
            for name, value in (_begun(values, length) if "marks" in values else values).items():
                found[name].append(value[:length])
        packed = {name: torch.cat(parts) for name, parts in found.items()}
        if self.header.kind == "sampled":
            return Sampled(packed["log_probs"])
        if self.header.kind == "spans":
            marks = packed["marks"]
            return Spans(packed["log_probs"], *((marks & bit) != 0 for bit in (BEGINS, COMPARED, SINGLE)))
        if self.header.kind == "top_k":
            return TopK(packed["log_probs"], packed["ids"].long())
        return Categorical(packed["hidden"], head or self.head())

    def left_out(self, rows: Sequence[int]) -> list[bool]:
        """Of each row whether the teacher's tokenizer does not give it back."""
        if self.header.kind != "spans":
            return [False] * len(rows)
        return [bool((self._row(row)["marks"] & LEFT_OUT).any()) for row in rows]

    def pictures(self, row: int) -> tuple[str, ...]:
        """Hashes of the pictures that the teacher saw beside a row, which are not checked."""
        if self.header.processor is None:
            return ()
        shard, place = self._placed(row)
        return named(pictures_at(shard, place))

    def _placed(self, row: int) -> tuple[Shard, int]:
        index, place = self.store.locate(row)
        if index not in self._open:
            path = self.shard_path(index)
            if not is_written(path):
                raise DataError(f"{path} is not written yet; run opd score again, it goes on where it stopped")
            self._open[index] = Shard(path)
        return self._open[index], place

    def _row(self, row: int) -> dict[str, torch.Tensor]:
        shard, place = self._placed(row)
        values = {name: shard.positions(name, place) for name in FIELDS[self.header.kind]}
        check = int(shard.of_rows("checks")[place])
        bound = int(self.store.shard(self.store.locate(row)[0]).of_rows("checks")[place])
        seen = [] if self.header.processor is None else [pictures_at(shard, place)]
        if check_of(*seen, *values.values(), before=bound) != check:
            raise damaged(self.store, row, shard.path, "score")
        return values

    def check(self) -> Iterator[Path]:
        """Every written file after its bytes were checked against its checksum."""
        paths = [self.shard_path(s) for s in range(self.store.header.shards)]
        for path in [*paths, self.head_path]:
            if is_written(path):
                check_shard(path)
                yield path

    def content(self) -> str:
        """`sha256:...` over the checksums of all shards and the head."""
        paths = [self.shard_path(s) for s in range(self.store.header.shards)]
        if self.header.kind == "exact":
            paths.append(self.head_path)
        return digest("\n".join(recorded_checksum(p) for p in paths).encode())


def _begun(values: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The fields of a row in spans, of which `length` positions are wanted: a span that goes beyond them counts not."""
    marks, log_probs = values["marks"].clone(), values["log_probs"].clone()
    if length < len(marks) and bool(marks[length] & COMPARED) and not bool(marks[length] & BEGINS):
        first = int((marks[:length] & BEGINS).nonzero().max()) if length else 0
        marks[first:] &= LEFT_OUT
        log_probs[first:] = 0.0
    return {"log_probs": log_probs, "marks": marks}
