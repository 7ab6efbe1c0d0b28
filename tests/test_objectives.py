"""Objectives beside the divergences: supervised fine-tuning, GRPO, sums with denominators of their own, the ladder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opd
from opd.api import execute
from opd.context import Context
from opd.curricula.length_ladder import ENTROPY, LengthLadder
from opd.divergences import ForwardKL, ReverseKL, Target
from opd.kept_weights import KeptWeights
from opd.objectives.grpo import GRPO
from opd.objectives.sft import SFT
from opd.recipe import parse_recipe
from opd.reduction import position_weights
from tests.conftest import rolled_out, trajectories_of
from tests.test_loop import models, recipe_for  # noqa: F401


def gradients(student, loss):
    trained = [p for p in student.module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def log_q_of(student, trajectories):
    return student(trajectories).log_probs().gather(1, trajectories.actions[:, None]).squeeze(1)


def test_sft_is_the_mean_cross_entropy_of_the_actions(student):
    trajectories = trajectories_of([5, 2, 7])
    weights = position_weights(trajectories, "token_mean")
    loss = SFT()(student(trajectories), [], weights, trajectories)
    want = -log_q_of(student, trajectories).mean()
    torch.testing.assert_close(loss.total, want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(student, loss.total), gradients(student, want), atol=1e-6, rtol=1e-4)


def test_soft_labels_are_forward_kl():
    """Same gradient as the cross-entropy with the teacher's distribution."""
    z = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    cross = torch.autograd.grad(-(p * z.log_softmax(-1)).sum(), z)[0]
    kl = torch.autograd.grad(ForwardKL().exact(p.log(), z.log_softmax(-1)), z)[0]
    torch.testing.assert_close(cross, kl)
    torch.testing.assert_close(kl, torch.tensor([0.46524, -0.25527, -0.20997], dtype=torch.float64), atol=1e-5, rtol=0)


def grouped(rewards, lengths=(3, 5, 2, 4), groups=(0, 0, 1, 1)):
    return replace(trajectories_of(list(lengths)), groups=torch.tensor(groups)).rewarded(torch.tensor(rewards), 0.5)


def test_advantages_are_relative_to_the_group():
    trajectories = grouped([1.0, 0.0, 1.0, 1.0])
    half = 0.5 / 0.5**0.5
    torch.testing.assert_close(GRPO().advantages(trajectories), torch.tensor([half, -half, 0, 0]), atol=1e-4, rtol=0)
    plain = GRPO(normalise=False).advantages(trajectories)
    torch.testing.assert_close(plain, torch.tensor([0.5, -0.5, 0.0, 0.0]))
    nan = float("nan")
    torch.testing.assert_close(
        GRPO(normalise=False).advantages(grouped([1.0, nan, 0.0, 1.0])), torch.tensor([0.0, 0.0, -0.5, 0.5])
    )


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_micro_batch_may_hold_part_of_a_group(student, spread):
    trajectories = grouped([1.0, 0.0, float("nan"), 1.0, 0.0], (3, 5, 2, 4, 3), (0, 0, 0, 1, 1))
    weights, objective = position_weights(trajectories, "token_mean"), GRPO(spread=spread)
    whole = gradients(student, objective(student(trajectories), [], weights, trajectories).total)
    parts = [objective(student(part), [], weights[here], part) for part, here in trajectories.split(1)]
    assert [len(part) for part, _ in trajectories.split(2)] == [2, 2, 1]
    torch.testing.assert_close(gradients(student, sum(p.total for p in parts)), whole, atol=1e-6, rtol=1e-4)
    assert whole.abs().max() > 0


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_grpo_is_the_clipped_surrogate(student, shift):
    trajectories = grouped([1.0, 0.0, 0.0, 1.0])
    log_q = log_q_of(student, trajectories)
    trajectories = replace(trajectories, behaviour_log_probs=log_q.detach() - shift)
    weights = position_weights(trajectories, "sequence_mean")
    objective = GRPO(clip=0.2, clip_high=0.3)
    loss = objective(student(trajectories), [], weights, trajectories)
    advantage = objective.advantages(trajectories).repeat_interleave(trajectories.lengths)
    ratio = (log_q - trajectories.behaviour_log_probs).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    torch.testing.assert_close(loss.total, (weights * surrogate).sum().detach(), atol=1e-5, rtol=1e-4)
    want = gradients(student, (weights * surrogate).sum())
    torch.testing.assert_close(gradients(student, loss.total), want, atol=1e-5, rtol=1e-3)


