"""The step benchmarks: that sides are given the same work, and that the clocks count what they say."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer

from benchmarks import flow_step, lengths, pages, phases, pictured, scaling, sizes, store, vision_step
from benchmarks.bare import FloorSession
from benchmarks.contestants import FLOOR, OPD, OpdSession
from benchmarks.head_to_head import utilisation
from benchmarks.phases import Phases
from benchmarks.session import Job
from benchmarks.sizes import ON_DEVICE, ForcedLengths, Shape, Size, materialise
from benchmarks.time_to_quality import Curve, judge, prune, smoothed
from benchmarks.utilisation import body
from benchmarks.vision_contestants import BarePictures, OpdPictures
from tests.test_gpu import cuda

SIZE = Size("test", 48, Shape(32, 2, 2), Shape(48, 1, 4), batch=4, shortest=2, longest=12, prompt=(6, 10))


@pytest.fixture
def ticks(monkeypatch):
    """A clock that advances by one second of CPU and two of wall each time that it is read."""
    counter = itertools.count()
    monkeypatch.setattr(phases, "_now", lambda: (float(tick := next(counter)), 2.0 * tick))


def test_a_phase_inside_another_stops_it(ticks):
    clock = Phases()
    with clock("loss"), clock("teacher"):
        pass
    assert clock.take() == {
        "cpu": {"rest": 2.0, "loss": 2.0, "teacher": 1.0},
        "wall": {"rest": 4.0, "loss": 4.0, "teacher": 2.0},
    }


def test_a_clock_that_showed_no_time_divides_nothing():
    """Clocks of processes advance by ticks on some machines."""
    assert phases.over(6.0, 2.0) == 3.0
    assert math.isnan(phases.over(6.0, 0.0))


def test_nothing_interrupts_a_rollout(ticks):
    clock = Phases()
    with clock("rollout"), clock("student"):
        pass
    assert clock.take()["cpu"] == {"rest": 2.0, "rollout": 1.0}


def test_measuring_costs_nothing(monkeypatch):
    now = 0.0
    monkeypatch.setattr(phases, "_now", lambda: (now, now))
    curve = Curve()
    for step in range(3):
        with curve.measuring(step) as point:
            point["accuracy"] = 0.5
            now += 100
        now += 1
    assert [(p["step"], p["cpu_seconds"], p["accuracy"]) for p in curve.points] == [
        (0, 0, 0.5),
        (1, 1, 0.5),
        (2, 2, 0.5),
    ]


def test_every_step_has_short_and_long_completions():
    lengths = SIZE.lengths(10)
    for start in range(0, 40, 4):
        step = lengths[start : start + 4]
        assert min(step) <= 2 * 6 ** (1 / 4) + 0.5
        assert max(step) >= 2 * 6 ** (3 / 4) - 0.5
    assert lengths == SIZE.lengths(11)[:40]


def test_an_end_is_forbidden_before_its_time_and_certain_then():
    forced = ForcedLengths.of([[5], [6, 7]], [3, 1], ends=[0, 2])
    wanted = forced.wanted([torch.tensor([6, 7]), torch.tensor([5])])
    assert wanted.tolist() == [1, 3]
    first = torch.softmax(forced.apply(torch.zeros(2, 4), wanted, 0), -1)
    assert first.tolist() == [[1, 0, 0, 0], [0, 0.5, 0, 0.5]]


def test_opd_and_the_floor_do_the_same_step(monkeypatch, tmp_path):
    """Equal loss and gradient on equal completions, and steps that sample what the schedule says."""
    monkeypatch.setattr(sizes, "MODELS", tmp_path)
    materialise(SIZE)
    ours, bare = (session(Job(name, SIZE)) for name, session in (("opd", OpdSession), ("floor", FloorSession)))
    completions = ours.examples()
    mine, theirs = ours.score(completions), bare.score(completions)
    assert theirs.loss == pytest.approx(mine.loss, rel=1e-5)
    assert theirs.gradient_norm == pytest.approx(mine.gradient_norm, rel=1e-5)
    assert theirs.gradient_component == pytest.approx(mine.gradient_component, abs=1e-5 * mine.gradient_norm)
    for session in (ours, bare):
        steps = itertools.count(1)
        session.train(lambda steps=steps: next(steps) < 2)
        assert session.sampled == sum(SIZE.lengths(2))
        assert {"rollout", "teacher", "student", "loss", "backward", "optimizer"} <= session.phases.take()["cpu"].keys()


def test_products_are_counted_as_torch_counts_them(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "MODELS", tmp_path)
    materialise(SIZE)
    bare = FloorSession(Job("floor", SIZE))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.student.prefill([torch.tensor([7])])
    assert body(bare.student.config.to_dict(), 1) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_a_step_of_models_made_on_the_device(device, monkeypatch, tmp_path):
    """What `make gpu` runs at the size of Qwen3, small."""
    monkeypatch.setattr(sizes, "MODELS", tmp_path)
    size = ON_DEVICE["qwen3-tiny"]
    materialise(size)
    assert not list(tmp_path.rglob("*.safetensors"))
    session = OpdSession(Job("opd", size, "bf16", device=device))
    assert {p.dtype for p in session.run.student.module.parameters()} == {torch.float32}
    assert {p.dtype for p in session.run.teachers[0].language.parameters()} == {torch.bfloat16}
    assert session.score(session.examples()).gradient_norm > 0
    steps = itertools.count(1)
    session.train(lambda: next(steps) < 2)
    assert session.sampled == sum(size.lengths(2))
    found = utilisation(size, "bf16", device, [session.phases.take()])
    # Of so small a step the clock may show nothing.
    assert found["step"] > 0 or math.isnan(found["step"])
    assert set(found["by_phase"]) == {"rollout", "teacher", "student", "loss", "backward"}


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_what_unequal_lengths_cost(device, monkeypatch, tmp_path):
    """What `make gpu` runs at the size of Qwen3, small."""
    monkeypatch.setattr(sizes, "MODELS", tmp_path)
    size = ON_DEVICE["qwen3-tiny"]
    found = lengths.measure(size, device, 1)
    assert 0 < found["layouts"]["padding"] < 1
    assert found["layouts"]["apart"] < 0.05
    for sides in (*found["layouts"]["seconds"].values(), found["looks"]["seconds"]):
        assert [len(seconds) for seconds in sides.values()] == [1, 1]
    assert len(set(found["looks"]["rows"])) > 1
    assert found["looks"]["same"] > 0
    assert len(lengths.told(found)) == 3
    if device == "cpu":
        assert found["layouts"]["attention"] == "sdpa"
        assert "flash attention is not there" in found["note"]
        monkeypatch.setattr(lengths, "can_flatten", lambda model: False)
        skipped = lengths.layouts(lengths.language_of(size, device, False), size, device, 1)
        assert lengths.told({"layouts": skipped})[0] == "layouts skipped: the family 'qwen3' is padded always"


def test_a_public_models_shape_is_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "MODELS", tmp_path)
    small = replace(ON_DEVICE["qwen3"], vocabulary=64)
    materialise(small)
    config = AutoConfig.from_pretrained(small.folder / "student")
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (2048, 28, True)
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(small.folder / "student")) == 64


def test_a_step_of_flow_opd_takes_turns_with_a_bare_loop_of_the_same_loss(tmp_path):
    cell = flow_step.measure(flow_step.QUICK, 2, tmp_path)
    assert {name: len(steps) for name, steps in cell["steps"].items()} == {"opd": 2, "bare": 2}
    assert cell["loss_error"] < 1e-5
    assert all(step["cpu"] > 0 for steps in cell["steps"].values() for step in steps)
    slow = {**cell, "ratio": {"cpu": 0.5, "wall": 1.0}}
    assert [goal["met"] for goal in flow_step.judge([slow])] == [False, True]
    assert f"| {flow_step.QUICK.name} | 4 | 4 |" in pages._flow_step({"cells": [slow]})


@pytest.mark.parametrize(("family", "group"), [("qwen2_5_vl", 2), ("idefics3", 1)])
def test_opd_and_the_bare_loop_do_the_same_step_with_pictures(family, group, monkeypatch, tmp_path):
    """Equal loss and gradient on equal completions, each under its own picture, and as many tokens a step."""
    monkeypatch.setattr(pictured, "MODELS", tmp_path)
    monkeypatch.setattr("benchmarks.session.STEPS", 2)
    monkeypatch.setattr(pictured, "POOL", 4)
    monkeypatch.setattr(pictured, "TEXT", Shape(32, 1, 4))
    size = replace(vision_step.SIZES[0], vocabulary=20, batch=2, group=group, shortest=3, longest=3, family=family)
    pictured.materialise(size, 2)
    ours, bare = (kind(Job(name, size)) for name, kind in ((OPD, OpdPictures), (FLOOR, BarePictures)))
    completions = ours.examples()
    mine, theirs = ours.score(completions), bare.score(completions)
    assert theirs.loss == pytest.approx(mine.loss, rel=1e-5)
    assert theirs.gradient_norm == pytest.approx(mine.gradient_norm, rel=1e-5)
    assert theirs.gradient_component == pytest.approx(mine.gradient_component, abs=1e-5 * mine.gradient_norm)
    same = BarePictures(Job(FLOOR, replace(size, sees="image"))).score(completions)
    assert same.loss != pytest.approx(mine.loss, rel=1e-3)
    for side in (ours, bare):
        side.train(lambda: False)
        assert side.sampled == 2 * group * 3
    # Completions that share a prompt come to the same as each alone.
    given, other, drawn = bare.read(0, 2, "image"), bare.read_other(0, 2), torch.tensor(completions)
    assert bare.descend(given, other, drawn.repeat_interleave(2, 0), 2) == pytest.approx(
        bare.descend(given, other, drawn, 1), rel=1e-5
    )


def test_goals_of_steps_with_pictures_are_judged_by_the_worst_cell():
    cells = [
        {
            "size": {"group": group},
            "over_floor": {"cpu": over},
            "peer_over_opd": {"cpu": peer},
            "loss_error": 1e-7,
            "gradient_error": 1e-6,
            "peer_loss_error": 1e-3,
        }
        for group, over, peer in ((1, 1.0, 1.2), (4, 1.1, 2.2), (4, 1.2, 2.5))
    ]
    found = vision_step.judge(cells)
    assert [(goal["figure"], goal["met"]) for goal in found] == [
        (1.2, False),
        (2.2, True),
        (1.2, False),
        (1e-6, True),
        (1e-3, True),
    ]


def test_two_processes_share_a_step_and_take_turns_with_one():
    found = scaling.two_processes(replace(SIZE, batch=2), "DDP", 2)
    assert [(of["prompts"], len(of["speed_up"])) for of in found] == [(2, 2), (4, 2)]
    assert all(of["loss_error"] < 1e-5 and of["gradient_error"] < 1e-5 for of in found)
    speeds = found[1]["tokens_per_second"]["two"], found[0]["tokens_per_second"]["one"]
    assert found[1]["speed_up_per_process"] == [two / one for two, one in zip(*speeds, strict=True)]
    fast = [*found[:1], {**found[1], "speed_up_per_process": [1.5, 1.9, 1.8]}]
    assert [(goal["figure"], goal["met"]) for goal in scaling.judge([], fast)][:2] == [(None, None), (1.8, True)]
    assert "| DDP | 4 |" in pages._scaling({"points": [], "processes": fast})


def test_goals_without_results_are_said_to_be_unmeasured(tmp_path):
    text = pages.benchmarks(tmp_path)
    goals = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(goals) == 18
    assert all("not measured yet" in line for line in goals)


def test_time_to_quality_needs_every_seed_to_arrive():
    def runs(seconds, reached):
        return {"runs": [{"reached": r, "cpu_seconds_to_goal": s} for s, r in zip(seconds, reached, strict=True)]}

    there = {"opd": runs([10, 20, 30], [1, 1, 1]), "TRL on-policy": runs([50, 70, 80], [1, 1, 1])}
    assert [(g["figure"], g["met"]) for g in judge(there)] == [(3.5, True)]
    assert not judge({**there, "opd": runs([10, 24, 30], [1, 1, 1])})[0]["met"]
    # Who ends below the goal has no time to it, however cheap the run was.
    assert [(g["figure"], g["met"]) for g in judge({**there, "opd": runs([1, 1, 1], [1, 0, 1])})] == [(None, False)]
    assert [(g["figure"], g["met"]) for g in judge({})] == [(None, None)]


def test_one_lucky_measurement_is_no_arrival():
    curve = Curve(goal=0.6)
    for accuracy in (0.2, 0.5, 0.7, 0.5, 0.55, 0.8):
        assert not curve.there
        with curve.measuring(len(curve.points)) as point:
            point["greedy_accuracy"] = accuracy
    assert curve.there
    expected = [0.2, 0.35, 1.4 / 3, 1.7 / 3, 1.75 / 3, 1.85 / 3]
    assert [point["greedy_accuracy"] for point in smoothed(curve.points)] == pytest.approx(expected)


def test_pruning_keeps_the_neurons_with_the_largest_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    from opd.language.creation import create_model, task_tokenizer

    create_model(tmp_path / "whole", task_tokenizer("running_sum"), width=16, layers=2, heads=2)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    kept = []
    for i, layer in enumerate(whole.model.layers):
        size = layer.mlp.up_proj.weight.shape[0]
        kept.append([j for j in range(size) if j % 2 == i])
        gone = [j for j in range(size) if j % 2 != i]
        layer.mlp.up_proj.weight.data[gone] = 0.0  # half of the neurons do nothing: nobody misses them
    whole.save_pretrained(tmp_path / "whole")
    prune(tmp_path / "whole", tmp_path / "half", 0.5)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for layer, before, neurons in zip(half.model.layers, whole.model.layers, kept, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, before.mlp.gate_proj.weight[neurons])
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(half(ids).logits, whole(ids).logits)
    assert (tmp_path / "half" / "tokenizer.json").exists()


def test_the_stores_goals_are_judged_by_its_figures():
    rows = [
        {"kind": "exact bfloat16", "gradient error": 2e-3, "waiting": 0.001},
        {"kind": "exact float32", "gradient error": 0.0, "waiting": 0.003},
    ]
    cost = {"waiting": 0.01, "compute": 8.0, "cpu": {"live over stored, a step": 4.5}}
    assert [goal["met"] for goal in store.judge(rows, cost)] == [False, True, True, True, True]
    cost |= {"waiting": 0.03, "compute": 4.0}
    assert [goal["met"] for goal in store.judge(rows, cost)] == [False, True, False, False, True]


def test_the_stores_page_shows_the_committed_figures():
    text = pages.store(pages.ROOT / "benchmarks/results")
    assert text.strip() in (pages.ROOT / "docs/store.md").read_text(encoding="utf-8")
    assert "| live over stored, a step |" in text
