"""A run that is killed goes on as if nothing had happened; what is damaged is named; nothing complete is lost."""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import opd
from opd.api import execute
from opd.checkpoints.content import content_of
from opd.checkpoints.resume import identity
from opd.checkpoints.store import UnusableError, folder_of, read, steps_stored, verify, write
from opd.checkpoints.tree import flatten, unflatten
from opd.curricula.shuffled import ShuffledCourse
from opd.errors import DataError, OpdError, RunError
from opd.files.whole import locked, whole_folder, write_whole
from opd.monitor import Monitor
from opd.prompts import Prompt
from opd.randomness import random_state, set_random_state
from opd.recipe import differences, parse_recipe
from opd.shaping import Shape, Shaper
from opd.weights import copy_into, fingerprint, frozen, trained
from tests.conftest import save_tiny, tiny_model
from tests.processes import Program, together
from tests.test_loop import TEXTS, recipe_for


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


@pytest.fixture
def make(models, tmp_path):
    """A recipe of six small steps, a checkpoint every two, in the directory `name`; `whole` blocks replace others."""

    def of(name, whole=None, **changes):
        small = {
            "steps": 6,
            "batch": {"prompts": 4, "group": 1, "micro": 4},
            "rollout": {"max_new_tokens": 6},
            "evaluation": {"held_out": 2, "samples": 1, "every": 3},
            "checkpoint": {"every": 2},
        }
        for key, value in changes.items():
            known = small.get(key)
            small[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
        recipe = recipe_for(models, tmp_path, output=str(tmp_path / name), **small)
        return parse_recipe({**recipe.dump(), **(whole or {})})

    return of


def killed_at(monkeypatch, recipe, step, **options):
    """Run until `step` is logged and half of what follows it, then die."""
    after_step = Monitor.after_step

    def dying(self, run, signals, measurement):
        measured = after_step(self, run, signals, measurement)
        if run.step == step:
            raise Killed
        return measured

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "after_step", dying)
        with pytest.raises(Killed):
            execute(recipe, quiet=True, **options)


def final(recipe):
    """The last checkpoint's tensors: weights, moments, teachers, generators."""
    directory = recipe.directory
    return load_file(folder_of(directory, steps_stored(directory)[0]) / "tensors.safetensors")


def records(recipe, name="metrics.jsonl"):
    """The lines of a log without what a clock says."""
    rows = [json.loads(line) for line in (recipe.directory / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k} for row in rows]


