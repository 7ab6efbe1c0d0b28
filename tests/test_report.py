"""The report: one safe, self-contained page; rollouts come back as they were written; the live page stays at home."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from array import array

import pytest
import yaml

from benchmarks.browser import CHROMIUM, Browser
from opd.api import execute
from opd.choice import choices_of
from opd.compatibility import Compatibility
from opd.drafting.record import saved
from opd.errors import RunError
from opd.report import Bars, Curves, Layer, Line, register, register_chart, write_report
from opd.report.charts import registered_charts
from opd.report.curves import PHASES, POINTS, curves, extremes
from opd.report.glossary import MEANINGS
from opd.report.layers import registered
from opd.report.live import make_server
from opd.report.page import LARGEST, collect, differing_keys, labels, page, updates
from opd.report.rows import choose_held_out, choose_training, encode, evenly, scan
from tests.conftest import save_tiny
from tests.drafters import LAYERS
from tests.test_draft_opd import recipe_for as recipe_of_a_drafter
from tests.test_prune import DRIFT
from tests.test_prune import run as run_pruned
from tests.uni import trained as run_uni

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=1>\u2028\u202e"
WORDS = ["\n", " the", " a", "é", "<|im_end|>", "", "\ufffd", *(f" {a}{b}" for a in "bcdfgklmnprst" for b in "aeiou")]
NAMES = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "log_q", "log_p")


def held_out_row(step, i, tokens=6):
    chance = random.Random(f"{step} {i}")

    def word():
        return WORDS[int(len(WORDS) * chance.random() ** 3)]

    def ranked():
        return [[word(), round(0.6 * chance.random() / 3**k, 4)] for k in range(4)]

    texts = [word() for _ in range(tokens)]
    return {
        "step": step,
        "id": f"p{i}",
        "prompt": f"question {i}",
        "completion": "".join(texts),
        "finished": i % 2 == 0,
        "reward": None,
        "tokens": texts,
        "values": {
            n: [round(chance.expovariate(0.7) * (-1 if n[:3] == "log" else 1), 4) for _ in texts] for n in NAMES
        },
        "alternatives": {side: [ranked() for _ in texts] for side in ("student", "teacher")},
    }


def training_row(step, tokens=6):
    row = held_out_row(step, step, tokens)
    del row["alternatives"]
    return row | {"values": {"divergence": row["values"]["reverse_kl"], "weight": [1.0] * tokens}}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_run(folder, steps=4, prompts=3, tokens=6, evaluations=2, finished=True, **recipe):
    """A run directory as the monitor writes it."""
    folder.mkdir(parents=True)
    measured = sorted({round(i * steps / (evaluations - 1)) for i in range(evaluations)})
    metrics = []
    for step in range(steps + 1):
        if step:
            phases = {"rollout": 0.5, "teacher": 0.25, "step": 1.0}
            metrics.append(
                {"step": step, "train/loss": 2 / step, **{f"train/seconds/{k}": v for k, v in phases.items()}}
            )
        if step in measured:
            metrics.append({"step": step, "held_out/reverse_kl": 2 - step / steps, "held_out/top1_agreement": 0.5})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", [held_out_row(s, i, tokens) for s in measured for i in range(prompts)])
    write_lines(folder / "rollouts.jsonl", [training_row(s, tokens) for s in range(1, steps + 1)])
    settings = {"name": folder.name, "steps": steps, "student": {"model": "s"}, "teacher": [{"model": "t"}], **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2.6"}, "command": ["opd", "train"]}))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"seconds": 12.0, "steps": steps, "stopped_early": False}))
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The files of a run with drift weights, a window and a watch; two models that have nothing in common."""
    return run_pruned(
        tmp_path_factory.mktemp("pruned"),
        steps=3,
        shaping={"kind": "drift", **DRIFT},
        curriculum={"kind": "window", "minimum": 16, "maximum": 24},
        rollout={"max_new_tokens": 24, "segment": 4, "watch": {"kind": "drift", **DRIFT}},
        end_tokens=[89],
    ).directory


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The files of a run with margins, balancers and a gate; two untrained models that are right by chance."""
    found, *_ = run_uni(
        tmp_path_factory.mktemp("calibrated"),
        steps=3,
        curriculum={"kind": "difficulty", "responses": 3, "by": "side"},
        # Cut groups: what is shown is put together again.
        batch={"prompts": 3, "group": 6, "micro": 4},
    )
    return found.directory


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def unpack(chunk):
    """What rows.js does: the rows of a chunk."""
    payload = gzip.decompress(base64.b64decode(chunk["data"]))
    (size,) = struct.unpack("<I", payload[:4])
    header = json.loads(payload[4 : 4 + size])
    place, columns = 4 + size, {}
    for column in header["columns"]:
        n = column["count"]
        planes = [payload[place + k * n : place + (k + 1) * n] for k in range(4)]
        integers = array("i", bytes(byte for four in zip(*planes, strict=True) for byte in four))
        columns[column["key"]] = [None if v == -(2**31) else v / column["scale"] for v in integers]
        place += 4 * n
    rows, start = [], 0
    for i, length in enumerate(chunk["index"]["length"]):
        here = slice(start, start + length)
        start += length
        rows.append(
            {
                "prompt": header["prompts"][header["prompt"][i]],
                "tokens": [header["strings"][int(v)] for v in columns["tokens"][here]],
                "values": {k.removeprefix("values."): v[here] for k, v in columns.items() if k.startswith("values.")},
                "text": header["text"][i],
                "extra": header["extra"][i],
                "teacher_answer": header["teacher_answer"][i],
                "teacher_prompt": None if (k := header["teacher_prompt"][i]) is None else header["prompts"][k],
            }
        )
    for key in [key for key in columns if key.endswith("/count")]:
        stem = key.removesuffix("/count")
        pairs = zip(columns[f"{stem}/text"], columns[f"{stem}/number"], strict=True)
        tokens = [
            [[header["strings"][int(t)], v] for t, v in (next(pairs) for _ in range(int(n)))] for n in columns[key]
        ]
        name, side = stem.rsplit("/", 1)
        for row in rows:
            row["extra"].setdefault(name, {})[side] = [tokens.pop(0) for _ in row["tokens"]]
    return rows


def outside_data(text):
    """The page without its data and its scripts: what the HTML parser sees as markup."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


