"""A shaping moves the teacher's word by a trajectory's outcome within its group, which micro-batches cut."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import pytest
import torch
from pydantic import Field

import opd
from opd.distributions import Sampled
from opd.errors import IncompatibleError, RunError
from opd.objectives import Target
from opd.shaping import Shape, Shaper, Shaping
from tests.conftest import character_tokenizer, tiny_model, trajectories_of

ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a)} for a in range(1, 4) for b in range(1, 5)]


class Margin(Shaping):
    """Trajectories with a reward above their group's mean are lifted, those below are lowered."""

    kind: Literal["margin_of_a_test"] = "margin_of_a_test"
    makes_offsets = True
    size: float = Field(0.5, gt=0, description="Nats, either way")

    def build(self, context):
        return MarginShaper()


class MarginShaper(Shaper):
    def __init__(self):
        self.steps = 0

    def look(self, trajectories, targets, settings, sum_over_processes):
        self.steps += 1
        assert len(trajectories) == 12, "the whole step"
        assert len(targets[0].distribution) == trajectories.positions
        # Where all are alike there is no margin; by how many places an outcome leads in its group is found here alone.
        lead = torch.sign(trajectories.rewards - trajectories.group_mean).nan_to_num()
        share = sum_over_processes((lead != 0).float().mean())
        assert share.numel() == 1
        by_position = lead.repeat_interleave(trajectories.lengths)
        return replace(trajectories, columns={**trajectories.columns, "lead": by_position})

    def __call__(self, student, targets, micro, settings):
        lead = micro.columns["lead"]
        margin = Sampled.of(targets[0].distribution, micro.actions).log_probs - micro.behaviour_log_probs
        measured = {"margin": margin, "led": torch.where(lead == 0, torch.nan, lead)}
        return Shape(torch.ones(micro.positions), settings.size * lead, measured)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Sly(Shaping):
    """Makes offsets and does not say so."""

    kind: Literal["sly_of_a_test"] = "sly_of_a_test"

    def build(self, context):
        return SlyShaper()


class SlyShaper(Shaper):
    def __call__(self, student, targets, micro, settings):
        return Shape(torch.ones(micro.positions), torch.ones(micro.positions))


class Namesake(Shaping):
    """Measures something under the name of another thing."""

    kind: Literal["namesake_of_a_test"] = "namesake_of_a_test"

    def build(self, context):
        return NamesakeShaper()


class NamesakeShaper(Shaper):
    def __call__(self, student, targets, micro, settings):
        ones = torch.ones(micro.positions)
        return Shape(ones, measured={"loss": ones})


def trained(folder, **changes):
    settings = {
        "steps": 1,
        "shaping": {"kind": "margin_of_a_test", "size": 0.7},
        "objective": {"kind": "reverse_kl_sampled"},
        "batch": {"prompts": 3, "group": 4, "micro": 1},
        "rollout": {"max_new_tokens": 8},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "end_tokens": [2, 5, 8, 11],
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        # One step of gradient descent at rate 1, so that the weights' difference is the gradient.
        "update": {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "clip_norm": None},
        "output": str(folder),
        **changes,
    }
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    result = opd.distill(student, teacher, ROWS, tokenizer=character_tokenizer(), quiet=True, **settings)
    gradient = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    return result, gradient, before, teacher


SEEN = []
"""The trajectories of each step, whole, as the shaping saw them."""


@pytest.fixture
def seen(monkeypatch):
    SEEN.clear()
    look = MarginShaper.look

    def keep(self, trajectories, targets, settings, sum_over_processes):
        SEEN.append(look(self, trajectories, targets, settings, sum_over_processes))
        return SEEN[-1]

    monkeypatch.setattr(MarginShaper, "look", keep)
    return SEEN


@pytest.mark.parametrize("objective", ["reverse_kl_sampled", "lightning"])
def test_the_gradient_is_that_by_hand_however_groups_are_cut(objective, seen, tmp_path):
    one, cut, before, teacher = trained(tmp_path / "cut", objective={"kind": objective})
    _, whole, _, _ = trained(tmp_path / "whole", objective={"kind": objective}, batch={"prompts": 3, "group": 4})
    made = seen[0]
    assert torch.equal(made.actions, seen[1].actions)
    lead = made.columns["lead"]
    assert {-1.0, 1.0} <= set(lead.tolist()), "the step has groups of both outcomes"
    # By hand, trajectory by trajectory: the mean over tokens of -(log p + offset - log q) grad log q.
    student = tiny_model(seed=1)
    student.load_state_dict(before, strict=False)
    total, start = torch.zeros(()), 0
    for context, actions in zip(made.contexts, made.completions(), strict=True):
        ids = torch.cat([context, actions])[None]
        here = slice(start, start + len(actions))
        places = torch.arange(len(context) - 1, ids.shape[1] - 1)
        # Only the tokenizer's ids are drawn and compared.
        log_q = student(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            log_p = teacher(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        advantage = log_p + 0.7 * lead[here] - log_q.detach()
        advantage = advantage.clamp(-10, 10) if objective == "lightning" else advantage
        total = total - (advantage * log_q).sum() / made.positions
        start = here.stop
    total.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(cut[name], p.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(cut[name], whole[name], atol=5e-6, rtol=1e-4)
    step = next(r for r in one.history if "train/loss" in r)
    known = lead[lead != 0]
    assert step["train/led"] == pytest.approx(float(known.mean()), abs=1e-6)
    assert "train/margin" in step
    rows = [json.loads(line) for line in (tmp_path / "cut" / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        assert {"offset", "margin", "led", "weight", "divergence"} <= row["values"].keys()
        pairs = zip(row["values"]["offset"], row["values"]["led"], strict=True)
        assert all((led is None and offset == 0) or offset == pytest.approx(0.7 * led) for offset, led in pairs)


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "jensen_shannon", "grpo"])
def test_objectives_without_a_place_for_offsets_refuse_the_shaping(objective, tmp_path):
    with pytest.raises(IncompatibleError, match=rf"shaping 'margin_of_a_test' .* objective '{objective}'"):
        trained(tmp_path, objective=objective)
    listed = [{"kind": "reverse_kl_sampled"}, {"kind": objective}]
    with pytest.raises(IncompatibleError, match=rf"objective '{objective}'"):
        trained(tmp_path, objective=listed)


def test_offsets_that_were_not_announced_and_names_that_are_taken_are_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="makes_offsets"):
        trained(tmp_path / "a", shaping="sly_of_a_test", objective="reverse_kl")
    with pytest.raises(RunError, match="measures 'loss'"):
        trained(tmp_path / "b", shaping="namesake_of_a_test")


def test_a_targets_offset_goes_with_its_positions():
    from opd.distributions.target import joined_targets

    made = trajectories_of([2, 3])
    target = Target(Sampled(torch.arange(5.0)), 1.0, "t", torch.arange(5.0) / 10)
    (first, here), (second, there) = made.split(1)
    assert len(first) == len(second) == 1
    back = joined_targets([target.select(there), target.select(here)], [torch.arange(5)[there], torch.arange(5)[here]])
    assert torch.equal(back.offset, target.offset)
    assert torch.equal(back.distribution.log_probs, target.distribution.log_probs)
    plain = Target(Sampled(torch.arange(2.0)))
    mixed = joined_targets([plain, target.select(there)], [torch.arange(2), torch.arange(2, 5)])
    assert torch.equal(mixed.offset, torch.tensor([0, 0, 0.2, 0.3, 0.4]))
