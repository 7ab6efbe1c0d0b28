"""A frozen teacher is never asked twice at the same ids: across epochs, runs and seeds, within a bound."""

from __future__ import annotations

import os

import pytest
import torch

from opd.api import execute
from opd.language.engines.transformers import LanguageModel
from opd.recipe import parse_recipe
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.memory import Memory, MemorySettings
from tests.conftest import character_tokenizer, said, tiny_model, trajectories_of
from tests.test_loop import models, recipe_for  # noqa: F401


def teacher(tmp_path, seed=5, gigabytes=1.0, **settings):
    language = LanguageModel(tiny_model(seed=seed).requires_grad_(False), character_tokenizer(), template="plain")
    cache = {"path": str(tmp_path / "answers"), "gigabytes": gigabytes}
    block = LocalTeacher(model="(live)", template="plain", cache=cache, batch=2, **settings)
    return LanguageTeacher(language, block, torch.device("cpu"))


def asked_of(one, trajectories):
    """The answer and how many forward passes it took."""
    passes = []
    handle = one.language.register_forward_hook(lambda *_: passes.append(1))
    answer = said(one, trajectories)
    handle.remove()
    return answer, len(passes)


def test_the_second_answer_is_the_first_and_costs_no_forward_pass(tmp_path):
    trajectories = trajectories_of([3, 5, 2, 4])
    forgetful = teacher(tmp_path)
    forgetful.cache = None
    plain, _ = asked_of(forgetful, trajectories)
    one = teacher(tmp_path)
    first, passes = asked_of(one, trajectories)
    assert (passes, one.asked) == (2, 1.0)
    assert torch.equal(first.hidden, plain.hidden)
    again = teacher(tmp_path)  # another process, another run
    second, passes = asked_of(again, trajectories)
    assert (passes, again.asked) == (0, 0.0)
    assert torch.equal(first.hidden, second.hidden)
    # What is new is computed, what is known is not, and the order stays.
    part, _ = trajectories.rows(1, 3)
    other = trajectories_of([6], seed=3)
    from opd.trajectories import join

    mixed = join([part, other], [2, 0, 1])
    _, passes = asked_of(again, mixed)
    assert passes == 1
    assert again.asked == pytest.approx(6 / 13)
    torch.testing.assert_close(said(again, mixed).hidden[:2], first.hidden[8:10])


def test_another_teacher_dtype_or_token_is_another_answer(tmp_path):
    trajectories = trajectories_of([3, 5])
    said(teacher(tmp_path), trajectories)
    for other in (teacher(tmp_path, seed=6), teacher(tmp_path)):
        if other.identity() == teacher(tmp_path).identity():
            other.language.to(torch.bfloat16)
        _, passes = asked_of(other, trajectories)
        assert passes == 1
    one = teacher(tmp_path)
    trajectories.actions[0] = (trajectories.actions[0] + 1) % 64
    said(one, trajectories)
    assert one.asked == pytest.approx(3 / 8)
    # The border between prompt and completion is part of the question.
    memory = Memory(MemorySettings(path=str(tmp_path)), "t")
    a, b, c = (torch.tensor([i]) for i in (1, 2, 3))
    assert memory.path(torch.cat([a, b]), c) != memory.path(a, torch.cat([b, c]))


def test_the_folder_stays_within_its_bound_and_the_longest_unused_go(tmp_path):
    memory = Memory(MemorySettings(path=str(tmp_path), gigabytes=1e-5), "t")  # ten kilobytes
    paths = [memory.path(torch.tensor([i]), torch.tensor([i])) for i in range(12)]
    for i, path in enumerate(paths[:9]):
        memory.keep(path, torch.full((8, 32), float(i)))  # a kilobyte and a header each
        os.utime(path, ns=(i, i))
    assert memory.recall(paths[:1])[0] is not None
    for path in paths[9:]:
        memory.keep(path, torch.zeros(8, 32))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) <= 10_000
    assert memory.recall(paths[:1])[0] is not None, "was used since"
    assert memory.recall(paths[1:2])[0] is None


def test_a_file_that_cannot_be_read_is_asked_again(tmp_path):
    trajectories = trajectories_of([3])
    one = teacher(tmp_path)
    first = said(one, trajectories)
    (file,) = (tmp_path / "answers").rglob("*.safetensors")
    file.write_bytes(b"torn")
    again, passes = asked_of(one, trajectories)
    assert passes == 1
    assert torch.equal(first.hidden, again.hidden)


def test_a_second_seed_of_a_run_on_given_texts_asks_nothing(models, tmp_path):  # noqa: F811
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]
    prompts = {"kind": "inline", "prompts": rows}
    recipe = recipe_for(models, tmp_path, prompts=prompts, evaluation={"held_out": 2}, batch={"prompts": 5, "group": 1})
    data = recipe.dump() | {"rollout": {"kind": "data"}, "objective": "forward_kl", "steps": 4, "self_test": False}
    data["teacher"][0]["cache"] = {"path": str(tmp_path / "answers")}
    first = execute(parse_recipe(data), quiet=True)
    rates = [r["train/teacher_hit_rate"] for r in first.history if "train/teacher_hit_rate" in r]
    assert rates == [0.0, 0.0, 1.0, 1.0], "the second epoch of ten prompts asks nothing"
    tokens = [r["train/teacher_tokens"] for r in first.history if "train/teacher_tokens" in r]
    assert tokens[0] > 0
    assert tokens[-1] == 0
    second = execute(parse_recipe(data | {"output": str(tmp_path / "again")}), quiet=True)
    assert all(r["train/teacher_hit_rate"] == 1.0 for r in second.history if "train/teacher_hit_rate" in r)
    assert [r["train/loss"] for r in first.history if "train/loss" in r] == pytest.approx(
        [r["train/loss"] for r in second.history if "train/loss" in r], abs=1e-6
    )


@pytest.mark.parametrize("value", [True, {"gigabytes": 2}, False])
def test_the_switch(value, models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, teacher={"cache": value})
    cache = recipe.teacher[0].cache
    assert (cache is None) == (value is False)
    assert parse_recipe(recipe.dump()) == recipe
