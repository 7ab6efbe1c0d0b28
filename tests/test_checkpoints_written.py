"""What is written comes back as it was; what is damaged is named; which checkpoints are kept, and their export."""

from __future__ import annotations

import json
import os
import random

import numpy
import pytest
import torch

import opd
from opd.api import execute
from opd.checkpoints.store import UnusableError, folder_of, read, steps_stored, verify, write
from opd.checkpoints.tree import flatten, unflatten
from opd.errors import RunError
from opd.files.whole import whole_folder, write_whole
from opd.monitor import Monitor
from opd.randomness import random_state, set_random_state
from opd.weights import copy_into, fingerprint, frozen, trained
from tests.checkpoints import assert_same_run, killed_at, make, models  # noqa: F401
from tests.conftest import tiny_model


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


def test_a_damaged_checkpoint_is_passed_over_and_none_left_is_refused(make, monkeypatch, capsys):  # noqa: F811
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


def test_a_damaged_checkpoint_of_a_later_step_displaces_no_sound_one(make, monkeypatch):  # noqa: F811
    recipe = make("run")
    killed_at(monkeypatch, recipe, 5)
    damage(recipe, 4)
    often = make("run", checkpoint={"every": 1, "keep_last": 1})
    killed_at(monkeypatch, often, 4, resume=True)
    assert steps_stored(recipe.directory) == [4, 3]
    execute(often, resume=True, quiet=True)


def last_byte(recipe, make, monkeypatch, step):  # noqa: F811
    """Last byte of the tensors of another such run at that step."""
    other = make("other")
    killed_at(monkeypatch, other, step + 1)
    return (folder_of(other.directory, step) / "tensors.safetensors").read_bytes()[-1:]


def test_the_newest_and_the_best_are_kept(make, monkeypatch):  # noqa: F811
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


def test_a_checkpoint_is_exported_as_a_student(make, tmp_path):  # noqa: F811
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
