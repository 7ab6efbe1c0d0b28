"""What one step measures of itself: the signals that logs and curricula read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from opd.objectives import Loss, Objective
from opd.objectives.base import label
from opd.teachers import LiveTeacher
from opd.trajectories import AUTHORS, Trajectories

SHOWN = 4
"""Trajectories of a group that a step leaves for the report."""


class Clock:
    """Wall seconds by phase of a step, and this process's CPU seconds for all of it."""

    def __init__(self) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def signals(self, positions: int) -> dict[str, float]:
        total = time.perf_counter() - self.started
        phases = {f"seconds/{phase}": seconds for phase, seconds in self.phases.items()}
        cpu = time.process_time() - self.cpu_started
        return {**phases, "seconds/step": total, "cpu_seconds": cpu, "tokens_per_second": positions / total}


class Measurement:
    """Sums over a step's micro-batches; means are over all positions or trajectories of all processes."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.names = [f"{label(o)}@{o.teacher}" if o.teacher else label(o) for o in objectives]
        self.answered = {"teacher_tokens": 0.0}
        self.sums: dict[str, float] = {}
        self.parts: list[tuple[Trajectories, dict[str, torch.Tensor]]] = []

    def asked(self, teachers: Sequence[LiveTeacher], trajectories: Trajectories) -> None:
        """Count the positions that the step's teachers scored, and those whose answers they had already."""
        wanted = len(teachers) * trajectories.positions
        scored = sum(t.asked for t in teachers) * trajectories.positions
        self.answered = {"teacher_tokens": float(scored)}
        if any(t.remembers for t in teachers):
            self.answered |= {"remembered": float(wanted - scored), "wanted": float(wanted)}

    def add(self, losses: Sequence[Loss], micro: Trajectories, weights: torch.Tensor, exact_behaviour: bool) -> None:
        """Take in one micro-batch; its numbers by position stay until the step is over.

        `divergence` is the first objective's value a token; of several objectives each also logs its own.
        """
        learnt, loss = micro.learn, losses[0]
        self.parts.append((micro, {"divergence": loss.values, "weight": weights}))
        added = {
            "positions": float(learnt.sum()),
            "trajectories": float(len(micro)),
            "sampled_tokens": float((micro.authors != AUTHORS.index("data")).sum()) if micro.stored is None else 0.0,
            "loss": sum(float(each.total.detach()) for each in losses),
            "divergence": float(loss.values[learnt].sum()),
            "length": float(micro.lengths.sum()),
            "truncated": float((~micro.finished).sum()),
        }
        if len(losses) > 1:
            added |= {
                f"objective/{name}": float(each.values[learnt].sum())
                for name, each in zip(self.names, losses, strict=True)
            }
        if exact_behaviour:
            gap = (loss.log_probs - micro.behaviour_log_probs)[learnt & (loss.log_probs != 0)]
            added["rollout_gap"] = float(gap.abs().sum())
        if micro.stored is not None:
            mine = learnt & (loss.log_probs != 0) & (micro.authors == AUTHORS.index("student"))
            ratio = (loss.log_probs - micro.behaviour_log_probs)[mine].exp().double()
            added |= {
                "moved": float(ratio.sum()),
                "moved_squared": float((ratio**2).sum()),
                "moved_positions": float(len(ratio)),
            }
        for each in losses:
            for name, found in each.measured.items():
                known = found[learnt & ~found.isnan()]
                for key, number in ((f"measured/{name}", float(known.sum())), (f"known/{name}", float(len(known)))):
                    added[key] = added.get(key, 0.0) + number
        if micro.rewards is not None:
            known = ~torch.isnan(micro.rewards)
            added |= {"reward": float(micro.rewards[known].sum()), "rewarded": float(known.sum())}
        for name, value in added.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def example(self) -> list[tuple[Trajectories, dict[str, torch.Tensor]]]:
        """The step's first trajectories of one prompt with their numbers, as `parts` are; at most `SHOWN`."""
        if not self.parts:
            return []
        groups = self.parts[0][0].groups[:SHOWN]
        first, here = self.parts[0][0].rows(0, int((groups == groups[0]).sum()))
        return [(first, {name: value[here] for name, value in self.parts[0][1].items()})]

    def clear(self) -> None:
        """Forget the micro-batches taken in."""
        self.sums, self.parts = {}, []

    def finite(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether the step's loss is a number, on all processes."""
        loss = sum_over_processes(torch.tensor([self.sums.get("loss", 0.0)], dtype=torch.float64))
        return bool(loss.isfinite().all())

    def signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        self.sums |= self.answered
        names = list(self.sums)
        totals = sum_over_processes(torch.tensor([self.sums[n] for n in names], dtype=torch.float64))
        total = dict(zip(names, totals.tolist(), strict=True))
        positions, trajectories = max(total["positions"], 1.0), max(total["trajectories"], 1.0)
        signals = {
            "loss": total["loss"],
            "divergence": total["divergence"] / positions,
            "sampled_tokens": total["sampled_tokens"],
            "length": total["length"] / trajectories,
            "truncated": total["truncated"] / trajectories,
        }
        signals |= {name: total[name] / positions for name in names if name.startswith("objective/")}
        measured = [name.removeprefix("measured/") for name in names if name.startswith("measured/")]
        signals |= {name: total[f"measured/{name}"] / max(total[f"known/{name}"], 1.0) for name in measured}
        signals["teacher_tokens"] = total["teacher_tokens"]
        if "wanted" in total:
            signals["teacher_hit_rate"] = total["remembered"] / max(total["wanted"], 1.0)
        if total.get("moved_positions"):
            mean = total["moved"] / total["moved_positions"]
            signals["drift"] = mean
            signals["drift_std"] = max(0.0, total["moved_squared"] / total["moved_positions"] - mean**2) ** 0.5
        if "rollout_gap" in total:
            signals["rollout_gap"] = total["rollout_gap"] / positions
        if total.get("rewarded"):
            signals["reward"] = total["reward"] / total["rewarded"]
        return signals
