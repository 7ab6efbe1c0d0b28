"""Whole runs of tiny real transformers in the loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd.api import execute, export
from opd.cli.main import main
from opd.distributions.transition import transition
from opd.evaluation import evaluate
from opd.loop import train
from opd.objectives.grpo import GRPO
from opd.verifiers import CompletionVerifier
from tests.conftest import rolled_out
from tests.flow.tiny import PROMPTS, block_for, built, recipe_for, step_of


def test_training_moves_the_student_to_the_teacher_and_plain_diffusers_draws_its_images(models, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import AutoTokenizer

    result = execute(recipe_for(models, tmp_path / "run", steps=40), quiet=True)
    assert result.after["reverse_kl"] < 0.7 * result.before["reverse_kl"]
    logged = [r for r in result.history if "train/loss" in r]
    assert max(r["train/rollout_gap"] for r in logged) < 1e-4
    parts = [logged[0][f"train/kl_step_{k}"] for k in range(3)]
    assert sum(parts) / 3 == pytest.approx(logged[0]["train/divergence"], rel=1e-4)
    row = json.loads((result.directory / "samples.jsonl").read_text().splitlines()[-1])
    assert row["image"].startswith("data:image/png;base64,")
    assert len(row["tokens"]) == len(row["values"]["reverse_kl"]) == 3

    # What the documentation says loads it: no opd.
    folder = result.directory / "student"
    transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    table = load_file(folder / "prompt_table" / "table.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder / "prompt_table")
    ids = tokenizer("red square", padding="max_length", max_length=4, return_tensors="pt")["input_ids"]
    hidden = table["tokens.weight"][ids] + table["places.weight"]
    present = (ids != tokenizer.pad_token_id)[..., None]
    pooled = (table["means.weight"][ids] * present).sum(1) / present.sum(1)
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = start
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(transformer(x, hidden, pooled, t[None], return_dict=False)[0], t, x).prev_sample
    model = result.student
    ours, times = start, model.grid(5)
    with torch.no_grad():
        for k in range(5):
            velocity = model(ours, times[k][None], model.encoder.encode(["red square"]), [1], [1.0])
            ours = step_of(velocity, ours, float(times[k]), float(times[k + 1]), 0.0).mean
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_teachers_stay_as_they_are_and_the_anchor_weighs_in(models, tmp_path):
    teachers = [
        {"kind": "flow", "model": models[1], "name": "expert"},
        {"kind": "self", "mode": "frozen", "name": "anchor"},
    ]
    objective = [
        {"kind": "gaussian_kl", "teacher": "expert"},
        {"kind": "gaussian_kl", "teacher": "anchor", "weight": 0.5},
    ]
    run = built(recipe_for(models, tmp_path / "run", teacher=teachers, objective=objective))
    before = [{n: p.clone() for n, p in t.model.named_parameters()} for t in run.teachers]
    train(run)
    for teacher, weights in zip(run.teachers, before, strict=True):
        for name, p in teacher.model.named_parameters():
            assert torch.equal(p, weights[name])
            assert p.grad is None
    assert {"train/kl_step_0@expert", "train/kl_step_0@anchor"} <= run.monitor.history[1].keys()
    anchored = run.monitor.history[1]["train/objective/gaussian_kl@anchor"]
    assert anchored == pytest.approx(0, abs=1e-6), "the student is its own anchor at first"


def test_what_is_logged_of_each_step_does_not_depend_on_how_a_batch_is_cut(models, tmp_path):
    second = {"kind": "sde", "steps": 3, "teacher": "expert"}
    rollout = {"kind": "mixture", "first": {"kind": "sde", "steps": 4}, "second": second}
    teacher = {"kind": "flow", "model": models[1], "name": "expert"}
    logged = []
    for micro in (1, 8):
        recipe = recipe_for(models, tmp_path / str(micro), teacher=teacher, rollout=rollout, batch={"micro": micro})
        run = built(recipe)
        train(run)
        logged.append({n: v for n, v in run.monitor.history[1].items() if "kl_step" in n})
    assert list(logged[0]) == [f"train/kl_step_{k}" for k in range(3)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"kind": "sde", "steps": 4, "teacher": "expert"}},
        {"rollout": {"kind": "noised", "times": "grid", "steps": 4}},
        {"objective": {"kind": "gaussian_kl", "estimator": "pg_sample"}, "student": {"guidance": 2.0}},
        {"teacher": {"kind": "self", "mode": "ema", "name": "expert"}},
        {
            "rollout": {
                "kind": "mixture",
                "first": {"kind": "sde", "steps": 4},
                "second": {"kind": "noised", "times": "grid", "steps": 4},
            }
        },
        {
            "hardware": {"precision": "bf16"},
            "objective": {"kind": "gaussian_kl", "scale": "uniform"},
            "student": {"gradient_checkpointing": True, "lora": {"rank": 2}},
            "update": {"average": {"every": 1}},
        },
    ],
    ids=lambda c: "-".join(c),
)
def test_every_choice_trains_through_the_same_loop(changes, models, drawings, tmp_path):
    teacher = {"teacher": {"kind": "flow", "model": models[1], "name": "expert"}}
    recipe = recipe_for(models, tmp_path / "run", prompts={"prompts": drawings}, **(teacher | changes))
    result = execute(recipe, quiet=True)
    assert all(math.isfinite(v) for v in result.after.values())
    assert result.summary["steps"] == 3
    if "rollout" in changes:
        learnt = [r["train/divergence"] for r in result.history if "train/divergence" in r]
        assert learnt[-1] < learnt[0]


@pytest.mark.parametrize(
    "rollout",
    [
        {"kind": "mixture", "first": {"kind": "noised"}, "second": {"kind": "sde", "steps": 3, "noise": 0.3}},
        {"kind": "noised", "times": "grid", "steps": 3, "noise": 0.3},
    ],
    ids=lambda rollout: rollout["kind"],
)
def test_held_out_divergence_is_measured_on_the_recipes_grid(rollout, models, drawings, tmp_path):
    prompts = {"prompts": drawings}
    found = built(recipe_for(models, tmp_path / "a", prompts=prompts, rollout=rollout))
    plain = built(
        recipe_for(models, tmp_path / "b", prompts=prompts, rollout={"kind": "sde", "steps": 3, "noise": 0.3})
    )
    assert evaluate(found).metrics == evaluate(plain).metrics


class Brightness(CompletionVerifier):
    """Mean of an image, for prompts that have a colour."""

    def score(self, prompt, completion):
        assert completion.shape == (8, 8, 3)
        assert completion.dtype == np.float32
        return float(completion.mean()) if prompt.view() != "blue circle" else None


def test_grpo_raises_the_reward_and_scores_are_told_by_task(models, tmp_path):
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]
    recipe = recipe_for(
        models,
        tmp_path / "run",
        steps=25,
        prompts={"kind": "inline", "prompts": rows},
        batch={"prompts": 2, "group": 8, "micro": 16},
        update={"learning_rate": 3e-3},
        evaluation={"held_out": 4},
    )
    run = built(recipe)
    run.verifier = Brightness().build(run.context)
    run.recipe = recipe.model_copy(update={"objective": [GRPO(spread="batch", bound=5.0, clip=1e-4)]})
    train(run)
    before, after = run.monitor.before.metrics, run.monitor.after.metrics
    assert after["accuracy"] > before["accuracy"] + 0.02
    assert {"accuracy/square", "accuracy/circle"} <= after.keys()


def test_routing_sends_every_trajectory_to_its_teacher_and_its_sampler(models, tmp_path):
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]
    routed = {
        "kind": "routed",
        "by": "task",
        "name": "experts",
        "routes": {"square": {"kind": "flow", "model": models[1]}, "circle": {"kind": "flow", "model": models[0]}},
    }
    recipe = recipe_for(models, tmp_path / "run", prompts={"prompts": rows}, teacher=routed, steps=2)
    run = built(recipe)
    prompts = run.course.next(0, {}, None).prompts
    trajectories = rolled_out(run, prompts, 2, 3)
    (target,) = run.ask(trajectories, run.at(0))
    own = run.student(trajectories).kl(target.distribution).view(-1, 3).sum(1)
    tasks = [p.fields["task"] for p in trajectories.prompts]
    assert len(set(tasks)) == 2
    for task, divergence in zip(tasks, own.tolist(), strict=True):
        assert (divergence < 1e-10) == (task == "circle"), "the circles' teacher is the student"
    train(run)
    row = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert row["teacher"] == row["task"]
    writer = built(
        recipe_for(
            models,
            tmp_path / "w",
            prompts={"prompts": rows},
            teacher=routed,
            rollout={"kind": "sde", "steps": 4, "teacher": "experts"},
        )
    )
    walked = rolled_out(writer, prompts, 1, 3)
    squares = [p for p in prompts if p.fields["task"] == "square"]
    alone = writer.rollout.sources["square"](writer.at(0).request(squares, 3, stream=0, group=1))
    mine = [i for i, p in enumerate(walked.prompts) if p.fields["task"] == "square"]
    torch.testing.assert_close(torch.cat([walked.completions()[i] for i in mine]), alone.actions)


def test_averaged_weights_are_measured_saved_and_resumed(models, tmp_path):
    average = {"decay": 0.75, "every": 2}
    run = built(recipe_for(models, tmp_path / "a", update={"average": average}, steps=4))
    weights = [dict(run.student.module.named_parameters())["transformer.proj_out.bias"]]
    expected = weights[0].detach().clone()
    apply = run.optimiser.apply

    def taken(settings, finite):
        signals = apply(settings, finite)
        if run.step % 2 == 1:
            expected.lerp_(weights[0].detach(), 0.25)
        return signals

    run.optimiser.apply = taken
    train(run)
    live = weights[0].detach().clone()
    assert not torch.allclose(live, expected)
    with run.optimiser.averaged():
        torch.testing.assert_close(weights[0].detach(), expected)
    assert torch.equal(weights[0].detach(), live)
    changes = {"update": {"average": average}, "checkpoint": {"every": 2}}
    whole = execute(recipe_for(models, tmp_path / "whole", steps=4, **changes), quiet=True)
    torch.testing.assert_close(whole.student.transformer.proj_out.bias.detach(), expected)
    execute(recipe_for(models, tmp_path / "cut", steps=2, **changes), quiet=True)
    rest = execute(recipe_for(models, tmp_path / "cut", steps=4, **changes), resume=True, quiet=True)
    assert torch.equal(rest.student.transformer.proj_out.bias, whole.student.transformer.proj_out.bias)
    assert rest.after == whole.after
    exported = load_file(export(tmp_path / "cut", tmp_path / "out") / "transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(exported["proj_out.bias"], whole.student.transformer.proj_out.bias)
    # A run too short for a look at the weights keeps what it trained.
    short = execute(recipe_for(models, tmp_path / "short", update={"average": average}, steps=1), quiet=True)
    start = load_file(f"{models[0]}/transformer/diffusion_pytorch_model.safetensors")["proj_out.bias"]
    assert not torch.equal(short.student.transformer.proj_out.bias, start)


def test_a_run_goes_on_bit_for_bit(models, tmp_path):
    lora = {"rank": 2, "alpha": 4}
    changes = {"student": {"lora": lora}, "checkpoint": {"every": 2}}
    whole = execute(recipe_for(models, tmp_path / "whole", steps=4, **changes), quiet=True)
    execute(recipe_for(models, tmp_path / "cut", steps=2, **changes), quiet=True)
    rest = execute(recipe_for(models, tmp_path / "cut", steps=4, **changes), resume=True, quiet=True)
    for (name, a), (_, b) in zip(whole.student.named_parameters(), rest.student.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole.after == rest.after


def test_the_command_line_end_to_end(models, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(block_for(models, tmp_path / "run")))
    for words in (["train", str(path), "--quiet"], ["eval", str(tmp_path / "run")]):
        monkeypatch.setattr("sys.argv", ["opd", *words])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0
    assert "reverse_kl/step_2" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_teacher_is_asked_with_the_students_guidance(models, tmp_path):
    run = built(recipe_for(models, tmp_path / "run", student={"guidance": 3.0}))
    made = rolled_out(run, run.course.next(0, {}, None).prompts, 1, 3)
    (target,) = run.ask(made, run.at(0))
    teacher, x = run.teachers[0].model, made.contexts[0].start[None]
    t, conditions = made.contexts[0].times[:1], run.student.model.encoder.encode([made.prompts[0].view(), ""])
    with torch.no_grad():
        bound, free = (teacher(x, t, [condition], [1], [1.0]) for condition in conditions)
    following, noise = made.contexts[0].times[1:2], torch.tensor([0.7])
    expected = transition(x, free + 3.0 * (bound - free), t, following, noise).mean
    torch.testing.assert_close(target.distribution.mean[:1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, transition(x, bound, t, following, noise).mean, atol=1e-4)


def test_members_of_a_routed_teacher_stay_and_a_student_like_its_teacher_has_no_loss(models, tmp_path):
    routes = {shape: {"kind": "flow", "model": models[0]} for shape in ("square", "circle")}
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]
    routed = {"kind": "routed", "by": "task", "routes": routes}
    run = built(recipe_for(models, tmp_path / "run", teacher=routed, prompts={"prompts": rows}))
    train(run)
    steps = [record for record in run.monitor.history if "train/loss" in record]
    # A student in training mode and a teacher in eval mode may round differently.
    assert steps[0]["train/loss"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["train/divergence"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["train/empty"] == 1
    run = built(recipe_for(models[::-1], tmp_path / "other", teacher=routed, prompts={"prompts": rows}))
    members = run.teachers[0].members().values()
    before = [{name: p.clone() for name, p in member.model.named_parameters()} for member in members]
    train(run)
    assert next(record["train/loss"] for record in run.monitor.history if "train/loss" in record) > 0
    for member, weights in zip(members, before, strict=True):
        for name, p in member.model.named_parameters():
            assert torch.equal(p, weights[name]), name
            assert p.grad is None


def test_the_recipes_lead_from_a_blank_model_to_a_distilled_student(tmp_path, monkeypatch, capsys):
    """The commands of docs/systems/flow-opd.md, with a few pictures and steps."""
    monkeypatch.chdir(tmp_path)
    sizes = ["steps=2", "batch.prompts=2", "evaluation.every=0", "evaluation.steps=2", "hardware.threads=1"]
    runs = ["runs/drawings-2-count", "runs/drawings-2-glyph"]
    for words in (
        ["create-flow-model", "models/blank", "--tokenizer", "drawings:count,glyph", "--size", "16", "--layers", "1"],
        ["train", "drawings_1_base", "--quiet", *sizes],
        ["train", "drawings_2_count", "--quiet", "batch.group=2", *sizes],
        ["train", "drawings_2_glyph", "--quiet", "batch.group=2", *sizes],
        ["merge", *runs, "--into", "models/drawings"],
        ["train", "drawings_3_opd", "--quiet", "batch.group=2", *sizes],
    ):
        monkeypatch.setattr("sys.argv", ["opd", *words])
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code, (words, capsys.readouterr().err)
    assert (tmp_path / "runs/drawings-3-opd/student/transformer").is_dir()
