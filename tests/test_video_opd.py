"""Video-OPD: its objective against the specification, its recipe for Qwen3-VL-8B, and small ones on clips and text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from opd.api import execute
from opd.cli.main import app
from opd.distributions import Categorical, Head, Sampled
from opd.objectives import Target
from opd.prompts.clips import VOCABULARY
from opd.recipe import load_recipe, parse_recipe
from opd.reduction import position_weights
from opd.vision.creation import create_clip_model
from tests.conftest import tiny_model, trajectories_of
from tests.tiny import saved, turn_tokenizer

# The objective.


def own_and_teacher(same=False, seed=0, states=1, size=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(states, size, generator=generator, requires_grad=True)
    teacher = logits.detach() if same else torch.randn(states, size, generator=generator)
    return logits, teacher


def loss_of(logits, teacher, actions, weights):
    """The recipe's objective at these states, on logits themselves."""
    objective = load_recipe("recipes/video_opd_qwen3_vl_8b.yaml").objective[0]
    eye = torch.eye(logits.shape[1])
    student, said = Categorical(logits, Head(eye)), Categorical(teacher, Head(eye))
    made = replace(trajectories_of([len(actions)]), actions=actions)
    target = Target(Sampled.of(said, actions))
    return objective(student, [target], weights, made)


def test_a_teacher_that_is_the_student_moves_nothing():
    logits, teacher = own_and_teacher(same=True, states=5)
    loss = loss_of(logits, teacher, torch.tensor([0, 1, 2, 3, 4]), torch.ones(5))
    loss.total.backward()
    assert float(loss.total) == pytest.approx(0)
    assert logits.grad.abs().max() == 0


def test_the_mean_gradient_of_sampled_tokens_is_that_of_reverse_kl():
    logits, teacher = own_and_teacher()
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    (wanted,) = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), logits)
    found = torch.zeros_like(logits)
    for action in range(logits.shape[1]):
        loss = loss_of(logits, teacher, torch.tensor([action]), torch.ones(1))
        (gradient,) = torch.autograd.grad(loss.total, logits)
        found += float(log_q[0, action].exp()) * gradient
    # The expectation over the student's own draws, so exactly and with its sign.
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_answers_are_summed_and_averaged_over_answers_whatever_their_padding():
    weights = position_weights(trajectories_of([3, 1]), "sequence_sum")
    assert weights.tolist() == [0.5] * 4
    assert load_recipe("recipes/video_opd_qwen3_vl_8b.yaml").objective[0].reduction in (None, "sequence_sum")


# The recipe.

SIZES = {"8b": (4096, 36, 12288, 32), "32b": (5120, 64, 25600, 64)}


def configured(folder, hidden, layers, inner, heads):
    """What `opd check` reads of a model: its configuration."""
    text = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
    }
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": hidden}
    AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, dtype="bfloat16").save_pretrained(folder)
    return str(folder)


def test_the_paper_s_recipe_is_checked_from_the_models_configurations(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student, teacher = (configured(tmp_path / name, *sizes) for name, sizes in SIZES.items())
    given = [f"student.model={student}", f"teacher.model={teacher}"]
    found = CliRunner().invoke(app, ["check", "video_opd_qwen3_vl_8b", *given])
    assert found.exit_code == 0, found.output
    told = " ".join(found.output.split())
    assert "32" in told
    recipe = load_recipe("recipes/video_opd_qwen3_vl_8b.yaml")
    assert recipe.steps == -(-recipe.curriculum.size // recipe.batch.prompts) == 79
    assert (recipe.student.videos.max_tokens, recipe.student.vision) == (8192, "frozen")
    for change, words in (
        ("student.videos.fps=0", "student.videos.fps is 0"),
        ("student.videos.fpss=2", "student.videos"),
        ("curriculum.reliable_from=2", "curriculum.reliable_from is 2"),
        ("verifier=null", "key 'verifier' is required: curriculum 'focusing'"),
    ):
        refused = CliRunner().invoke(app, ["check", "video_opd_qwen3_vl_8b", *given, change])
        assert refused.exit_code != 0
        assert words in " ".join(str(refused.exception or refused.output).split())


# The small ones.

TINY = {
    "batch": {"prompts": 2, "micro": 4},
    "tracking": {"trackers": []},
    "checkpoint": {"every": 0},
    "hardware": {"device": "cpu", "threads": 1},
}


@pytest.mark.parametrize("name", ["opd", "plain", "op_rkd", "op_fkd", "sft", "grpo"])
def test_small_recipes_on_clips_run(name, tmp_path):
    folders = [
        create_clip_model(tmp_path / side, *VOCABULARY, width=48, layers=1, vision_layers=1) for side in ("s", "t")
    ]
    recipe = load_recipe(f"recipes/clips_2_{name}.yaml").dump()
    recipe["student"]["model"] = str(folders[0])
    for teacher in recipe["teacher"]:
        teacher["model"] = str(folders[1])
    recipe["prompts"][0]["size"] = 6
    if name == "opd":
        recipe["curriculum"] |= {"size": 3, "reliable_from": 0}
    group = 2 if name == "grpo" else 1
    evaluation = {"every": 0, "prompts": [{"kind": "clips", "size": 2, "split": "validation"}]}
    own = {**TINY, "steps": 2, "output": str(tmp_path / "run"), "batch": {**TINY["batch"], "group": group}}
    result = execute(parse_recipe({**recipe, **own, "evaluation": recipe["evaluation"] | evaluation}), quiet=True)
    assert result.summary["steps"] == 2
    assert "greedy_recall_at_0.5" in result.before
    if name == "opd":
        rows = [json.loads(line) for line in (tmp_path / "run" / "curriculum.jsonl").read_text().splitlines()]
        assert len(rows) == 6
        row = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
        assert row["interval"]["duration"] == 16
        assert len(row["frames"]["times"]) == 12


def test_focusing_works_on_text(tmp_path):
    pytest.importorskip("reasoning_gym")
    tokenizer = turn_tokenizer()
    folders = [saved(tmp_path / str(seed), tiny_model(vocabulary=120, seed=seed), tokenizer) for seed in (1, 2)]
    recipe = load_recipe("recipes/smollm2_focusing.yaml").dump()
    recipe |= {
        "student": {"model": folders[0], "template": "plain"},
        "teacher": [{"model": folders[1], "template": "plain"}],
    }
    recipe["prompts"][0]["size"] = 4
    recipe["curriculum"] |= {"size": 2, "reliable_from": 0}
    recipe["evaluation"] |= {"held_out": 2, "samples": 0}
    own = {**TINY, "steps": 2, "output": str(tmp_path / "run"), "max_prompt_tokens": 2000}
    execute(parse_recipe({**recipe, **own}), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "curriculum.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1] * 6 + [2] * 6
    assert sum(row["drawn"] for row in rows) == 4