def assert_same_run(one, other):
    for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl"):
        assert records(one, name) == records(other, name)
    mine, theirs = final(one), final(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name
    students = [load_file(recipe.directory / "student" / "model.safetensors") for recipe in (one, other)]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


# ---- going on ----

HINTED = {"prompts": [{"kind": "inline", "prompts": [{"prompt": t, "hint": f"{t} think"} for t in TEXTS]}]}
EMA = {"teacher": {"kind": "self", "mode": "ema", "rate": 0.1, "sees": "hint"}, **HINTED}

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
def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(way, make, monkeypatch):
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
def test_states_of_a_shaping_and_of_sources_in_a_combination_are_in_it(kind, make, monkeypatch):
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


def test_a_run_killed_before_its_first_checkpoint_starts_again(make, monkeypatch):
    undisturbed, broken = make("undisturbed"), make("broken", resume="auto")
    execute(undisturbed, quiet=True)
    killed_at(monkeypatch, broken, 1)
    assert steps_stored(broken.directory) == []
    execute(broken, quiet=True)
    assert_same_run(undisturbed, broken)


def test_resume_auto_begins_and_goes_on_and_the_command_line_asks_for_a_run(make, monkeypatch):
    recipe = make("run", resume="auto")
    killed_at(monkeypatch, recipe, 3)
    assert execute(recipe, quiet=True).summary["steps"] == 6
    with pytest.raises(RunError, match="nothing to resume: there is no run directory"):
        execute(make("absent"), resume=True, quiet=True)
    with pytest.raises(RunError, match="--resume"):
        execute(make("run"), quiet=True)
    with pytest.raises(RunError, match="give one of them"):
        execute(recipe, resume=True, overwrite=True, quiet=True)


def test_a_run_without_checkpoints_is_not_cleared_by_a_resume(make, monkeypatch):
    recipe = make("run", checkpoint={"every": 0})
    killed_at(monkeypatch, recipe, 5)
    assert not (recipe.directory / "checkpoints").exists()
    with pytest.raises(RunError, match="has no checkpoint to go on from"):
        execute(recipe, resume=True, quiet=True)
    assert len(records(recipe)) == 7


def test_every_part_with_a_state_is_saved_by_having_the_two_methods(make, monkeypatch):
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


def test_adapters_alone_are_stored_and_another_base_is_refused(make, models, monkeypatch):
    recipe = make("run", student={"lora": {"rank": 2}})
    killed_at(monkeypatch, recipe, 4)
    folder = folder_of(recipe.directory, 2)
    names = [n for n in load_file(folder / "tensors.safetensors") if n.startswith("/parts/student/")]
    assert names
    assert all("lora_" in n for n in names)
    tiny_model(seed=7).save_pretrained(models[0])
    with pytest.raises(RunError, match=r"weights that training does not move have changed \(student\)"):
        execute(recipe, resume=True, quiet=True)
    tiny_model(seed=1).save_pretrained(models[0])
    tiny_model(seed=9, vocabulary=72).save_pretrained(models[1])
    with pytest.raises(RunError, match=r"have changed \(teachers\.0\)"):
        execute(recipe, resume=True, quiet=True)
    assert len(records(recipe)) == 6
    execute(recipe, resume=True, force_changed=True, quiet=True)


def test_a_changed_recipe_is_refused_with_its_keys_unless_forced(make, monkeypatch, capsys):
    recipe = make("run")
    killed_at(monkeypatch, recipe, 3)
    changed = make("run", update={"learning_rate": 0.5}, steps=7, description="other", evaluation={"samples": 0})
    with pytest.raises(RunError) as error:
        execute(changed, resume=True, quiet=True)
    assert "update.learning_rate 0.01 -> 0.5" in str(error.value)
    assert "steps" not in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    result = execute(changed, resume=True, force_changed=True, quiet=True)
    rates = {r["step"]: r["train/learning_rate"] for r in result.history if "train/loss" in r}
    assert rates == {1: 0.01, 2: 0.01, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5, 7: 0.5}


def test_a_prompt_file_that_changed_under_its_name_is_refused(make, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    recipe = make("run", whole={"prompts": {"path": str(path)}})
    killed_at(monkeypatch, recipe, 3)
    path.write_text("\n".join([*TEXTS[:-1], "0+0="]))
    with pytest.raises(RunError, match="rows that prompts name have changed"):
        execute(recipe, resume=True, quiet=True)
    path.write_text("\n".join(TEXTS))
    execute(recipe, resume=True, quiet=True)


def test_more_steps_extend_a_constant_rate_and_are_a_change_of_a_falling_one(make):
    longer, short = make("longer", steps=8), make("short")
    execute(longer, quiet=True)
    execute(short, quiet=True)
    execute(make("short", steps=8), resume=True, quiet=True)
    assert records(longer, "rollouts.jsonl") == records(short, "rollouts.jsonl")
    assert all(torch.equal(value, final(short)[name]) for name, value in final(longer).items())
    falling = {"update": {"learning_rate": {"kind": "linear", "start": 1e-2}}}
    execute(make("falling", **falling), quiet=True)
    with pytest.raises(RunError, match=r"steps 6 -> 8 \(counted on by update\.learning_rate\)"):
        execute(make("falling", steps=8, **falling), resume=True, quiet=True)


def test_a_finished_run_resumed_ends_the_same(make):
    recipe = make("run")
    first = execute(recipe, quiet=True)
    again = execute(recipe, resume=True, quiet=True)
    assert first.after == again.after
    assert [r["step"] for r in records(recipe)] == [r["step"] for r in first.history]


def test_tensorboard_shows_each_step_once_after_a_resume(make, monkeypatch):
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


def test_the_process_that_went_on_is_recorded(make, monkeypatch):
    recipe = make("run")
    killed_at(monkeypatch, recipe, 3)
    execute(recipe, resume=True, quiet=True)
    facts = json.loads((recipe.directory / "environment.json").read_text())
    assert [entry["step"] for entry in facts["resumed"]] == [2]


# ---- files ----


def test_a_tree_comes_back_as_it_was():
    shared = torch.arange(6.0)
    tree = {
        "a": [1, 2.5, None, True, "x", float("inf")],
        "b": {3: torch.tensor(1.5, dtype=torch.bfloat16), (1, 2): "t"},
        "views": (shared[:2], shared[2:], shared.view(2, 3).T, torch.zeros(0)),
        "$tensor": {"$tuple": torch.tensor([True])},
    }
    structure, tensors = flatten(tree)
    back = unflatten(json.loads(json.dumps(structure)), tensors)
    assert back["a"] == tree["a"]
    assert back["b"][(1, 2)] == "t"
    assert back["b"][3].dtype == torch.bfloat16
    assert isinstance(back["views"], tuple)
    assert all(torch.equal(x, y) for x, y in zip(back["views"], tree["views"], strict=True))
    assert back["$tensor"]["$tuple"].tolist() == [True]
    with pytest.raises(TypeError, match=r"/a/0: a checkpoint holds no set"):
        flatten({"a": [{1}]})


def test_every_generator_comes_back():
    state = random_state(torch.device("cpu"))
    structure, tensors = flatten(state)

    def draw():
        return random.random(), numpy.random.normal(), numpy.random.rand(), torch.rand(2).tolist()

    first = draw()
    draw()
    set_random_state(unflatten(json.loads(json.dumps(structure)), tensors), torch.device("cpu"))
    assert draw() == first


def test_trained_weights_and_the_fingerprint_of_the_others():
    model = tiny_model(tie_word_embeddings=True)
    assert "lm_head.weight" not in trained(model) or "model.embed_tokens.weight" not in trained(model)
    before = fingerprint(frozen(model))
    model.model.embed_tokens.requires_grad_(False)
    assert not any("embed" in name for name in trained(model))
    first = fingerprint(frozen(model))
    assert first != before
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] += 1e-6
    assert fingerprint(frozen(model)) != first
    targets = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(RunError, match=r"b is float32 \[4\] there and float32 \[3\] here"):
        copy_into(targets, {"a": torch.ones(2), "b": torch.ones(4)}, "student")
    with pytest.raises(RunError, match="b is absent there"):
        copy_into(targets, {"a": torch.ones(2)}, "student")
    assert targets["a"].sum() == 0


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    target = tmp_path / "thing"

    def fill(text, error=None):
        with whole_folder(target, ["sub/file"]) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(text)
            assert not (target / "sub" / "file").exists() or (target / "sub" / "file").read_text() != text
            if error:
                raise error

    fill("one")
    fill("two")
    with pytest.raises(KeyboardInterrupt):
        fill("three", KeyboardInterrupt())
    assert (target / "sub" / "file").read_text() == "two"
    assert os.listdir(tmp_path) == ["thing"]
    write_whole(tmp_path / "text", "a")
    write_whole(tmp_path / "text", "b")
    assert (tmp_path / "text").read_text() == "b"


@pytest.fixture
def stored(tmp_path):
    folder = folder_of(tmp_path, 3)
    write(folder, {"step": 3, "recipe": {}}, {"weights": torch.arange(1000.0)})
    return folder


def test_a_checkpoint_reads_back(stored, tmp_path):
    assert steps_stored(tmp_path) == [3]
    assert verify(stored)["step"] == 3
    assert read(stored)["weights"].tolist() == list(range(1000))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone", "foreign"])
def test_every_damage_is_found_and_named(name, harm, stored):
    path = stored / name
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(b'{"some": "other program\'s"}')
    with pytest.raises(UnusableError, match=name if harm != "gone" else "missing|no manifest"):
        verify(stored)


def test_another_format_and_a_renamed_folder_are_named(stored, tmp_path):
    moved = stored.rename(folder_of(tmp_path, 9))
    with pytest.raises(UnusableError, match="holds step 3: it was renamed"):
        verify(moved)
    other = folder_of(tmp_path, 4)
    write(other, {"step": 4, "recipe": {}}, {})
    manifest = json.loads((other / "manifest.json").read_text())
    from opd.checkpoints.store import _hash_of

    manifest["content"]["format"] = 99
    manifest["sha256"] = _hash_of(manifest["content"])
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnusableError, match="has format 99; this version of opd reads 1"):
        verify(other)


