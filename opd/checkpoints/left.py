"""What a run that ended by an error leaves behind, and how it goes on."""

from __future__ import annotations

from opd.checkpoints.store import folder_of, steps_stored
from opd.errors import OVERWRITE, RESUME, OpdError
from opd.run import Run

FROM_PYTHON = "passed from Python)"
"""In a recipe in the place of what no file holds: a live model, or a function."""


def tell_what_is_left(error: BaseException, run: Run, by_python: bool) -> None:
    """Let an error that ended a run say which step is kept and the command that goes on from it, unless it does.

    Args:
        by_python: the run has parts that a command cannot give it again.
    """
    if isinstance(error, OpdError) and RESUME not in str(error):
        error.args = (f"{error}\n{left_by(run, by_python)}",)
    elif not isinstance(error, OpdError):
        error.add_note(left_by(run, by_python))


def left_by(run: Run, by_python: bool) -> str:
    """What of the run is kept, and how it goes on, in one line."""
    directory = run.recipe.directory
    if (directory / "summary.json").is_file():
        return f"The run itself is whole: its student and summary.json are in {directory}"
    by_python = by_python or FROM_PYTHON in run.recipe.to_yaml()
    steps = steps_stored(directory)
    if steps:
        lost = run.step - steps[0]
        how = "the same call with resume=True" if by_python else f"opd train {directory / 'recipe.yaml'} --resume"
        return (
            f"Step {steps[0]} is kept in {folder_of(directory, steps[0])}"
            + (f", the {lost} after it are not" if lost > 1 else ", the one after it is not" if lost == 1 else "")
            + f"; to go on from there: {how}"
        )
    every, again = run.recipe.checkpoint.every, "overwrite=True" if by_python else OVERWRITE
    taken = f"none of its {run.step} steps is kept" if run.step else "no step was taken"
    return f"There is no checkpoint yet (checkpoint.every={every}), and {taken}; to begin again: {again}"