def test_the_expected_gradient_of_grpo_is_that_of_the_reward():
    """By enumeration over one action and groups of two: E[gradient] of unnormalised GRPO is (G - 1) / G of the policy
    gradient, since a member's own reward is in its baseline."""
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    q = z.softmax(-1)
    expected = torch.zeros(5, dtype=torch.float64)
    for a in range(5):
        for b in range(5):
            mean = (reward[a] + reward[b]) / 2
            log_q = z.log_softmax(-1)
            loss = -((reward[a] - mean) * log_q[a] + (reward[b] - mean) * log_q[b]) / 2
            expected += (q[a] * q[b]).detach() * torch.autograd.grad(loss, z)[0]
    want = torch.autograd.grad(-(q * reward).sum(), z)[0]
    torch.testing.assert_close(expected, want / 2)


def test_every_objective_has_its_own_positions_and_denominator():
    trajectories = trajectories_of([2, 3, 5])
    authors = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 0, 0], dtype=torch.uint8)
    trajectories = replace(trajectories, authors=authors)
    identity = lambda x: x  # noqa: E731
    mine = ReverseKL(written_by=["student"], weight=2.0).position_weights(trajectories, "token_mean", identity)
    assert mine.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0.5, 0.5])
    stopped = replace(trajectories, finished=torch.tensor([True, False, True]))
    masked = ReverseKL(end="mask").position_weights(stopped, "token_mean", identity)
    assert (masked == 0).nonzero().flatten().tolist() == [1, 9]
    assert float(masked.sum()) == pytest.approx(1.0)
    data = SFT(written_by=["data", "teacher"], reduction="sequence_mean")
    found = data.position_weights(trajectories, "token_mean", identity)
    assert found.tolist() == pytest.approx([0, 0, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 0, 0])


def test_cut_trajectories_may_be_left_out():
    trajectories = trajectories_of([2, 3, 1])
    trajectories = replace(trajectories, finished=torch.tensor([True, False, True]))
    masked = SFT(truncated="mask").position_weights(trajectories, "token_mean", lambda x: x)
    assert masked.tolist() == pytest.approx([1 / 3] * 2 + [0] * 3 + [1 / 3])
    by_sequence = SFT(truncated="mask", end="mask").position_weights(trajectories, "sequence_mean", lambda x: x)
    assert by_sequence.tolist() == [1, 0, 0, 0, 0, 0]
    assert SFT().position_weights(trajectories, "token_mean", lambda x: x).tolist() == pytest.approx([1 / 6] * 6)


def test_a_clip_and_a_mask_of_cut_trajectories_reach_training(models, tmp_path):  # noqa: F811
    def steps(name, **objective):
        recipe = recipe_for(
            models, tmp_path, output=str(tmp_path / name), objective={"kind": "reverse_kl", **objective}, steps=1
        )
        return next(r for r in execute(recipe, quiet=True).history if "train/loss" in r)

    plain, masked, clipped = steps("plain"), steps("masked", truncated="mask"), steps("clipped", clip=0.5)
    assert 0 < plain["train/truncated"] < 1
    assert masked["train/positions"] < plain["train/positions"]
    assert masked["train/divergence"] != plain["train/divergence"]
    assert clipped["train/divergence"] == pytest.approx(plain["train/divergence"], rel=1e-5)
    assert 0 < clipped["train/clipped"] <= 1
    assert clipped["train/loss"] <= 0.5 < plain["train/loss"]


def test_a_sum_of_objectives_is_the_sum_of_their_gradients(models, tmp_path):  # noqa: F811
    from tests.test_loop import build

    def step(objectives):
        recipe = recipe_for(models, tmp_path, objective=objectives)
        run = build(recipe, tmp_path)
        trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 2, 6)
        targets = run.ask(trajectories, run.at(0))
        counts = [o.position_weights(trajectories, "token_mean", lambda x: x) for o in recipe.objective]
        student = run.student(trajectories)
        losses = [o(student, targets, c, trajectories) for o, c in zip(recipe.objective, counts, strict=True)]
        run.optimiser.accumulate(losses, last=True)
        return torch.cat([p.grad.flatten() for p in run.student.module.parameters()])

    forward, reverse = {"kind": "forward_kl", "weight": 0.75}, {"kind": "reverse_kl", "weight": 0.25}
    both, mixed = step([forward, reverse]), step({"kind": "mixture", "reverse_weight": 0.25})
    torch.testing.assert_close(both, mixed, atol=1e-6, rtol=1e-4)


