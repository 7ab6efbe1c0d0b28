"""What the commands print."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from opd.choice import kind_of
from opd.provenance import models_of, student_of
from opd.report.glossary import MEANINGS

if TYPE_CHECKING:
    from opd.api import Result
    from opd.catalogue import Kind, Setting
    from opd.plan import ActionPlan, DrafterPlan, FlowPlan, Plan
    from opd.plan.estimate import Estimate
    from opd.recipe import Recipe
    from opd.reproductions.catalogue import Entry
    from opd.store import Store
    from opd.truth_table import Row


SURE = 500
"""Held-out answers of which nobody needs to hear that they are few."""


def console() -> Console:
    found = Console()
    # Piped into a file there is no width to ask for; eighty columns would cut the samples.
    return found if found.is_terminal else Console(width=120)


def show_result(result: Result, recipe: Recipe) -> None:
    """Before and after, side by side: metrics, then completions."""
    out = console()
    table = Table(title=f"{result.summary['held_out_prompts']} held-out prompts, {recipe.name}", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for name, after in result.after.items():
        before = result.before[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", change_of(name, before, after))
    out.print(table)
    for line in headlines(result, recipe):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    # A drafter changes no text of its target.
    if any(old["completion"] != new["completion"] for old, new in result.samples):
        shown = Table(title="the same prompts, before and after", title_justify="left", show_lines=True)
        for column in ("prompt", "before", "after"):
            shown.add_column(column, overflow="fold", ratio=1)
        for old, new in result.samples:
            shown.add_row(_text(old["prompt"]), _text(old["completion"]), _text(new["completion"]))
        out.print(shown)
    # A signal behind the last step cut nothing short.
    by = result.stopped_by if result.summary["stopped_early"] else None
    stopped = f" (stopped early by {signal.Signals(by).name})" if by else ""
    out.print(f"{result.summary['steps']} steps in {result.summary['seconds']:.0f} s{stopped}", highlight=False)
    for title, texts in (("ended", [] if by else [result.summary["ended_by"]]), ("alarm", result.summary["alarms"])):
        for text in texts:
            if text:
                out.print(f"{title}: {text}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"student: {result.directory / 'student'}", highlight=False, soft_wrap=True)
    best = best_line(result)
    if best:
        out.print(best, highlight=False, markup=False, soft_wrap=True)
    out.print(f"summary: {result.directory / 'summary.json'}", highlight=False, soft_wrap=True)
    out.print(f"report:  {result.directory / 'report.html'}", highlight=False, soft_wrap=True)
    following = recipe.try_next or f"opd eval {result.directory}"
    if by and recipe.checkpoint.every:
        following = f"opd train {result.directory / 'recipe.yaml'} --resume"
    out.print(f"next: {escape(following)}", highlight=False, soft_wrap=True)


def change_of(name: str, before: float, after: float) -> str:
    """A held-out figure's change: of shares in points, of others as a part of what it was."""
    meaning = MEANINGS.get(f"held_out/{name}")
    if meaning is not None and meaning.unit.startswith("share"):
        return f"{100 * (after - before):+.0f} points"
    return f"{(after - before) / before:+.0%}" if before else ""


def headlines(result: Result, recipe: Recipe) -> list[str]:
    """What a person asks first of the numbers: the verifier's, and what the student reads less than its teacher."""
    lines = []
    if recipe.verifier is not None and "accuracy" in result.after:
        shares = f"{result.before['accuracy']:.2f} before, {result.after['accuracy']:.2f} after"
        taught = result.after.get("teacher_accuracy")
        own = "" if taught is None else f"; the teacher's own answers {taught:.2f}"
        count = result.summary["held_out_prompts"]
        lines.append(f"{kind_of(recipe.verifier)}, of {count} held-out answers: {shares}{own}{_chance(result, count)}")
    tokens = result.summary.get("prompt_tokens")
    if tokens is not None and tokens["teacher"] > tokens["student"]:
        lines.append(
            f"tokens of a prompt: {tokens['student']:.0f} for the student, {tokens['teacher']:.0f} for its teacher: "
            f"{tokens['teacher'] - tokens['student']:.0f} saved each time"
        )
    return lines


def _chance(result: Result, count: int) -> str:
    """How far two shares of so few answers differ by chance alone: 1.96 standard errors of a difference."""
    shares = (result.before["accuracy"], result.after["accuracy"])
    # A verifier's scores need not be shares.
    if not all(0 <= share <= 1 for share in shares):
        return ""
    by_chance = 1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / count)
    if abs(shares[1] - shares[0]) > by_chance or count >= SURE:
        return ""
    return f"; so few answers differ by {by_chance:.2f} by chance"