# ---- the page ----


def test_the_page_is_one_file_without_references_and_its_data_parses(tmp_path):
    run = write_run(tmp_path / "one")
    out = write_report([run], tmp_path / "deep" / "page.html")
    text = out.read_text(encoding="utf-8")
    assert len(text.encode()) < 10_000_000
    markup = outside_data(text)
    assert re.findall(r'\b(?:src|href|action)\s*=\s*(?!"#\w+")', markup) == []
    assert "http" not in markup.replace("http-equiv", "")
    assert "url(" not in markup
    assert "@import" not in markup
    assert text.count("plotly.js v") == 1
    data = data_of(text)
    (one,) = data["runs"]
    assert one["label"] == "one"
    assert one["series"]["held_out/reverse_kl"] == {"x": [0, 4], "y": [2.0, 1.0], "not_finite": 0}
    assert one["phases"]["seconds"]["rollout"] == [0.5] * 4
    assert one["rows"]["held_out"]["total"] == 6
    assert one["rows"]["training"]["total"] == 4
    assert one["environment"] == [["versions.torch", "2.6"], ["command", "opd train"]]
    assert one["finished"]
    assert ["time", "12 s"] in one["facts"]
    assert not data["live"]


def test_only_the_scripts_of_the_page_may_run_and_nothing_may_be_fetched(tmp_path):
    import hashlib

    text = page([write_run(tmp_path / "one")])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    charts = re.search(r'<script type="text/plain" id="charts">(.*?)</script>', text, re.S)[1]
    own = re.findall(r"<script>(.*?)</script>", text, re.S)
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in [*own, charts]]
    assert re.findall(r"'sha256-([^']*)'", policy) == digests
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", "".join(own))


def test_what_a_run_says_stays_text(tmp_path):
    run = write_run(tmp_path / "<b>&one", name="n", description=ATTACK, nested={ATTACK: ATTACK})
    row = held_out_row(4, 0) | {
        "id": ATTACK,
        "prompt": ATTACK,
        "completion": ATTACK,
        "tokens": [ATTACK] * 6,
        "x": ATTACK,
    }
    row["values"][ATTACK] = [1.0] * 6
    write_lines(run / "samples.jsonl", [row])
    write_lines(run / "metrics.jsonl", [{"step": 0, f"held_out/{ATTACK}": 1.0}])
    text = page([run])
    assert text.count("<script") == text.count("</script>") == len(re.findall(r"^<script", text, re.M))
    assert "<img" not in outside_data(text)
    assert "<title>&lt;b&gt;&amp;one" in text
    assert "\u2028" not in re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    (one,) = data_of(text)["runs"]
    assert dict(one["facts"])["about"] == ATTACK
    (chunk,) = one["rows"]["held_out"]["chunks"]
    assert chunk["index"]["id"] == [ATTACK]
    assert unpack(chunk)[0]["tokens"] == [ATTACK] * 6
    assert unpack(chunk)[0]["extra"]["x"] == ATTACK


def test_several_runs_and_the_keys_in_which_they_differ(tmp_path):
    runs = [
        write_run(tmp_path / "a", update={"learning_rate": 1e-4}),
        write_run(tmp_path / "b", update={"learning_rate": 2e-4}, teacher=[{"model": "t", "weight": 2}]),
        write_run(tmp_path / "c", update=None),
    ]
    data = data_of(page(runs))
    assert [run["label"] for run in data["runs"]] == ["a", "b", "c"]
    found = {row["key"]: row["values"] for row in data["differences"]}
    assert found["name"] == ["a", "b", "c"]
    assert found["update.learning_rate"] == [1e-4, 2e-4, None]
    assert found["teacher.0.weight"] == [None, 2, None]
    assert "steps" not in found
    assert differing_keys([{"a": 1}]) == []


def test_labels_take_as_many_parents_as_tell_the_runs_apart(tmp_path):
    assert labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert labels([tmp_path / "x", tmp_path / "y"]) == ["x", "y"]
    assert len(set(labels([tmp_path, tmp_path]))) == 2


