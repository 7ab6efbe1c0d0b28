"""The loop. It knows no modality: prompts become trajectories, trajectories become targets, and the student moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from opd.failures import MicroBatches
from opd.measurement import Clock, Measurement
from opd.now import Now
from opd.objectives import Target
from opd.prompts import count_repeats
from opd.rounding import Gradients
from opd.run import Run
from opd.trajectories import Trajectories


def train(run: Run) -> None:
    """Train `run.student` from `run.step` to the recipe's last step, the curriculum's end, or a wish to stop: a
    person's, or one that held-out measurements give reason for."""
    recipe = run.recipe
    measured = run.monitor.begin(run)
    run.signals |= measured
    run.watch.read(run, run.step, held_out(measured))

    while not run.stop_requested() and run.watch.ended_by is None:
        draw = run.schedule.next(run.step, run.signals)
        if draw is None or run.step >= recipe.steps:
            break
        now = run.at(run.step)
        objectives = now.recipe.objective
        clock, measurement = Clock(), Measurement(objectives)

        with clock("rollout"):
            request = now.request(count_repeats(draw.prompts), draw.budget, stream=run.step)
            run.rollout.drawn(request)
            trajectories = run.rollout(replace(request, prompts=run.share(request.prompts)))
            trajectories = run.verify(trajectories)

        with clock("teacher"), run.accelerator.autocast():
            targets = run.ask(trajectories, now)
        measurement.asked(run.teachers, trajectories)

        counts = [o.position_weights(trajectories, recipe.reduction, run.sum_over_processes) for o in objectives]
        batch = MicroBatches(run, trajectories, measurement)
        for micro, here in batch:
            with batch.fitting():
                answers = [target.select(here) for target in targets]
                accumulate(run, now, micro, answers, [count[here] for count in counts], batch, clock, measurement)

        with clock("update"):
            run.signals = move(run, now, measurement)

        run.step += 1
        run.signals |= measurement.signals(run.sum_over_processes) | clock.signals(trajectories.positions)
        run.signals |= run.student.own_signals(run.sum_over_processes)
        run.signals |= draw.signals | now.scheduled
        measured = run.monitor.after_step(run, run.signals, measurement)
        run.signals |= measured
        run.watch.read(run, run.step, held_out(measured))
        run.skips.after_step(run)
        run.checkpoints.after_step(run)

    run.checkpoints.write(run)
    run.watch.read(run, run.step, run.monitor.end(run))


def held_out(signals: Mapping[str, float]) -> dict[str, float]:
    """The held-out metrics among signals, by their own names."""
    return {name.removeprefix("held_out/"): value for name, value in signals.items() if name.startswith("held_out/")}


def move(run: Run, now: Now, measurement: Measurement) -> dict[str, float]:
    """Take the step, and have the teachers follow that are made of the student. Where nothing can be learnt, neither
    the weights nor what belongs to them (moments, averages, such teachers) move, and `empty` is 1."""
    finite = measurement.finite(run.sum_over_processes)
    if finite and not measurement.learns(run.sum_over_processes):
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
            student = run.student(micro, now.context)
        with clock("loss"):
            shape = run.shape(now, student.detach(), answers, micro)
            weights = [o.shape(count, shape) for o, count in zip(objectives, counts, strict=True)]
            losses = [
                objective(student, objective.heard(answers), weight, micro)
                for objective, weight in zip(objectives, weights, strict=True)
            ]
            share = len(micro) / (len(batch.trajectories) * run.accelerator.num_processes)
            own = run.student.own_losses(share)
            gradients = Gradients(student, answers, run.accelerator.num_processes)
    with clock("backward"):
        run.optimiser.accumulate([*losses, *own], batch.last)
    above = gradients.above(objectives, weights, losses)
    measurement.add(losses, weights, micro, shape, above, run.rollout.exact(now.recipe.rollout))
