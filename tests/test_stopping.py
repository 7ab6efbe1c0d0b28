"""Held-out measurements that end a run, and the alarm for samples that degenerate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import opd.monitor
from opd.api import execute, export
from opd.cli.display import best_line, show_result
from opd.drafting.evaluation import DraftEvaluation
from opd.errors import RecipeError
from opd.language.evaluation import LanguageEvaluation
from opd.policies.evaluation import Alarm, Evaluation, Stop
from opd.recipe import parse_recipe
from opd.report.page import collect
from opd.stopping import Watch, best_of
from tests.checkpoints import make, models  # noqa: F401


class Run:
    """What a watch asks of a run."""

    def __init__(self, **before):
        self.heard: list[str] = []
        self.monitor = SimpleNamespace(before=SimpleNamespace(metrics=before), warn=self.heard.append)


def watching(stop=None, alarm=None, kind=LanguageEvaluation):
    return Watch(kind(every=1, stop=stop, alarm=alarm))


def ends_at(stop, metric, values, kind=LanguageEvaluation):
    watch = watching(stop, kind=kind)
    for step, value in enumerate(values):
        watch.read(Run(), step, {metric: value})
        if watch.ended_by is not None:
            return step
    return None


def test_patience_counts_evaluations_since_the_best_one():
    down = [3.0, 2.0, 2.5, 1.9, 1.95, 2.0, 1.0]
    assert ends_at(Stop(patience=2), "reverse_kl", down) == 5
    assert ends_at(Stop(patience=3), "reverse_kl", down) is None
    # Only a gain of half a nat over the best counts: 1.9 is none over 2.0.
    assert ends_at(Stop(patience=2, least_gain=0.5), "reverse_kl", down) == 3
    up = [0.1, 0.4, 0.3, 0.4, 0.5]
    assert ends_at(Stop(metric="accuracy", patience=2), "accuracy", up) == 3
    assert ends_at(Stop(metric="accuracy", patience=1), "accuracy", up) == 2
    longer = [1.1, 1.6, 1.5, 1.6, 2.0]
    assert ends_at(Stop(metric="acceptance_length", patience=2), "acceptance_length", longer, DraftEvaluation) == 3
    watch = watching(Stop(patience=1))
    watch.read(Run(), 1, {})
    assert watch.ended_by is None


def test_an_alarm_rings_once_for_each_time_outside_of_the_band():
    run, watch = Run(length=10.0, student_entropy=2.0), watching(None, Alarm(length=(0.5, 2), entropy=(0.5, 2)))
    for step, length, entropy in [(1, 12, 2), (2, 21, 2), (3, 30, 0.9), (4, 19, 0.5), (5, 4, 0.8)]:
        watch.read(run, step, {"length": length, "student_entropy": entropy})
    assert [text.split(" is ")[0] for text in watch.alarms] == [
        "step 2: held-out length",
        "step 3: held-out student_entropy",
        "step 5: held-out length",
    ]
    assert "2.1 times what it was before training" in watch.alarms[0]
    assert len(run.heard) == 3
    assert watch.ended_by is None
    only = watching(None, Alarm(length=None, entropy=(0.5, 2), stop=True))
    only.read(run, 1, {"length": 1e6, "student_entropy": 2.0})
    assert only.ended_by is None
    only.read(run, 2, {"length": 1e6, "student_entropy": 0.1})
    assert only.ended_by == only.alarms[0]


def measuring(monkeypatch, values):
    """Held-out metrics as `values` has them by step, beside those that are measured."""
    evaluate = opd.monitor.evaluate

    def changed(run):
        found = evaluate(run)
        found.metrics.update(values[run.step])
        return found

    monkeypatch.setattr("opd.monitor.evaluate", changed)


def test_a_run_ends_when_it_no_longer_gains_and_goes_on_when_the_recipe_says_so(make, monkeypatch):  # noqa: F811
    measuring(monkeypatch, {step: {"reverse_kl": max(0.3, 1 - step / 3)} for step in range(7)})
    evaluation = {"held_out": 2, "every": 1, "stop": {"patience": 2}}
    recipe = make("run", evaluation=evaluation, checkpoint={"every": 1})
    result = execute(recipe, quiet=True)
    # 1, 0.67, 0.33, 0.3, 0.3, 0.3: the second one without a gain is that of step 5.
    assert result.summary["steps"] == 5
    assert result.summary["ended_by"] == "step 5: held-out reverse_kl has not gained in 2 evaluations (best 0.3)"
    assert result.summary["stopped_early"]
    assert json.loads((recipe.directory / "summary.json").read_text())["stopped_early"]
    assert execute(recipe, quiet=True, resume=True).summary["steps"] == 5
    patient = make("run", evaluation={**evaluation, "stop": {"patience": 9}}, checkpoint={"every": 1})
    summary = execute(patient, quiet=True, resume=True).summary
    assert (summary["steps"], summary["ended_by"], summary["stopped_early"]) == (6, None, False)


def test_the_end_says_which_step_was_the_best_and_how_to_get_it(make, monkeypatch, capsys, tmp_path):  # noqa: F811
    values = [5.0, 3.0, 1.0, 2.0, 4.0, 4.0, 4.0]
    measuring(monkeypatch, {step: {"reverse_kl": value} for step, value in enumerate(values)})
    evaluation = {"held_out": 2, "every": 1}
    recipe = make("kept", evaluation=evaluation, checkpoint={"every": 4, "keep_last": 1, "keep_best": "reverse_kl"})
    result = execute(recipe, quiet=True)
    best = {"metric": "reverse_kl", "value": 1.0, "step": 2, "stored": True}
    assert json.loads((recipe.directory / "summary.json").read_text())["best"] == best
    show_result(result, recipe)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best:")]
    command = line.split("; ")[1].split()
    assert command[:3] == ["opd", "export", str(recipe.directory)]
    assert export(Path(command[2]), Path(command[3]), int(command[5])).is_dir()
    # The one that ended the run is not kept, and the line says how it would have been.
    recipe = make("stopped", evaluation={**evaluation, "stop": {"patience": 2}}, checkpoint={"every": 0})
    line = best_line(execute(recipe, quiet=True))
    assert "at step 2" in line
    assert line.endswith("checkpoint.keep_best=reverse_kl keeps it")
    assert execute(make("plain", evaluation=evaluation), quiet=True).summary["best"] is None


def test_the_best_of_a_log_is_the_last_where_that_is_as_good():
    def best(*values, metric="reverse_kl", kind=LanguageEvaluation):
        return best_of([{"step": i, f"held_out/{metric}": value} for i, value in enumerate(values)], metric, kind)

    assert best(3.0, 1.0, 2.0, 1.0, 4.0) == (1, 1.0)
    assert best(3.0, 1.0, 2.0, 1.0) == (3, 1.0)
    assert best(0.1, 0.3, float("nan"), metric="accuracy") == (1, 0.3)
    assert best(float("nan")) is None
    assert best(1.2, 2.5, 2.5, 1.9, metric="acceptance_length", kind=DraftEvaluation) == (1, 2.5)
    assert best_of([{"step": 1, "train/loss": 2.0}], "reverse_kl", LanguageEvaluation) is None


def test_a_collapse_is_said_and_may_end_the_run(make, monkeypatch, capsys):  # noqa: F811
    measuring(monkeypatch, {step: {"student_entropy": 2.0 if step < 2 else 0.1, "length": 5.0} for step in range(7)})
    recipe = make("warned", evaluation={"every": 1})
    result = execute(recipe, quiet=True)
    assert result.summary["steps"] == 6
    assert len(result.summary["alarms"]) == 1
    assert "step 2: held-out student_entropy is 0.1, 0.05 times" in capsys.readouterr().err
    assert json.loads((recipe.directory / "summary.json").read_text())["alarms"] == result.summary["alarms"]
    (page,) = collect([recipe.directory])["runs"]
    assert any("student_entropy is 0.1" in note for note in page["notes"])
    show_result(result, recipe)
    assert "alarm: step 2: held-out student_entropy" in capsys.readouterr().out
    recipe = make("ended", evaluation={"every": 1, "alarm": {"stop": True}})
    assert execute(recipe, quiet=True).summary["steps"] == 2
    recipe = make("deaf", evaluation={"every": 1, "alarm": None})
    assert execute(recipe, quiet=True).summary["alarms"] == []


def test_each_measure_says_what_is_better():
    for kind in (Evaluation, *Evaluation.__subclasses__()):
        assert set(kind.measures.values()) <= {"larger", "smaller"}
        assert kind.measures.items() >= Evaluation.measures.items()
    assert LanguageEvaluation.rank("accuracy", 0.5) == 0.5
    assert LanguageEvaluation.rank("forward_kl", 0.5) == -0.5
    assert DraftEvaluation.rank("acceptance_length", 2.0) > DraftEvaluation.rank("acceptance_length", 1.0)


def test_a_metric_that_does_not_say_what_is_better_is_refused(make):  # noqa: F811
    for evaluation, checkpoint in (
        ({"every": 1, "stop": {"metric": "acceptance_lenght"}}, {}),
        ({"every": 1}, {"every": 1, "keep_best": "student_entropy"}),
    ):
        with pytest.raises(RecipeError, match=r"is no metric that says .*these do: reverse_kl, accuracy"):
            make("run", evaluation=evaluation, checkpoint=checkpoint)
    drafter = {
        "student": {"kind": "draft", "target": "x", "drafter": {"kind": "chain"}},
        "teacher": {"kind": "target"},
        "prompts": {"kind": "inline", "prompts": ["a", "b"]},
        "rollout": {"kind": "speculative"},
        "objective": "accepted",
        "evaluation": {"held_out": 1, "every": 1, "stop": {"metric": "acceptance_length"}},
        "checkpoint": {"every": 1, "keep_best": "acceptance_length"},
    }
    assert parse_recipe(drafter).checkpoint.keep_best == "acceptance_length"
    drafter["evaluation"]["stop"] = {"metric": "acceptance_lenght"}
    with pytest.raises(RecipeError, match=r"did you mean 'acceptance_length'"):
        parse_recipe(drafter)


def test_what_cannot_end_a_run_is_refused(make):  # noqa: F811
    for block in ({"stop": {}}, {"alarm": {"stop": True}}):
        with pytest.raises(RecipeError, match=r"set evaluation\.every"):
            make("run", evaluation={"every": 0, **block})
    with pytest.raises(RecipeError, match=r"a band is \[low, high\] around 1"):
        make("run", evaluation={"alarm": {"length": [2, 3]}})
    recipe = make("run", evaluation={"every": 1, "stop": {"metric": "accuracy"}})
    with pytest.raises(RecipeError, match=r"evaluation.stop.metric is 'accuracy'.*reverse_kl"):
        execute(recipe, quiet=True)
