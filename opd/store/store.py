"""A store of trajectories: who wrote them and how, and their exact ids.

A row's place follows from the header alone: row `(draw * prompts + prompt) * group + member` lies in shard
`draw * shards_per_draw + prompt // prompts_per_shard`. So workers agree without talking, and a further draw is appended
without touching what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationError

from opd.choice import Settings
from opd.distributions import Vocabulary
from opd.errors import DataError, IncompatibleError, RunError
from opd.language.engines.base import EncodedPrompt, Engine, ids_of
from opd.prompts import Prompt
from opd.store.pictures import SHOWN, by_row, check_pictures, named, packed_pictures, pictures_at, pictures_of
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
from opd.trajectories import Author, Trajectories


class VocabularyHeader(Settings):
    """Part of a header: the ids that log-probabilities are over.

    Attributes:
        vocabulary: number of leading ids; None with a slice.
        excluded: ids before it that are left out.
        ids: the ids of a slice, or None.
    """

    names_things: ClassVar[bool] = False

    vocabulary: int | None
    excluded: list[int] = Field([])
    ids: list[int] | None = None

    @staticmethod
    def of(vocabulary: Vocabulary) -> dict[str, Any]:
        """The fields of this part."""
        ids = None if vocabulary.ids is None else list(vocabulary.ids)
        return {"vocabulary": vocabulary.size, "excluded": list(vocabulary.excluded), "ids": ids}

    def covered(self) -> Vocabulary:
        """The fields as one."""
        return Vocabulary(self.vocabulary, tuple(self.excluded), None if self.ids is None else tuple(self.ids))


class StoreHeader(VocabularyHeader):
    """`store.json`.

    Attributes:
        prompts: P, prompts in `prompts.json`.
        group: G, trajectories of each prompt in one draw.
        draws: how often all prompts were, or are being, rolled out.
        prompts_per_shard: prompts whose trajectories share a shard.
        prompts_hash: of `prompts.json`.
        rollout: settings of the rollout, as in the recipe.
        temperature, seed, budget: of the sampling; `budget` in tokens.
        authors: who may have chosen an action.
        student: name of the student's model and hash of its weights.
        writers: names and hashes of the teachers that wrote in it.
        tokenizer, template: hashes of the student's.
        processor: hash of the settings by which the student reads pictures; None where it reads text alone.
        end_ids: ids that end a completion.
        versions: of the software that made the store.
    """

    format: Literal[1] = 1
    prompts: int = Field(ge=1)
    group: int = Field(ge=1)
    draws: int = Field(ge=1)
    prompts_per_shard: int = Field(ge=1)
    prompts_hash: str
    rollout: dict[str, Any]
    temperature: float
    seed: int
    budget: int
    authors: list[Author]
    student: dict[str, str]
    writers: list[dict[str, str]]
    tokenizer: str
    template: str
    processor: str | None = None
    end_ids: list[int]
    versions: dict[str, str]

    @property
    def shards_per_draw(self) -> int:
        return -(-self.prompts // self.prompts_per_shard)

    @property
    def shards(self) -> int:
        return self.draws * self.shards_per_draw

    @property
    def rows(self) -> int:
        return self.draws * self.prompts * self.group

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError:
            raise DataError(f"no store at {path.parent}: opd rollout RECIPE --out {path.parent} makes one") from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"{path}: {key}: {first['msg']}; this is no store that this version of opd reads") from None


NO_IDENTITY = {"draws", "versions"}
"""What may differ between the header of a store and that of a job that goes on with it."""


@dataclass(frozen=True)
class Row:
    """One stored trajectory: int64 `context` `[P]` and `actions` `[T]`, `behaviour` float32 `[T]`, `authors` uint8
    `[T]`, whether it ended by itself, the checksum that targets are bound to, and the hashes of the prompt's
    pictures."""

    context: torch.Tensor
    actions: torch.Tensor
    behaviour: torch.Tensor
    authors: torch.Tensor
    finished: bool
    check: int
    pictures: tuple[str, ...] = ()


class Store:
    """An opened store. Shards are opened when first read."""

    def __init__(self, path: Path, header: StoreHeader, prompt_ids: Sequence[str]):
        self.path, self.header, self.prompt_ids = path, header, prompt_ids
        self.index = {name: i for i, name in enumerate(prompt_ids)}
        self._open: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        path = Path(path)
        header = StoreHeader.read(path / "store.json")
        text = (path / "prompts.json").read_bytes()
        if digest(text) != header.prompts_hash:
            raise DataError(f"{path / 'prompts.json'} is not the list of prompts that this store was made from")
        return cls(path, header, json.loads(text))

    @classmethod
    def create_or_continue(cls, path: str | Path, header: StoreHeader, prompt_ids: Sequence[str]) -> Store:
        """Make the store, or go on with one that the same settings began; more draws than it has are appended."""
        path = Path(path)
        header = header.model_copy(update={"prompts_hash": digest(_prompts_text(prompt_ids))})
        if not (path / "store.json").is_file():
            if path.is_dir() and any(not p.name.startswith(".") and p.name != "prompts.json" for p in path.iterdir()):
                raise RunError(f"{path} holds something that is no store; choose another place with --out")
            write_json(path / "prompts.json", list(prompt_ids))
            write_json(path / "store.json", header.model_dump())
            return cls.open(path)
        store = cls.open(path)
        here, wanted = store.header.model_dump(exclude=NO_IDENTITY), header.model_dump(exclude=NO_IDENTITY)
        different = [key for key in wanted if wanted[key] != here[key]]
        if different:
            key = different[0]
            raise RunError(
                f"{path} was made with another {key} ({shortened(here[key])}, now {shortened(wanted[key])}); "
                "give this recipe a store of its own with --out"
            )
        if header.draws > store.header.draws:
            write_json(path / "store.json", {**store.header.model_dump(), "draws": header.draws})
            return cls.open(path)
        return store

    # -- where things are ------------------------------------------------------------------------------------------

    def shard_path(self, shard: int) -> Path:
        return self.path / "rollouts" / f"{shard:06d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [s for s in range(self.header.shards) if not is_written(self.shard_path(s))]

    def part(self, shard: int) -> tuple[int, list[str]]:
        """`(draw, prompt ids)` of a shard."""
        draw, place = divmod(shard, self.header.shards_per_draw)
        first = place * self.header.prompts_per_shard
        return draw, list(self.prompt_ids[first : first + self.header.prompts_per_shard])

    def locate(self, row: int) -> tuple[int, int]:
        """`(shard, place in it)` of a row."""
        head = self.header
        rest, member = divmod(row, head.group)
        draw, prompt = divmod(rest, head.prompts)
        shard, place = divmod(prompt, head.prompts_per_shard)
        return draw * head.shards_per_draw + shard, place * head.group + member

    def rows_of_shard(self, shard: int) -> range:
        draw, place = divmod(shard, self.header.shards_per_draw)
        count = len(self.part(shard)[1]) * self.header.group
        first = (draw * self.header.prompts + place * self.header.prompts_per_shard) * self.header.group
        return range(first, first + count)

    def rows_of(self, prompt_id: str) -> list[int]:
        """All rows of a prompt, draw after draw."""
        head, prompt = self.header, self.index[prompt_id]
        return [
            (draw * head.prompts + prompt) * head.group + member
            for draw in range(head.draws)
            for member in range(head.group)
        ]

    def name(self, row: int) -> str:
        """How messages call a row."""
        prompt = row // self.header.group % self.header.prompts
        return f"row {row} (prompt {self.prompt_ids[prompt]!r})"

    # -- writing and reading ---------------------------------------------------------------------------------------

    def write(self, shard: int, trajectories: Trajectories) -> None:
        """Write one shard from the trajectories of its prompts, in order."""
        contexts = [torch.as_tensor(ids_of(c)).int().cpu() for c in trajectories.contexts]
        pictures = self._pictures(trajectories)
        lengths = trajectories.lengths.tolist()
        packed = {
            "actions": trajectories.actions.int(),
            "behaviour_log_probs": trajectories.behaviour_log_probs.float(),
            "authors": trajectories.authors,
        }
        packed = {name: value.cpu() for name, value in packed.items()}
        parts = [torch.split(value, lengths) for value in packed.values()]
        finished = trajectories.finished.to(torch.uint8).cpu()
        checks = [
            check_of(context, *seen, *row, finished[i : i + 1])
            for i, (context, seen, row) in enumerate(
                zip(contexts, by_row(pictures, len(contexts)), zip(*parts, strict=True), strict=True)
            )
        ]
        tensors = {
            **packed,
            "lengths": trajectories.lengths.int(),
            "contexts": torch.cat(contexts),
            "context_lengths": torch.tensor([len(c) for c in contexts], dtype=torch.int32),
            "finished": finished,
            "checks": torch.tensor(checks, dtype=torch.int64),
            **pictures,
        }
        write_shard(self.shard_path(shard), tensors)

    def _pictures(self, trajectories: Trajectories) -> dict[str, torch.Tensor]:
        """Arrays of a shard that say what the prompts' pictures are; none where the student reads text alone."""
        if self.header.processor is None:
            return {}
        pairs = zip(trajectories.prompts, trajectories.contexts, strict=True)
        return packed_pictures([pictures_of(prompt, context) for prompt, context in pairs])

    def shard(self, shard: int) -> Shard:
        """An open shard; raises `DataError` when it is missing."""
        if shard not in self._open:
            path = self.shard_path(shard)
            if not is_written(path):
                raise DataError(f"{path} is not written yet; run opd rollout again, it goes on where it stopped")
            self._open[shard] = Shard(path)
        return self._open[shard]

    def row(self, row: int) -> Row:
        """Read and check one row; raises `DataError` that names it when its checksum does not match."""
        index, place = self.locate(row)
        shard = self.shard(index)
        stop = int(shard.of_rows("context_lengths")[: place + 1].sum())
        context = shard.slice("contexts", stop - int(shard.of_rows("context_lengths")[place]), stop)
        packed = [shard.positions(name, place) for name in ("actions", "behaviour_log_probs", "authors")]
        finished = shard.of_rows("finished")[place : place + 1]
        check = int(shard.of_rows("checks")[place])
        pictures = [] if self.header.processor is None else [pictures_at(shard, place)]
        if check_of(context, *pictures, *packed, finished) != check:
            raise damaged(self, row, shard.path, "rollout")
        seen = named(pictures[0]) if pictures else ()
        return Row(context.long(), packed[0].long(), packed[1], packed[2], bool(finished), check, seen)

    def actions(self, row: int) -> torch.Tensor:
        """int64 `[T]` actions of one row, which are not checked."""
        index, place = self.locate(row)
        return self.shard(index).positions("actions", place).long()

    def trajectories(
        self,
        rows: Sequence[int],
        prompts: Sequence[Prompt],
        device: torch.device,
        budget: int | None = None,
        reader: Engine | None = None,
    ) -> Trajectories:
        """Stored rows as trajectories on `device`, each cut to `budget` actions.

        Args:
            rows: B row numbers; rows of one prompt that stand next to each other are a group.
            prompts: B prompts, those of the rows.
            reader: the student's, by which prompts with pictures are read again; not asked in a store of texts.

        Raises:
            DataError: a row is damaged, or its prompt reads otherwise than when it was written.
        """
        found = [self.row(row) for row in rows]
        contexts: list[EncodedPrompt] = [row.context for row in found]
        if self.header.processor is not None:
            if reader is None:
                raise DataError(f"{self.path} keeps no pictures: its rows are read with the student's processor")
            contexts = [reader.encode(prompt) for prompt in prompts]
            for number, row, prompt, context in zip(rows, found, prompts, contexts, strict=True):
                self._check_read(number, row, prompt, context)
        numbers = torch.tensor([self.index[prompt.id] for prompt in prompts])
        return Trajectories(
            prompts=list(prompts),
            contexts=contexts,
            actions=torch.cat([row.actions[:budget] for row in found]).to(device),
            lengths=torch.tensor([len(row.actions[:budget]) for row in found]),
            behaviour_log_probs=torch.cat([row.behaviour[:budget] for row in found]).to(device),
            finished=torch.tensor([row.finished and len(row.actions[:budget]) == len(row.actions) for row in found]),
            learn=torch.ones(sum(len(row.actions[:budget]) for row in found), dtype=torch.bool, device=device),
            authors=torch.cat([row.authors[:budget] for row in found]).to(device),
            groups=torch.unique_consecutive(numbers, return_inverse=True)[1],
            stored=torch.tensor(list(rows)),
        )

    def check_reader(self, reader: Engine) -> None:
        """Raise `IncompatibleError` when a student's reader makes other inputs of pictures than the store's did."""
        kept, mine = self.header.processor, reader.processor_hash
        if kept == mine:
            return
        refuse = f"the store {self.path} was made with"
        if kept is None:
            raise IncompatibleError(f"{refuse} a student of text, and this one reads pictures; sample one with it")
        if mine is None:
            raise IncompatibleError(f"{refuse} a student that reads pictures; take student.kind image_text")
        raise IncompatibleError(
            f"{refuse} another processor of pictures ({kept[:SHOWN]}, now {mine[:SHOWN]}); take the student that "
            "sampled it, with its preprocessor_config.json"
        )

    def check_prompt(self, prompt: Prompt, context: EncodedPrompt) -> None:
        """Raise `DataError` when a prompt reads otherwise than in some draw, as far as the store is written."""
        # A draw reads it once for its whole group.
        for row in self.rows_of(prompt.id)[:: self.header.group]:
            if is_written(self.shard_path(self.locate(row)[0])):
                self._check_read(row, self.row(row), prompt, context)

    def _check_read(self, number: int, row: Row, prompt: Prompt, context: EncodedPrompt) -> None:
        if self.header.processor is not None:
            where = f"{self.path}, row {number}"
            check_pictures(prompt, pictures_of(prompt, context), row.pictures, where)
        if not torch.equal(row.context, ids_of(context)):
            raise DataError(
                f"{prompt.where}: prompt {prompt.id!r} has other tokens than in {self.path}; its text or the template "
                "changed since"
            )

    def check(self) -> Iterator[Path]:
        """Every written shard after its bytes were checked against its checksum."""
        for shard in range(self.header.shards):
            path = self.shard_path(shard)
            if is_written(path):
                check_shard(path)
                yield path

    def content(self) -> str:
        """`sha256:...` over the prompts and the checksums of all shards: equal for stores that hold the same."""
        lines = [self.header.prompts_hash]
        lines += [recorded_checksum(self.shard_path(s)) for s in range(self.header.shards)]
        return digest("\n".join(lines).encode())


def damaged(store: Store, row: int, path: Path, command: str) -> DataError:
    """The error for a row whose checksum does not match."""
    return DataError(
        f"{path}: {store.name(row)} is damaged, its checksum does not match; delete the file and run opd {command} "
        "again"
    )


def _prompts_text(prompt_ids: Sequence[str]) -> bytes:
    return (json.dumps(list(prompt_ids), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
