"""What a page is made of: rollouts that come back as they were written, curves, charts, and layers."""

from __future__ import annotations

import json
import math
import re

import pytest

from opd.report import Bars, Curves, Layer, Line, register, register_chart
from opd.report.charts import registered_charts
from opd.report.curves import POINTS, curves, extremes
from opd.report.layers import registered
from opd.report.page import collect, page
from opd.report.rows import choose_held_out, choose_training, encode, evenly, scan
from tests.reports import ATTACK, held_out_row, unpack, write_lines, write_run

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


# ---- curves and charts ----


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


def test_charts_of_several_names_are_declared_and_from_outside_too(monkeypatch):
    monkeypatch.setattr("opd.report.charts._charts", [])
    mine = Curves("mine", (Line("train/mine", "mine", low="train/mine_p10", high="train/mine_p90"),), "nats")
    assert register_chart(mine) is register_chart(mine) is mine
    (found,) = registered_charts()
    assert (found["kind"], found["title"], found["lines"][0]["high"]) == ("curves", "mine", "train/mine_p90")
    register_chart(Bars("counts", (("train/counts/", "counts"),), "of what"))
    assert [chart["kind"] for chart in registered_charts()] == ["curves", "bars"]


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
