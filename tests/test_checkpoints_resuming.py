"""A run that is killed goes on as if nothing had happened, whatever has a state in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml

from opd.api import execute
from opd.checkpoints.store import folder_of, read, steps_stored
from opd.curricula.shuffled import ShuffledCourse
from opd.errors import RunError
from opd.shaping import Shape, Shaper
from tests.checkpoints import EMA, assert_same_run, final, killed_at, logged, make, models, records, until  # noqa: F401
from tests.processes import together
from tests.test_loop import TEXTS

RUNGS = {"steps_per_rung": 3, "minimum_share": 0.01}

WAYS = {
    "full": {},
    "scheduled": {"update": {"learning_rate": {"kind": "cosine", "start": 1e-2, "warmup": 1}}},
    # Its gate is asked at step 3, in the middle of a run that dies there.
    "length ladder": {"whole": {"curriculum": {"kind": "length_ladder", "lengths": [3, 5], **RUNGS}}},
    # Without the self-test the student is left in training mode, and dropout draws from torch's generator.
    "lora with dropout": {"student": {"lora": {"rank": 2, "dropout": 0.2}}, "self_test": False},
    "part frozen": {"student": {"freeze": ["embed_tokens"]}},
    "ema teacher": {"whole": EMA},
    "ema teacher of lora": {"student": {"lora": {"rank": 2}}, "whole": EMA},
    "equal prompts, no self-test": {"prompts": {"prompts": [t for t in TEXTS if len(t) == 4]}, "self_test": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(way, make, monkeypatch):  # noqa: F811
    undisturbed, broken = make("undisturbed", **WAYS[way]), make("broken", **WAYS[way])
    execute(undisturbed, quiet=True)
    killed_at(monkeypatch, broken, 3)
    killed_at(monkeypatch, broken, 5, resume=True)
    result = execute(broken, resume=True, quiet=True)
    assert_same_run(undisturbed, broken)
    assert [r["step"] for r in result.history if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    # A ladder measures at the end of its last rung, and so does the run.
    assert sorted({r["step"] for r in result.history if "held_out/length" in r}) == [0, 3, 6]
    assert len(result.samples) == 1


class Remembering(Shaper):
    """A built shaping with a state: positions weigh less from step to step."""

    def __init__(self):
        self.asked = 0

    def __call__(self, student, targets, micro, settings):
        self.asked += 1
        return Shape(torch.full((micro.positions,), 1 / self.asked))

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


@pytest.mark.parametrize("kind", ["mixture", "switch"])
def test_states_of_a_shaping_and_of_sources_in_a_combination_are_in_it(kind, make, monkeypatch):  # noqa: F811
    """Two responses a row take turns by the visits of the row, which only the source inside the combination counts."""
    monkeypatch.setattr("opd.shaping.uniform.Uniform.build", lambda self, context: Remembering(), raising=False)
    rows = [{"prompt": text, "response": [f"{text}1", f"{text}22", f"{text}333"]} for text in TEXTS[:6]]
    data, student = {"kind": "data", "max_new_tokens": 6}, {"kind": "student", "max_new_tokens": 6}
    rollout = {
        "mixture": {"kind": "mixture", "first": data, "second": student, "share": 0.9},
        "switch": {"kind": "switch", "first": data, "then": student, "position": 5},
    }[kind]
    whole = {
        "rollout": rollout,
        "objective": [{"kind": "forward_kl"}],
        "prompts": [{"kind": "inline", "prompts": rows}],
    }
    undisturbed, broken = (make(name, whole=whole, self_test=False) for name in ("undisturbed", "broken"))
    execute(undisturbed, quiet=True)
    killed_at(monkeypatch, broken, 3)
    execute(broken, resume=True, quiet=True)
    assert_same_run(undisturbed, broken)
    parts = read(folder_of(broken.directory, steps_stored(broken.directory)[0]))["parts"]
    assert parts["shaping.0"] == {"asked": 6}
    assert sum(parts["rollout.0"]["visits"].values()) > 12


def test_a_run_killed_before_its_first_checkpoint_starts_again(make, monkeypatch):  # noqa: F811
    undisturbed, broken = make("undisturbed"), make("broken", resume="auto")
    execute(undisturbed, quiet=True)
    killed_at(monkeypatch, broken, 1)
    assert steps_stored(broken.directory) == []
    execute(broken, quiet=True)
    assert_same_run(undisturbed, broken)


def test_resume_auto_begins_and_goes_on_and_the_command_line_asks_for_a_run(make, monkeypatch):  # noqa: F811
    recipe = make("run", resume="auto")
    killed_at(monkeypatch, recipe, 3)
    assert execute(recipe, quiet=True).summary["steps"] == 6
    with pytest.raises(RunError, match="nothing to resume: there is no run directory"):
        execute(make("absent"), resume=True, quiet=True)
    with pytest.raises(RunError, match="--resume"):
        execute(make("run"), quiet=True)
    with pytest.raises(RunError, match="give one of them"):
        execute(recipe, resume=True, overwrite=True, quiet=True)


def test_a_run_without_checkpoints_is_not_cleared_by_a_resume(make, monkeypatch):  # noqa: F811
    recipe = make("run", checkpoint={"every": 0})
    killed_at(monkeypatch, recipe, 5)
    assert not (recipe.directory / "checkpoints").exists()
    with pytest.raises(RunError, match="has no checkpoint to go on from"):
        execute(recipe, resume=True, quiet=True)
    assert len(records(recipe)) == 7


def test_every_part_with_a_state_is_saved_by_having_the_two_methods(make, monkeypatch):  # noqa: F811
    class Counting:
        def __init__(self, inner):
            self.inner, self.drawn = inner, 0

        def next(self, step, signals, asker):
            self.drawn += 1
            seen.append((step, self.drawn, signals.get("divergence")))
            return self.inner.next(step, signals, asker)

        def saw(self, trajectories, values, signals, gather):
            return {}

        def asks_evaluation(self, step):
            return False

        def state_dict(self):
            return {"drawn": self.drawn, "by step": {step: d for step, d, _ in seen}, "pair": (1, torch.ones(2, 0))}

        def load_state_dict(self, state):
            assert state["by step"][0] == 1
            assert isinstance(state["pair"], tuple)
            self.drawn = state["drawn"]

    def build(self, prompts, per_step, context):
        return Counting(ShuffledCourse(prompts, per_step, context.seed))

    monkeypatch.setattr("opd.curricula.shuffled.Shuffled.build", build)
    recipe, seen = make("run"), []
    killed_at(monkeypatch, recipe, 3)
    first, seen = seen, []
    execute(recipe, resume=True, quiet=True)
    assert [s[:2] for s in seen] == [(2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    # The signals of the step before the checkpoint reach the curriculum as they would have.
    assert seen[0] == first[2]
    assert seen[0][2] is not None


def test_a_finished_run_resumed_ends_the_same(make):  # noqa: F811
    recipe = make("run")
    first = execute(recipe, quiet=True)
    again = execute(recipe, resume=True, quiet=True)
    assert first.after == again.after
    assert [r["step"] for r in records(recipe)] == [r["step"] for r in first.history]


def test_tensorboard_shows_each_step_once_after_a_resume(make, monkeypatch):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make("run", tracking={"trackers": ["tensorboard"]})
    killed_at(monkeypatch, recipe, 5)
    # TensorBoard reads files in the order of their names, which count seconds; within one second, and one process, "10"
    # comes before "9".
    time.sleep(1)
    execute(recipe, resume=True, quiet=True)
    events = EventAccumulator(str(recipe.directory / "opd"), purge_orphaned_data=True)
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_process_that_went_on_is_recorded(make, monkeypatch):  # noqa: F811
    recipe = make("run")
    killed_at(monkeypatch, recipe, 3)
    execute(recipe, resume=True, quiet=True)
    facts = json.loads((recipe.directory / "environment.json").read_text())
    assert [entry["step"] for entry in facts["resumed"]] == [2]


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(make, tmp_path):  # noqa: F811
    """Replicated weights, one generator a process: dropout draws differently in each."""
    options = {"student": {"lora": {"rank": 2, "dropout": 0.2}}, "self_test": False, "checkpoint": {"every": 2}}
    steps = {"steps": 16, "batch": {"prompts": 4, "micro": 1}, "resume": "auto"}
    undisturbed, broken = make("undisturbed", **options, **steps), make("broken", **options, **steps)

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(broken.dump()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "opd", "train", str(tmp_path / "recipe.yaml"), "--quiet"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: logged(broken) >= 5)
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        member.kill()
    process.communicate()
    assert steps_stored(broken.directory)[0] < 16
    for recipe in (broken, undisturbed):
        assert all(isinstance(answer, dict) for answer in together(recipe, {}))
    assert_same_run(undisturbed, broken)
    generators = {name: value for name, value in final(broken).items() if name.startswith("/random/")}
    assert not torch.equal(generators["/random/0/torch"], generators["/random/1/torch"])