def test_a_real_run_is_reported(tmp_path):
    from opd.api import execute
    from tests.conftest import save_tiny
    from tests.test_loop import recipe_for

    models = save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)
    run = execute(recipe_for(models, tmp_path, evaluation={"every": 2}), quiet=True).directory
    (one,) = data_of(page([run]))["runs"]
    assert one["series"]["train/loss"]["x"] == [1, 2, 3]
    assert one["series"]["held_out/forward_kl"]["x"] == [0, 2, 3]
    assert {"rollout", "teacher", "student", "loss", "backward", "update", "step"} <= one["phases"]["seconds"].keys()
    written = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {}
    for chunk in one["rows"]["held_out"]["chunks"]:
        keys = zip(chunk["index"]["step"], chunk["index"]["id"], strict=True)
        shown |= dict(zip(keys, unpack(chunk), strict=True))
    assert len(shown) == len(written) == 12
    for row in written:
        got = shown[row["step"], row["id"]]
        assert (got["prompt"], got["tokens"], got["values"]) == (row["prompt"], row["tokens"], row["values"])
        assert got["extra"]["alternatives"] == row["alternatives"]
    assert list(one["rows"]["training"]["chunks"][0]["ranges"]) == ["divergence", "weight"]


def test_every_name_that_a_run_logs_is_explained(tmp_path):
    from opd.api import execute
    from tests.conftest import save_tiny
    from tests.test_loop import TEXTS, recipe_for

    models = save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)
    recipe = recipe_for(
        models,
        tmp_path,
        steps=2,
        temperature=[[0, 1.0], [2, 0.8]],
        prompts={"prompts": [{"prompt": text, "answer": "1"} for text in TEXTS]},
        verifier={"kind": "exact_match", "pattern": "([0-9])"},
        objective=["reverse_kl", "grpo"],
        curriculum={"kind": "length_ladder", "lengths": [4, 8], "steps_per_rung": 1},
        evaluation={"k": 2, "greedy": True},
    )
    logged = {name for record in execute(recipe, quiet=True).history for name in record} - {"step"}
    assert {"train/curriculum/rung", "train/objective/grpo", "train/schedule/temperature"} <= logged
    assert {"held_out/pass_at_k", "held_out/greedy_accuracy"} <= logged
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    unknown = {n for n in logged if n not in MEANINGS and not n.startswith((*families, PHASES))}
    assert not unknown


def test_a_pruned_run_shows_signal_events_weights_and_where_rollouts_ended(pruned):
    (one,) = data_of(page([pruned]))["runs"]
    names = ("window", "hits", "effective_length")
    assert all(one["series"][f"train/curriculum/{name}"]["x"] == [1, 2, 3] for name in names)
    known = {layer["reads"]: layer for layer in registered()}
    rows = [row for chunk in one["rows"]["training"]["chunks"] for row in unpack(chunk)]
    assert {"overlap", "drifted", "reliable", "weight"} <= rows[0]["values"].keys()
    assert all(f"values.{name}" in known for name in rows[0]["values"])
    assert known["stopped"]["place"] == "row"
    for row in rows:
        assert row["extra"]["stopped"] == "drifted, 8 events"
        assert row["values"]["reliable"] == [1.0] * 4 + [0.0] * 4
        assert row["values"]["weight"][-1] == 0.5
    logged = {name for name in one["series"] if name.startswith("train/")}
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    assert {name for name in logged if name not in MEANINGS and not name.startswith((*families, PHASES))} == set()
    signals = [choice.measured for choice in choices_of(Compatibility).values()]
    assert all(f"train/{name}" in MEANINGS and f"values.{name}" in known for name in signals)


OF_DRAFTERS = ("acceptance length", "passes saved by a drafter", "proposals that stood, by slot")


def test_a_drafters_run_shows_its_blocks_and_which_slots_stood(tmp_path):
    target = save_tiny(tmp_path / "target", seed=1, layers=LAYERS, initializer_range=0.15)
    result = execute(recipe_of_a_drafter(target, tmp_path, steps=2), quiet=True)
    data = data_of(page([result.directory]))
    (one,) = data["runs"]
    length, passes, slots = (
        next(chart for chart in data["charts"] if chart["title"] == title) for title in OF_DRAFTERS
    )
    assert {line["reads"] for line in length["lines"]} - {"train/engine/acceptance_length"} <= one["series"].keys()
    assert passes["lines"][0]["reads"] == "train/passes_saved"
    assert {f"train/{name}" for name in saved(1, 2)} <= one["series"].keys() & MEANINGS.keys()
    assert all(f"{family}{k}" in one["series"] for family, _ in slots["families"] for k in range(1, 5))
    logged = {name for name in one["series"] if "accept" in name and "objective" not in name}
    assert all(name in MEANINGS or name.startswith(("train/accepted_at/", "held_out/accepted_at/")) for name in logged)
    known = {layer["reads"]: layer for layer in registered()}
    assert known["blocks"]["renderer"] == "blocks"
    for kind in ("training", "held_out"):
        rows = [row for chunk in one["rows"][kind]["chunks"] for row in unpack(chunk)]
        assert rows
        for row in rows:
            slots_of_row = [k for block in row["extra"]["blocks"] for k in range(1, block["proposals"] + 1)]
            assert row["values"]["slot"] == slots_of_row
            stood = [float(k < b["accepted"]) for b in row["extra"]["blocks"] for k in range(b["proposals"])]
            assert row["values"]["accepted"] == stood


