"""The loop. It knows no modality: prompts become trajectories, trajectories become targets, and the student moves."""

from __future__ import annotations

from opd.divergences import Target
from opd.measurement import Clock, Measurement
from opd.reduction import position_weights
from opd.run import Run


def train(run: Run) -> None:
    """Train `run.student` until the recipe's last step, or until a stop was asked for."""
    recipe, signals = run.recipe, dict[str, float]()
    run.monitor.begin(run)

    while run.step < recipe.steps and not run.monitor.stop_requested:
        clock, measurement = Clock(), Measurement()
        draw = run.schedule.next(run.step, signals)

        with clock("rollout"):
            prompts = run.share(draw.prompts)
            trajectories = run.rollout(prompts, recipe.batch.group, draw.budget, stream=run.step)
            trajectories = run.verify(trajectories)

        with clock("teacher"), run.accelerator.autocast():
            targets = [Target(teacher(trajectories), teacher.weight) for teacher in run.teachers]

        weights = position_weights(trajectories, recipe.reduction, run.sum_over_processes)
        done = 0
        for micro, here in trajectories.split(recipe.batch.micro, whole_groups=run.shaping.scope == "group"):
            done += len(micro)
            with run.accelerator.autocast():
                with clock("student"):
                    student = run.student(micro)
                with clock("loss"):
                    answers = [target.select(here) for target in targets]
                    shape = run.shaping(student.detach(), answers, micro)
                    loss = run.divergence(student, answers, weights[here] * shape, micro)
            with clock("backward"):
                run.optimiser.accumulate(loss, last=done == len(trajectories))
            measurement.add(loss, micro, shape, run.rollout.exact)

        with clock("update"):
            signals = run.optimiser.apply()
            for teacher in run.teachers:
                teacher.follow(run.student)

        run.step += 1
        signals |= measurement.signals(run.sum_over_processes) | clock.signals(trajectories.positions)
        run.monitor.after_step(run, signals, measurement.example)

    run.monitor.end(run)