def best_line(result: Result) -> str | None:
    """Which step's student was measured to be better than the saved one, which is that of the run's end, and how to get
    it; None where none was, or where nobody asked."""
    best, run = result.summary["best"], result.directory
    if best is None or best["step"] == result.summary["steps"]:
        return None
    measured = f"{best['metric']} {best['value']:.4g}"
    line = f"best:    held-out {measured} at step {best['step']}, and student/ is of the end; "
    if best["stored"]:
        return f"{line}opd export {run} {run}-step-{best['step']} --step {best['step']}"
    if best["step"] == 0:
        return f"{line}that is the student before training"
    return f"{line}no checkpoint of that step is kept, checkpoint.keep_best={best['metric']} keeps it"


def show_metrics(title: str, metrics: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    table = Table(title, "")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console().print(table)


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def show_drawings(rows: Sequence[Mapping[str, Any]], out: Path, columns: int, scale: int) -> None:
    """Write the rows' pictures to `out` and print their prompts, a line for each line of pictures."""
    import numpy as np

    from opd.errors import DataError
    from opd.pictures import png, sheet

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(png(sheet(np.stack([row["image"] for row in rows]), columns, scale)))
    except OSError as error:
        raise DataError(f"cannot write the pictures to {out} ({error.strerror}); choose another file") from None
    for start in range(0, len(rows), columns):
        print(" | ".join(row["prompt"] for row in rows[start : start + columns]))


def show_recipes(found: Mapping[str, Path]) -> None:
    # A name is for copying: it stays whole however narrow the terminal is.
    table = Table(Column("recipe", no_wrap=True), "student", "teacher", "what it does")
    for name, path in found.items():
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = data.get("teacher") or []
        teachers = named if isinstance(named, list) else [named]
        shown = ", ".join(models_of(t) for t in teachers)
        table.add_row(name, student_of(data["student"]), shown, data.get("description", ""))
    console().print(table)


def show_objectives(rows: Sequence[Row]) -> None:
    """The table of objectives: what each descends, and how far its expected gradient is from that."""
    table = Table("objective", "descends", title="expected gradient against the promised one", title_justify="left")
    for column in ("cosine", "norm ratio", "bias", "variance", "cos forward", "cos reverse"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (row.cosine, row.norm_ratio, row.bias, row.variance, row.to_forward_kl, row.to_reverse_kl)
        descends = row.descends if row.unbiased else f"{row.descends} (biased)"
        table.add_row(row.objective, descends, *(f"{n:.3f}" for n in numbers))
    console().print(table)


def show_plan(
    plan: Plan | FlowPlan | ActionPlan | DrafterPlan,
    estimate: Estimate,
    unusual: Sequence[str],
    there: Sequence[str],
    as_json: bool,
) -> None:
    notes = [*plan.notes, *estimate.notes, *there]
    if as_json:
        whole = {**plan.as_dict(), "estimate": estimate.as_dict(), "unusual": list(unusual), "notes": notes}
        print(json.dumps(whole, indent=2))
        return
    out = console()
    for title, rows in [*plan.sections(), *estimate.sections()]:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        out.print(table)
    for note in notes:
        out.print(f"note: {note}", highlight=False, soft_wrap=True)
    for line in unusual:
        out.print(f"unusual: {line}", highlight=False, soft_wrap=True)


def show_demonstrations(path: Path, kept: int, played: int) -> None:
    """What `opd rollout` of a policy that acts left, and how to learn from it."""
    out = console()
    out.print(f"{kept} of {played} episodes succeeded and are in {path}; to learn from them:", soft_wrap=True)
    out.print(f"  prompts: {{kind: demonstrations, path: {path}}}", highlight=False, soft_wrap=True)
    out.print("  rollout: demonstrations", highlight=False)
    out.print("  objective: sft", highlight=False)


def show_images(path: Path, count: int) -> None:
    """What `opd rollout` of a flow model left, and how to learn from it."""
    out = console()
    if not count:
        out.print(
            f"{path}: another worker still draws some of the images; run this again for the table of all",
            soft_wrap=True,
        )
        return
    out.print(
        f"{count} images in {path}, listed in metadata.jsonl; to learn from them:", highlight=False, soft_wrap=True
    )
    out.print(f"  prompts: {{kind: dataset, path: {path}}}", highlight=False, soft_wrap=True)
    out.print("  rollout: {kind: noised}", highlight=False)


def show_choices(kinds: Sequence[Kind]) -> None:
    """Each choice in a line: its axis where that begins, its kind, what it does, and whose it is where not ours."""
    table = Table("axis", "kind", Column("", overflow="fold"))
    for i, each in enumerate(kinds):
        first = i == 0 or kinds[i - 1].axis != each.axis
        if first and i:
            table.add_section()
        whose = f" (package {each.package})" if each.package else ""
        table.add_row(each.axis if first else "", each.kind, escape(each.line + whose))
    console().print(table)


def show_choice(kind: Kind) -> None:
    """What a choice does, and its settings."""
    from opd.catalogue import settings_of

    whose = f", of package {kind.package}" if kind.package else ""
    console().print(f"{kind.axis} {kind.kind}{whose}: {kind.line}", highlight=False, markup=False, soft_wrap=True)
    show_settings(settings_of(kind.choice))


def show_settings(settings: Iterable[Setting]) -> None:
    """Settings of a choice or of another block of a recipe."""
    out = console()
    table = Table("setting", "type", "default", "bounds", Column("", overflow="fold"))
    for each in settings:
        table.add_row(*(escape(text) for text in (each.key, each.type, each.default, each.bounds, each.description)))
    out.print(table)


def show_store(store: Store, verify: bool = False) -> None:
    """What a store and each of its targets hold and lack; with `verify` every file is read and checked."""
    from opd.store import Targets

    head = store.header
    if verify:
        list(store.check())
    missing = len(store.missing())
    out = console()
    out.print(f"store:   {store.path}", highlight=False, soft_wrap=True)
    drawn = f"{head.draws} draws of {head.prompts} prompts, {head.group} each" if head.draws > 1 else "one draw"
    state = f"{missing} of {head.shards} shards missing" if missing else f"content {store.content()}"
    out.print(f"rows:    {head.rows} ({drawn}), written by {', '.join(head.authors)}; {state}", soft_wrap=True)
    lacking = set(store.missing())
    shards = [store.shard(i) for i in range(head.shards) if i not in lacking]
    written, read = (
        [int(n) for shard in shards for n in shard.of_rows(name)] for name in ("lengths", "context_lengths")
    )
    if written:
        told = f"{sum(written)} written, {sum(written) / len(written):.4g} a row and {max(written)} at most"
        out.print(f"tokens:  {told}; {sum(read)} of prompts", highlight=False, soft_wrap=True)
    if head.processor is not None and written:
        seen = sum(int(n) for shard in shards for n in shard.of_rows("picture_counts"))
        out.print(f"seen:    {seen} pictures, kept as hashes; processor {head.processor}", soft_wrap=True)
    out.print(f"student: {head.student['model']} {head.student['weights']}", highlight=False, soft_wrap=True)
    for path in sorted(store.path.glob("targets/*/targets.json")):
        targets = Targets.open(store, path.parent.name)
        if verify:
            list(targets.check())
        missing = len(targets.missing())
        state = f"{missing} of {head.shards} shards missing" if missing else f"content {targets.content()}"
        teacher = f"{targets.header.teacher['model']} {targets.header.teacher['weights']}"
        out.print(f"targets: {targets.path.name}: {targets.header.kind} of {teacher}; {state}", soft_wrap=True)
    if verify:
        out.print("every written file matches its checksum")


def show_reproductions(entries: Mapping[str, Entry]) -> None:
    from opd.reproductions.jobs import graph
    from opd.reproductions.results import keys, read
    from opd.reproductions.verdicts import tally

    table = Table("reproduction", "arms", "seeds", "jobs to run", "headline claims")
    for name, entry in entries.items():
        made = graph(entry.reproduction)
        to_run = [job.record(entry.cache) is None for job in made.jobs()]
        results = read(entry.results)
        if results is None:
            lines = ["not run yet"]
        elif "conventions" not in results:
            lines = ["judged by an earlier opd; --page-only judges them again"]
        else:
            lines = [f"main: {claim['verdict']}" for claim in results["claims"] if claim["id"] == "main"]
            lines += [f"{number} {verdict}" for verdict, number in tally(results["claims"]).items() if number]
        if results and results["jobs"] != keys(made):
            lines.append("(of an earlier version of the experiment)")
        arms, seeds = "\n".join(entry.reproduction.arms), len(entry.reproduction.seeds)
        table.add_row(name, escape(arms), str(seeds), f"{sum(to_run)} of {len(to_run)}", "\n".join(lines))
    console().print(table)


def show_results(results: Mapping[str, Any]) -> None:
    """The claims of one reproduction with their intervals and verdicts, headline claims first."""
    from opd.reproductions.verdicts import said

    table = Table(title=f"{results['system']}, {results['profile']} profile", title_justify="left")
    for column in ("claim", "metric", "arms", "difference", "interval", "verdict"):
        table.add_column(column)
    for claim in sorted(results["claims"], key=lambda claim: not claim["headline"]):
        if claim["difference"] is None:
            table.add_row(claim["id"], "", "", "", "", f"{claim['verdict']} ({escape(claim['note'])})")
            continue
        level = 90 if claim["test"] == "equivalent" else 95
        bounds = claim[f"ci{level}"]
        interval = "one seed" if bounds is None else f"{bounds[0]:.3g} to {bounds[1]:.3g} ({level} %)"
        arms = escape(f"{claim['method']} against {claim['baseline']}")
        table.add_row(claim["id"], claim["metric"], arms, f"{claim['difference']:.3g}", interval, said(claim))
    console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = value[-1]["content"]
    return escape(str(value).strip()) or "(empty)"
