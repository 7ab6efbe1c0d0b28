"""How a run is followed where nothing can be written over: lines now and then, and nobody else's bars."""

from __future__ import annotations

import io

import datasets
import pytest
from huggingface_hub import utils as hub
from rich.console import Console
from transformers.utils import logging as transformers_logging

from opd.api import execute
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.progress import SILENCE, Bar, Lines, shows_bars, without_library_bars
from tests.test_loop import models, recipe_for  # noqa: F401


def log():
    """A console as it is when stderr is a file."""
    return Console(file=io.StringIO(), width=40)


def steps_shown(console):
    lines = console.file.getvalue().splitlines()
    return [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]


@pytest.mark.parametrize(
    ("steps", "seconds", "first", "expected"),
    [
        (100, 0.1, 0, [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (7, 0.1, 0, [1, 2, 3, 4, 5, 6, 7]),
        # A step of 13 s: every third one is more than half a minute after the last line.
        (100, 13.0, 0, [1, 4, 7, 10, 13, 16, 19, 20]),
        # One that was resumed speaks at its first step, not at the run's.
        (100, 0.1, 42, [43, 50, 60, 70, 80, 90, 100]),
    ],
)
def test_a_log_file_gets_lines_at_tenths_and_when_it_was_silent_for_long(steps, seconds, first, expected):
    console, now = log(), iter(range(1000))
    lines = Lines(console, first, steps, clock=lambda: next(now) * seconds)
    for step in range(first + 1, steps + 1):
        lines.update(step, "divergence 0.5")
    shown = steps_shown(console)
    assert shown[: len(expected)] == expected
    assert shown[-1] == steps
    assert seconds < SILENCE
    last = console.file.getvalue().splitlines()[-1]
    assert last == f"step {steps}/{steps}  divergence 0.5  left 0:00:00"


def test_the_time_that_is_left_is_that_of_the_steps_done_here():
    console, now = log(), iter([0.0, 120.0])
    lines = Lines(console, 50, 100, clock=lambda: next(now))
    lines.update(51, "x")
    assert "left 1:38:00" in console.file.getvalue()


def test_a_run_whose_output_is_a_file_says_what_it_does(models, tmp_path):  # noqa: F811
    console = log()
    recipe = recipe_for(models, tmp_path, steps=2)
    execute(recipe, console=console)
    text = console.file.getvalue()
    opening, loading, measuring, *rest = text.splitlines()
    assert opening == f"run t: student {models[0]}, teacher {models[1]}, 2 steps of 16 trajectories, in {tmp_path}/run"
    assert (loading.split()[0], measuring) == ("loading", "measuring the student before training")
    assert steps_shown(console) == [1, 2]
    assert "divergence" in rest[0]
    assert "tok/s" in rest[0]
    assert "\x1b" not in text
    silent = Console(file=io.StringIO(), quiet=True)
    execute(recipe, console=silent, overwrite=True)
    assert silent.file.getvalue() == ""


@pytest.mark.parametrize(
    ("objective", "called"), [("sft", "nll"), (["sft", "forward_kl"], "nll"), ("forward_kl", "divergence")]
)
def test_a_line_calls_the_value_what_it_is(objective, called, models, tmp_path):  # noqa: F811
    console = log()
    rollout = {"kind": "teacher", "max_new_tokens": 6}
    result = execute(recipe_for(models, tmp_path, steps=1, objective=objective, rollout=rollout), console=console)
    (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("step 1/1")]
    (logged,) = [record for record in result.history if "train/loss" in record]
    values = {called: logged["train/divergence"]}
    if isinstance(objective, list):
        # Of several each has its own: a first one of 0 would hide what the others are.
        values = {name: logged[f"train/objective/{name}"] for name in objective}
    assert "  ".join(f"{name} {value:.3f}" for name, value in values.items()) + "  length" in line
    assert logged.get("train/nll", logged["train/divergence"]) == pytest.approx(logged["train/divergence"], rel=1e-5)
    assert ("train/nll" in logged) == (called == "nll")


def test_jobs_on_shards_say_in_a_log_file_how_far_they_are(models, tmp_path, capfd):  # noqa: F811
    recipe = recipe_for(models, tmp_path, rollout={"max_new_tokens": 4})

    def said(what):
        return [line for line in capfd.readouterr().err.splitlines() if line.startswith(what)]

    store = sample(recipe, tmp_path / "store", prompts_per_shard=8)
    first, *shards = said("sampling")
    assert first == "sampling: 3 of 3 shards are to be written"
    assert [line.split("  ")[0] for line in shards] == [f"sampling, shard {i}/3" for i in (1, 2, 3)]
    score(recipe, store.path)
    assert said("scoring")[-1] == "scoring, shard 3/3  left 0:00:00"
    score(recipe, store.path)
    assert said("scoring") == ["scoring: 0 of 3 shards are to be written"]
    score(recipe, store.path, name="quiet", quiet=True)
    assert said("scoring") == []


def test_a_terminal_has_a_bar():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert shows_bars(terminal)
    assert not shows_bars(log())
    bar = Bar(terminal, 0, 10)
    bar.update(10, "divergence 0.5")
    bar.stop()
    assert "10/10" in terminal.file.getvalue()


def bars():
    return (
        transformers_logging.is_progress_bar_enabled(),
        not datasets.are_progress_bars_disabled(),
        not hub.are_progress_bars_disabled(),
    )


@without_library_bars()
def failing_inside():
    assert bars() == (False, False, False)
    raise KeyError("inside")


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
def test_bars_of_the_libraries_are_off_and_then_as_they_were(wanted):
    switches = (
        (transformers_logging.enable_progress_bar, transformers_logging.disable_progress_bar),
        (datasets.enable_progress_bars, datasets.disable_progress_bars),
        (hub.enable_progress_bars, hub.disable_progress_bars),
    )
    before = bars()
    try:
        for (on, off), is_on in zip(switches, wanted, strict=True):
            (on if is_on else off)()
        if bars() != wanted:
            pytest.skip("the environment decides about bars")
        with pytest.raises(KeyError, match="inside"):
            failing_inside()
        assert bars() == wanted
    finally:
        for (on, off), is_on in zip(switches, before, strict=True):
            (on if is_on else off)()
