"""One self-contained page for one or more runs: everything that they logged, and their rollouts token by token."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.files.places import DIRECTORY
from opd.files.run_directory import check_run, lines, read_json, read_yaml
from opd.provenance import held_out_told
from opd.report.card import facts
from opd.report.charts import registered_charts
from opd.report.curves import curves
from opd.report.glossary import glossary
from opd.report.layers import ASSETS, registered, scripts
from opd.report.maps import maps
from opd.report.rows import RowFile, choose_held_out, choose_training, encode, finite, scan

LARGEST = 9_500_000
"""Bytes of a page; rollouts are left out, evenly and with a note, where they would not fit."""

SCRIPTS = ("page.js", "card.js", "curves.js", "scales.js", "rows.js", "rollouts.js", "pictures.js", "live.js")

COMPRESSED = 0.25
"""A first, low guess of a row's bytes in the page by its bytes in the file; what is made is measured."""


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of `runs` to `out` and return `out`.

    Raises:
        RunError: a run directory that is missing or has logged nothing, or an `out` that cannot be written.
    """
    runs = [Path(run) for run in runs]
    if not runs:
        raise RunError("a report needs at least one run directory")
    for run in runs:
        check_run(run)
    text = page(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the report to {out} ({error.strerror}); choose another file with --out") from None
    return out


def page(runs: Sequence[Path], live: bool = False) -> str:
    """The whole HTML text; with `live` it asks its server for more."""
    from plotly.offline import get_plotlyjs

    code = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    # Renderers must be there before the page starts.
    sources = [*code, *scripts(), (ASSETS / "start.js").read_text(encoding="utf-8")]
    charts = get_plotlyjs()
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    fixed = sum(map(len, [*sources, charts, style]))
    data = _embedded(collect(runs, live, LARGEST - fixed))
    hashes = " ".join(f"'sha256-{_digest(source)}'" for source in [*sources, charts])
    connect = "'self'" if live else "'none'"
    parts = {
        # Only these scripts may run, whatever a rollout says, and nothing is fetched from anywhere.
        "policy": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'",
        "title": html.escape(", ".join(labels(runs))),
        "style": style,
        "data": data,
        "charts": charts,
        "scripts": "\n".join(f"<script>{source}</script>" for source in sources),
    }
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def collect(runs: Sequence[Path], live: bool = False, budget: int = LARGEST) -> dict[str, Any]:
    """Everything that the page shows, as plain data of about `budget` bytes at most."""
    recipes = [read_yaml(run / "recipe.yaml") for run in runs]
    found = [
        {"label": label, "recipe": text, **_run(run, recipe)}
        for run, label, (text, recipe) in zip(runs, labels(runs), recipes, strict=True)
    ]
    data = {
        "live": live,
        "runs": found,
        "differences": differing_keys([recipe for _, recipe in recipes]),
        "layers": registered(),
        "charts": registered_charts(),
        "glossary": glossary(),
    }
    files = [{"held_out": scan(run / "samples.jsonl"), "training": scan(run / "rollouts.jsonl")} for run in runs]
    for one, rows in zip(found, _fitting(files, budget - len(_embedded(data))), strict=True):
        one["rows"] = rows
    for one, sources in zip(found, files, strict=True):
        one["offsets"] |= {"samples": sources["held_out"].end, "rollouts": sources["training"].end}
        for source in sources.values():
            if source.broken:
                one["notes"].append(f"{source.broken} line(s) of {source.path.name} could not be read")
    return data


def updates(run: Path, offsets: dict[str, int], limit: int = 4_000_000) -> dict[str, Any]:
    """What a run has written after `offsets`, in the page's form; at most about `limit` bytes of each file.

    `restarted` says that the files are others than those that the offsets were taken from.
    """
    names = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "rollouts": "rollouts.jsonl"}
    read = {key: list(lines(run / name, offsets[key], limit)) for key, name in names.items()}
    records = {key: [line.record for line in found if line.record] for key, found in read.items()}
    ends = {key: found[-1].end if found else offsets[key] for key, found in read.items()}
    return {
        **_state(run, read_yaml(run / "recipe.yaml")[1]),
        **curves(records["metrics"]),
        "rows": {
            "held_out": {"total": len(records["samples"]), "chunks": encode(records["samples"])},
            "training": {"total": len(records["rollouts"]), "chunks": encode(records["rollouts"])},
        },
        "offsets": ends,
        "restarted": any(_size(run / name) < offsets[key] for key, name in names.items()),
        "more": any(end - offsets[key] >= limit for key, end in ends.items()),
    }


def labels(runs: Sequence[Path]) -> list[str]:
    """A short name for each run: its directory's, with as many parents as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({i})" for i, part in enumerate(parts, 1)]


