"""Training by two processes over gloo, plain (DDP) and sharded (FSDP2), against the same training by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd import sharding
from opd.api import execute
from opd.checkpoints.store import folder_of, steps_stored
from opd.errors import RecipeError, RunError
from opd.updates.plain import PlainUpdate
from tests.checkpoints import EMA
from tests.conftest import save_tiny
from tests.processes import together
from tests.test_loop import recipe_for

pytestmark = pytest.mark.timeout(900)  # four processes may share a machine with others
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def states(recipe):
    folder = folder_of(recipe.directory, steps_stored(recipe.directory)[0])
    tensors = load_file(folder / "tensors.safetensors")
    return {name: value for name, value in tensors.items() if not name.startswith("/random")}


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-5, atol=1e-5), (name, (value - other[name]).abs().max())


# One held-out prompt, so that one of two processes has none, and several micro-batches a step.
WAYS = {
    "full": ({}, {}),
    "tied, EMA": (
        {"kind": "qwen3", "tie_word_embeddings": True},
        # A view of its own: without one the gradient of the first step would be nothing but rounding.
        {"teacher": {**EMA["teacher"], "rate": 0.1}, "objective": "forward_kl", "rollout": {"top_k": 9}},
    ),
    "LoRA": ({}, {"student": {"lora": {"rank": 2}}}),
}


@pytest.fixture
def make(tmp_path):
    def of(name, way, **changes):
        model, settings = WAYS[way]
        folder = tmp_path / way
        models = save_tiny(folder / "student", seed=1, **model), save_tiny(folder / "teacher", seed=2)
        own = dict(settings)
        teacher = own.pop("teacher", None)
        recipe = recipe_for(
            models,
            tmp_path,
            output=str(tmp_path / name),
            batch={"prompts": 8, "group": 2, "micro": 4},
            update={"learning_rate": 1e-3},
            evaluation={"held_out": 1},
            checkpoint={"every": 1},
            **own,
            **changes,
        )
        hinted = {"teacher": [teacher], "prompts": EMA["prompts"]}
        return recipe if teacher is None else type(recipe).model_validate({**recipe.dump(), **hinted})

    return of


@pytest.mark.parametrize("way", list(WAYS))
def test_sharded_training_is_training_by_one_process(way, make):
    alone, sharded = make("alone", way), make("sharded", way)
    history = execute(alone, quiet=True).history
    answers = together(sharded, FSDP2)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert [answer["sharded"] for answer in answers] == [False, True]
    assert_close(states(alone), states(sharded))
    assert not any("train/empty" in row for row in history)
    for mine, theirs in zip(history, answers[0]["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() & {"train/gradient_norm", "train/loss", "held_out/student_entropy", "held_out/length"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    students = [AutoModelForCausalLM.from_pretrained(r.directory / "student").state_dict() for r in (alone, sharded)]
    assert_close(*students)


def test_sharded_training_computes_in_bf16(make):
    """Weights that the optimiser sees stay in float32; other roundings, so the numbers agree as far as those go."""
    alone, sharded = (make(name, "full", hardware={"precision": "bf16"}) for name in ("alone", "sharded"))
    history = execute(alone, quiet=True).history
    answers = together(sharded, FSDP2)
    assert all(isinstance(answer, dict) for answer in answers), answers
    first, theirs = (next(row for row in rows if "train/loss" in row) for rows in (history, answers[0]["history"]))
    assert theirs["train/loss"] == pytest.approx(first["train/loss"], rel=0.1)
    assert theirs["train/gradient_norm"] == pytest.approx(first["train/gradient_norm"], rel=0.1)
    student = load_file(sharded.directory / "student" / "model.safetensors")
    assert {value.dtype for value in student.values()} == {torch.float32}


def test_sharded_training_goes_on_from_its_checkpoint(make):
    alone = make("alone", "full", steps=4)
    execute(alone, quiet=True)
    together(make("sharded", "full", steps=2), FSDP2)
    sharded = make("sharded", "full", steps=4)
    answers = together(sharded, FSDP2, resume=True)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert_close(states(alone), states(sharded))


def test_two_processes_with_a_copy_each_train_as_one(make):
    alone, both = make("alone", "full"), make("both", "full")
    execute(alone, quiet=True)
    answers = together(both, {})
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert_close(states(alone), states(both))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "needs FSDP2"),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "student.gradient_checkpointing"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
    ],
)
def test_what_sharding_cannot_do_is_refused(environment, message, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message):
        sharding.plugin()


def test_other_engines_are_refused():
    engine = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, is_fsdp2=False)
    with pytest.raises(RunError, match="DEEPSPEED is not supported"):
        sharding.settle(engine, None)
    sharding.settle(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, is_fsdp2=False), None)


def test_a_student_whose_rollouts_do_not_gather_is_refused():
    accelerator = SimpleNamespace(is_fsdp2=True)
    student = SimpleNamespace(module=torch.nn.Linear(2, 2), shards=False)
    with pytest.raises(RecipeError, match="plain data parallelism"):
        PlainUpdate().build(student, accelerator)