def test_a_calibrated_run_shows_margins_balance_and_difficulty(calibrated):
    data = data_of(page([calibrated]))
    (one,) = data["runs"]
    for chart in data["charts"]:
        if chart["title"] in OF_DRAFTERS:
            continue
        if chart["kind"] == "bars":
            families = [family for family, _ in chart["families"]] + [chart["notes"]]
            assert all(f"{family}{tag}/{c}" in one["series"] for family in families for tag in "ab" for c in range(4))
        else:
            names = [name for line in chart["lines"] for name in (line["reads"], line["low"], line["high"]) if name]
            assert {name for name in names if name in one["series"]} == set(names), chart["title"]
            assert all(name in MEANINGS or name.startswith(tuple(MEANINGS)) for name in names)
    known = {layer["reads"]: layer for layer in registered()}
    (chunk,) = one["rows"]["training"]["chunks"]
    assert {"offset", "return", "group_margin", "inverted", "outcome_kept"} <= set(chunk["of_rows"])
    assert "divergence" not in chunk["of_rows"]
    rows = unpack(chunk)
    assert all(f"values.{name}" in known for name in rows[0]["values"])
    for step in (1, 2, 3):
        here = [i for i, found in enumerate(chunk["index"]["step"]) if found == step]
        assert len(here) == 4
        assert len({chunk["index"]["id"][i] for i in here}) == 1
        if any(rows[i]["values"]["offset"][0] for i in here):
            # Of a group that was moved both outcomes are there, however many of each it has.
            assert {chunk["index"]["reward"][i] for i in here} == {0.0, 1.0}
            assert all(rows[i]["extra"]["shaped"].startswith(("right, ", "wrong, ", "dropped by chance")) for i in here)
    logged = {name for name in one["series"] if name.startswith("train/")}
    families = tuple(key for key in MEANINGS if key.endswith("/"))
    assert {name for name in logged if name not in MEANINGS and not name.startswith((*families, PHASES))} == set()


def test_charts_of_several_names_are_declared_and_from_outside_too(monkeypatch):
    monkeypatch.setattr("opd.report.charts._charts", [])
    mine = Curves("mine", (Line("train/mine", "mine", low="train/mine_p10", high="train/mine_p90"),), "nats")
    assert register_chart(mine) is register_chart(mine) is mine
    (found,) = registered_charts()
    assert (found["kind"], found["title"], found["lines"][0]["high"]) == ("curves", "mine", "train/mine_p90")
    register_chart(Bars("counts", (("train/counts/", "counts"),), "of what"))
    assert [chart["kind"] for chart in registered_charts()] == ["curves", "bars"]


# ---- rows ----


def test_rows_come_back_as_they_were_written():
    rows = [held_out_row(1, 0), held_out_row(2, 1, tokens=3), held_out_row(2, 2, tokens=0)]
    rows[1]["values"] |= {"drift": [1e-7, None, float("nan")], "wrong length": [1.0]}
    rows[1]["debate"] = {"turns": ["no", float("inf")]}
    rows[2]["prompt"] = [{"role": "user", "content": "hi"}]
    (chunk,) = encode(rows)
    json.dumps(chunk, allow_nan=False)
    back = unpack(chunk)
    assert [r["tokens"] for r in back] == [r["tokens"] for r in rows]
    assert [r["prompt"] for r in back] == [r["prompt"] for r in rows]
    assert [r["extra"]["alternatives"] for r in back] == [r["alternatives"] for r in rows]
    assert back[0]["values"]["log_p"] == rows[0]["values"]["log_p"]
    assert back[0]["values"]["drift"] == [None] * 6
    assert back[1]["values"]["drift"] == [pytest.approx(1e-7), None, None]
    assert back[1]["extra"]["debate"] == {"turns": ["no", None]}
    assert chunk["index"]["means"]["log_q"][0] == pytest.approx(sum(rows[0]["values"]["log_q"]) / 6, rel=1e-5)
    assert chunk["index"]["means"]["log_q"][2] is None
    assert chunk["ranges"]["drift"] == [pytest.approx(1e-7)] * 4


def test_a_completion_comes_back_as_text_however_its_tokens_read():
    def text(tokens, completion):
        row = held_out_row(0, 0, tokens=len(tokens)) | {"tokens": tokens, "completion": completion}
        return unpack(encode([row])[0])[0]["text"]

    assert text(["\ufffd", "\ufffd"], "学") == "学"
    assert text(["a", "b"], "a b") == "a b"
    assert text(["a", " b"], "a b") == 0
    assert text(["a", " b", "<|im_end|>"], "a b") == 1
    assert text([], "") == 0


