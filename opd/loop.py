"""The loop. It knows no modality: prompts become trajectories, trajectories become targets, and the student moves."""

from __future__ import annotations

from opd.measurement import Clock, Measurement
from opd.run import Run


def train(run: Run) -> None:
    """Train `run.student` until the recipe's last step, the curriculum's end, or until a stop was asked for."""
    recipe = run.recipe
    signals = run.monitor.begin(run)

    while not run.monitor.stop_requested:
        draw = run.schedule.next(run.step, signals)
        if draw is None or run.step == recipe.steps:
            break
        clock, measurement = Clock(), Measurement(run.objectives)
        scheduled = run.take_settings_of_step()

        with clock("rollout"):
            prompts = run.share(draw.prompts)
            budget = run.rollout.settings.budget if draw.budget is None else draw.budget
            trajectories = run.rollout(prompts, recipe.batch.group, budget, stream=run.step)
            trajectories = run.verify(trajectories)

        with clock("teacher"), run.accelerator.autocast():
            targets = run.ask(trajectories)
        measurement.asked(run.teachers, trajectories)

        counts = [o.position_weights(trajectories, recipe.reduction, run.sum_over_processes) for o in run.objectives]
        done = 0
        for micro, here in trajectories.split(recipe.batch.micro, run.whole_groups):
            done += len(micro)
            with run.accelerator.autocast():
                with clock("student"):
                    student = run.student(micro)
                with clock("loss"):
                    answers = [target.select(here) for target in targets]
                    shape = run.shaping(student.detach(), answers, micro)
                    losses = [
                        objective(student, objective.heard(answers), objective.shape(count[here], shape), micro)
                        for objective, count in zip(run.objectives, counts, strict=True)
                    ]
            with clock("backward"):
                run.optimiser.accumulate(losses, last=done == len(trajectories))
            measurement.add(losses, micro, shape, run.rollout.exact)

        with clock("update"):
            signals = run.optimiser.apply()
            for teacher in run.teachers:
                teacher.follow(run.student)

        run.step += 1
        signals |= measurement.signals(run.sum_over_processes) | clock.signals(trajectories.positions)
        signals |= draw.signals | scheduled
        signals |= run.monitor.after_step(run, signals, measurement.example)

    run.monitor.end(run)
