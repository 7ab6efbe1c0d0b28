"""A step without anything to learn: masked everywhere, or a teacher that is the student up to rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from opd.api import execute
from opd.checkpoints.store import folder_of, steps_stored
from opd.distributions import Categorical, Gaussian
from opd.divergences import ForwardKL, JensenShannon, ReverseKL, Target
from opd.divergences.gaussian_kl import GaussianKL
from opd.divergences.lightning import Lightning
from opd.divergences.reverse_kl_sampled import ReverseKLSampled
from opd.errors import RunError
from opd.measurement import Measurement
from opd.objectives.grpo import GRPO
from opd.objectives.sft import SFT
from opd.rounding import Gradients
from opd.shaping import Shape
from opd.teachers.self_teacher import SelfLanguageTeacher
from tests.checkpoints import HINTED, make, models  # noqa: F401
from tests.conftest import trajectories_of


def rounded_otherwise(hidden, seed=0, ulps=3):
    """The same hidden states as another processor might have them: each number off by a few units in its last place."""
    eps = torch.finfo(hidden.dtype).eps
    steps = torch.randint(-ulps, ulps + 1, hidden.shape, generator=torch.Generator().manual_seed(seed))
    return (hidden * (1 + steps * eps)).to(hidden.dtype)


def above(student, objective, trajectories, hidden=None, weights=None, processes=1, weight=1.0):
    """Positions of a micro-batch with something to learn, for a teacher that answers `hidden` with the own head and has
    that `weight`."""
    weights = torch.full((trajectories.positions,), 1 / 50) if weights is None else weights
    own = student(trajectories)
    answers = [] if hidden is None else [Target(Categorical(hidden, own.head.detach()), weight)]
    gradients = Gradients(own, answers, processes)
    loss = objective(own, answers, weights, trajectories)
    (loss.total * processes).backward()
    return gradients.above([objective], [weights], [loss])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL(weight=1e-4), JensenShannon(), ReverseKLSampled()])
def test_a_teacher_that_is_the_student_teaches_nothing_however_it_rounds(objective, processes, student):
    made = trajectories_of([5, 9, 3])
    with torch.no_grad():
        hidden = student(made).hidden
    for seed in range(5):
        assert not above(student, objective, made, rounded_otherwise(hidden, seed), processes=processes).any()
    # A thousandth of a hidden state is far above rounding in float32.
    assert above(student, objective, made, hidden * 1.001, processes=processes).all()
    one = hidden.clone()
    one[4] *= 1.001
    assert above(student, objective, made, one).nonzero().tolist() == [[4]]


def test_coarser_dtypes_round_more(student):
    made = trajectories_of([5, 9, 3])
    with torch.no_grad():
        hidden = student(made).hidden
    coarse = rounded_otherwise(hidden.bfloat16(), ulps=1)
    assert not above(student, ReverseKL(), made, coarse).any(), "the teacher computed in bfloat16"
    assert above(student, ReverseKL(), made, coarse.float()).any()
    with torch.autocast("cpu", torch.bfloat16):
        assert not above(student, ReverseKL(), made, coarse.float()).any()
        assert above(student, ReverseKL(), made, hidden * 1.3).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("objective", "weight", "temperature"),
    [
        (ReverseKL(clip=0.05), 1.0, 1.0),
        (ReverseKL(clip=1e-6), 1.0, 1.0),
        (ReverseKL(clip=1e-6, top_k=4), 1.0, 1.0),
        (JensenShannon(beta=0.05), 1.0, 1.0),
        (JensenShannon(beta=0.002), 1.0, 1.0),
        (ReverseKLSampled(clamp=0.01), 1.0, 1.0),
        (ReverseKLSampled(clamp=0.01, discount=1.0), 1.0, 1.0),
        (Lightning(clamp=1e-6), 1.0, 1.0),
        (ReverseKL(), 0.02, 1.0),
        (ReverseKL(), 1e-6, 1.0),
        (ReverseKL(), torch.full((17,), 1e-6), 1.0),
        (ReverseKLSampled(), 1e-6, 1.0),
        (ForwardKL(), 1.0, 30.0),
        (ReverseKL(), 1.0, 300.0),
        (ReverseKLSampled(), 1.0, 30.0),
    ],
)
def test_what_makes_a_gradient_small_makes_no_difference_rounding(objective, weight, temperature, precision, student):
    """Clips, clamps, means that are the student's almost, weights of teachers, high temperatures: another teacher has
    something to say under all of them, and one that is the student has nothing."""
    student.context = student.context.with_(temperature=temperature)
    made = trajectories_of([5, 9, 3])
    with torch.no_grad():
        hidden = student(made).hidden
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            own = student(made).hidden.float()
        assert not above(student, objective, made, rounded_otherwise(own), weight=weight).any()
        another = above(student, objective, made, hidden.roll(1, 0), weight=weight)
    # An action may happen to be as likely on both sides.
    assert another.float().mean() > 0.8


def test_another_latent_is_no_rounding_under_any_weight():
    mean = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sides = [torch.full((6,), 0.7), torch.full((6,), 0.1), torch.full((6,), 0.1)]
    own, answers = Gaussian(mean, *sides), [Target(Gaussian(mean.detach() + 0.1, *sides), 1e-8)]
    weights = torch.full((6,), 1 / 6)
    gradients = Gradients(own, answers, 1)
    made = replace(trajectories_of([6]), actions=torch.zeros(6, 3, 8, 8))
    loss = GaussianKL(scale="uniform")(own, answers, weights, made)
    loss.total.backward()
    assert gradients.above([GaussianKL()], [weights], [loss]).all()


def test_what_compares_with_no_teacher_has_no_rounding_to_allow_for(student):
    made = trajectories_of([5, 9, 3])
    weights = torch.full((17,), 1e-12)
    weights[:5] = 0
    assert above(student, SFT(), made, weights=weights).tolist() == [False] * 5 + [True] * 12
    rewarded = trajectories_of([5, 9, 3, 4])
    with torch.no_grad():
        now = SFT()(student(rewarded), [], torch.ones(21), rewarded).log_probs
    rewarded = replace(rewarded, groups=torch.tensor([0, 0, 1, 1]), behaviour_log_probs=now)
    rewarded = rewarded.rewarded(torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.4)
    learnt = above(student, GRPO(), rewarded, weights=torch.ones(21))
    assert learnt.tolist() == [True] * 14 + [False] * 7, "equal rewards of a group are no signal"


def test_a_gradient_that_is_no_number_is_never_taken_for_rounding(student):
    made = trajectories_of([5])
    with torch.no_grad():
        hidden = student(made).hidden
    hidden[2] = math.nan
    assert above(student, ReverseKL(), made, hidden)[2]


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_latents_of_flow_models_too(std):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 3, 8, 8, generator=generator).requires_grad_()
    sides = [torch.full((6,), std), torch.full((6,), 0.1), torch.full((6,), 0.1)]
    made = trajectories_of([6])
    made = replace(made, actions=torch.randn(6, 3, 8, 8, generator=generator))
    weights = torch.full((6,), 1 / 6)
    for answer, expected in ((rounded_otherwise(mean.detach()), False), (mean.detach() * 1.01, True)):
        own, answers = Gaussian(mean, *sides), [Target(Gaussian(answer, *sides))]
        gradients = Gradients(own, answers, 1)
        loss = GaussianKL()(own, answers, weights, made)
        loss.total.backward()
        assert set(gradients.above([GaussianKL()], [weights], [loss]).tolist()) == {expected}


def other_processor(monkeypatch):
    """Self-teachers whose answers are rounded as no pass of the student is."""
    answer = SelfLanguageTeacher.__call__

    def rounding(self, trajectories):
        found = answer(self, trajectories)
        return Categorical(rounded_otherwise(found.hidden), found.head)

    monkeypatch.setattr(SelfLanguageTeacher, "__call__", rounding)


def moving(recipe, step):
    """The tensors of a checkpoint that training moves."""
    tensors = load_file(folder_of(recipe.directory, step) / "tensors.safetensors")
    return {n: t for n, t in tensors.items() if n.startswith(("/parts/student", "/parts/teachers", "/parts/optimiser"))}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["frozen", "ema"])
def test_self_distillation_without_a_better_view_moves_nothing(mode, make, monkeypatch, capsys):  # noqa: F811
    """Adam would make whole steps of the rounding; with a view of its own the same teacher teaches."""
    other_processor(monkeypatch)
    settings = {"checkpoint": {"every": 1, "keep_last": 10}, "update": {"weight_decay": 0.1}, "steps": 3}
    blind = {"teacher": {"kind": "self", "mode": mode}, **HINTED}
    recipe = make("blind", **settings, whole=blind)
    result = execute(recipe, quiet=True)
    assert equal(moving(recipe, 1), moving(recipe, 3))
    assert result.summary["empty_updates"] == 3
    assert [r["train/empty"] for r in result.history if "train/loss" in r] == [1.0] * 3
    assert capsys.readouterr().err.count("zero up to rounding") == 1
    seeing = {"teacher": {"kind": "self", "mode": mode, "sees": "hint"}, **HINTED}
    recipe = make("seeing", **settings, whole=seeing)
    assert execute(recipe, quiet=True).summary["empty_updates"] == 0
    assert not equal(moving(recipe, 1), moving(recipe, 3))


def masked_on(steps, make, name, **changes):  # noqa: F811
    """A run of which these steps hold no position that the student wrote. Case of huggingface/trl#2217."""
    parts = {"first": {"kind": "student", "max_new_tokens": 6}, "second": {"kind": "teacher", "max_new_tokens": 6}}
    points = [[step, 0.0 if step in steps else 1.0] for step in range(6)]
    whole = {
        "rollout": {"kind": "mixture", **parts, "share": {"kind": "hold", "points": points}},
        "objective": [{"kind": "reverse_kl", "written_by": ["student"]}],
    }
    update = {"learning_rate": 1e-2, "weight_decay": 0.5}
    return make(name, whole=whole, update=update, checkpoint={"every": 1, "keep_last": 10}, **changes)


