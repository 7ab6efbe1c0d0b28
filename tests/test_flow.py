"""Flow-matching models: the sampler's equations on numbers, and tiny real transformers in the same loop."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from opd.api import distill, execute, export
from opd.cli.main import main
from opd.context import Context
from opd.distributions import Gaussian
from opd.divergences import Target
from opd.divergences.gaussian_kl import GaussianKL
from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError, RunError
from opd.evaluation import evaluate
from opd.flow.creation import create_flow_model
from opd.flow.denoising import Denoising, pack
from opd.flow.model import load_flow_model
from opd.flow.sampling import sample_images
from opd.flow.transition import diffusion, transition
from opd.language.creation import symbol_tokenizer
from opd.loop import train
from opd.merging import merge
from opd.monitor import Monitor
from opd.objectives.grpo import GRPO
from opd.objectives.sft import SFT
from opd.plan import make_plan
from opd.planning import saved_bytes
from opd.policies.flow_transformer import FlowTransformer
from opd.prompts import Prompt, count_repeats, load_prompts
from opd.recipe import load_recipe, parse_recipe
from opd.rollouts.noised import NoisedRollout
from opd.rollouts.sde import SDERollout
from opd.run import assemble
from opd.store.sampling import sample
from opd.verifiers import Verifier

WORDS = ("red", "green", "blue", "square", "circle")
PROMPTS = [f"{colour} {shape}" for colour in WORDS[:3] for shape in WORDS[3:]]
PIXELS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}
TIMES = torch.tensor([1.0, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.009, 0.0])


def step_of(velocity, x, t=0.6, following=0.4, noise=0.7):
    each = torch.full((len(x),), 1.0)
    return transition(x, velocity, t * each, following * each, noise * each)


# The sampler's equations


def test_divergence_of_two_steps_is_the_weighted_square_of_their_velocities_difference():
    g = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(10, 3, 4, 4, generator=g) for _ in range(3))
    t, following = TIMES[:-1], TIMES[1:]
    noise = torch.full((10,), 0.7)
    s = diffusion(t, following, noise)
    expected = [3.51, 3.44, 2.27, 1.72, 1.36, 1.09, 0.86, 0.65, 0.43, 0.07]
    torch.testing.assert_close(s, torch.tensor(expected), atol=0.03, rtol=0.02)
    step = t - following
    weight = step / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2
    kl = transition(x, v, t, following, noise).kl(transition(x, w, t, following, noise))
    torch.testing.assert_close(kl, weight * (v - w).square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
    assert weight[-2] == pytest.approx(1.1, rel=0.1)


def test_without_noise_the_mean_is_the_euler_step_and_density_that_of_the_velocity():
    x, v, target = (torch.randn(5, 2, 2) for _ in range(3))
    step = step_of(v, x, noise=0.0)
    torch.testing.assert_close(step.mean, x - 0.2 * v)
    # An action that the velocity `target` would have led to.
    error = (v - target).square().flatten(1).mean(1)
    torch.testing.assert_close(step.square(x - 0.2 * target), error)
    constant = -math.log(0.2) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob(x - 0.2 * target), constant - 0.5 * error)


def test_log_probability_is_the_mean_over_the_numbers_of_a_latent():
    step = step_of(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    x = torch.randn(3, 2, 4, 4)
    expected = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1)).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob(x), expected)


def test_sde_and_ode_have_the_same_marginals_on_gaussian_data():
    """Data ~ N(1.5, 0.4^2): the velocity is known, and both samplers must end there."""
    centre, spread, count = 1.5, 0.4, 20_000
    g = torch.Generator().manual_seed(0)

    def velocity(x, t):
        variance = (1 - t) ** 2 * spread**2 + t**2
        centred = x - (1 - t) * centre
        data = centre + (1 - t) * spread**2 / variance * centred
        return t / variance * centred - data

    grid = torch.linspace(1, 0, 201)
    for noise in (0.0, 0.7):
        x = torch.randn(count, 1, generator=g)
        for t, following in itertools.pairwise(grid):
            step = step_of(velocity(x, float(t)), x, float(t), float(following), noise)
            x = step.mean + (step.std[:, None] * torch.randn(x.shape, generator=g) if noise else 0)
        assert float(x.mean()) == pytest.approx(centre, abs=0.02)
        assert float(x.std()) == pytest.approx(spread, abs=0.03)


# Objectives on Gaussians


def walk(count, steps, shape=(1, 2, 2), seed=0, rewards=None, group=1):
    """Trajectories of random latents at the grid's times."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randn(count, steps, *shape, generator=g)
    rows = [Denoising(None, torch.zeros(shape), TIMES[: steps + 1], 0.7, 1.0, actions[i, -1]) for i in range(count)]
    prompts = [Prompt(f"p{i}", {"prompt": "x"}) for i in range(count // group)]
    made = pack(prompts, group, rows, actions, torch.zeros(count, steps), "student")
    if rewards is None:
        return made
    known = torch.tensor(rewards)
    return replace(made, rewards=known, reward_spread=float(known.std(correction=0)))


@pytest.mark.parametrize("estimator", ["kl_direct", "pg_sample", "pg_detached"])
@pytest.mark.parametrize("scale", ["kl", "release", "uniform"])
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(estimator, scale):
    v = torch.randn(6, 1, 2, 2, requires_grad=True)
    made = walk(2, 3)
    own = step_of(v, torch.randn(6, 1, 2, 2))
    loss = GaussianKL(estimator=estimator, scale=scale)(own, [Target(own.detach())], torch.ones(6), made)
    loss.total.backward()
    assert loss.total.item() == 0
    assert v.grad.abs().max() == 0


def test_scales_are_the_step_in_time_and_the_plain_square_of_velocities():
    x, v, w = (torch.randn(6, 1, 2, 2) for _ in range(3))
    mine, theirs = step_of(v, x), step_of(w, x)
    values = {
        scale: GaussianKL(scale=scale)(mine, [Target(theirs)], torch.ones(6), walk(2, 3)).values
        for scale in ("kl", "release", "uniform")
    }
    torch.testing.assert_close(values["release"], 0.2 * values["kl"])
    torch.testing.assert_close(values["uniform"], (v - w).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_divergence_by_step_is_logged_with_the_name_of_a_teacher():
    mine, theirs = (step_of(torch.randn(6, 1, 2, 2), torch.zeros(6, 1, 2, 2)) for _ in range(2))
    loss = GaussianKL(teacher="anchor")(mine, [Target(theirs)], torch.ones(6), walk(2, 3))
    assert list(loss.measured) == ["kl_step_0@anchor", "kl_step_1@anchor", "kl_step_2@anchor"]
    second = loss.measured["kl_step_1@anchor"].mean()
    torch.testing.assert_close(second, loss.values[1::3].mean())


def test_with_an_anchor_the_optimum_lies_between_the_two_teachers():
    x, taught, anchored = (torch.randn(6, 1, 2, 2) for _ in range(3))
    share = 0.25
    best = ((taught + share * anchored) / (1 + share)).requires_grad_()
    own, made = step_of(best, x), walk(2, 3)
    targets = [Target(step_of(taught, x), teacher="expert"), Target(step_of(anchored, x), teacher="anchor")]
    total = torch.zeros(())
    for name, weight in (("expert", 1.0), ("anchor", share)):
        objective = GaussianKL(teacher=name)
        total = total + objective(own, objective.heard(targets), weight * torch.ones(6), made).total
    total.backward()
    assert total.item() > 0.1
    assert best.grad.abs().max() < 1e-5


def test_grpo_of_images_divides_by_the_spread_of_all_rewards_and_bounds():
    made = walk(4, 2, rewards=[1.0, 0.0, 0.5, 0.5], group=2)
    spread = float(torch.tensor([1.0, 0.0, 0.5, 0.5]).std(correction=0)) + 1e-4
    found = GRPO(spread="batch").advantages(made)
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0.0, 0.0]) / spread)
    assert GRPO(spread="batch", bound=1.0).advantages(made).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_grpo_of_images_is_the_policy_gradient_of_the_latents_drawn():
    from dataclasses import replace

    v = torch.randn(8, 1, 2, 2, requires_grad=True)
    made = walk(4, 2, rewards=[1.0, 0.0, 0.5, 0.5], group=2)
    own = step_of(v, torch.randn(8, 1, 2, 2))
    made = replace(made, behaviour_log_probs=own.log_prob(made.actions).detach())
    GRPO(spread="batch", clip=1e-4)(own, [], torch.ones(8), made).total.backward()
    other = v.detach().clone().requires_grad_()
    x = own.mean.detach() + v.detach() * own.gain.view(-1, 1, 1, 1)  # undo the step
    again = Gaussian(x - other * own.gain.view(-1, 1, 1, 1), own.std, own.step, own.gain)
    advantage = GRPO(spread="batch").advantages(made).repeat_interleave(2)
    (-advantage * again.log_prob(made.actions)).sum().backward()
    torch.testing.assert_close(v.grad, other.grad, atol=1e-5, rtol=1e-3)