def differing_keys(recipes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`key` and the `values` of every run, wherever some run's recipe differs from the first one's."""
    if len(recipes) < 2:
        return []
    # Imported here: it loads torch, which the report of one run does not need.
    from opd.recipe import differences

    keyed = [_keyed(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for other in keyed[1:] for key, _, _ in differences(keyed[0], other))
    return [{"key": key, "values": [finite(_at(recipe, key)) for recipe in keyed]} for key in keys]


def _run(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    found = list(lines(run / "metrics.jsonl"))
    broken = sum(line.record is None for line in found)
    notes = [f"{broken} line(s) of metrics.jsonl could not be read"] if broken else []
    summary = read_json(run / "summary.json")
    alarms = summary.get("alarms")
    notes += [held_out_told(summary)] if summary.get("compared") and "held_out_prompts" in summary else []
    notes += [f"alarm at {text}" for text in alarms if isinstance(text, str)] if isinstance(alarms, list) else []
    return {
        **_state(run, recipe),
        **curves(line.record for line in found if line.record),
        # A report is shown around, and where a run was started is nobody else's.
        "environment": _flat({k: v for k, v in read_json(run / "environment.json").items() if k != DIRECTORY}),
        "offsets": {"metrics": found[-1].end if found else 0},
        "notes": notes,
    }


def _state(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What changes when a run starts and ends; `generation` changes when another run starts in the same directory."""
    summary = read_json(run / "summary.json")
    return {
        "facts": facts(recipe, summary, read_json(run / "environment.json")),
        "taught": bool(recipe.get("teacher")),
        "steps": recipe.get("steps"),
        "finished": bool(summary),
        "maps": maps(run / "curriculum.jsonl"),
        "generation": [_modified(run / "recipe.yaml"), _modified(run / "environment.json")],
    }


def _fitting(files: Sequence[dict[str, RowFile]], budget: int) -> list[dict[str, Any]]:
    """The rows of every run, encoded, thinned evenly until they take no more than `budget` bytes."""
    raw = sum(source.bytes for sources in files for source in sources.values())
    share = min(1.0, budget / (COMPRESSED * raw)) if raw and budget > 0 else 1.0
    while True:
        rows = [{name: _chosen(name, source, share) for name, source in sources.items()} for sources in files]
        size = len(json.dumps(rows))
        if size <= budget or share < 1e-6:
            return rows
        share *= 0.95 * budget / size if budget > 0 else 0.1


def _chosen(name: str, source: RowFile, share: float) -> dict[str, Any]:
    chosen = (choose_held_out if name == "held_out" else choose_training)(source.entries, share)
    if name == "held_out":
        # By prompt, so that a prompt's text stands once in a chunk for all its steps.
        order = {entry.id: i for i, entry in reversed(list(enumerate(source.entries)))}
        chosen = sorted(chosen, key=lambda entry: (order[entry.id], entry.step))
    return {"total": len(source.entries), "chunks": encode(source.read(chosen)) if chosen else []}


def _embedded(data: Any) -> str:
    """JSON that no HTML parser can leave early: without `<`, and ASCII only."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _keyed(data: Any) -> Any:
    """Lists as mappings from index to item, so that only the items that differ are named."""
    if isinstance(data, dict):
        return {str(key): _keyed(value) for key, value in data.items()}
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return {str(i): _keyed(item) for i, item in enumerate(data)}
    return data


def _at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _flat(data: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(data, dict):
        return [pair for key, value in data.items() for pair in _flat(value, f"{prefix}{key}.")]
    text = " ".join(map(str, data)) if isinstance(data, list) else str(data)
    return [(prefix.rstrip("."), text)] if prefix else []


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000 if path.exists() else 0