def test_an_objective_may_listen_to_one_teacher(models, tmp_path):  # noqa: F811
    _, teacher = models
    blocks = [
        {"model": teacher, "template": "plain", "name": "a"},
        {"kind": "self", "mode": "frozen", "name": "anchor"},
    ]
    objective = [{"kind": "reverse_kl", "teacher": "a"}, {"kind": "reverse_kl", "teacher": "anchor", "weight": 0.5}]
    data = recipe_for(models, tmp_path, end_tokens=[0]).dump()
    recipe = parse_recipe({**data, "teacher": blocks, "objective": objective})
    steps = [r for r in execute(recipe, quiet=True).history if "train/loss" in r]
    # The anchor is the student itself before the first step, and 0 nats away then.
    assert steps[0]["train/objective/reverse_kl@a"] > 0.1
    assert steps[0]["train/objective/reverse_kl@anchor"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/objective/reverse_kl@anchor"] > 1e-3
    target = [Target(None, 1.0, "a"), Target(None, 1.0, "anchor")]
    assert [t.teacher for t in recipe.objective[1].heard(target)] == ["anchor"]
    assert steps[0]["train/loss"] == pytest.approx(steps[0]["train/divergence"], rel=1e-3)
    assert steps[-1]["train/loss"] > steps[-1]["train/divergence"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": []}, "'teacher' is required"),
        ({"objective": {"kind": "reverse_kl", "teacher": "tutor"}}, "'tutor'"),
        ({"objective": "grpo"}, "'verifier' is required"),
        ({"objective": "grpo", "verifier": "exact_match", "batch": {"group": 1}}, "batch.group is 1"),
        ({"objective": ["sft", "forward_kll"]}, "forward_kl"),
        ({"objective": []}, "objective"),
    ],
)
def test_objectives_that_cannot_work_are_refused_when_the_recipe_is_read(models, tmp_path, changes, words):  # noqa: F811
    data = recipe_for(models, tmp_path).dump()
    with pytest.raises(opd.RecipeError, match=words):
        parse_recipe({**data, **changes})


def test_sft_on_own_samples_and_grpo_on_others_are_refused(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, objective="sft")
    with pytest.raises(opd.OpdError, match="no expected gradient"):
        execute(recipe, quiet=True)
    data = recipe_for(models, tmp_path, objective="grpo", verifier="exact_match").dump()
    with pytest.raises(opd.OpdError, match="own samples"):
        execute(parse_recipe({**data, "rollout": {"kind": "teacher", "max_new_tokens": 3}}), quiet=True)


@pytest.mark.parametrize(
    ("verifier", "fields", "words"),
    [
        ("exact_match", {"anser": "7"}, r"'exact_match' .* none of the 16 .* column 'answer'.*did you mean 'anser'\?"),
        ("math_verify", {"answer": " "}, "column 'answer' with an answer that can be read"),
        ("reasoning_gym", {"answer": "7"}, "column 'reasoning_gym' of prompts.kind: reasoning_gym"),
        ("reasoning_gym", {"reasoning_gym": "lcm"}, r"prompts\[\d+\]: column 'reasoning_gym' holds no task"),
    ],
)
def test_verdicts_that_no_prompt_can_get_are_refused(models, tmp_path, verifier, fields, words):  # noqa: F811
    pytest.importorskip("math_verify")
    rows = [{"prompt": f"{i}=", **fields} for i in range(20)]
    recipe = recipe_for(
        models,
        tmp_path,
        objective="grpo",
        verifier=verifier,
        batch={"group": 2},
        prompts={"prompts": rows},
        evaluation={"held_out": 4},
    )
    with pytest.raises(opd.DataError, match=words):
        execute(recipe, quiet=True)


