"""What a reproduction file states: stages, gates, arms, seeds, metrics and claims. It holds no machinery."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any, Literal

from opd.errors import RecipeError, RunError, nearest

Figures = dict[str, Any]
"""What a job returns, as JSON: numbers by name; besides them `curve` (a list of points, each numbers by name) and
`items` (metric to one value per test item, by the item's id)."""

COSTS = ("cpu_seconds", "sampled_tokens", "teacher_tokens")
"""Figures of an arm that say what it took: CPU seconds of its training steps, positions that a model drew, positions
that teachers scored."""

MOST_HEADLINES = 8


@dataclass(frozen=True)
class Stage:
    """One step of an experiment: `function(folder, inputs, **params)` writes into `folder` and returns its figures.

    Attributes:
        function: at the top level of an importable module, so that a process of its own can find it by name.
        params: JSON values for its keyword arguments.
        inputs: names of earlier stages; the function gets their folders by these names.
        per_seed: run once per seed, with the keyword argument `seed`. Arms always do.
        version: raise it when the function's meaning changes: finished jobs are found again by name, version, params
            and inputs, not by source code.
        seeds: run with so many of the reproduction's seeds, the first ones; None is all of them.
    """

    function: Callable[..., Figures]
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    per_seed: bool = False
    version: int = 1
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise RecipeError(f"seeds of {self.address} is {self.seeds}; it is a number of seeds, 1 or more, or None")
        if "<" in self.address:
            raise RecipeError(f"stage function {self.address} is local or a lambda; move it to the top of its module")
        try:
            json.dumps(self.params, allow_nan=False)
        except (TypeError, ValueError) as error:
            problem = f"params of {self.address} are not JSON ({error}); use numbers, text, lists and mappings"
            raise RecipeError(problem) from None

    @property
    def address(self) -> str:
        """`module:name` of the function."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def overridden(self, changes: Mapping[str, Any]) -> Stage:
        return replace(self, params=merged(self.params, changes))


@dataclass(frozen=True)
class Gate:
    """A figure of a stage that must reach a limit before any arm runs, e.g. that the teacher can do the task.

    Attributes:
        worst: every class of the figure must reach the limit, so its worst class decides: the lowest of `at_least`, the
            highest of `at_most`. The figure is then a mapping from class to number, or figures named `FIGURE/CLASS`,
            as evaluation returns them (`accuracy/TASK`). A mean can be high while one class is never right.
    """

    stage: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    worst: bool = False

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise RecipeError(f"gate {self.stage}.{self.figure}: give one of at_least and at_most")

    @property
    def limit(self) -> str:
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"

    def passes(self, value: float) -> bool:
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)

    def measured(self, job: str, figures: Figures) -> tuple[float, str]:
        """The number that is held against the limit, and its class (empty where the figure has none).

        Raises:
            RunError: the job returned no such figure, or one by class without `worst`, or the other way round.
        """
        found = figures.get(self.figure)
        if not self.worst:
            if isinstance(found, int | float) and _is_number(found):
                return float(found), ""
            by_class = "; it is by class: set worst=True" if isinstance(found, Mapping) else ""
            raise RunError(f"gate: {job} has no number {self.figure!r}{by_class}; it returned {', '.join(figures)}")
        prefix = f"{self.figure}/"
        classes = (
            found
            if isinstance(found, Mapping)
            else {n.removeprefix(prefix): v for n, v in figures.items() if n.startswith(prefix)}
        )
        if not classes or not all(map(_is_number, classes.values())):
            raise RunError(f"gate: {job} has no numbers of {self.figure!r} by class; it returned {', '.join(figures)}")
        # A class without a number is worse than any.
        sign = 1.0 if self.at_least is not None else -1.0
        name = min(classes, key=lambda one: (not isnan(classes[one]), sign * classes[one]))
        return float(classes[name]), str(name)


@dataclass(frozen=True)
class Claim:
    """What is to be decided: how `method` compares with `baseline` on a metric. The verdict is computed.

    What holds by definition is no claim, such as that fewer steps take fewer tokens: it belongs in the prose.

    Attributes:
        id: `main` for the first of the headline claims.
        test: of the paired difference, signed so that positive favours `method`. `better`: reproduced when its whole
            95 % interval lies above `margin`, contradicted when all of it lies below. `equivalent`: reproduced when
            its whole 90 % interval lies inside plus or minus `margin`, contradicted when all of it lies outside.
            Otherwise undecided.
        margin: in the metric's units.
        note: shown beside the verdict.
        testable: False for a claim that cannot be tested here; `note` then says why, and no arm is needed.
    """

    id: str
    statement: str
    metric: str = ""
    better: Literal["higher", "lower"] = "higher"
    method: str = ""
    baseline: str = ""
    test: Literal["better", "equivalent"] = "better"
    margin: float = 0.0
    note: str = ""
    testable: bool = True

    def __post_init__(self) -> None:
        if self.testable and not (self.metric and self.method and self.baseline):
            raise RecipeError(f"claim {self.id!r} needs metric, method and baseline, or testable=False and a note")
        if not self.testable and not self.note:
            raise RecipeError(f"claim {self.id!r} is declared not testable here; say why in its note")
        if self.test == "equivalent" and self.testable and self.margin <= 0:
            raise RecipeError(f"claim {self.id!r} tests equivalence and needs a margin above 0")


@dataclass(frozen=True)
class Smoke:
    """Overrides for a run of under two minutes, of the arms that headline claims compare: params of stages by name,
    params of all arms, and the seeds."""

    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arms: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)


@dataclass(frozen=True)
class Reproduction:
    """One system's experiment.

    Attributes:
        title, introduction, discussion: Markdown of its page: its heading, what is tested and how, why it came out so.
        stages: by name, each after those that it takes as inputs.
        arms: by name, the controls too; each returns the metrics, and what it cost under the names in `COSTS`.
        seeds: each arm runs once for each, or for the first few (`Stage.seeds`); values of two arms with the same seed
            form a pair.
        imports: modules that jobs use besides those of `opd` itself: they are imported once instead of once a job.
        metrics: figures of the arms to show, the claims' metrics among them. An arm must return those that a claim
            compares it on; what it does not return of the others stays empty.
        claims: all that are decided; those that are not headline claims stand in the page's appendix.
        headline: ids of the claims that the page leads with, at most eight, `main` among them. They are held to 5 %
            together. Declare them before the run: the page says when they were chosen after it.
    """

    title: str
    introduction: str
    discussion: str
    stages: Mapping[str, Stage]
    arms: Mapping[str, Stage]
    seeds: Sequence[int]
    metrics: Sequence[str]
    claims: Sequence[Claim]
    headline: Sequence[str] = ("main",)
    gates: Sequence[Gate] = ()
    imports: Sequence[str] = ()
    smoke: Smoke = field(default_factory=Smoke)

    def __post_init__(self) -> None:
        known: list[str] = []
        for name, stage in [*self.stages.items(), *((f"arm {name}", arm) for name, arm in self.arms.items())]:
            for wanted in stage.inputs:
                _check(wanted, known, f"{name} takes the input", "an earlier stage")
                if self.stages[wanted].per_seed and name in self.stages and not stage.per_seed:
                    raise RecipeError(f"stage {name!r} takes {wanted!r}, which is per seed; make it per_seed too")
                few = self.stages[wanted].seeds if self.stages[wanted].per_seed else None
                if few is not None and (stage.seeds is None or stage.seeds > few):
                    raise RecipeError(f"{name} takes {wanted!r}, which runs with {few} seeds only; set seeds={few}")
            if name in self.stages:
                known.append(name)
        for gate in self.gates:
            _check(gate.stage, known, "a gate names the stage", "a stage")
        for name in self.smoke.stages:
            _check(name, known, "smoke overrides", "a stage")
        ids = [claim.id for claim in self.claims]
        if ids.count("main") != 1:
            raise RecipeError("a reproduction has exactly one claim with the id 'main'")
        if twice := [name for name in ids if ids.count(name) > 1]:
            raise RecipeError(f"two claims have the id {twice[0]!r}; give each its own")
        for name in self.headline:
            _check(name, ids, "headline names", "the id of a claim")
        if "main" not in self.headline or len(set(self.headline)) < len(self.headline):
            raise RecipeError("headline holds 'main' and each id once")
        if len(self.headline) > MOST_HEADLINES:
            raise RecipeError(
                f"headline names {len(self.headline)} claims and may name {MOST_HEADLINES}; leave the rest to the "
                "appendix"
            )
        for claim in (claim for claim in self.claims if claim.testable):
            for arm in (claim.method, claim.baseline):
                _check(arm, self.arms, f"claim {claim.id!r} compares", "an arm")
            _check(claim.metric, self.metrics, f"claim {claim.id!r} is about", "one of metrics")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RecipeError("seeds must be at least one and all different")

    def smoked(self) -> Reproduction:
        """What the headline claims and the gates need of this experiment, with the smoke overrides."""
        claims = [claim for claim in self.claims if claim.id in self.headline]
        compared = {name for claim in claims if claim.testable for name in (claim.method, claim.baseline)}
        arms = {n: arm.overridden(self.smoke.arms) for n, arm in self.arms.items() if n in compared or not compared}
        needed = {gate.stage for gate in self.gates} | {name for arm in arms.values() for name in arm.inputs}
        for name, stage in reversed(list(self.stages.items())):
            needed |= set(stage.inputs) if name in needed else set()
        stages = {n: s.overridden(self.smoke.stages.get(n, {})) for n, s in self.stages.items() if n in needed}
        # A figure that only left-out claims are about may be one of left-out arms alone.
        left = {claim.metric for claim in self.claims if claim.testable} - {c.metric for c in claims if c.testable}
        metrics = [metric for metric in self.metrics if metric not in left]
        return replace(
            self, stages=stages, arms=arms, claims=claims, metrics=metrics, seeds=self.smoke.seeds, smoke=Smoke()
        )


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`; mappings are merged, everything else is replaced."""
    found = dict(values)
    for key, value in changes.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(name: str, accepted: Sequence[str] | Mapping[str, Any], what: str, kind: str) -> None:
    if name not in accepted:
        raise RecipeError(
            f"{what} {name!r}, which is not {kind}{nearest(name, accepted)}; known: {', '.join(accepted)}"
        )
