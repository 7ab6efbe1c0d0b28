"""The command: run what is missing, then write results and page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from opd.errors import RunError, nearest
from opd.reproductions.catalogue import Entry, docs_folder, shipped
from opd.reproductions.definition import Figures
from opd.reproductions.jobs import Job, graph
from opd.reproductions.page import with_verdicts, write_page
from opd.reproductions.results import collect, judged, read, write
from opd.reproductions.runner import run_jobs
from opd.reproductions.verdicts import CONVENTIONS


@dataclass(frozen=True)
class Done:
    """What a call came to.

    Attributes:
        results: what was written, or None when something failed, a gate closed or arms are missing.
        problems: one line for every failed job and closed gate; the console has had them already.
        missing: names of jobs that results.json still needs.
    """

    results: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def reproduce(
    entry: Entry, *, smoke: bool = False, arm: str | None = None, workers: int = 2, console: Console | None = None
) -> Done:
    """Run the missing jobs of a reproduction, of one arm or of all; when all arms are there, write what they say.

    The full profile writes results.json and the page; the smoke profile writes smoke-results.json in the cache, and its
    gates are printed but let everything pass, since stages of a few steps teach nothing.

    Raises:
        OpdError: an unknown arm, figures that a claim needs and an arm does not return, another command at work.
    """
    reproduction = entry.reproduction.smoked() if smoke else entry.reproduction
    if arm is not None and arm not in reproduction.arms:
        raise RunError(f"no arm {arm!r}{nearest(arm, reproduction.arms)}; arms: {', '.join(reproduction.arms)}")
    console = console or Console(stderr=True)
    found = graph(reproduction)
    jobs = found.jobs(arm)
    keys = {job.key for job in jobs}
    gates = [(gate, job) for gate in reproduction.gates for job in found.stages[gate.stage] if job.key in keys]

    def check(job: Job, figures: Figures) -> str | None:
        for gate, stage in gates:
            if stage.key != job.key:
                continue
            value, name = gate.measured(job.name, figures)
            if not gate.passes(value):
                where = f" at worst ({name})" if gate.worst else ""
                said = f"gate: {gate.figure} of {job.name} is {value:g}{where} and must be {gate.limit}"
                console.print(f"{said}; smoke goes on" if smoke else said, highlight=False, markup=False)
                return None if smoke else said
        return None

    gated = [job for _, job in gates]
    outcome = run_jobs(
        jobs, entry.cache, entry.file.parent, workers, console, check, gated, imports=reproduction.imports
    )
    problems = [f"{name}: {reason}" for name, reason in outcome.failed.items()]
    problems += [outcome.closed] if outcome.closed else []
    missing = [job.name for job in found.jobs() if job.record(entry.cache) is None]
    if problems or missing:
        return Done(problems=problems, missing=missing)
    results = collect(entry, reproduction, found, smoke)
    write(results, entry.smoke_results if smoke else entry.results)
    if not smoke:
        write_page(reproduction, results, entry.page)
        renew_index(entry)
    return Done(results)


def renew_page(entry: Entry) -> None:
    """Judge the figures of results.json again, by the claims as they are stated now, and write it and its page.

    Raises:
        RunError: there is none, or it lacks a figure of a claim.
    """
    results = read(entry.results)
    if results is None:
        raise RunError(f"no {entry.results}; run opd reproduce {entry.name} first")
    for claim in (claim for claim in entry.reproduction.claims if claim.testable):
        for arm in (claim.method, claim.baseline):
            if claim.metric not in results["arms"].get(arm, {}):
                raise RunError(
                    f"{entry.results} has no {claim.metric!r} of the arm {arm!r}, which claim {claim.id!r} compares; "
                    f"run opd reproduce {entry.name}"
                )
    claims = judged(entry.reproduction, results["arms"])
    own = {"conventions": CONVENTIONS, "headline_before": results.get("headline_before"), "claims": claims}
    # In the order in which `collect` writes them.
    rest = {name: value for name, value in results.items() if name not in own}
    before = list(rest)[: list(rest).index("arms")]
    results = {name: rest.pop(name) for name in before} | own | rest
    write(results, entry.results)
    write_page(entry.reproduction, results, entry.page)
    renew_index(entry)


def renew_index(entry: Entry) -> None:
    """Write the table of verdicts of all shipped reproductions into `index.md` beside the page of one of them."""
    index = entry.page.parent / "index.md"
    if entry.page.parent != docs_folder() or not index.is_file():
        return
    found = [(one.name, one.reproduction.title, read(one.results)) for one in shipped().values()]
    judged_now = [(name, title, results) for name, title, results in found if results and "conventions" in results]
    index.write_text(with_verdicts(index.read_text(encoding="utf-8"), judged_now), encoding="utf-8")
