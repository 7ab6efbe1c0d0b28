"""A run does not go on with another recipe, other weights, other prompts or fewer steps in silence."""

from __future__ import annotations

import datetime
import os
import re

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import opd
from opd.api import execute
from opd.checkpoints.content import content_of
from opd.checkpoints.resume import identity
from opd.checkpoints.store import folder_of
from opd.errors import RunError
from opd.prompts import Prompt
from opd.recipe import differences, parse_recipe
from tests.checkpoints import final, killed_at, make, models, records  # noqa: F401
from tests.conftest import save_tiny, tiny_model
from tests.test_loop import TEXTS


def test_adapters_alone_are_stored_and_another_base_is_refused(make, models, monkeypatch):  # noqa: F811
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


def test_force_is_offered_where_it_can_work_and_nowhere_else(make, models, tmp_path, monkeypatch):  # noqa: F811
    recipe = make("run", student={"lora": {"rank": 2}})
    killed_at(monkeypatch, recipe, 3)
    alike = save_tiny(tmp_path / "alike", seed=1)
    wider = save_tiny(tmp_path / "wider", seed=1, width=48)

    def refused(force=False, **changes):
        with pytest.raises(RunError) as error:
            execute(make("run", **changes), resume=True, force_changed=force, quiet=True)
        return str(error.value)

    def student(**changes):
        return {"student": {"lora": {"rank": 2}, **changes}}

    assert "go on all the same with --force-changed" in refused(**student(model=alike))
    told = refused(**student(model=wider))
    assert "--force" not in told
    assert re.search(r"PATH: the checkpoint does not fit, its weights .* \(\[.*32.*\] there and \[.*48.*\] here", told)
    assert "output=PATH: the checkpoint does not fit, its weights" in refused(**student(lora={"rank": 4}))
    told = refused(force=True, **student(model=wider))
    assert re.search(r"does not fit the student: .* there .*\.\n.* student\.model .* cannot help here; undo the", told)
    told = refused(**student(), update={"optimizer": "sgd"})
    assert told.endswith("does not fit, what it holds of update is of another optimizer")
    told = refused(**student(), update={"average": {"decay": 0.5}})
    assert told.endswith("does not fit, it holds no mean of the weights")
    # The folder is the same, and another model lies there.
    tiny_model(seed=1, width=48).save_pretrained(models[0])
    assert "--force" not in refused(**student())
    tiny_model(seed=1).save_pretrained(models[0])
    execute(make("run", **student(model=alike)), resume=True, force_changed=True, quiet=True)


def test_a_changed_recipe_is_refused_with_its_keys_unless_forced(make, monkeypatch, capsys):  # noqa: F811
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


def test_differences_name_the_item_of_a_list():
    one = {"teacher": [{"model": "a"}, {"model": "b", "weight": 1}]}
    two = {"teacher": [{"model": "a"}, {"model": "b", "weight": 2}]}
    assert differences(one, two) == [("teacher.1.weight", 1, 2)]


def test_more_steps_extend_a_constant_rate_and_are_a_change_of_a_falling_one(make):  # noqa: F811
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


def test_steps_below_those_taken_are_refused(make):  # noqa: F811
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


def test_a_prompt_file_that_changed_under_its_name_is_refused(make, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    recipe = make("run", whole={"prompts": {"path": str(path)}})
    killed_at(monkeypatch, recipe, 3)
    path.write_text("\n".join([*TEXTS[:-1], "0+0="]))
    with pytest.raises(RunError, match="rows that prompts name have changed"):
        execute(recipe, resume=True, quiet=True)
    path.write_text("\n".join(TEXTS))
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
