"""The loop. It knows no modality: prompts become trajectories, trajectories become targets, and the student moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from opd.asking import RunAsker
from opd.curricula import Draw
from opd.errors import IncompatibleError
from opd.failures import MicroBatches
from opd.measurement import Clock, Measurement, looks
from opd.now import Now
from opd.objectives import Loss, Target
from opd.prompts import count_repeats
from opd.rounding import Gradients
from opd.run import Run
from opd.shaping import joint_shape, looked
from opd.trajectories import Trajectories


def train(run: Run) -> None:
    """Train `run.student` from `run.step` to the recipe's last step, the curriculum's end, or a wish to stop: a
    person's, or one that held-out measurements give reason for."""
    recipe = run.recipe
    measured = run.monitor.begin(run)
    run.signals |= measured
    run.watch.read(run, run.step, held_out(measured))

    while not run.stop_requested() and run.watch.ended_by is None and run.optimiser.ended_by is None:
        clock = Clock()
        for teacher in run.teachers:
            teacher.begin_step()
        asker = RunAsker(run, clock)
        draw = run.course.next(run.step, run.signals, asker)
        if draw is None or run.step >= recipe.steps:
            break
        now = run.at(run.step)
        measurement = Measurement(now.recipe.objective, asker.tokens)

        trajectories = accumulate_step(run, now, draw, clock, measurement) if draw.prompts else None
        with clock("update"):
            run.signals = move(run, now, measurement)

        run.step += 1
        run.signals |= measurement.signals(run.sum_over_processes) | clock.signals(measurement.positions)
        run.signals |= run.student.own_signals(run.sum_over_processes)
        run.signals |= run.rollout.own_signals()
        for teacher in run.teachers:
            run.signals |= teacher.own_signals(run.sum_over_processes)
        run.signals |= draw.signals | now.scheduled
        if trajectories is not None:
            if run.verifier is not None:
                run.signals |= run.verifier.own_signals(run.sum_over_processes)
            for shaper in run.shaping:
                run.signals |= shaper.own_signals()
            run.signals |= run.course.saw(trajectories, measurement.values(), run.signals, run.gather)
        measured = run.monitor.after_step(run, run.signals, measurement)
        run.signals |= measured
        run.watch.read(run, run.step, held_out(measured))
        run.skips.after_step(run)
        run.checkpoints.after_step(run)
        run.monitor.raise_failed(run)

    run.checkpoints.write(run)
    run.watch.read(run, run.step, run.monitor.end(run))


def held_out(signals: Mapping[str, float]) -> dict[str, float]:
    """The held-out metrics among signals, by their own names."""
    return {name.removeprefix("held_out/"): value for name, value in signals.items() if name.startswith("held_out/")}


def accumulate_step(run: Run, now: Now, draw: Draw, clock: Clock, measurement: Measurement) -> Trajectories | None:
    """Roll a draw's prompts out, ask the teachers, and add the gradients of all micro-batches; of no trajectory that
    could not be written or that a teacher did not answer, and None where none is left."""
    with clock("rollout"):
        request = now.request(count_repeats(draw.prompts), draw.budget, stream=run.step)
        run.rollout.drawn(request)
        trajectories = run.rollout(replace(request, prompts=run.share_of_draw(request.prompts), training=True))
        run.rollout.learn(now.recipe.rollout, run.sum_over_processes)
        run.begin_next(draw)
        trajectories = run.written(trajectories, measurement)
        if not len(trajectories):
            return None
        trajectories = run.verify(trajectories)

    with clock("teacher"), run.accelerator.autocast():
        targets = run.ask(trajectories, now)
    measurement.asked(run.teachers, trajectories)
    trajectories, targets = run.answered(trajectories, targets, measurement)
    if not len(trajectories):
        return None
    trajectories = looked(run.shaping, now.recipe.shaping, trajectories, targets, run.sum_over_processes)

    of_each = (trajectories, run.recipe.reduction, run.sum_over_processes, run.expected)
    counts = [objective.position_weights(*of_each) for objective in now.recipe.objective]
    batch = MicroBatches(run, trajectories, measurement)
    for micro, here in batch:
        with batch.fitting(), apart(run, batch.last):
            answers = [target.select(here) for target in targets]
            accumulate(run, now, micro, answers, [count[here] for count in counts], batch, clock, measurement)
    return trajectories


def apart(run: Run, last: bool) -> AbstractContextManager[None]:
    """Around all passes of one micro-batch: processes average their gradients in a step's `last` one alone, as they may
    have different numbers of them. The forward pass decides already whether the backward pass waits for others."""
    return nullcontext() if last else run.accelerator.no_sync(run.student.module)


def move(run: Run, now: Now, measurement: Measurement) -> dict[str, float]:
    """Take the step, and have the teachers follow that are made of the student. Where nothing can be learnt, neither
    the weights nor what belongs to them (moments, averages, such teachers) move, and `empty` is 1; unless the update
    takes such steps too."""
    finite = measurement.finite(run.sum_over_processes)
    if finite and not run.optimiser.takes_empty and not measurement.learns(run.sum_over_processes):
        run.optimiser.discard()
        return {"empty": 1.0}
    signals = run.optimiser.apply(now.recipe.update, finite)
    for teacher in run.teachers if "skipped" not in signals else ():
        teacher.follow(run.student)
    return signals


def accumulate(
    run: Run,
    now: Now,
    micro: Trajectories,
    answers: Sequence[Target],
    counts: Sequence[torch.Tensor],
    batch: MicroBatches,
    clock: Clock,
    measurement: Measurement,
) -> None:
    """Add the gradients of one micro-batch of a step's `batch`; `counts` are each objective's weights."""
    objectives = now.recipe.objective
    with run.accelerator.autocast():
        with clock("student"):
            student = run.optimiser.opened(run.student(micro, now.context), micro.lengths)
        with clock("loss"):
            shape = joint_shape(run.shaping, now.recipe.shaping, student.detach(), answers, micro)
            weights = [o.shape(count, shape.weights) for o, count in zip(objectives, counts, strict=True)]
            moved = shape.offset(answers)
            losses = [
                objective(student, objective.heard(moved), weight, micro, run.optimiser.per_example)
                for objective, weight in zip(objectives, weights, strict=True)
            ]
            if run.shows_alternatives and looks(run.step, run.recipe.steps):
                measurement.look(student.detach(), answers, losses, weights, micro, shape)
            share = len(micro) / (len(batch.trajectories) * run.accelerator.num_processes)
            own = run.student.own_losses(share)
            if run.optimiser.per_example:
                check_apart(run, losses, own)
            gradients = Gradients(student, answers, run.accelerator.num_processes)
    with clock("backward"):
        run.optimiser.accumulate([*losses, *own], batch.last)
    above = gradients.above(objectives, weights, losses)
    measurement.add(losses, weights, micro, shape, counts, above, run.rollout.exact(now.recipe.rollout))


def check_apart(run: Run, losses: Sequence[Loss], own: Sequence[Loss]) -> None:
    """Raise `IncompatibleError` when the update asked for the loss of each example and some loss is only a whole."""
    kinds = [objective.model_dump()["kind"] for objective in run.recipe.objective]
    whole = [f"objective {kind!r}" for kind, loss in zip(kinds, losses, strict=True) if loss.per_example is None]
    whole += ["the student's routers (router_aux_loss_coef)"] if own else []
    if whole:
        update = run.recipe.update.model_dump()["kind"]
        raise IncompatibleError(
            f"update {update!r} needs the loss of each trajectory apart, and {whole[0]} has one for all together"
        )
