"""Before step one: does this set-up, through its own pipeline, train on the signal that its recipe names?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.context import Context
from opd.divergences import Divergence, Target
from opd.errors import SelfTestError
from opd.language.own_outputs import ELSEWHERE, TOLERANCE, compute_dtype
from opd.objectives import Objective
from opd.objectives.sft import SFT
from opd.policies import Student
from opd.prompts import Prompt
from opd.rollouts import HeldOutSampler, PrefixSource, Request, Rollout
from opd.teachers import LiveTeacher, reasons, unanswered
from opd.trajectories import Trajectories

PROBE_POSITIONS = 16
"""Length of the tiny rollout's trajectories."""

PROBE = -2
"""Its random stream."""


def self_test(
    student: Student,
    teachers: Sequence[LiveTeacher],
    rollout: PrefixSource,
    objectives: Sequence[Objective],
    probe: Request[Rollout],
    measured: HeldOutSampler | None = None,
) -> None:
    """Raise `SelfTestError` with the reason when a tiny rollout shows a wrong pipeline. Costs one small step.

    The student is in the mode in which it trains, unless the recipe asks for noise there.

    1. Whoever writes, also for evaluation, draws from what its model computes (`PrefixSource.check_draws`).
    2. Student and teachers answer with their models' own outputs (`check_outputs`).
    3. Rollout and training log-probabilities of the same actions agree (when the student samples, without a cut).
    4. With the student as its own teacher, loss and gradient of every divergence are zero.
    5. Every teacher answers one finite distribution for every position.

    Args:
        probe: asks the rollout for a few short trajectories.
        measured: the student's rollouts for evaluation.
    """
    student.module.train(not student.noisy)
    # Rollouts run outside of autocast.
    with torch.autocast(next(student.module.parameters()).device.type, enabled=False):
        sources = [rollout, *([] if measured is None else [measured.source])]
        check_writers(sources, probe.prompts, probe.context)
    trajectories = rollout(probe).written()
    if not len(trajectories):
        raise SelfTestError(f"none of a few short rollouts could be written ({reasons([rollout])}); mend what failed")
    tolerance = TOLERANCE[compute_dtype(student.module)]

    student.check_outputs(trajectories, tolerance)
    check_teachers(teachers, trajectories)

    mine = student(trajectories, probe.context)
    alike = trajectories.learnt / max(1, trajectories.positions)
    own = SFT()(mine, [], alike, trajectories)
    if rollout.exact(probe.settings):
        gaps = (own.log_probs - trajectories.behaviour_log_probs)[trajectories.learnt].abs()
        gap = float(gaps.median() if rollout.elsewhere else gaps.mean())
        allowed = max(tolerance, TOLERANCE[rollout.dtype]) * (ELSEWHERE if rollout.elsewhere else 1)
        if not gap <= allowed:
            raise SelfTestError(
                f"rollout and training log-probabilities of the same actions differ by {gap:.2g} nats "
                f"{'at half of the tokens' if rollout.elsewhere else 'on average'} (tolerance {allowed:g}): the "
                "sampler and the trainer do not run the same model"
            )
    for objective in objectives:
        if not isinstance(objective, Divergence):
            continue
        loss = objective(mine, [Target(mine.detach())], alike, trajectories)
        value = float(loss.values.abs().max())
        gradient = _largest_gradient(student, loss.total)
        if not (value <= 1e-3 and gradient <= 1e-3):
            raise SelfTestError(
                f"with the student as its own teacher the divergence is {value:.2g} and the gradient {gradient:.2g}; "
                f"both must be 0. The divergence {objective.model_dump()['kind']!r} does not vanish where it should"
            )
    for i, teacher in enumerate(teachers):
        targets = teacher.answer(trajectories, teacher.settings, probe.context)
        readable = any(member.leaves_out for member in teacher.members().values())
        if bool(unanswered(trajectories, targets).any()) and not readable:
            raise SelfTestError(f"teacher {i} was asked about a tiny rollout and did not answer ({reasons([teacher])})")
        _check_answers(targets, trajectories, i)


def check_writers(sources: Sequence[PrefixSource], prompts: Sequence[Prompt], context: Context) -> None:
    """Let everyone who writes draw a little; once where several sources draw from one model."""
    seen = set()
    for writer in (writer for source in sources for writer in source.writers()):
        model = id(getattr(writer, "language", writer))
        if model not in seen:
            seen.add(model)
            writer.check_draws(prompts, context)


def check_teachers(teachers: Sequence[LiveTeacher], trajectories: Trajectories) -> None:
    """Compare the answers of every teacher's model, of each route, with its own outputs."""
    for i, teacher in enumerate(teachers):
        for route, member in teacher.members().items():
            which = (f"teacher {i}" if len(teachers) > 1 else "the teacher") + (
                f" of {teacher.member_role} {route!r}" if route else ""
            )
            member.check_outputs(trajectories, which)


def _largest_gradient(student: Student, total: torch.Tensor) -> float:
    trained = [p for p in student.module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, trained, allow_unused=True, retain_graph=True)
    return max((float(g.abs().max()) for g in grads if g is not None), default=0.0)


def _check_answers(targets: Sequence[Target], trajectories: Trajectories, index: int) -> None:
    if not targets:
        raise SelfTestError(f"teacher {index} gave no answer; a teacher answers with one target or several")
    for target in targets:
        answer = target.distribution
        if len(answer) != trajectories.positions:
            raise SelfTestError(
                f"teacher {index} answered {len(answer)} positions for {trajectories.positions} actions of the student"
            )
        for _, piece in answer.pieces():
            found = (getattr(piece, name, None) for name in ("hidden", "log_probs", "mean"))
            values = [each for each in found if isinstance(each, torch.Tensor)]
            if not all(bool(torch.isfinite(each).all()) for each in values):
                raise SelfTestError(f"teacher {index} answered with NaN or infinity; try another dtype (teacher.dtype)")