# Tiny transformers


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Rows with the path of an 8 x 8 drawing: a colour, or the colour under a dark bar."""
    folder, rows = tmp_path_factory.mktemp("drawings"), []
    for text in PROMPTS:
        colour, shape = text.split()
        picture = np.full((8, 8, 3), PIXELS[colour], np.uint8)
        if shape == "circle":
            picture[:2] = 20
        Image.fromarray(picture).save(folder / f"{text}.png")
        rows.append({"id": text, "prompt": text, "task": shape, "image": str(folder / f"{text}.png")})
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of two tiny models that read the same words."""
    folder = tmp_path_factory.mktemp("flow")
    tokenizer = symbol_tokenizer(WORDS, words=True)
    options = {"size": 8, "layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4, "shift": 3.0}
    return [
        str(create_flow_model(folder / name, tokenizer, seed=seed, **options))
        for seed, name in enumerate(("student", "teacher"))
    ]


def block_for(models, output, **changes):
    data = {
        "name": "t",
        "output": str(output),
        "steps": 3,
        "student": {"kind": "flow_transformer", "model": models[0]},
        "teacher": {"kind": "flow", "model": models[1]},
        "prompts": {"kind": "inline", "prompts": [{"prompt": text, "id": text} for text in PROMPTS]},
        "rollout": {"kind": "sde", "steps": 4},
        "objective": "gaussian_kl",
        "batch": {"prompts": 4, "group": 2, "micro": 8},
        "update": {"learning_rate": 1e-2},
        "evaluation": {"held_out": 2, "samples": 1, "steps": 3},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        extends = isinstance(value, dict) and isinstance(data.get(key), dict) and "kind" not in value
        data[key] = {**data[key], **value} if extends else value
    return data


def recipe_for(models, output, **changes):
    return parse_recipe(block_for(models, output, **changes))


def built(recipe):
    recipe.directory.mkdir(parents=True, exist_ok=True)
    return assemble(recipe, Monitor(recipe.directory, quiet=True))


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
    assert run.monitor.history[1]["train/objective/gaussian_kl@anchor"] == 0, "the student is its own anchor at first"


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


def test_flow_matching_learns_images_and_the_prompt_table_where_asked(models, drawings, tmp_path):
    recipe = recipe_for(
        models,
        tmp_path / "run",
        steps=60,
        teacher=[],
        student={"train_prompts": True},
        prompts={"prompts": drawings},
        rollout={"kind": "noised", "drop_prompt": 0.1},
        objective="sft",
        batch={"prompts": 4, "group": 4, "micro": 16},
    )
    table = built(recipe).student.model.encoder.tokens.weight.detach().clone()
    result = execute(recipe, quiet=True)
    errors = [r["train/squared_error"] for r in result.history if "train/squared_error" in r]
    assert np.mean(errors[-10:]) < 0.7 * np.mean(errors[:3])
    assert not torch.equal(result.student.encoder.tokens.weight, table)


class Brightness(Verifier):
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
    run.verifier, run.objectives = Brightness(), [GRPO(spread="batch", bound=5.0, clip=1e-4)]
    train(run)
    before, after = run.monitor.before.metrics, run.monitor.after.metrics
    assert after["accuracy"] > before["accuracy"] + 0.02
    assert {"accuracy/square", "accuracy/circle"} <= after.keys()


def test_lora_trains_adapters_alone_and_saves_both_forms(models, tmp_path):
    from diffusers import SD3Transformer2DModel

    lora = {"rank": 2, "alpha": 4}
    result = execute(recipe_for(models, tmp_path / "run", student={"lora": lora}), quiet=True)
    trained = [n for n, p in result.student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    folder = result.directory / "student"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, models[0])
    merged = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    # The adapter says what it changes: nobody has to name the base. The average of one with itself is that one.
    factors = merge([result.directory, result.directory], tmp_path / "factors", average="factors", form="dense")
    same = SD3Transformer2DModel.from_pretrained(factors, subfolder="transformer")
    for ours, theirs in zip(same.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    inputs = (torch.randn(1, 3, 8, 8), torch.randn(1, 4, 16), torch.randn(1, 16), torch.tensor([500.0]))
    torch.testing.assert_close(merged(*inputs).sample, result.student.transformer(*inputs).sample, atol=1e-5, rtol=1e-4)
    other = FlowTransformer(model=models[0], adapter=str(folder / "adapter")).build(Context(torch.device("cpu")))
    torch.testing.assert_close(other.model.transformer(*inputs).sample, merged(*inputs).sample, atol=1e-5, rtol=1e-4)
    # On top of that adapter a second one changes weights that lie nowhere, and says nothing alone.
    student = {"lora": lora, "adapter": str(folder / "adapter")}
    again = execute(recipe_for(models, tmp_path / "again", student=student), quiet=True)
    assert not (again.directory / "student" / "adapter").exists()
    merged = SD3Transformer2DModel.from_pretrained(again.directory / "student", subfolder="transformer")
    torch.testing.assert_close(merged(*inputs).sample, again.student.transformer(*inputs).sample, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="has no adapter"):
        merge([result.directory, again.directory], tmp_path / "merged", form="adapter")


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
    prompts = run.schedule.next(0, {}).prompts
    trajectories = run.rollout(prompts, 2, 3, stream=0)
    (target,) = run.ask(trajectories)
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
    walked = writer.rollout(prompts, 1, 3, stream=0)
    alone = writer.rollout.sources["square"]([p for p in prompts if p.fields["task"] == "square"], 1, 3, stream=0)
    mine = [i for i, p in enumerate(walked.prompts) if p.fields["task"] == "square"]
    torch.testing.assert_close(torch.cat([walked.completions()[i] for i in mine]), alone.actions)


def test_averaged_weights_are_measured_saved_and_resumed(models, tmp_path):
    average = {"decay": 0.75, "every": 2}
    run = built(recipe_for(models, tmp_path / "a", update={"average": average}, steps=4))
    weights = [dict(run.student.module.named_parameters())["transformer.proj_out.bias"]]
    expected = weights[0].detach().clone()
    apply = run.optimiser.apply

    def taken(finite):
        signals = apply(finite)
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


def test_the_plan_counts_what_the_models_are(models, tmp_path):
    teachers = [{"kind": "flow", "model": models[1], "name": "expert"}, {"kind": "self", "name": "anchor"}]
    recipe = recipe_for(models, tmp_path / "run", teacher=teachers)
    plan = make_plan(recipe)
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    count = sum(p.numel() for p in student.model.transformer.parameters())
    assert plan.models["student"]["trainable"] == plan.models["teacher 0"]["parameters"] == count
    assert plan.as_dict()["denoising_steps_per_step"] == {"sampled": 32, "trained": 24}
    assert plan.memory["student weights"] == plan.memory["teacher 1 weights"] == 4 * count
    kept = saved_bytes(
        student.model.transformer,
        lambda: student.model(
            torch.zeros(3, 3, 8, 8), torch.ones(3), student.model.encoder.encode(["red"]), [3], [1.0]
        ),
    )
    assert plan.memory["activations of a micro-batch"] == pytest.approx(8 * kept, rel=0.15)


@pytest.mark.parametrize(("dtype", "kept"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_a_teachers_dtype_is_the_students_unless_it_is_said(dtype, kept, models, tmp_path):
    teacher = {"kind": "flow", "model": models[1], "dtype": dtype}
    student = {"dtype": "bfloat16", "lora": {"rank": 2}}
    recipe = recipe_for(models, tmp_path / "run", teacher=teacher, student=student)
    context = Context(torch.device("cpu"))
    loaded = recipe.teacher[0].build(context, recipe.student.build(context)).model.transformer
    assert {p.dtype for p in loaded.parameters()} == {kept}
    held = sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert make_plan(recipe).memory["teacher 0 weights"] == held


def test_the_recipe_for_the_real_model_is_planned_without_it():
    plan = make_plan(load_recipe("flow_opd_sd3_5_medium"))
    assert plan.models["student"]["parameters"] == pytest.approx(2.25e9, rel=0.05)
    assert plan.models["student"]["trainable"] == pytest.approx(2e7, rel=0.3)
    assert len(plan.models) == 5
    assert any("comes with opd" in note for note in plan.notes)
    expert = make_plan(load_recipe("flow_opd_expert_sd3_5_medium"))
    assert expert.models["student"]["trainable"] == plan.models["student"]["trainable"]


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


MISTAKES = [
    ({"objective": "reverse_kl"}, RecipeError, "objective 'reverse_kl' is for language models.*gaussian_kl"),
    ({"rollout": {"kind": "student"}}, RecipeError, "rollout 'student' is for language.*sde"),
    ({"teacher": {"kind": "local", "model": "x"}}, RecipeError, "teacher 'local' is for language"),
    ({"rollout": {"kind": "mixture"}}, RecipeError, "'student' is for language"),
    ({"verifier": "exact_match"}, RecipeError, "verifier 'exact_match' is for language"),
    ({"objective": "sft"}, IncompatibleError, "noised"),
    ({"end_tokens": [1]}, IncompatibleError, "remove the key"),
    ({"rollout": {"kind": "sde", "teacher": "x"}}, IncompatibleError, "give that teacher a name"),
    ({"student": {"model": "/nowhere"}}, ModelError, "no folder with a transformer/"),
    ({"student": {"resolution": 12}}, ModelError, "at most 8"),
    ({"student": {"lora": {"targets": ["nothing"]}}}, ModelError, "student.lora.targets"),
    ({"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}}, DataError, "no token.*red pig"),
    ({"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}}, DataError, "at most 4"),
    ({"rollout": {"kind": "noised"}, "objective": "sft", "teacher": []}, DataError, "no column 'image'"),
    (
        {
            "rollout": {"kind": "noised", "times": "grid"},
            "objective": {"kind": "gaussian_kl", "estimator": "pg_sample"},
            "prompts": {"prompts": [{"prompt": text, "image": "x.png"} for text in PROMPTS]},
        },
        IncompatibleError,
        "student's own samples",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_named(changes, error, message, models, tmp_path):
    data = block_for(models, tmp_path / "run", **changes)
    with pytest.raises(error, match=message):
        built(parse_recipe(data))


REFUSED_BY_THE_PLAN = [
    {"rollout": {"kind": "sde", "teacher": "x"}},
    {"student": {"resolution": 12}},
    {"prompts": {"prompts": ["red pig", "red circle", "blue circle"]}},
    {"prompts": {"prompts": ["red circle square red circle", *PROMPTS]}},
    {"prompts": {"kind": "file", "path": "nowhere.jsonl"}},
    {"prompts": {"prompts": [{"prompt": [{"role": "user", "content": "red circle"}]}] * 4}},
]


@pytest.mark.parametrize("changes", REFUSED_BY_THE_PLAN, ids=lambda changes: next(iter(changes)))
def test_what_a_run_refuses_the_plan_refuses_in_the_same_words(changes, models, tmp_path):
    recipe = recipe_for(models, tmp_path / "run", **changes)
    with pytest.raises(OpdError) as found:
        built(recipe)
    with pytest.raises(type(found.value)) as planned:
        make_plan(recipe)
    assert str(planned.value) == str(found.value)


def test_a_teacher_is_asked_with_the_students_guidance(models, tmp_path):
    run = built(recipe_for(models, tmp_path / "run", student={"guidance": 3.0}))
    made = run.rollout(run.schedule.next(0, {}).prompts, 1, 3, stream=0)
    (target,) = run.ask(made)
    teacher, x = run.teachers[0].model, made.contexts[0].start[None]
    t, conditions = made.contexts[0].times[:1], run.student.model.encoder.encode([made.prompts[0].view(), ""])
    with torch.no_grad():
        bound, free = (teacher(x, t, [condition], [1], [1.0]) for condition in conditions)
    following, noise = made.contexts[0].times[1:2], torch.tensor([0.7])
    expected = transition(x, free + 3.0 * (bound - free), t, following, noise).mean
    torch.testing.assert_close(target.distribution.mean[:1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected, transition(x, bound, t, following, noise).mean, atol=1e-4)


def test_weights_of_the_steps_on_the_schedulers_own_grid(models):
    """Ten steps at shift 3: what a velocity's error weighs at each."""
    grid = load_flow_model(FlowTransformer(model=models[0]), "cpu").grid(10)
    torch.testing.assert_close(grid, TIMES, atol=1e-3, rtol=0)
    v, w = torch.zeros(10, 1, 2, 2), torch.ones(10, 1, 2, 2)
    t, following, noise = grid[:-1], grid[1:], torch.full((10,), 0.7)
    found = transition(v, v, t, following, noise).kl(transition(v, w, t, following, noise))
    diffusions = [3.51, 3.44, 2.27, 1.72, 1.36, 1.09, 0.86, 0.65, 0.43]
    times = TIMES.tolist()
    expected = [
        (now - later) / 2 * (s * (1 - now) / (2 * now) + 1 / s) ** 2
        for s, (now, later) in zip(diffusions, itertools.pairwise(times), strict=False)
    ]
    assert found[:9].tolist() == pytest.approx(expected, rel=0.04)
    # The last step is not trained on; the one before weighs several hundred times the first.
    assert 600 < found[8] / found[0] < 800


def test_a_group_of_equal_rewards_is_distilled_like_any_other():
    x, v, w = (torch.randn(12, 1, 2, 2) for _ in range(3))
    one, same = walk(4, 3, rewards=[0.0, 1.0, 0.5, 0.5], group=2), walk(4, 3, rewards=[1.0] * 4, group=2)
    losses = [GaussianKL()(step_of(v, x), [Target(step_of(w, x))], torch.ones(12), made) for made in (one, same)]
    assert torch.equal(losses[0].values, losses[1].values)
    assert (losses[1].values > 0).all()


def test_both_branches_of_a_guided_velocity_are_trained(models):
    student = FlowTransformer(model=models[0], guidance=3.0).build(Context(torch.device("cpu")))
    model, weight = student.model, student.model.transformer.proj_out.weight
    with torch.no_grad():
        weight.normal_(std=0.1)
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([0.6])
    bound, free = model.encoder.encode(["red circle", ""])

    def gradient(condition, guidance):
        (found,) = torch.autograd.grad(model(x, t, [condition], [1], [guidance]).square().sum() / 2, weight)
        return found

    guided = model(x, t, [bound], [1], [3.0]).detach()

    def pulled(condition):
        (found,) = torch.autograd.grad((model(x, t, [condition], [1], [1.0]) * guided).sum(), weight)
        return found

    torch.testing.assert_close(gradient(bound, 3.0), 3 * pulled(bound) - 2 * pulled(free), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ["pg_sample", "pg_detached"])
def test_policy_gradients_of_the_divergence_clip_latents_that_another_student_drew(estimator):
    """Where the ratio has left the clip on the side that the reward pulls to, a latent has no gradient."""
    made, x = walk(1, 4), torch.randn(4, 1, 2, 2)
    velocity = torch.randn(4, 1, 2, 2, requires_grad=True)
    own, teacher = step_of(velocity, x), step_of(torch.randn(4, 1, 2, 2), x)
    actions = made.actions
    log_q = own.log_prob(actions).detach()
    reward = teacher.log_prob(actions) - log_q if estimator == "pg_sample" else -own.kl(teacher).detach()
    away = 0.1 * reward.sign()  # two of the latents are likelier now than when drawn, two less likely
    away[2:] *= -1
    stale = replace(made, behaviour_log_probs=log_q - away)
    loss = GaussianKL(estimator=estimator)(own, [Target(teacher)], torch.ones(4), stale)
    (found,) = torch.autograd.grad(loss.total, velocity)
    moved = found.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, True]
    scale = reward[2:] * (4 if estimator == "pg_sample" else 1) * (-away[2:].abs() * reward[2:].sign()).exp()
    (plain,) = torch.autograd.grad((-scale * step_of(velocity, x).log_prob(actions)[2:]).sum(), velocity)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_a_step_is_float32_whatever_the_model_computes_in(models):
    student = FlowTransformer(model=models[0], dtype="bfloat16").build(Context(torch.device("cpu")))
    source = SDERollout(steps=4, dtype="bfloat16").build(student.context, student, [])
    with torch.autocast("cpu", torch.bfloat16):
        made = source([Prompt("p", {"prompt": "red circle"})], 2, 3, stream=0)
        own = student(made)
    assert {own.mean.dtype, own.std.dtype, made.actions.dtype, made.behaviour_log_probs.dtype} == {torch.float32}
    x, v = (torch.randn(3, 2, 4, 4) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        within = step_of(v.bfloat16(), x)
    assert torch.equal(within.mean, step_of(v.bfloat16().float(), x).mean)


def test_members_of_a_routed_teacher_stay_and_a_student_like_its_teacher_has_no_loss(models, tmp_path):
    routes = {shape: {"kind": "flow", "model": models[0]} for shape in ("square", "circle")}
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]
    routed = {"kind": "routed", "by": "task", "routes": routes}
    run = built(recipe_for(models, tmp_path / "run", teacher=routed, prompts={"prompts": rows}))
    train(run)
    steps = [record for record in run.monitor.history if "train/loss" in record]
    assert steps[0]["train/loss"] == steps[0]["train/divergence"] == 0
    assert steps[0]["train/gradient_norm"] == 0
    run = built(recipe_for(models[::-1], tmp_path / "other", teacher=routed, prompts={"prompts": rows}))
    members = run.teachers[0].members().values()
    before = [{name: p.clone() for name, p in member.model.named_parameters()} for member in members]
    train(run)
    assert next(record["train/loss"] for record in run.monitor.history if "train/loss" in record) > 0
    for member, weights in zip(members, before, strict=True):
        for name, p in member.model.named_parameters():
            assert torch.equal(p, weights[name]), name
            assert p.grad is None


def test_a_language_recipe_with_a_flow_objective_is_named():
    data = {"student": {"model": "x"}, "teacher": {"model": "y"}, "prompts": {"kind": "inline", "prompts": ["a"]}}
    with pytest.raises(RecipeError, match=r"objective 'gaussian_kl' is for flow models.*reverse_kl"):
        parse_recipe({**data, "objective": "gaussian_kl"})


def test_teachers_that_do_not_fit_are_named(models, tmp_path):
    sizes = {"layers": 1, "heads": 2, "head_width": 8, "prompt_width": 16, "places": 4}
    small = create_flow_model(tmp_path / "small", symbol_tokenizer(WORDS, words=True), size=4, **sizes)
    with pytest.raises(ModelError, match="at most 4"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(small)}))
    other = create_flow_model(tmp_path / "other", symbol_tokenizer(WORDS[::-1], words=True), size=8, shift=3.0, **sizes)
    with pytest.raises(IncompatibleError, match="read prompts differently"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(other)}))
    # Written by such a teacher, trajectories would go through other times than the student's.
    late = create_flow_model(tmp_path / "late", symbol_tokenizer(WORDS, words=True), size=8, shift=1.0, **sizes)
    with pytest.raises(IncompatibleError, match=r"scheduler goes through the times 1, .*the same scheduler"):
        built(recipe_for(models, tmp_path / "run", teacher={"kind": "flow", "model": str(late)}))
    with pytest.raises(ModelError, match="holds a model already"):
        create_flow_model(other, symbol_tokenizer(WORDS, words=True))


def commanded(words, monkeypatch, capsys):
    """Exit code and both outputs of a command."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["taken"], "holds a model already"),
        (["file"], "is a file"),
        (["m", "--heads", "0"], "heads is 0"),
        (["m", "--size", "30"], "multiple of 4"),
        (["m", "--heads", "1", "--head-width", "6"], "give a multiple of 4"),
        (["m", "--tokenizer", "drawings:cont"], "did you mean 'count'"),
    ],
)
def test_a_flow_model_is_created_by_a_command(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    command = ["opd", "create-flow-model", "taken", "--tokenizer", "drawings:glyph", "--size", "16", "--layers", "1"]
    assert commanded(command, monkeypatch, capsys)[:2] == (0, "taken\n")
    model = load_flow_model(FlowTransformer(model="taken"), torch.device("cpu"))
    model.encoder.check("text 4K", 8)
    with pytest.raises(DataError, match="no token"):
        model.encoder.check("red circle", 8)
    code, out, err = commanded(["opd", "create-flow-model", *words], monkeypatch, capsys)
    assert (code, out) == (OpdError.exit_code, "")
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_images_may_be_arrays_of_the_right_size_or_lists_that_take_turns(models, drawings, tmp_path):
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    source = NoisedRollout().build(student.context, student, [])
    dark, light = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    turns = Prompt("p", {"prompt": "red circle", "image": [dark, light]})
    assert [float(source([turns], 1, 1, stream=s).actions.mean()) for s in (0, 1, 2)] == [-1, 1, -1]
    made = source([Prompt("q", {"prompt": "red circle", "image": light})], 2, 1, stream=0)
    assert torch.equal(made.contexts[0].outcome, torch.ones(3, 8, 8))
    assert not torch.allclose(made.contexts[0].start, made.contexts[1].start)
    assert 0 < made.contexts[0].times[0] < 1
    with pytest.raises(DataError, match=r"\[4, 8, 3\]; the student draws"):
        source([Prompt("r", {"prompt": "red circle", "image": dark[:4]}, where="row 3")], 1, 1, stream=0)
    rows = [{**drawings[0], "image": dark}]
    with pytest.raises(RecipeError, match="path of its file"):
        recipe_for(models, tmp_path / "run", prompts={"prompts": rows})


@pytest.mark.parametrize("writer", [None, "experts"])
def test_images_are_sampled_once_and_learnt_from(writer, models, tmp_path, monkeypatch):
    """`opd rollout` of the student, or of two routed experts; a killed job goes on; `datasets` reads the folder."""
    prompts = [{"prompt": text, "id": text, "task": text.split()[1], "number": i} for i, text in enumerate(PROMPTS)]
    routes = {shape: {"kind": "flow", "model": models[i]} for i, shape in enumerate(("square", "circle"))}
    teacher = {"kind": "routed", "name": "experts", "by": "task", "routes": routes}
    folder, path = tmp_path / "images", tmp_path / "recipe.yaml"
    block = block_for(models, tmp_path / "run", teacher=[teacher], prompts={"prompts": prompts})
    path.write_text(yaml.safe_dump({**block, "rollout": {"kind": "sde", "steps": 4, "teacher": writer}}))

    def command(*more):
        words = ["rollout", str(path), "--out", str(folder), "--prompts-per-shard", "4", "--quiet", *more]
        monkeypatch.setattr("sys.argv", ["opd", *words])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    assert command() == 0
    first = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len([p for p in first if p.suffix == ".png"]) == 12
    (folder / ".opd" / "000001.jsonl").unlink()
    (folder / "images" / "000001" / "000003.png").write_bytes(b"half")
    assert command() == 0
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == first
    assert command("--draws", "2") == 0
    assert all(p.read_bytes() == data for p, data in first.items() if p.suffix == ".png")
    recipe = recipe_for(
        models,
        tmp_path / "sft",
        steps=2,
        teacher=[],
        prompts={"kind": "dataset", "path": str(folder)},
        rollout={"kind": "noised", "author": "teacher"},
        objective="sft",
    )
    run = built(recipe)
    prompts = load_prompts(recipe.prompts)
    assert len(prompts) == 24
    assert {(p.id, p.fields["task"]) for p in prompts} >= {("red circle-1-0", "circle"), ("blue square-0-1", "square")}
    train(run)
    assert command("seed=1") == 2


@pytest.mark.parametrize("rollout", [{"kind": "sde", "steps": 4}, {"kind": "noised"}])
def test_a_prompt_that_a_step_draws_twice_gets_other_noise(rollout, models, drawings):
    student = FlowTransformer(model=models[0]).build(Context(torch.device("cpu")))
    source = parse_recipe(block_for(models, "run", rollout=rollout)).rollout.build(student.context, student, [])
    one, other = (Prompt(row["id"], row) for row in drawings[:2])
    made = source(count_repeats([one, other, one]), 2, 3, stream=0)
    starts = torch.stack([context.start for context in made.contexts])
    assert len(starts.unique(dim=0)) == 6
    before = source([one, other], 2, 3, stream=0)
    assert torch.equal(before.actions, made.rows(0, 4)[0].actions)


def test_images_of_other_settings_and_of_nobody_are_refused(models, tmp_path):
    folder = tmp_path / "images"
    recipe = recipe_for(models, tmp_path / "run", batch={"group": 1})
    assert sample_images(recipe, folder, quiet=True) == 6
    assert sample_images(recipe, folder, quiet=True) == 6
    with pytest.raises(RunError, match=r"made with another settings .*'seed': 0.* now .*--out"):
        sample_images(recipe.model_copy(update={"seed": 1}), folder, quiet=True)
    texts = [{"prompt": text, "id": name} for text, name in zip(PROMPTS[::-1], PROMPTS, strict=True)]
    swapped = recipe_for(models, tmp_path / "run", batch={"group": 1}, prompts={"prompts": texts})
    with pytest.raises(RunError, match="made with another prompts"):
        sample_images(swapped, folder, quiet=True)
    (folder / ".opd" / "settings.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        sample_images(recipe, folder, quiet=True)
    other = recipe_for(models, tmp_path / "run", rollout={"kind": "noised"}, objective="sft", teacher=[])
    with pytest.raises(RecipeError, match="takes images that exist already"):
        sample_images(other, tmp_path / "other", quiet=True)
    with pytest.raises(RunError, match="did not write"):
        sample_images(recipe, tmp_path, quiet=True)
    with pytest.raises(RecipeError, match="a store holds texts"):
        sample(recipe, tmp_path / "store")


def test_images_of_another_writer_or_size_are_refused(models, tmp_path):
    """Each where nothing else has changed: a routed expert, its scheduler, the resolution."""
    shifted = Path(shutil.copytree(models[1], tmp_path / "shifted"))
    file = shifted / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 5.0}))
    rows = [{"prompt": text, "id": text, "task": text.split()[1]} for text in PROMPTS]

    def drawn(circle):
        routes = {"square": {"kind": "flow", "model": models[0]}, "circle": {"kind": "flow", "model": str(circle)}}
        teacher = {"kind": "routed", "name": "experts", "by": "task", "routes": routes}
        rollout = {"kind": "sde", "steps": 4, "teacher": "experts"}
        recipe = recipe_for(models, tmp_path / "run", teacher=teacher, rollout=rollout, prompts={"prompts": rows})
        return sample_images(recipe, tmp_path / "images", quiet=True)

    assert drawn(models[1]) == 12
    with pytest.raises(RunError, match="made with another writer"):
        drawn(models[0])
    with pytest.raises(RunError, match="made with another times"):
        drawn(shifted)
    tokenizer = symbol_tokenizer(WORDS, words=True)
    wide = create_flow_model(tmp_path / "wide", tokenizer, size=16, layers=1, heads=2, head_width=8, places=4)
    small, whole = (recipe_for([str(wide), str(wide)], tmp_path / "r", student={"resolution": n}) for n in (8, 16))
    sample_images(small, tmp_path / "sized", quiet=True)
    with pytest.raises(RunError, match="made with another settings"):
        sample_images(whole, tmp_path / "sized", quiet=True)
    pipelines = [str(tmp_path / name) for name in ("one", "other")]
    for seed, place in enumerate(pipelines):
        tiny_pipeline(seed).save_pretrained(place)
    expert = {"kind": "flow", "name": "expert", "model": pipelines[0]}
    changes = {"teacher": expert, "rollout": {"kind": "sde", "steps": 4, "teacher": "expert"}}
    first, second = (recipe_for([place, ""], tmp_path / "r", **changes) for place in pipelines)
    sample_images(first, tmp_path / "decoded", quiet=True)
    with pytest.raises(RunError, match="made with another encoders"):
        sample_images(second, tmp_path / "decoded", quiet=True)


def tiny_pipeline(seed=0):
    """A StableDiffusion3Pipeline of a few thousand numbers, with a VAE that halves nothing and two CLIP encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    text = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
        "max_position_embeddings": 77,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**text)) for _ in range(2)]
    tokenizer = symbol_tokenizer(WORDS, words=True)
    tokenizer.model_max_length = 77
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def test_a_diffusers_pipeline_trains_saves_and_draws_in_plain_diffusers(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    models = [str(tmp_path / "pipeline"), str(tmp_path / "other")]
    changes = {"steps": 2, "batch": {"prompts": 2, "group": 1}, "evaluation": {"steps": 2}}
    recipe = recipe_for(models, tmp_path / "run", student={"guidance": 2.0, "lora": {"rank": 2}}, **changes)
    result = execute(recipe, quiet=True)
    loaded = StableDiffusion3Pipeline.from_pretrained(
        result.directory / "student", text_encoder_3=None, tokenizer_3=None
    )
    g = torch.Generator().manual_seed(0)
    start = torch.randn(1, 4, 8, 8, generator=g)
    options = {"prompt": "red circle", "num_inference_steps": 2, "guidance_scale": 2.0, "latents": start}
    theirs = loaded(**options, height=8, width=8, output_type="np").images
    student = FlowTransformer(model=str(result.directory / "student"), guidance=2.0).build(Context(torch.device("cpu")))
    model = student.model
    assert model.resolution == 8
    x, times = start, model.grid(2)
    for k in range(2):
        with torch.no_grad():
            velocity = model(x, times[k][None], model.encoder.encode(["red circle"]), [1], [2.0])
        x = step_of(velocity, x, float(times[k]), float(times[k + 1]), 0.0).mean
    np.testing.assert_allclose(model.images(x), theirs, atol=2e-3)


def test_distill_takes_live_models(models, tmp_path):
    own, other = (FlowTransformer(model=m).build(Context(torch.device("cpu"))).model for m in models)
    before = own.transformer.proj_out.weight.detach().clone()
    settings = block_for(models, tmp_path / "run")
    settings = {k: v for k, v in settings.items() if k not in ("student", "teacher", "prompts")}
    result = distill({"model": own, "guidance": 3.0}, other, PROMPTS, quiet=True, **settings)
    assert result.student is own
    assert not torch.equal(own.transformer.proj_out.weight, before)
    assert yaml.safe_load((result.directory / "recipe.yaml").read_text())["student"]["guidance"] == 3.0
    with pytest.raises(RecipeError, match=r"student\.resolution is 8 beside a live model, which takes guidance, lora"):
        distill({"model": own, "resolution": 8}, other, PROMPTS, **settings)
    assert SFT().model_dump()["kind"] == "sft"