def damage(recipe, step):
    path = folder_of(recipe.directory, step) / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_refused(make, monkeypatch, capsys):
    undisturbed, broken = make("undisturbed"), make("broken")
    execute(undisturbed, quiet=True)
    killed_at(monkeypatch, broken, 5)
    assert steps_stored(broken.directory) == [4, 2]
    damage(broken, 4)
    listing = sorted(str(p) for p in (broken.directory / "checkpoints").rglob("*"))
    killed_at(monkeypatch, broken, 3, resume=True)
    warned = [line for line in capsys.readouterr().err.splitlines() if "going on from step 2 instead" in line]
    assert len(warned) == 1
    assert "step-00000004/tensors.safetensors has" in warned[0]
    assert sorted(str(p) for p in (broken.directory / "checkpoints").rglob("*")) == listing
    damage(broken, 2)
    before = (broken.directory / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"no usable checkpoint: .*step-00000004/tensors\.safetensors has"):
        execute(broken, resume=True, quiet=True)
    assert (broken.directory / "metrics.jsonl").read_bytes() == before
    assert steps_stored(broken.directory) == [4, 2]
    # The older one mended: the run goes on and replaces the newer one when it gets there.
    sound = folder_of(broken.directory, 2) / "tensors.safetensors"
    sound.write_bytes(sound.read_bytes() + last_byte(undisturbed, make, monkeypatch, 2))
    execute(broken, resume=True, quiet=True)
    assert_same_run(undisturbed, broken)


