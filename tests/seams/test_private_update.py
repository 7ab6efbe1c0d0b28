"""An update clips each trajectory's gradient, divides by an expected number, takes empty steps and keeps silent."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from pydantic import Field

import opd
from opd.curricula import Course, Curriculum, Draw
from opd.errors import IncompatibleError
from opd.shaping.uniform import UniformShaper
from opd.updates import Optimiser, Update
from tests.conftest import character_tokenizer, tiny_model

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a)} for a in range(1, 4) for b in range(1, 5)]
EXPECTED = 4 * 2


class ClippedUpdate(Update):
    """Gradient descent with each trajectory's gradient clipped, and a known number added to every weight."""

    kind: Literal["clipped_of_a_test"] = "clipped_of_a_test"
    clip: float = Field(0.02, gt=0, description="Largest norm of one trajectory's part of the gradient")
    added: float = Field(0.0, description="What stands for noise: added to each weight's gradient at every step")

    def build(self, student, accelerator):
        return Clipped(self, student)


class Clipped(Optimiser):
    per_example = True
    expected = True
    takes_empty = True
    writes_rollouts = False

    def __init__(self, settings, student):
        self.settings = settings
        self.weights = [p for p in student.module.parameters() if p.requires_grad]
        self.steps = 0
        self.discard()

    def accumulate(self, losses, last):
        apart = torch.stack([loss.per_example for loss in losses]).sum(0)
        torch.testing.assert_close(apart.sum(), sum(loss.total for loss in losses))
        for loss in apart:
            gradient = torch.autograd.grad(loss, self.weights, retain_graph=True)
            norm = torch.stack([g.norm() for g in gradient]).norm()
            for total, g in zip(self.total, gradient, strict=True):
                total += g * (self.settings.clip / norm).clamp(max=1)
            self.clipped += float(norm > self.settings.clip)
            self.examples += 1

    def discard(self):
        self.total = [torch.zeros_like(p) for p in self.weights]
        self.clipped = self.examples = 0

    @torch.no_grad()
    def apply(self, settings, finite=True):
        for weight, gradient in zip(self.weights, self.total, strict=True):
            weight -= gradient + settings.added
        self.steps += 1
        signals = {"examples": float(self.examples), "clipped_examples": float(self.clipped)}
        self.discard()
        return signals

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Sizes(Curriculum):
    """Draws of given sizes, one a step."""

    kind: Literal["sizes_of_a_test"] = "sizes_of_a_test"
    sizes: list[int] = Field(description="Prompts of each step")

    def build(self, prompts, per_step, context):
        return SizesCourse(self.sizes, list(prompts))


class SizesCourse(Course):
    def __init__(self, sizes, prompts):
        self.sizes, self.prompts = sizes, prompts

    def next(self, step, signals, asker):
        return Draw(self.prompts[: self.sizes[step]]) if step < len(self.sizes) else None


SEEN = []
"""Trajectories of each step that rolled out."""


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    SEEN.clear()

    def keep(self, trajectories, targets, settings, sum_over_processes):
        SEEN.append(trajectories)
        return trajectories

    monkeypatch.setattr(UniformShaper, "look", keep)


def trained(folder, sizes, **changes):
    settings = {
        "steps": len(sizes),
        "curriculum": {"kind": "sizes_of_a_test", "sizes": sizes},
        "update": {"kind": "clipped_of_a_test"},
        "objective": "jensen_shannon",
        "reduction": "sequence_mean",
        "batch": {"prompts": 4, "group": 2, "micro": 3},
        "rollout": {"max_new_tokens": 8},
        "end_tokens": [2, 5, 8, 11],
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 1},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(folder),
        **changes,
    }
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    result = opd.distill(student, teacher, ROWS, tokenizer=character_tokenizer(), quiet=True, **settings)
    moved = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    return result, moved, before, teacher


def steps_of(result):
    return [r for r in result.history if "train/loss" in r]