def test_what_the_teacher_read_and_said_comes_back_and_equal_prompts_are_kept_once():
    view = [{"role": "system", "content": ATTACK}, {"role": "user", "content": "hi"}]
    told = {"teacher_prompt": view, "teacher_answer": ATTACK}
    (chunk,) = encode([held_out_row(0, 0) | told, held_out_row(0, 1) | told, held_out_row(1, 0), picture_row()])
    back = unpack(chunk)
    assert [row["teacher_prompt"] for row in back] == [view, view, None, None]
    assert [row["teacher_answer"] for row in back] == [ATTACK, ATTACK, None, None]
    assert chunk["index"]["taught"] == [True, True, False, None]
    assert chunk["index"]["read"] == [True, True, False, False]
    assert all("teacher_prompt" not in row["extra"] for row in back)


def picture_row():
    return {"step": 0, "id": "drawn", "prompt": "draw", "image": "data:image/png;base64,AAAA"}


def test_other_shapes_of_alternatives_are_kept_as_they_are():
    row = held_out_row(0, 0, tokens=2) | {"alternatives": {"student": [[["a", "high"]], []]}}
    assert unpack(encode([row])[0])[0]["extra"]["alternatives"] == row["alternatives"]


def test_what_is_no_row_is_left_out_and_counted(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_lines(path, [held_out_row(0, 0), [1], {"step": 1}, {"tokens": []}, held_out_row(1, 0)])
    found = scan(path)
    assert [entry.step for entry in found.entries] == [0, 1]
    assert found.broken == 3
    assert found.end == path.stat().st_size


def test_a_page_that_would_be_too_large_keeps_an_even_share(tmp_path):
    run = write_run(tmp_path / "big", steps=60, prompts=40, tokens=20, evaluations=4)
    whole = collect([run])
    assert sum(len(c["index"]["id"]) for c in whole["runs"][0]["rows"]["held_out"]["chunks"]) == 160
    size = len(json.dumps(whole, separators=(",", ":")))
    thin = collect([run], budget=size // 2)
    assert len(json.dumps(thin, separators=(",", ":"))) <= size // 2
    rows = thin["runs"][0]["rows"]
    assert rows["held_out"]["total"] == 160
    pairs = [p for c in rows["held_out"]["chunks"] for p in zip(c["index"]["id"], c["index"]["step"], strict=True)]
    assert 20 < len(pairs) < 120
    assert {step for _, step in pairs} == {0, 20, 40, 60}
    assert len(pairs) == 4 * len({name for name, _ in pairs})
    trained = [step for c in rows["training"]["chunks"] for step in c["index"]["step"]]
    assert trained[0] == 1
    assert trained[-1] == 60
    assert len(trained) < 60
    tiny = collect([run], budget=1000)
    assert len(tiny["runs"][0]["rows"]["held_out"]["chunks"]) >= 1


def test_choices_are_even():
    assert evenly(range(10), 4) == [0, 3, 6, 9]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert evenly(range(3), 1) == [0]
    assert choose_training([], 0.5) == choose_held_out([], 0.5) == []


# ---- files of a run that is still writing, or broke ----


def test_half_written_and_broken_lines_are_tolerated(tmp_path):
    run = write_run(tmp_path / "live", finished=False)
    before = updates(run, {"metrics": 0, "samples": 0, "rollouts": 0})["offsets"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "train/loss": \xff broken}\n{"step": 6, "train/loss": NaN}\n{"step": 7, "train/lo')
    (run / "samples.jsonl").open("ab").write('{"step": 5, "id": "p0", "tokens": ["é'.encode()[:-1])
    (one,) = data_of(page([run]))["runs"]
    assert one["series"]["train/loss"]["x"] == [1, 2, 3, 4, 6]
    assert one["series"]["train/loss"]["y"][-1] is None
    assert one["series"]["train/loss"]["not_finite"] == 1
    assert one["notes"] == ["1 line(s) of metrics.jsonl could not be read"]
    assert one["rows"]["held_out"]["total"] == 6
    assert not one["finished"]
    assert one["offsets"]["samples"] == before["samples"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'ss": 0.5}\n')
    more = updates(run, one["offsets"])
    assert more["series"]["train/loss"] == {"x": [7], "y": [0.5], "not_finite": 0}
    assert more["rows"]["held_out"] == {"total": 0, "chunks": []}


def test_updates_go_on_in_pieces_and_notice_another_run(tmp_path):
    run = write_run(tmp_path / "live", steps=40)
    offsets, seen, rounds = {"metrics": 0, "samples": 0, "rollouts": 0}, [], 0
    while True:
        news = updates(run, offsets, limit=500)
        seen += news["series"].get("train/loss", {"x": []})["x"]
        offsets, rounds = news["offsets"], rounds + 1
        if not news["more"]:
            break
    assert seen == list(range(1, 41))
    assert rounds > 3
    assert not news["restarted"]
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert updates(run, offsets)["restarted"]


def test_a_run_without_its_side_files_still_shows(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 1.0, "note": "text", "own/thing": 3}])
    (run / "recipe.yaml").write_text("- [broken")
    (run / "environment.json").write_text("{")
    data = data_of(page([run]))
    assert data["runs"][0]["series"].keys() == {"train/loss", "own/thing"}
    assert data["runs"][0]["recipe"] == ""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["does not exist", "opd train"]),
        (lambda path: path.write_text("x"), ["is a file", "opd train"]),
        (lambda path: path.mkdir(), ["no metrics", "opd train"]),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"st'))[0], ["no metrics", "opd train"]),
    ],
)
def test_errors_name_the_path_and_the_fix_in_one_line(make, words, tmp_path):
    make(tmp_path / "mine")
    with pytest.raises(RunError) as error:
        write_report([tmp_path / "mine"], tmp_path / "out.html")
    message = str(error.value)
    assert all(word in message for word in [str(tmp_path / "mine"), *words])
    assert "\n" not in message
    assert not (tmp_path / "out.html").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(RunError, match=f"cannot write the report to {tmp_path} .*--out"):
        write_report([run], tmp_path)
    with pytest.raises(RunError, match="at least one"):
        write_report([], tmp_path / "x.html")