def test_grpo_without_a_teacher_raises_the_reward(models, tmp_path):  # noqa: F811
    """The student learns to end its answer with a '7', rewarded by a pattern."""
    data = recipe_for(
        models,
        tmp_path,
        steps=40,
        objective=[{"kind": "grpo", "normalise": False}],
        verifier={"kind": "exact_match", "pattern": "([0-9])$"},
        rollout={"max_new_tokens": 1},
        batch={"prompts": 8, "group": 8, "micro": 64},
        update={"learning_rate": 3e-3},
        end_tokens=[2],
        evaluation={"held_out": 4, "k": 8, "samples": 1},
        prompts={"kind": "inline", "prompts": [{"prompt": f"{i}=", "answer": "7"} for i in range(20)]},
    ).dump()
    result = execute(parse_recipe({**data, "teacher": []}), quiet=True)
    rewards = [r["train/reward"] for r in result.history if "train/reward" in r]
    assert sum(rewards[-5:]) / 5 > 0.5 > 5 * sum(rewards[:3]) / 3
    assert result.after["accuracy"] > result.before["accuracy"]
    assert result.after["pass_at_k"] >= result.after["accuracy"]
    assert "reverse_kl" not in result.after


class Weights:
    """A stand-in student: one parameter; and a stand-in of a run that keeps and restores it."""

    def __init__(self):
        self.module = torch.nn.Linear(1, 1, bias=False)
        kept = KeptWeights(self)
        self.keep_weights, self.restore_weights = kept.keep, kept.restore


def climb(settings, entropies):
    """Walk a ladder whose held-out entropy is given after each rung; the weight counts the steps."""
    student = Weights()
    context = Context(torch.device("cpu"), steps=len(settings.lengths) * settings.steps_per_rung)
    course = settings.build([opd.prompts.Prompt("p", {"prompt": "x"})], 1, context)
    torch.nn.init.zeros_(student.module.weight)
    signals, lengths, step = {ENTROPY: entropies[0]}, [], 0
    while (draw := course.next(step, signals, student)) is not None and step < context.steps:
        lengths.append(draw.budget)
        with torch.no_grad():
            student.module.weight += 1
        step += 1
        signals = {ENTROPY: entropies[step // settings.steps_per_rung]} if course.asks_evaluation(step) else {}
    return lengths, int(student.module.weight)


def test_the_ladder_climbs_while_entropy_lasts_and_returns_the_last_stable_weights():
    ladder = LengthLadder(lengths=[4, 8, 16], steps_per_rung=2, minimum_share=0.5)
    assert climb(ladder, [2.0, 1.5, 1.2, 1.1]) == ([4, 4, 8, 8, 16, 16], 6)
    assert climb(ladder, [2.0, 1.5, 0.9, 9.0]) == ([4, 4, 8, 8], 2)
    assert climb(ladder, [2.0, 0.9, 9.0, 9.0]) == ([4, 4], 2), "if the first rung fails its weights stay"
    assert climb(ladder, [2.0, 1.5, 1.2, 0.9]) == ([4, 4, 8, 8, 16, 16], 4), "the last rung is judged too"
    kept = ladder.model_copy(update={"on_failure": "keep"})
    assert climb(kept, [2.0, 1.5, 0.9, 9.0]) == ([4, 4, 8, 8], 4)
    free = LengthLadder(lengths=[4, 8], steps_per_rung=3)
    assert climb(free, [2.0, 0.0, 0.0]) == ([4, 4, 4, 8, 8, 8], 6)
    absolute = LengthLadder(lengths=[4, 8], steps_per_rung=1, minimum_entropy=1.0)
    assert climb(absolute, [9.0, 0.9, 9.0]) == ([4], 1)


def test_a_ladder_in_a_run(models, tmp_path):  # noqa: F811
    ladder = {"kind": "length_ladder", "lengths": [3, 6, 12], "steps_per_rung": 2, "minimum_share": 0.01}
    recipe = recipe_for(models, tmp_path, steps=6, curriculum=ladder, end_tokens=[2])
    result = execute(recipe, quiet=True)
    rungs = [r["train/curriculum/length"] for r in result.history if "train/loss" in r]
    assert rungs == [3, 3, 6, 6, 12, 12]
    entropies = [r["step"] for r in result.history if "held_out/student_entropy" in r]
    assert entropies == [0, 2, 4, 6, 6]
    with pytest.raises(opd.OpdError, match="steps: 6"):
        execute(recipe_for(models, tmp_path, steps=7, curriculum=ladder, output=str(tmp_path / "b")), quiet=True)
    strict = {**ladder, "minimum_share": 100.0}
    stopped = execute(recipe_for(models, tmp_path, steps=6, curriculum=strict, output=str(tmp_path / "c")), quiet=True)
    assert stopped.summary["steps"] == 2
