"""Jobs: an experiment as a graph whose finished nodes are found again by what they are."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from opd.reproductions.definition import Figures, Reproduction, Stage


def source_of(function: str) -> str | None:
    """Hash of the file that a job's `module:name` lies in, once that is imported; None of what comes with opd."""
    module = sys.modules.get(function.partition(":")[0])
    file = getattr(module, "__file__", None)
    if file is None or function.startswith("opd."):
        return None
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=10).hexdigest()


@dataclass(frozen=True, eq=False)
class Job:
    """One stage or one arm with one seed. `key` is all that its result depends on; `name` is for people."""

    name: str
    function: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, Job] = field(repr=False)

    @cached_property
    def key(self) -> str:
        """Hash of the function's address and version, the params and the inputs' keys; also the name of its folder."""
        content = {
            "function": self.function,
            "version": self.version,
            "params": self.params,
            "inputs": {name: job.key for name, job in self.inputs.items()},
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
        return f"{self.function.rpartition(':')[2]}-{digest}"

    def with_inputs(self) -> list[Job]:
        """Everything that it needs and itself, inputs first."""
        return list(dict.fromkeys([*(j for job in self.inputs.values() for j in job.with_inputs()), self]))

    def record(self, cache: Path) -> dict[str, Any] | None:
        """What its `job.json` holds once it is finished."""
        try:
            found: dict[str, Any] = json.loads((cache / self.key / "job.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def figures(self, cache: Path) -> Figures | None:
        record = self.record(cache)
        return None if record is None else record["figures"]


@dataclass(frozen=True)
class Graph:
    """The jobs of a reproduction: of each stage one, or one per seed; of each arm one per seed, in order of seeds. A
    stage or arm with fewer seeds has those of the first."""

    stages: dict[str, list[Job]]
    arms: dict[str, list[Job]]

    def jobs(self, arm: str | None = None) -> list[Job]:
        """All jobs, or those that one arm needs; inputs before what takes them, each key once."""
        stages = [job for jobs in self.stages.values() for job in jobs] if arm is None else []
        runs = [job for name, jobs in self.arms.items() if arm in (None, name) for job in jobs]
        found: dict[str, Job] = {}
        for job in (needed for wanted in [*stages, *runs] for needed in wanted.with_inputs()):
            found.setdefault(job.key, job)
        return list(found.values())


def graph(reproduction: Reproduction) -> Graph:
    """Build the jobs of a reproduction (of `reproduction.smoked()` for the smoke profile)."""
    stages: dict[str, list[Job]] = {}

    def of_seed(stage: Stage, name: str, index: int) -> Job:
        seed = reproduction.seeds[index]
        inputs = {n: stages[n][index if reproduction.stages[n].per_seed else 0] for n in stage.inputs}
        return Job(f"{name} (seed {seed})", stage.address, stage.version, {**stage.params, "seed": seed}, inputs)

    def of_seeds(stage: Stage, name: str) -> list[Job]:
        return [of_seed(stage, name, i) for i in range(len(reproduction.seeds[: stage.seeds]))]

    for name, stage in reproduction.stages.items():
        if stage.per_seed:
            stages[name] = of_seeds(stage, name)
        else:
            inputs = {n: stages[n][0] for n in stage.inputs}
            stages[name] = [Job(name, stage.address, stage.version, dict(stage.params), inputs)]
    return Graph(stages, {name: of_seeds(stage, name) for name, stage in reproduction.arms.items()})
