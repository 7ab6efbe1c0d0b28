"""The loop. It knows no modality: prompts become trajectories, trajectories become targets, and the student moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd.failures import MicroBatches
from opd.measurement import Clock, Measurement
from opd.objectives import Target
from opd.prompts import count_repeats
from opd.run import Run
from opd.trajectories import Trajectories


def train(run: Run) -> None:
    """Train `run.student` from `run.step` to the recipe's last step, the curriculum's end, or a wish to stop."""
    recipe = run.recipe
    run.signals |= run.monitor.begin(run)

    while not run.stop_requested():
        draw = run.schedule.next(run.step, run.signals)
        if draw is None or run.step >= recipe.steps:
            break
        clock, measurement = Clock(), Measurement(run.objectives)
        scheduled = run.take_settings_of_step()

        with clock("rollout"):
            prompts = run.share(count_repeats(draw.prompts))
            budget = run.rollout.settings.budget if draw.budget is None else draw.budget
            trajectories = run.rollout(prompts, recipe.batch.group, budget, stream=run.step)
            trajectories = run.verify(trajectories)

        with clock("teacher"), run.accelerator.autocast():
            targets = run.ask(trajectories)
        measurement.asked(run.teachers, trajectories)

        counts = [o.position_weights(trajectories, recipe.reduction, run.sum_over_processes) for o in run.objectives]
        batch = MicroBatches(run, trajectories, measurement)
        for micro, here in batch:
            with batch.fitting():
                answers = [target.select(here) for target in targets]
                accumulate(run, micro, answers, [count[here] for count in counts], batch, clock, measurement)

        with clock("update"):
            run.signals = run.optimiser.apply(measurement.finite(run.sum_over_processes))
            for teacher in run.teachers if "skipped" not in run.signals else ():
                teacher.follow(run.student)

        run.step += 1
        run.signals |= measurement.signals(run.sum_over_processes) | clock.signals(trajectories.positions)
        run.signals |= run.student.own_signals(run.sum_over_processes)
        run.signals |= draw.signals | scheduled
        run.signals |= run.monitor.after_step(run, run.signals, measurement)
        run.skips.after_step(run)
        run.checkpoints.after_step(run)

    run.checkpoints.write(run)
    run.monitor.end(run)


def accumulate(
    run: Run,
    micro: Trajectories,
    answers: Sequence[Target],
    counts: Sequence[torch.Tensor],
    batch: MicroBatches,
    clock: Clock,
    measurement: Measurement,
) -> None:
    """Add the gradients of one micro-batch of a step's `batch`; `counts` are each objective's weights."""
    with run.accelerator.autocast():
        with clock("student"):
            student = run.student(micro)
        with clock("loss"):
            shape = run.shaping(student.detach(), answers, micro)
            losses = [
                objective(student, objective.heard(answers), objective.shape(count, shape), micro)
                for objective, count in zip(run.objectives, counts, strict=True)
            ]
            share = len(micro) / (len(batch.trajectories) * run.accelerator.num_processes)
            own = run.student.own_losses(share)
    with clock("backward"):
        run.optimiser.accumulate([*losses, *own], batch.last)
    measurement.add(losses, micro, shape, run.rollout.exact)
