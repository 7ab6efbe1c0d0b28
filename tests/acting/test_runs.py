"""Policies that act train through the one loop: in a simulator, under experts of three kinds, and by success."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from opd.acting.deciding import PolicyActor, ScriptedActor, State, draw, states_of
from opd.acting.model import PolicySettings, load_policy
from opd.api import execute
from opd.context import Context
from opd.divergences import Target
from opd.errors import DataError, IncompatibleError, RecipeError, RunError
from opd.objectives.hard_ce import HardCE
from opd.policies.action_tokens import ActionStudent, ActionTokensPolicy
from opd.policies.held_out import wilson
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.reduction import position_weights
from opd.rollouts import Request
from opd.rollouts.simulator import PlayingSettings, Simulator, SimulatorRollout
from opd.weights import weights_hash
from tests.acting.test_environments import Faulty
from tests.acting.tiny import WORLD, episodes, policy, recipe_of

CONTEXT = Context(torch.device("cpu"), seed=3)


def prompts_of(world=WORLD, per_task=2):
    return load_prompts(parse_recipe({"student": {"kind": "action_tokens", "model": "x"},
                                      "prompts": episodes(world, per_task), "rollout": "simulator",
                                      "objective": "grpo", "batch": {"group": 2}}).prompts)  # fmt: skip


def rolled(actor, model, *, plans=True, group=2, author="student", stream=0, prompts=None, **settings):
    own = PlayingSettings(**{"decisions": 4, **settings})
    source = Simulator(actor, model.layout, own, plans=plans, author=author)
    return source(Request(prompts or prompts_of(), group, own.decisions, stream, own, CONTEXT))


def test_a_trajectory_is_an_episode_in_chunks(model):
    found = rolled(PolicyActor(model), model)
    layout = model.layout
    assert found.lengths.tolist() == [len(episode.seen) * layout.tokens for episode in found.contexts]
    assert found.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.learn.all(), "no episode ended within a chunk"
    first, second = found.contexts[:2]
    assert np.array_equal(first.seen[0].images, second.seen[0].images), "a group begins in one state"
    assert not np.array_equal(first.seen[1].images, second.seen[1].images)
    # What was noted of each token is what the policy says of it.
    belief = PolicyActor(model).believe(states_of(found.contexts), 1.0).log_probs()
    columns = model.vocabulary.columns(found.actions)
    torch.testing.assert_close(belief.gather(1, columns[:, None]).squeeze(1), found.behaviour_log_probs)
    # The states are those that its actions lead to.
    world = WORLD.build()
    prompt = found.prompts[0]
    from opd.environments import Start
    from opd.rollouts.base import row_seed

    world.reset(Start(prompt.fields["task"], prompt.fields["seed"], row_seed(3, 0, prompt, 2, 0) % 2**31))
    scaled = layout.actions.decode(found.actions[: layout.tokens].numpy()).reshape(layout.chunk, 3)
    for action in model.statistics.unscale(scaled):
        turn = world.step(action)
    assert np.array_equal(turn.observation.images, first.seen[1].images)


def test_rollouts_do_not_depend_on_what_they_are_played_beside(model):
    one = rolled(PolicyActor(model), model, worlds=64)
    other = rolled(PolicyActor(model), model, worlds=3)
    assert torch.equal(one.actions, other.actions)
    again = rolled(PolicyActor(model), model, stream=1)
    assert not torch.equal(one.actions, again.actions)
    greedy = [rolled(PolicyActor(model), model, greedy=True, stream=s) for s in (0, 0)]
    assert torch.equal(greedy[0].actions, greedy[1].actions)


def test_draws_follow_the_distribution(model):
    belief = PolicyActor(model).believe(states_of(rolled(PolicyActor(model), model).contexts)[:1], 1.0)
    tokens = model.layout.tokens
    noise = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    ids = torch.stack([draw(belief, tokens, torch.full((1, tokens), float(u)))[0][0] for u in noise[::40]])
    share = (ids == ids.mode(0).values).float().mean(0)
    assert (share <= belief.log_probs().exp().max(-1).values + 0.02).all()
    ids, log_probs = draw(belief, tokens, None)
    assert torch.equal(log_probs[0], belief.log_probs().max(-1).values)


def test_tokens_behind_success_are_masked_and_have_no_influence(policies, model):
    """The scripted expert succeeds in the middle of a chunk; what it would have done afterwards is in nothing."""
    found = rolled(ScriptedActor(model), model, author="teacher", decisions=12, greedy=True)
    assert found.rewards.tolist() == [1.0] * 8
    assert found.finished.all()
    masked = ~found.learn
    assert 0 < int(masked.sum()) < len(masked)
    for episode, part in zip(found.contexts, torch.split(found.learn, found.lengths.tolist()), strict=True):
        assert int(part.sum()) == 3 * episode.steps
    student = ActionStudent(model, ActionTokensPolicy(model=policies[0]), CONTEXT)
    weights = position_weights(found, "token_mean")
    other = replace(found, actions=found.actions.where(found.learn, torch.tensor(model.layout.actions.ids[0])))
    expert = Target(ScriptedActor(model).believe(states_of(found.contexts), 1.0))
    from opd.divergences import ReverseKL
    from opd.objectives.sft import SFT

    for objective, targets in ((SFT(), []), (ReverseKL(), [expert])):
        losses = [objective(student(t), targets, weights, t).total for t in (found, other)]
        assert torch.equal(*losses)


def gradients(student, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [student.model.lm_head.weight])])


def test_the_sampled_reward_descends_reverse_kl_and_is_zero_under_oneself(policies, model):
    """By enumeration over the K bins of every token of two states."""
    from opd.divergences import ReverseKL
    from opd.divergences.reverse_kl_sampled import ReverseKLSampled

    student = ActionStudent(model, ActionTokensPolicy(model=policies[0]), CONTEXT)
    few = rolled(PolicyActor(model), model, group=1, prompts=prompts_of()[:1], decisions=2)
    target = Target(ScriptedActor(model).believe(states_of(few.contexts), 1.0))
    weights = position_weights(few, "token_mean")
    exact = gradients(student, ReverseKL()(student(few), [target], weights, few).total)
    q = student(few).log_probs().exp().detach()
    expected = torch.zeros_like(exact)
    for column in range(model.layout.bins):
        ids = torch.full_like(few.actions, model.layout.actions.ids[column])
        drawn = replace(few, actions=ids)
        loss = ReverseKLSampled()(student(few), [target], weights * q[:, column], drawn)
        expected += gradients(student, loss.total)
    torch.testing.assert_close(expected, exact, atol=2e-6, rtol=1e-3)
    own = Target(student(few).detach())
    same = ReverseKLSampled()(student(few), [own], weights, few)
    assert float(same.values.abs().max()) == 0
    assert float(gradients(student, same.total).abs().max()) < 1e-7


def test_sum_and_token_mean_point_the_same_way(policies, model):
    from opd.divergences import ReverseKL

    student = ActionStudent(model, ActionTokensPolicy(model=policies[0]), CONTEXT)
    found = rolled(PolicyActor(model), model, group=1, prompts=prompts_of()[:2])
    target = Target(ScriptedActor(model).believe(states_of(found.contexts), 1.0))
    both = [
        gradients(student, ReverseKL()(student(found), [target], position_weights(found, how), found).total)
        for how in ("token_mean", "sequence_sum")
    ]
    assert float(torch.nn.functional.cosine_similarity(*both, dim=0)) == pytest.approx(1, abs=1e-5)


def test_hard_ce_lowers_the_entropy_and_forward_kl_raises_it(policies, model):
    """A peaked student against a flat teacher that agrees on the likeliest token."""
    from opd.distributions import Categorical, Head
    from opd.divergences import ForwardKL

    few = rolled(PolicyActor(model), model, group=1, prompts=prompts_of()[:1], decisions=1)
    logits = torch.zeros(few.positions, model.layout.bins)
    logits[:, 5] = 3.0
    identity = Head(torch.eye(model.layout.bins), vocabulary=model.vocabulary)
    teacher = Target(Categorical(logits / 10, identity))
    weights = position_weights(few, "token_mean")
    changes = {}
    for objective in (HardCE(), ForwardKL()):
        z = logits.clone().requires_grad_()
        loss = objective(Categorical(z, identity), [teacher], weights, few)
        (grad,) = torch.autograd.grad(loss.total, z)
        entropies = [Categorical(each, identity).log_probs() for each in (logits, logits - 5 * grad)]
        before, after = (float(-(e.exp() * e).sum(-1).mean()) for e in entropies)
        changes[type(objective).__name__] = after - before
        if isinstance(objective, HardCE):
            want = torch.nn.functional.cross_entropy(logits, torch.full((few.positions,), 5))
            torch.testing.assert_close(loss.total, want)
            torch.testing.assert_close(grad * few.positions, logits.softmax(-1) - torch.eye(16)[5].expand_as(logits))
    assert changes["HardCE"] < 0 < changes["ForwardKL"]


def test_wilson_intervals():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


TEACHERS = {"scripted": "scripted", "privileged": {"kind": "policy"}, "self": {"kind": "self", "mode": "ema"}}


@pytest.mark.parametrize(
    ("teacher", "objective"),
    [
        ("scripted", "reverse_kl_sampled"),
        ("privileged", "reverse_kl"),
        ("scripted", "hard_ce"),
        ("privileged", "forward_kl"),
        (None, "grpo"),
    ],
)
def test_two_steps_train(teacher, objective, policies, tmp_path, monkeypatch):
    if objective == "grpo":
        # A blank policy succeeds nowhere: here half of the episodes count as successes.
        play = Simulator.__call__

        def lucky(self, request):
            found = play(self, request)
            return replace(found, rewards=torch.arange(len(found)).remainder(2).float())

        monkeypatch.setattr(Simulator, "__call__", lucky)
    own = {} if teacher is None else {"teacher": TEACHERS[teacher]}
    if teacher == "privileged":
        own = {"teacher": {"kind": "policy", "model": policies[1]}}
    result = execute(recipe_of(policies[0], tmp_path / "run", objective=objective, **own), quiet=True)
    steps = [row for row in result.history if "train/loss" in row]
    assert len(steps) == 2
    assert all(row["train/gradient_norm"] > 0 for row in steps)
    assert all(row["train/rollout_gap"] < 1e-4 for row in steps)
    assert all(row["train/simulator_steps"] == 6 * 16 for row in steps)
    after = result.summary["after"]
    assert after["steps"] == 16
    assert (after["accuracy_low"], after["accuracy_high"]) == wilson(0, 2) if objective != "grpo" else True
    assert {"accuracy/red_block", "student_entropy"} <= after.keys()
    saved = load_policy(PolicySettings(model=str(tmp_path / "run" / "student")), "cpu")
    assert not torch.equal(saved.lm_head.weight, load_policy(PolicySettings(model=policies[0]), "cpu").lm_head.weight)


def test_the_teacher_is_left_as_it_was(policies, tmp_path):
    recipe = recipe_of(policies[0], tmp_path / "run", teacher={"kind": "policy", "model": policies[1]})
    teacher = recipe.teacher[0].build(CONTEXT, None)
    before = teacher.identity()
    execute(recipe, teachers=[teacher], quiet=True)
    assert weights_hash(teacher.model) == before


def test_a_run_in_a_simulator_resumes_bit_for_bit(policies, tmp_path):
    changes = {"teacher": "scripted", "steps": 4, "checkpoint": {"every": 2}, "objective": "reverse_kl_sampled"}
    whole = execute(recipe_of(policies[0], tmp_path / "whole", **changes), quiet=True)
    execute(recipe_of(policies[0], tmp_path / "cut", **changes | {"steps": 2}), quiet=True)
    rest = execute(recipe_of(policies[0], tmp_path / "cut", **changes), resume=True, quiet=True)
    for (name, a), (_, b) in zip(whole.student.state_dict().items(), rest.student.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_simulator_that_fails_costs_an_episode_and_not_the_run(policies, tmp_path):
    world = Faulty()
    student = policy(tmp_path / "student", world, reads=["state"])
    # Of its tokens some raise: three standard deviations of luck would be needed for none to.
    recipe = recipe_of(
        student,
        tmp_path / "run",
        world=world,
        teacher={"kind": "scripted"},
        rollout={"kind": "simulator", "decisions": 1},
        prompts=episodes(world, 40),
        batch={"prompts": 20, "micro": 20},
        evaluation={"prompts": episodes(world, 20, 1), "greedy": False},
        steps=1,
    )
    FaultyWorldSteps.patch(pytest.MonkeyPatch())
    try:
        result = execute(recipe, quiet=True)
    finally:
        FaultyWorldSteps.undo()
    (step,) = [row for row in result.history if "train/loss" in row]
    assert 0 < step["train/invalid"] < 1
    assert step["train/simulator_restarts"] > 0


class FaultyWorldSteps:
    """Faults of the faulty world that do not take this process with them."""

    @classmethod
    def patch(cls, monkeypatch):
        from tests.acting.test_environments import FaultyWorld

        cls.monkeypatch, plain = monkeypatch, FaultyWorld.step

        def step(self, action):
            if abs(float(action[0])) > 8:
                raise ValueError("joint limits are violated")
            return plain(self, np.clip(action, -1, 1))

        monkeypatch.setattr(FaultyWorld, "step", step)

    @classmethod
    def undo(cls):
        cls.monkeypatch.undo()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"objective": "reverse_kl"}, RecipeError, "key 'teacher' is required.*policy"),
        ({"objective": "gaussian_kl"}, RecipeError, "is for flow models and student 'action_tokens' is of action"),
        ({"rollout": "student"}, RecipeError, "is for language models and student 'action_tokens' is of action"),
        ({"end_tokens": [3]}, RecipeError, "an episode ends in its environment"),
        ({"rollout": {"kind": "simulator", "teacher": "expert"}}, IncompatibleError, "rollout.teacher is 'expert'"),
        ({"prompts": {"kind": "inline", "prompts": ["put the red block on the grey ring"] * 1}},
         DataError, "no column 'environment'"),
        ({"prompts": episodes(WORLD.model_copy(update={"pixels": 32}))}, DataError, "pixels: 24 and the environment"),
        ({"prompts": episodes(WORLD.model_copy(update={"only": ["green_ball"]}))}, DataError, "does not know a word"),
        ({"max_prompt_tokens": 3}, DataError, "has 8 tokens; 1 to 3"),
        ({"teacher": {"kind": "self", "mode": "trust_region"}}, IncompatibleError, "trust_region is for language"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(changes, error, told, policies, tmp_path):
    def run():
        return execute(recipe_of(policies[0], tmp_path / "run", **{"objective": "grpo", **changes}), quiet=True)

    with pytest.raises(error, match=told):
        run()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"chunk": 2}, "chunk is 4 for the student and 2 for the teacher"),
        ({"bins": 8}, "the student's actions are .* and those of teacher 0"),
    ],
)
def test_teachers_of_another_layout_are_refused(options, told, policies, tmp_path):
    other = policy(tmp_path / "other", **options)
    recipe = recipe_of(policies[0], tmp_path / "run", teacher={"kind": "policy", "model": other})
    with pytest.raises(IncompatibleError, match=told):
        execute(recipe, quiet=True)


def test_a_scripted_teacher_needs_an_environment_with_an_expert(tmp_path):
    pytest.importorskip("gymnasium")
    from opd.environments.gymnasium import GymnasiumEnvironment

    world = GymnasiumEnvironment(id="MountainCarContinuous-v0", instruction="reach the flag", limit=8)
    student = policy(tmp_path / "student", world, reads=["state"])
    with pytest.raises(DataError, match="'gymnasium' has no expert of its own"):
        execute(recipe_of(student, tmp_path / "run", world=world, teacher="scripted"), quiet=True)


def test_a_run_without_any_episode_says_why(policies, tmp_path, monkeypatch):
    from opd.environments.pixel_pick import PixelWorld

    def broken(self, action):
        raise ValueError("no floor")

    monkeypatch.setattr(PixelWorld, "step", broken)
    with pytest.raises(RunError, match="ValueError: no floor"):
        execute(recipe_of(policies[0], tmp_path / "run", teacher="scripted"), quiet=True)


def test_a_rollout_says_what_it_is():
    assert SimulatorRollout().rewards
    assert SimulatorRollout(decisions=7).budget == 7
    assert State("x", None).plan is None