# ---- curves ----


def test_long_curves_keep_their_extremes_and_phases_their_sum():
    records = [
        {
            "step": i,
            "train/loss": 100.0 if i == 12345 else math.sin(i),
            "train/seconds/a": 1.0,
            "train/seconds/b": i % 2,
        }
        for i in range(20000)
    ]
    found = curves(records)
    loss = found["series"]["train/loss"]
    assert len(loss["x"]) <= POINTS + 2
    assert loss["x"][0] == 0
    assert loss["x"][-1] == 19999
    assert loss["y"][loss["x"].index(12345)] == 100.0
    assert set(found["phases"]["seconds"]["a"]) == {1.0}
    assert set(found["phases"]["seconds"]["b"]) == {0.5}
    assert len(found["phases"]["x"]) == len(found["phases"]["seconds"]["b"]) <= POINTS
    assert extremes([None] * 5000, 100)[0] == 0


def test_a_phase_that_comes_later_counts_zero_before():
    found = curves([{"step": 1, "train/seconds/a": 1}, {"step": 2, "train/seconds/a": 1, "train/seconds/b": 2}])
    assert found["phases"] == {"x": [1, 2], "seconds": {"a": [1.0, 1.0], "b": [0.0, 2.0]}}


# ---- layers ----


def test_a_layer_is_one_entry_and_perhaps_a_file(tmp_path, monkeypatch):
    from opd.report import layers

    monkeypatch.setattr(layers, "_layers", dict(layers._layers))
    monkeypatch.setattr(layers, "_scripts", [])
    script = tmp_path / "dialogue.js"
    script.write_text('opd.rowRenderers.dialogue = (value) => opd.make("p", {}, value.turns.join(" / "));')
    layer = register(Layer("dialogue", "dialogue", "row", "dialogue"), script)
    register(layer, script)
    assert registered()[-1]["reads"] == "dialogue"
    text = page([write_run(tmp_path / "run")])
    assert text.count("opd.rowRenderers.dialogue") == 1
    assert text.index("opd.rowRenderers.dialogue") < text.index("opd.rollouts.start()")
    with pytest.raises(ValueError, match="registered already"):
        register(Layer("dialogue", "another", "row", "fields"))


def test_layers_name_renderers_that_exist(tmp_path):
    from opd.report.layers import ASSETS, scripts

    scales = set(re.findall(r"^  (\w+): \{", (ASSETS / "scales.js").read_text(), re.M))
    drawn = "".join(scripts())
    for layer in registered():
        if layer["place"] == "colour":
            assert layer["renderer"] in scales
        else:
            assert f"Renderers.{layer['renderer']} =" in drawn


# ---- opd watch ----


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "live", finished=False)
    server = make_server(run)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield run, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(port, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_watch_serves_the_page_and_what_is_new(served):
    run, port = served
    status, text, headers = get(port, "/")
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert "connect-src 'self'" in text
    data = data_of(text)
    assert data["live"]
    offsets = data["runs"][0]["offsets"]
    query = "&".join(f"{key}={value}" for key, value in offsets.items())
    status, body, _ = get(port, f"/data.json?{query}")
    assert status == 200
    assert json.loads(body)["series"] == {}
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 0.25}\n')
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(held_out_row(5, 0)) + "\n")
    (run / "summary.json").write_text('{"seconds": 3}')
    news = json.loads(get(port, f"/data.json?{query}")[1])
    assert news["series"]["train/loss"] == {"x": [5], "y": [0.25], "not_finite": 0}
    assert unpack(news["rows"]["held_out"]["chunks"][0])[0]["tokens"] == held_out_row(5, 0)["tokens"]
    assert news["finished"]
    assert news["generation"] == data["runs"][0]["generation"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.168.0.1", "", "[::"]
)
def test_watch_refuses_other_host_names(served, host):
    _, port = served
    assert get(port, "/", host)[0] in (400, 403)
    assert get(port, "/data.json?metrics=0&samples=0&rollouts=0", host)[0] in (400, 403)


def test_watch_answers_to_the_names_of_loopback(served):
    _, port = served
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "[::1]:9"):
        assert get(port, "/data.json?metrics=0&samples=0&rollouts=0", host)[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/metrics.jsonl", 404),
        ("/recipe.yaml", 404),
        ("/../live/recipe.yaml", 404),
        ("/%2e%2e/recipe.yaml", 404),
        ("//etc/passwd", 404),
        ("/student/model.safetensors", 404),
        ("/data.json", 400),
        ("/data.json?metrics=0&samples=0", 400),
        ("/data.json?metrics=0&samples=0&rollouts=-5", 400),
        ("/data.json?metrics=x&samples=0&rollouts=0", 400),
    ],
)
def test_watch_serves_nothing_else(served, path, status):
    _, port = served
    assert get(port, path)[0] == status