def test_a_step_in_which_every_position_is_masked_moves_nothing_and_is_counted(make, capsys):  # noqa: F811
    recipe = masked_on({2, 3}, make, "run", failures={"skips_in_a_row": 1})
    result = execute(recipe, quiet=True)
    states = [moving(recipe, step) for step in (2, 3, 4, 5)]
    assert equal(states[0], states[1])
    assert equal(states[1], states[2])
    assert not equal(states[2], states[3])
    assert (result.summary["empty_updates"], result.summary["skipped_updates"]) == (2, 0)
    steps = {r["step"]: r for r in result.history if "train/loss" in r}
    assert [step for step, r in steps.items() if "train/empty" in r] == [3, 4]
    assert [step for step, r in steps.items() if "train/divergence" not in r] == [3, 4], "a mean over nothing is none"
    assert capsys.readouterr().err.count("no position of it counts") == 1


def test_a_run_that_never_learns_stops_with_its_state_written(make, capsys):  # noqa: F811
    recipe = masked_on(set(range(6)), make, "never", failures={"empty_at_start": 4})
    with pytest.raises(RunError, match=r"nothing was learnt in any of the first 4 steps.*written_by") as error:
        execute(recipe, quiet=True)
    assert len(str(error.value).splitlines()) <= 2
    assert steps_stored(recipe.directory)[0] == 4
    free = masked_on(set(range(6)), make, "never", failures={"empty_at_start": None})
    assert execute(free, quiet=True, resume=True).summary["empty_updates"] == 6
    # What learnt once may find nothing later for as long as it takes.
    late = masked_on({1, 2, 3, 4, 5}, make, "late", failures={"empty_at_start": 4})
    assert execute(late, quiet=True).summary["empty_updates"] == 5