def test_a_damaged_checkpoint_of_a_later_step_displaces_no_sound_one(make, monkeypatch):
    recipe = make("run")
    killed_at(monkeypatch, recipe, 5)
    damage(recipe, 4)
    often = make("run", checkpoint={"every": 1, "keep_last": 1})
    killed_at(monkeypatch, often, 4, resume=True)
    assert steps_stored(recipe.directory) == [4, 3]
    execute(often, resume=True, quiet=True)


def last_byte(recipe, make, monkeypatch, step):
    """Last byte of the tensors of another such run at that step."""
    other = make("other")
    killed_at(monkeypatch, other, step + 1)
    return (folder_of(other.directory, step) / "tensors.safetensors").read_bytes()[-1:]


def test_the_newest_and_the_best_are_kept(make, monkeypatch):
    values = iter([5.0, 3.0, 1.0, 2.0, 4.0, float("nan"), 4.0, 4.0])
    evaluate = Monitor._evaluate

    def scripted(self, run):
        result = evaluate(self, run)
        self.history[-1]["held_out/reverse_kl"] = next(values)
        return result

    monkeypatch.setattr(Monitor, "_evaluate", scripted)
    keep = {"every": 4, "keep_last": 1, "keep_best": "reverse_kl"}
    recipe = make("run", checkpoint=keep, evaluation={"every": 1})
    execute(recipe, quiet=True)
    # Evaluated at steps 0 to 5 and after the end: step 2 is the best, step 6 the newest.
    assert steps_stored(recipe.directory) == [6, 2]
    with pytest.raises(opd.RecipeError, match="keep_best needs evaluations"):
        make("run", checkpoint=keep, evaluation={"every": 0})


def test_steps_below_those_taken_are_refused(make):
    recipe = make("run")
    execute(recipe, quiet=True)
    before = (recipe.directory / "metrics.jsonl").read_bytes()
    for resume in ({"resume": True}, {"force_changed": True, "resume": True}):
        with pytest.raises(RunError, match=r"steps is 4, and the run in .* has taken 6 steps already.* set steps to 6"):
            execute(make("run", steps=4), quiet=True, **resume)
    with pytest.raises(RunError, match="has taken 6 steps already"):
        execute(make("run", steps=4, resume="auto"), quiet=True)
    assert (recipe.directory / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"nowhere does not exist; give the directory"):
        opd.api.export(recipe.directory.parent / "nowhere", recipe.directory.parent / "out")


def test_differences_name_the_item_of_a_list():
    one = {"teacher": [{"model": "a"}, {"model": "b", "weight": 1}]}
    two = {"teacher": [{"model": "a"}, {"model": "b", "weight": 2}]}
    assert differences(one, two) == [("teacher.1.weight", 1, 2)]