def test_watch_only_reads(served):
    _, port = served
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert get(port, "/", method=method)[0] == 501


def test_watch_waits_for_a_run_that_has_logged_nothing_yet(tmp_path):
    data = data_of(page([tmp_path], live=True))
    assert data["runs"][0]["series"] == {}
    with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:70000"):
        make_server(tmp_path, port=70000)


def opd(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "opd", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_the_commands(tmp_path):
    run = write_run(tmp_path / "run")
    report, watch, missing = opd("report", run), opd("watch", run, "--seconds", "0.5"), opd("watch", tmp_path / "no")
    out, err = report.communicate(timeout=60)
    assert (report.returncode, err) == (0, "")
    assert out.strip() == str(run / "report.html")
    assert data_of((run / "report.html").read_text(encoding="utf-8"))["runs"][0]["label"] == "run"
    out, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (0, "")
    assert re.search(r"http://127\.0\.0\.1:\d+/", out)
    out, err = missing.communicate(timeout=60)
    assert missing.returncode == 2
    assert err.startswith(
        f"opd: run directory {tmp_path / 'no'} does not exist; give the directory that opd train wrote"
    )
    assert err.count("\n") == 1


def test_watch_ends_well_on_interrupt(tmp_path):
    process = opd("watch", write_run(tmp_path / "run"), "--no-open")
    line = process.stdout.readline()
    port = int(re.search(r":(\d+)/", line)[1])
    assert get(port, "/")[0] == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err


# ---- in a browser ----


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs chromium, which is not installed")
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


@pytest.mark.slow
def test_in_a_browser_hover_and_keyboard_reach_every_token(browser, tmp_path):
    runs = [write_run(tmp_path / "a", prompts=12), write_run(tmp_path / "b")]
    row = held_out_row(4, 0) | {
        "prompt": ATTACK,
        "tokens": [ATTACK, "\n", " x", "", "<|im_end|>", " y"],
        "own": [ATTACK],
    }
    row["values"]["own value"] = [-1.0, None, 1.0, 0.0, 0.5, 0.5]
    write_lines(runs[0] / "samples.jsonl", [held_out_row(0, 0), row, *(held_out_row(4, i) for i in range(1, 12))])
    browser.open(write_report(runs, tmp_path / "page.html").as_uri())
    assert browser.run("document.querySelectorAll('.card').length") == 10
    assert browser.run("window.attacked") is None
    assert browser.run("document.querySelectorAll('main img').length") == 0
    first = browser.run("document.querySelector('.tokens').innerText")
    assert "U+2028" in first
    assert "U+202E" in first
    assert "</script>" in first

    browser.point_at("document.querySelectorAll('.t')[2]")
    assert "token 3 of 6" in browser.panel()
    assert "·x" in browser.panel()
    assert f"{row['values']['reverse_kl'][2]:.4g}" in browser.panel()
    _, probability = row["alternatives"]["teacher"][2][0]
    assert f"{probability:.4f}" in browser.panel()

    browser.run("document.querySelector('.t').focus()")
    assert "token 1 of 6" in browser.panel()
    browser.press("ArrowRight")
    assert "token 2 of 6" in browser.panel()
    browser.press("End")
    assert "token 6 of 6" in browser.panel()
    browser.press("ArrowDown")
    assert "p1" in browser.panel()
    browser.press("ArrowUp")
    browser.press("Home")
    browser.press("ArrowLeft")
    assert "token 1 of 6" in browser.panel()
    browser.press("Tab")  # what no layer reads, below the tokens
    assert browser.run("document.activeElement.textContent") == "own"
    browser.press("Tab")
    assert "p1" in browser.panel()

    browser.run(
        "(() => { const s = document.querySelector('#rollouts [data-control=colour]'); s.value = 'own value';"
        "s.dispatchEvent(new Event('change')) })()"
    )
    browser.until("document.querySelector('.t').classList.contains('negative')")
    assert browser.run("document.querySelectorAll('.t')[1].classList.contains('unknown')")
    assert "both" in browser.run("document.querySelector('.scale .ramp').className")

    browser.run("document.querySelector('[aria-label=\"next page\"]').click()")
    browser.until("document.querySelectorAll('.card').length === 2")
    browser.run("document.querySelector('[data-mode=pairs]').click()")
    browser.until("document.querySelectorAll('.pair').length === 1")
    browser.run("document.querySelector('[data-mode=training]').click()")
    browser.until("document.querySelectorAll('.card').length === 4 && !document.querySelector('.pair')")

    browser.run("document.getElementById('curves').scrollIntoView()")
    browser.until("document.querySelectorAll('#curves .main-svg').length > 0")
    assert "Keys that differ" in browser.run("document.getElementById('recipe').innerText")
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []
    assert len(browser.requests) == 1


@pytest.mark.slow
def test_in_a_browser_a_pruned_rollout_says_where_it_ended(browser, pruned, tmp_path):
    browser.open(write_report([pruned], tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('[data-mode=training]').click()")
    browser.until("document.querySelectorAll('.card details[open] p').length > 0")
    ended = "behind token 8: drifted, 8 events"
    assert browser.run("document.querySelector('.card details p').textContent") == ended
    browser.run(
        "(() => { const s = document.querySelector('#rollouts [data-control=colour]'); s.value = 'drifted';"
        "s.dispatchEvent(new Event('change')) })()"
    )
    browser.until("document.querySelector('.scale').innerText.includes('student and teacher part')")
    browser.point_at("document.querySelectorAll('.t')[2]")
    assert all(word in browser.panel() for word in ("overlap", "drift event", "reliable", "weight"))
    browser.run("document.getElementById('curves').scrollIntoView()")
    assert all(word in browser.run("document.getElementById('curves').innerText") for word in ("window", "hits"))
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_groups_say_what_was_moved_and_why(browser, calibrated, tmp_path):
    browser.open(write_report([calibrated], tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('[data-mode=groups]').click()")
    browser.until("document.querySelectorAll('.card .members').length > 0")
    head = browser.run("document.querySelector('.members thead').innerText")
    assert all(word in head for word in ("reward", "return", "offset", "what was done to it"))
    assert "divergence" not in head
    assert "margin" in browser.run("document.querySelector('.card .meta').innerText")
    offsets = browser.run(
        "[...document.querySelectorAll('.members')].map((table) => {"
        "const k = [...table.querySelectorAll('thead th')].findIndex((cell) => cell.textContent === 'offset');"
        "return Math.max(...[...table.querySelectorAll('tbody tr')].map((row) => Math.abs(Number(row.children[k]"
        ".textContent.replace('−', '-')))))})"
    )
    assert offsets == sorted(offsets, reverse=True)
    assert offsets[0] > 0
    words = browser.run("document.querySelector('.members .what').innerText")
    assert words.startswith("right, ")
    assert "nats a token" in words
    sides = "[...document.querySelector('.pair').children].map((side) => side.innerText)"
    right, wrong = browser.run(sides)
    assert "reward 1" in right
    assert "reward 0" not in right
    assert "reward 0" in wrong
    browser.point_at("document.querySelector('.pair .t')")
    assert all(word in browser.panel() for word in ("return", "offset", "margin after"))
    curves = browser.run("document.getElementById('curves').innerText")
    wanted = ("margins of prompts", "balancer keeps", "before training: a", "before training: b")
    assert all(title in curves for title in wanted)
    browser.run("document.querySelector('[aria-label^=\"prompts by right answers\"]').scrollIntoView()")
    browser.until("document.querySelectorAll('#curves .bars .point').length > 0")
    for width in (1280, 390):
        browser.size(width, 844, mobile=width < 500)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.problems == []


@pytest.mark.slow
def test_in_a_browser_two_thousand_rollouts_open_in_three_seconds(browser, tmp_path):
    run = write_run(tmp_path / "big", steps=400, prompts=200, tokens=32, evaluations=10)
    out = write_report([run], tmp_path / "page.html")
    assert out.stat().st_size < 10_000_000
    browser.open(out.as_uri())
    shown = browser.run("performance.getEntriesByName('opd rollouts shown')[0].startTime")
    browser.until("performance.getEntriesByName('opd charts ready').length > 0")
    charts = browser.run("performance.getEntriesByName('opd charts ready')[0].startTime")
    print(f"2,000 rollouts: {out.stat().st_size / 1e6:.2f} MB, shown in {shown:.0f} ms, with charts in {charts:.0f} ms")
    assert shown < 3000
    assert "200 rollouts" in browser.run("document.querySelector('.pager').innerText")


@pytest.mark.slow
def test_in_a_browser_the_live_page_follows_the_run(browser, served):
    run, port = served
    browser.open(f"http://127.0.0.1:{port}/")
    assert "4 of 4 steps" in browser.run("document.querySelector('.states').innerText")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "held_out/reverse_kl": 0.125, "train/new": 3, "train/schedule/temperature": 1}\n')
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(held_out_row(9, 0)) + "\n")
    browser.until("document.querySelector('.states').innerText.includes('9 of 4 steps')")
    assert "0.125" in browser.run("document.getElementById('summary').innerText")
    browser.until("document.querySelector('.card .meta').innerText.includes('step 9')")
    curves = browser.run("document.getElementById('curves').innerText")
    assert "new" in curves
    assert "schedule of temperature" in curves
    (run / "summary.json").write_text('{"seconds": 3}')
    browser.until("document.querySelector('.live').textContent === 'finished'")
    (run / "recipe.yaml").write_text("name: another\n")
    os.utime(run / "recipe.yaml", (1, 1))
    browser.until("document.getElementById('recipe')?.innerText.includes('another')")
    assert browser.problems == []


def test_the_size_limit_leaves_room_for_the_page_itself():
    from plotly.offline import get_plotlyjs

    assert len(get_plotlyjs()) < LARGEST - 3_000_000
