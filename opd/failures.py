"""What a run does about a step that went wrong: an update that must not be taken, a batch that does not fit."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from opd.errors import RESUME, RunError
from opd.measurement import Measurement
from opd.recipe import Failures
from opd.run import Run
from opd.trajectories import Trajectories


def skipped_rows(bad: Sequence[Exception]) -> list[str]:
    """Which rows of the prompts were left out, a line each; the first few by name."""
    rest = len(bad) - 5
    return [f"skipped a row: {error}" for error in bad[:5]] + ([f"skipped {rest} more rows"] if rest > 0 else [])


class Skips:
    """Counts the updates that were not taken: `total` for a number that was not finite, `empty` because there was
    nothing to learn. The weights are as they were before each of them."""

    def __init__(self, settings: Failures):
        self.settings = settings
        self.in_a_row = self.total = self.empty = 0
        self.invalid: list[float] = []

    def after_step(self, run: Run) -> None:
        """Count an update that was not taken; the batch of one that was not finite is in rollouts.jsonl.

        Raises:
            RunError: that was one too many; the state is written before.
        """
        self._count_invalid(run)
        if run.signals.get("empty"):
            self._count_empty(run)
        if not run.signals.get("skipped"):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        what = f"step {run.step}: loss {run.signals['loss']:g}, gradient norm {run.signals['gradient_norm']:g}"
        if self.in_a_row < self.settings.skips_in_a_row:
            run.monitor.warn(f"{what}: the update was skipped, the weights are as before")
            return
        count, self.in_a_row = self.in_a_row, 0
        run.checkpoints.write(run)
        shown = f" Their batches are in `opd report {run.recipe.directory}`;" if run.optimiser.writes_rollouts else ""
        raise RunError(
            f"{what}: {count} updates in a row were not finite (failures.skips_in_a_row).{shown}\nlower "
            f"update.learning_rate, or go on as it is with {RESUME}"
        )

    def _count_invalid(self, run: Run) -> None:
        share, over = run.signals.get("invalid", 0.0), self.settings.invalid_over
        self.invalid = [*self.invalid, share][-over:]
        if not share:
            return
        what = f"step {run.step}: {share:.0%} of its rollouts were lost"
        why = run.reasons(gather_object)
        # Steps that are still to come count as good ones, so that a single failure does not end a young run.
        if sum(self.invalid) / over <= self.settings.max_invalid:
            run.monitor.warn(f"{what} and are in nothing of the step (so far {why})")
            return
        found, self.invalid = sum(self.invalid) / over, []
        run.checkpoints.write(run)
        raise RunError(
            f"{what}, and {found:.0%} of the last {over} steps' (failures.max_invalid={self.settings.max_invalid:g}). "
            f"What failed: {why}.\nmend it and go on with {RESUME}; the checkpoint was written"
        )

    def _count_empty(self, run: Run) -> None:
        self.empty += 1
        if run.signals.get("invalid") == 1.0:
            why = "all its rollouts were lost"
        elif not run.signals["length"]:
            why = "its draw has no prompt"
        elif not run.signals["positions"]:
            why = "no position of it counts (written_by, end, truncated, shaping, weights of 0)"
        elif only_spans(run):
            why = (
                "no text of it is one token of both tokenizers, and where it is several no objective of the recipe "
                "compares: add {kind: reverse_kl_sampled, spans: several} to objective"
            )
        else:
            why = "its gradient is zero up to rounding: student and teachers agree, or all rewards of a group are equal"
        limit = self.settings.empty_at_start
        if limit is not None and self.empty == run.step >= limit:
            run.checkpoints.write(run)
            raise RunError(
                f"nothing was learnt in any of the first {run.step} steps; of the last one {why}. Change that, or let "
                f"the run go on with failures.empty_at_start=null and {RESUME}"
            )
        if self.empty == 1:
            run.monitor.warn(
                f"step {run.step} has nothing to learn: {why}. The update is not taken; train/empty marks such steps"
            )

    def state_dict(self) -> dict[str, Any]:
        found = {"in_a_row": self.in_a_row, "total": self.total, "empty": self.empty}
        return {**found, "invalid": self.invalid} if any(self.invalid) else found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total, self.empty = state["in_a_row"], state["total"], state.get("empty", 0)
        self.invalid = list(state.get("invalid", []))


def only_spans(run: Run) -> bool:
    """Whether the last step's texts are nowhere one token of the student's and of each teacher's own tokenizer, and no
    objective compares what is several."""
    single = [value for name, value in run.signals.items() if name.startswith("alignment/single_bytes")]
    reached = any(getattr(objective, "spans", None) is not None for objective in run.recipe.objective)
    return bool(single) and not any(single) and not reached


class MicroBatches:
    """A step's trajectories in parts that fit into memory.

    Where a part does not fit, all gradients of the step are dropped and made again from parts of half the size: a
    backward pass that broke off has added some of its gradients already, and cannot be taken back alone. The
    denominator is the step's, so the gradient is the same. Smaller parts stay for the rest of the run.
    """

    def __init__(self, run: Run, trajectories: Trajectories, measurement: Measurement):
        self.run, self.trajectories, self.measurement = run, trajectories, measurement
        self.last = False
        self._too_large: Trajectories | None = None

    def __iter__(self) -> Iterator[tuple[Trajectories, slice]]:
        """Parts and the packed positions that each owns; `last` is true with the step's final one."""
        done = 0
        while done < len(self.trajectories):
            done = 0
            for part, here in self.trajectories.split(self.run.micro):
                done += len(part)
                self.last = done == len(self.trajectories)
                self._part = part
                yield part, here
                if self._too_large is not None:
                    self._start_again(self._too_large)
                    done, self._too_large = 0, None
                    break

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Around the work on one part; takes note when the device's memory does not suffice for it."""
        try:
            yield
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            # The frames of the work that broke off hold its tensors.
            traceback.clear_frames(error.__traceback__)
            self._too_large = self._part

    def _start_again(self, part: Trajectories) -> None:
        run = self.run
        of_one = len(part) == 1
        if of_one or run.accelerator.num_processes > 1:
            # Other processes may be waiting for this one's gradients: they could not be told to start again.
            raise RunError(
                f"out of memory with {len(part)} trajectories of {part.positions} positions in one "
                + ("micro-batch; " if of_one else f"micro-batch; set batch.micro={max(1, len(part) // 2)}. ")
                + run.student.cheaper
            )
        run.optimiser.discard()
        self.measurement.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        run.micro = max(1, len(part) // 2)
        run.monitor.warn(
            f"out of memory with {len(part)} trajectories of {part.positions} positions: micro-batches of {run.micro} "
            f"from step {run.step + 1} on (batch.micro; the gradient is the same)"
        )