def gradients_by_hand(before, teacher, made):
    """Of each trajectory's mean Jensen-Shannon divergence over the expected number, by the weights' names."""
    student = tiny_model(seed=1)
    student.load_state_dict(before, strict=False)
    weights = dict(student.named_parameters())
    found = []
    for context, actions in zip(made.contexts, made.completions(), strict=True):
        ids = torch.cat([context, actions])[None]
        places = torch.arange(len(context) - 1, ids.shape[1] - 1)
        # Only the tokenizer's ids are drawn and compared.
        log_q = student(ids).logits[0, places, :47].log_softmax(-1)
        with torch.no_grad():
            log_p = teacher(ids).logits[0, places, :47].log_softmax(-1)
        middle = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        js = (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(-1) / 2
        gradient = torch.autograd.grad(js.mean() / EXPECTED, list(weights.values()))
        found.append(dict(zip(weights, gradient, strict=True)))
    return found


def test_each_trajectory_is_clipped_alone_over_the_expected_number(tmp_path):
    free = {"kind": "clipped_of_a_test", "clip": 1e9}
    result, moved, before, teacher = trained(tmp_path / "free", [3], update=free)
    (made,) = SEEN
    assert len(made) == 6, "three prompts of four expected ones, each twice"
    gradients = gradients_by_hand(before, teacher, made)
    assert steps_of(result)[0]["train/clipped_examples"] == 0
    for name, gradient in moved.items():
        torch.testing.assert_close(gradient, sum(g[name] for g in gradients), atol=1e-6, rtol=1e-3)

    norms = [float(torch.stack([g.norm() for g in each.values()]).norm()) for each in gradients]
    clip = sum(sorted(norms)[2:4]) / 2
    update = {"kind": "clipped_of_a_test", "clip": clip}
    result, moved, _, _ = trained(tmp_path / "clipped", [3], update=update)
    assert steps_of(result)[0]["train/examples"] == 6
    assert steps_of(result)[0]["train/clipped_examples"] == 3
    for name, gradient in moved.items():
        wanted = sum(g[name] * min(1.0, clip / norm) for g, norm in zip(gradients, norms, strict=True))
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-3)
    # However the batch is cut.
    _, whole, _, _ = trained(tmp_path / "whole", [3], update=update, batch={"prompts": 4, "group": 2, "micro": 6})
    for name, gradient in whole.items():
        torch.testing.assert_close(moved[name], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("reverse_kl_sampled", {}),
        ("lightning", {}),
        ("sft", {"rollout": {"kind": "teacher", "max_new_tokens": 8}}),
        ("grpo", {"verifier": {"kind": "exact_match", "pattern": "([0-9])"}}),
    ],
)
def test_other_objectives_keep_examples_apart_too(objective, changes, tmp_path):
    result, _, _, _ = trained(tmp_path, [2], objective=objective, **changes)
    assert steps_of(result)[0]["train/examples"] == 4


def test_an_empty_draw_is_a_step_and_nothing_is_written_down(tmp_path):
    update = {"kind": "clipped_of_a_test", "clip": 1e-9, "added": 0.125}
    result, moved, _, _ = trained(tmp_path, [0, 2, 0], update=update)
    steps = steps_of(result)
    assert [r["train/examples"] for r in steps] == [0, 4, 0]
    assert [r["train/positions"] > 0 for r in steps] == [False, True, False]
    assert not any("train/empty" in r for r in steps)
    assert len(SEEN) == 1, "nothing is rolled out and shaped for an empty draw"
    for gradient in moved.values():
        # What stands for noise came three times.
        torch.testing.assert_close(gradient, torch.full_like(gradient, 0.375), atol=1e-5, rtol=0)
    rollouts = tmp_path / "rollouts.jsonl"
    assert not rollouts.exists() or not rollouts.read_text()
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert result.summary["steps"] == 3


def test_an_update_that_takes_no_empty_step_leaves_the_weights_as_they_are(tmp_path):
    plain = {"update": {"kind": "plain", "learning_rate": 1e-2, "weight_decay": 0.1}}
    result, moved, _, _ = trained(tmp_path, [0, 0], **plain)
    assert [r["train/empty"] for r in steps_of(result)] == [1, 1]
    assert result.summary["empty_updates"] == 2
    assert all(bool((gradient == 0).all()) for gradient in moved.values())


def test_a_mean_over_tokens_has_no_expected_number(tmp_path):
    with pytest.raises(IncompatibleError, match=r"update 'clipped_of_a_test' .* reduction=sequence_mean"):
        trained(tmp_path, [2], reduction="token_mean")
