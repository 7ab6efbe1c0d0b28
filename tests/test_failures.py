"""A step that goes wrong: an update that must not be taken, a batch that does not fit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from opd.api import execute
from opd.checkpoints.store import steps_stored
from opd.errors import RunError
from opd.policies.causal_lm import CausalLMStudent
from opd.report.page import collect
from opd.updates.plain import PlainOptimiser
from tests.checkpoints import EMA, final, make, models, records  # noqa: F401


def spoilt(monkeypatch, steps, value=float("nan")):
    """Put `value` into a gradient when the optimiser has been asked to move so often."""
    apply, count = PlainOptimiser.apply, iter(range(1, 1000))

    def spoiling(self, settings, finite):
        if next(count) in steps:
            next(p for p in self.student.module.parameters() if p.requires_grad).grad[0] = value
        return apply(self, settings, finite)

    monkeypatch.setattr(PlainOptimiser, "apply", spoiling)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_skipped_counted_and_shown(value, make, monkeypatch, capsys):  # noqa: F811
    spoilt(monkeypatch, {3}, value)
    recipe = make("run", checkpoint={"every": 1, "keep_last": 10}, whole=EMA)
    result = execute(recipe, quiet=True)
    assert "step 3:" in capsys.readouterr().err
    assert result.summary["skipped_updates"] == 1
    assert all(p.isfinite().all() for p in result.student.parameters())
    skipped = [r for r in result.history if "train/skipped" in r]
    assert [r["step"] for r in skipped] == [3]
    assert not math.isfinite(skipped[0]["train/gradient_norm"])
    (one,) = collect([recipe.directory])["runs"]
    rows = records(recipe, "rollouts.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 3, 3, 3, 4, 5, 6]
    assert all("not finite" in r["problem"] for r in rows if r["step"] == 3)
    assert one["rows"]["training"]["total"] == 9
    assert one["series"]["train/skipped"]["x"] == [3]


def test_nothing_moves_in_a_skipped_update(make, monkeypatch):  # noqa: F811
    from safetensors.torch import load_file

    from opd.checkpoints.store import folder_of

    spoilt(monkeypatch, {3})
    recipe = make("run", checkpoint={"every": 1, "keep_last": 10}, whole=EMA)
    execute(recipe, quiet=True)
    states = [load_file(folder_of(recipe.directory, step) / "tensors.safetensors") for step in (2, 3, 4)]
    moving = [n for n in states[0] if n.startswith(("/parts/student", "/parts/teachers", "/parts/optimiser/moments"))]
    assert any("teachers" in n for n in moving)
    assert all(torch.equal(states[0][n], states[1][n]) for n in moving)
    assert not all(torch.equal(states[1][n], states[2][n]) for n in moving)


def test_too_many_in_a_row_stop_the_run_with_its_state_written(make, monkeypatch):  # noqa: F811
    spoilt(monkeypatch, {2, 4, 5})
    recipe = make("run", failures={"skips_in_a_row": 2}, checkpoint={"every": 100})
    with pytest.raises(RunError, match=r"step 5: .* 2 updates in a row were not finite") as error:
        execute(recipe, quiet=True)
    assert len(str(error.value).splitlines()) <= 2
    assert steps_stored(recipe.directory) == [5]
    monkeypatch.undo()
    assert execute(recipe, resume=True, quiet=True).summary["skipped_updates"] == 3


def test_a_loss_that_is_not_finite_is_enough(make, monkeypatch):  # noqa: F811
    from opd.measurement import Measurement

    calls = iter(range(1000))
    monkeypatch.setattr(Measurement, "finite", lambda self, total: next(calls) != 1)
    result = execute(make("run"), quiet=True)
    assert [r["step"] for r in result.history if "train/skipped" in r] == [2]


def out_of_memory(monkeypatch, more_than, in_backward=False):
    """A device on which more than so many trajectories in one part do not fit."""
    forward = CausalLMStudent.__call__
    parts = []

    def limited(self, trajectories, *arguments):
        if not torch.is_grad_enabled() or self.module.training is None:
            return forward(self, trajectories, *arguments)
        parts.append(len(trajectories))
        if len(trajectories) > more_than and not in_backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        answer = forward(self, trajectories, *arguments)
        if len(trajectories) > more_than:
            # The last layer's gradients are there when the first one's no longer fit.
            def fail(gradient):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

            answer.hidden.register_hook(fail)
        return answer

    monkeypatch.setattr(CausalLMStudent, "__call__", limited)
    return parts


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_batch_that_does_not_fit_is_cut_and_its_gradient_is_the_same(in_backward, make, monkeypatch, capsys):  # noqa: F811
    batch = {"prompts": 6, "micro": 3}
    whole = make("whole", batch={**batch, "micro": 1}, self_test=False)
    execute(whole, quiet=True)
    cut = make("cut", batch=batch, self_test=False)
    parts = out_of_memory(monkeypatch, 1, in_backward)
    execute(cut, quiet=True)
    warned = [line for line in capsys.readouterr().err.splitlines() if "micro-batches of 1 from step 1 on" in line]
    assert len(warned) == 1
    # Tried once, then cut for the rest of the run; a broken part counts neither in gradients nor in the log.
    assert parts == [3] + [1] * 6 * 6
    for name, tensor in final(whole).items():
        assert torch.equal(tensor, final(cut)[name]), name
    assert [r["train/loss"] for r in records(cut) if "train/loss" in r] == [
        r["train/loss"] for r in records(whole) if "train/loss" in r
    ]


def test_a_part_that_fails_late_does_not_count_twice(make, monkeypatch):  # noqa: F811
    """The second part breaks off after some of its gradients, and all of the first one's, were added."""
    whole = make("whole", batch={"prompts": 4, "micro": 1}, self_test=False, steps=1)
    execute(whole, quiet=True)
    backward, count = PlainOptimiser.accumulate, iter(range(100))

    def breaking(self, losses, last):
        if next(count) != 1:
            return backward(self, losses, last)
        parameter = next(p for p in self.student.module.parameters() if p.requires_grad)
        handle = parameter.register_post_accumulate_grad_hook(_raise)
        try:
            return backward(self, losses, last)
        finally:
            handle.remove()

    monkeypatch.setattr(PlainOptimiser, "accumulate", breaking)
    cut = make("cut", batch={"prompts": 4, "micro": 2}, self_test=False, steps=1)
    execute(cut, quiet=True)
    assert all(torch.equal(tensor, final(cut)[name]) for name, tensor in final(whole).items())
    first, second = (next(r for r in records(recipe) if "train/loss" in r) for recipe in (whole, cut))
    assert first == second


def _raise(_parameter):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_one_trajectory_that_does_not_fit_is_one_message(make, monkeypatch):  # noqa: F811
    out_of_memory(monkeypatch, 0)
    with pytest.raises(RunError, match=r"out of memory with 1 trajectories of .* positions.*rollout\.max_new_tokens"):
        execute(make("run", self_test=False), quiet=True)


def test_memory_that_runs_out_elsewhere_is_one_message(make, monkeypatch):  # noqa: F811
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    recipe = make("run", checkpoint={"every": 1})
    with monkeypatch.context() as patch:
        patch.setattr("opd.language.engines.in_process.InProcess.sampler", full)
        with pytest.raises(RunError, match=r"outside of the micro-batches.*rollout\.batch"):
            execute(recipe, quiet=True)


def test_the_micro_batch_that_fits_is_remembered(make, monkeypatch, capsys):  # noqa: F811
    recipe = make("run", self_test=False)
    with monkeypatch.context() as patch:
        out_of_memory(patch, 2)
        execute(recipe, quiet=True)
    facts = json.loads((recipe.directory / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert facts["micro"] == 2
