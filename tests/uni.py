"""Uni-OPD for tests: shapings of trajectories with given rewards and returns, and small runs of everything together."""

from __future__ import annotations

from dataclasses import replace

import torch

import opd
from opd.context import Context
from opd.distributions import Sampled
from opd.objectives import Target
from opd.shaping import words_of
from tests.conftest import character_tokenizer, tiny_model, trajectories_of


def stepped(shaping, rewards, returns, groups=None, **fields):
    """A shaping's look at trajectories of these rewards and returns, and its shape of them all."""
    lengths = [1 + i % 3 for i in range(len(rewards))]
    made = trajectories_of(lengths)
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    made = replace(made, groups=groups, **fields).rewarded(torch.tensor(rewards), 1.0)
    noise = torch.randn(made.positions, generator=torch.Generator().manual_seed(1))
    # The mean over a trajectory's positions is what counts.
    means = torch.stack([part.mean() for part in noise.split(lengths)]).repeat_interleave(made.lengths)
    ratios = noise - means + torch.tensor(returns).repeat_interleave(made.lengths)
    made = replace(made, behaviour_log_probs=noise)
    targets = [Target(Sampled(made.behaviour_log_probs + ratios))]
    shaper = shaping.build(Context(torch.device("cpu")))
    made = shaper.look(made, targets, shaping, lambda x: x)
    return made, shaper(None, targets, made, shaping), shaper


def in_words(settings, made, *shapes):
    """What shapings say of each trajectory, weights and offsets among what was measured, as a run has it."""
    values = {"weight": torch.stack([shape.weights for shape in shapes]).prod(0)}
    for shape in shapes:
        values |= shape.measured | ({} if shape.offsets is None else {"offset": shape.offsets})
    return words_of(settings, made, values)


ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a), "side": "ab"[b % 2]} for a in range(1, 4) for b in range(1, 5)]
"""An untrained model answers with the first digit by chance, and is right sometimes."""

TOGETHER = [
    {"kind": "margin_shift", "delta": 0.5},
    {"kind": "outcome_balance"},
    {"kind": "log_ratio_gate", "limit": 3.0},
]


def trained(folder, **changes):
    """A step or more of gradient descent at rate 1, so that the weights' difference is the gradient."""
    choices = {
        "steps": 1,
        "shaping": TOGETHER,
        "objective": {"kind": "reverse_kl_sampled"},
        "reduction": "sequence_mean",
        "batch": {"prompts": 3, "group": 6, "micro": 1},
        "rollout": {"max_new_tokens": 8},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "end_tokens": [2, 5, 8, 11],
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "clip_norm": None},
        "output": str(folder),
        **changes,
    }
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    result = opd.distill(student, teacher, ROWS, tokenizer=character_tokenizer(), quiet=True, **choices)
    gradient = {name: before[name] - p.detach() for name, p in student.named_parameters()}
    return result, gradient, before, teacher


def steps_of(result):
    return [record for record in result.history if "train/loss" in record]