def test_means_run_over_the_positions_that_each_objective_counts(student):
    """Two terms on different positions, one value each; masked positions stand as zero and are no part of a mean."""
    made = trajectories_of([6, 4])
    made = replace(made, behaviour_log_probs=torch.full((10,), -1.0))
    with torch.no_grad():
        hidden = student(made).hidden
    own = student(made)
    answer = [Target(Categorical(hidden * 1.2, own.head.detach()))]
    objectives = [ReverseKL(), ReverseKL(), SFT()]
    weights = torch.zeros(3, 10)
    weights[0, :2], weights[1, 5:], weights[2, 8:] = 0.5, 0.2, 0.5
    losses = [o(own, answer, w, made) for o, w in zip(objectives, weights, strict=True)]
    whole = ReverseKL()(own, answer, torch.ones(10), made)
    measurement = Measurement(objectives)
    for _ in range(2):
        shape, everywhere = Shape(torch.ones(10)), torch.ones(10).bool()
        measurement.add(losses, list(weights), made, shape, list(weights), everywhere, exact_behaviour=True)
    signals = measurement.signals(lambda x: x)
    assert signals["divergence"] == pytest.approx(float(whole.values[:2].mean()), rel=1e-5)
    assert signals["objective/reverse_kl 1"] == signals["divergence"]
    assert signals["objective/reverse_kl 2"] == pytest.approx(float(whole.values[5:].mean()), rel=1e-5)
    assert signals["objective/sft"] == pytest.approx(-float(whole.log_probs[8:].mean()), rel=1e-5)
    counted = [0, 1, 5, 6, 7, 8, 9]
    assert signals["rollout_gap"] == pytest.approx(float((whole.log_probs + 1)[counted].abs().mean()), rel=1e-5)
    assert signals["positions"] == 2 * len(counted)
    assert measurement.parts[0][1]["weight"].tolist() == [1, 1] + [0] * 8