def test_a_checkpoint_is_exported_as_a_student(make, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = make("run")
    result = execute(recipe, quiet=True)
    model = AutoModelForCausalLM.from_pretrained(opd.api.export(recipe.directory, tmp_path / "out"))
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    earlier = AutoModelForCausalLM.from_pretrained(opd.api.export(recipe.directory, tmp_path / "earlier", 4))
    assert not torch.equal(earlier.lm_head.weight, model.lm_head.weight)
    with pytest.raises(RunError, match="no checkpoint of step 5; there are 6, 4"):
        opd.api.export(recipe.directory, tmp_path / "none", 5)
    with pytest.raises(opd.RecipeError, match=r"--as is 'native', .*'causal_lm' is written in one format alone"):
        opd.api.export(recipe.directory, tmp_path / "none", form="native")


# ---- the command line, and what the machine does to it ----


def start(recipe, tmp_path, *words, limit=None):
    """The command line on a recipe, in a process of its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    return Program(tmp_path, "train", str(path), "--quiet", *words, limit=limit)


def until(condition, seconds=150):
    deadline = time.time() + seconds
    while time.time() < deadline and not condition():
        time.sleep(0.02)
    assert condition()


def logged(recipe):
    path = recipe.directory / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def test_sigterm_in_a_rollout_finishes_the_step_and_the_rest_is_as_if_undisturbed(make, tmp_path):
    slow = {"rollout": {"max_new_tokens": 60}, "checkpoint": {"every": 100}}
    undisturbed, recipe = make("undisturbed", **slow), make("run", **slow)
    execute(undisturbed, quiet=True)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "stopped early by SIGTERM" in out
    assert "--resume" in out
    (done,) = steps_stored(recipe.directory)
    assert 2 <= done < 6
    summary = json.loads((recipe.directory / "summary.json").read_text())
    assert (summary["steps"], summary["ended_by"]) == (done, f"SIGTERM after step {done}")
    process = start(recipe, tmp_path, "--resume")
    _out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert_same_run(undisturbed, recipe)


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(make, tmp_path):
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


def test_two_writers_and_a_lock_that_ends_with_its_process(make, tmp_path):
    recipe = make("run", steps=100000)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 3)
    lines = logged(recipe)
    with pytest.raises(RunError, match=f"is being written by process {process.pid} on .*output=PATH"):
        execute(recipe, overwrite=True, quiet=True)
    assert logged(recipe) >= lines
    process.kill()
    process.communicate()
    with locked(recipe.directory):
        pass
    assert execute(make("run", steps=logged(recipe) + 1), resume=True, quiet=True).summary["steps"] == logged(recipe)


def test_what_a_crash_left_of_a_checkpoint_goes_with_the_next_one(make):
    execute(make("run", steps=2), quiet=True)
    recipe = make("run", steps=4)
    for name in (".step-00000001.old", ".step-00000009.partial"):
        left = recipe.directory / "checkpoints" / name
        left.mkdir()
        (left / "tensors.safetensors").write_bytes(b"half")
    execute(recipe, resume=True, quiet=True)
    assert steps_stored(recipe.directory)[0] == 4
    assert not list((recipe.directory / "checkpoints").glob(".*"))


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(make, tmp_path):
    recipe = make("run", steps=100000)
    process = start(recipe, tmp_path)
    until(lambda: logged(recipe) >= 5)
    process.kill()
    process.communicate()
    kept = steps_stored(recipe.directory)
    room = (folder_of(recipe.directory, kept[0]) / "tensors.safetensors").stat().st_size
    process = start(recipe, tmp_path, "--resume", limit=room - 1000)
    _out, err = process.communicate(timeout=150)
    assert process.returncode == 2
    assert "Traceback" not in err
    message = next(line for line in err.splitlines() if "cannot be written" in line)
    assert f"that of step {kept[0]} is whole" in message
    assert "--resume" in message
    assert steps_stored(recipe.directory) == kept
    verify(folder_of(recipe.directory, kept[0]))
    assert not list((recipe.directory / "checkpoints").glob(".*"))
    execute(make("run", steps=kept[0] + 3), resume=True, quiet=True)


def test_a_log_that_cannot_be_written_is_one_line(make, monkeypatch):
    recipe = make("run")
    killed_at(monkeypatch, recipe, 3)
    (recipe.directory / "rollouts.jsonl").unlink()
    (recipe.directory / "rollouts.jsonl").mkdir()
    with pytest.raises(OpdError, match=r"rollouts\.jsonl"):
        execute(recipe, resume=True, quiet=True)
    shutil.rmtree(recipe.directory / "rollouts.jsonl")
    execute(recipe, resume=True, quiet=True)


def image(colour):
    return Image.new("RGB", (4, 4), colour)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (image("red"), image("red"), image("blue")),
        (numpy.asarray(image("red")), numpy.asarray(image("red")), numpy.asarray(image("blue"))),
        (numpy.zeros((2, 3)), numpy.zeros((2, 3)), numpy.zeros((3, 2))),
        (numpy.array(["a", b"b"], object), numpy.array(["a", b"b"], object), numpy.array(["a", b"c"], object)),
        (torch.zeros(3).bfloat16(), torch.zeros(3).bfloat16(), torch.ones(3).bfloat16()),
        ({"bytes": b"red"}, {"bytes": b"red"}, {"bytes": b"blue"}),
        ([image("red")] * 2, [image("red")] * 2, [image("red"), image("blue")]),
        (numpy.float32(1), numpy.float32(1), numpy.float32(2)),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        ({1, 2}, {2, 1}, {1, 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_prompt_set_is_known_by_the_content_of_its_images_and_the_like(one, same, other):
    first, second, third = (
        content_of([Prompt("p", {"prompt": "a", "image": value})], lambda prompt: []) for value in (one, same, other)
    )
    assert first == second != third


def test_files_that_rows_name_count_by_what_is_in_them(tmp_path):
    def known(folder, rollout="noised"):
        rows = [
            Prompt("p", {"prompt": "a", "image": ["one.bin", {"path": "two.bin"}, {"bytes": b"x"}]}, folder=folder),
            Prompt("q", {"prompt": "b"}, folder=folder),
        ]
        data = {"student": {"kind": "flow_transformer", "model": "-"}, "rollout": {"kind": rollout}, "objective": "sft"}
        recipe = parse_recipe({**data, "prompts": {"kind": "inline", "prompts": ["a"]}})
        return identity(recipe, rows)["prompts"]

    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.bin").write_bytes(bytes(300_000))
        (tmp_path / name / "two.bin").write_bytes(b"2")
    os.utime(tmp_path / "b" / "one.bin", (1, 1))
    (tmp_path / "c" / "one.bin").write_bytes(bytes(299_999) + b"1")
    (tmp_path / "d" / "two.bin").unlink()
    same = known(tmp_path / "a")
    assert known(tmp_path / "b") == same, "copied to another place at another time"
    assert len({same, known(tmp_path / "c"), known(tmp_path / "d")}) == 3
    assert known(tmp_path / "a", "sde") == known(tmp_path / "c", "sde"), "nobody reads them"


# ---- rows that cannot be used ----


def test_bad_rows_are_named_and_skipped_only_when_asked(make, tmp_path, capsys):
    rows = [json.dumps({"prompt": text}) for text in TEXTS]
    rows[3:3] = ["{oops", json.dumps({"question": "x"}), json.dumps({"prompt": "1" * 50}), json.dumps({"prompt": " "})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    changes = {"whole": {"prompts": {"path": str(path)}}, "max_prompt_tokens": 20, "steps": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:4: not JSON"):
        execute(make("strict", **changes), quiet=True)
    assert execute(make("run", skip_bad_prompts=True, **changes), quiet=True).summary["steps"] == 1
    skipped = [line for line in capsys.readouterr().err.splitlines() if "skipped a row" in line]
    assert [line.split("rows.jsonl:")[1].split(":")[0] for line in skipped] == ["4", "5", "7", "6"]
    path.write_text("{oops")
    with pytest.raises(DataError, match=r"no row can be used; the first: .*rows\.jsonl:1"):
        execute(make("none", skip_bad_prompts=True, **changes), quiet=True)


def test_a_row_without_the_teachers_view_is_found_before_training(make):
    rows = [*({"prompt": text, "hint": "h"} for text in TEXTS[:-1]), {"prompt": TEXTS[-1]}]
    recipe = make("run", prompts={"prompts": rows}, whole={"teacher": {"kind": "self", "sees": "hint"}})
    with pytest.raises(DataError, match=r"prompts\[19\]: no column 'hint'"):
        execute(recipe, quiet=True)
    assert logged(recipe) == 0
