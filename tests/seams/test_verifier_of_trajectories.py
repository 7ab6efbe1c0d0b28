"""Verifiers see trajectories beside outcomes, build what they need, and rewards that a rollout set itself count."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import pytest
import torch

import opd
from opd.context import Context
from opd.errors import RecipeError
from opd.recipe import parse_recipe
from opd.rollouts.base import OneSource, PrefixSource
from opd.rollouts.student import StudentRollout
from opd.verifiers import Scorer, Verifier
from tests.conftest import character_tokenizer, save_tiny, tiny_model, trajectories_of

TEXTS = [f"{a}+{b}=" for a in range(1, 4) for b in range(1, 5)]
BUILT: list[Context] = []


class ShortestOfTheGroup(Scorer):
    """1 for the shortest answers to a prompt, 0 for the others; none for prompts that begin with 3."""

    def score(self, trajectories, outcomes):
        assert len(outcomes) == len(trajectories)
        lengths, groups = trajectories.lengths, trajectories.groups
        least = torch.stack([lengths[groups == group].min() for group in groups])
        rewards = (lengths == least).float()
        rewards[[i for i, p in enumerate(trajectories.prompts) if p.view().startswith("3")]] = torch.nan
        return rewards


class Shortest(Verifier):
    kind: Literal["shortest_of_the_group"] = "shortest_of_the_group"

    def judges(self, prompt):
        return not prompt.view().startswith("3")

    def build(self, context):
        BUILT.append(context)
        return ShortestOfTheGroup(self)


class Scored(PrefixSource):
    """The student's rollout, with a reward of the rollout's own: the share of even tokens."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, request):
        made = self.inner(request.to(request.settings.inner))
        return replace(made, rewards=torch.stack([(row % 2 == 0).float().mean() for row in made.completions()]))


class ScoredRollout(OneSource):
    kind: Literal["scored_by_itself"] = "scored_by_itself"

    @property
    def rewards(self):
        return True

    @property
    def inner(self):
        return StudentRollout(max_new_tokens=self.max_new_tokens)

    def build(self, context, student, teachers):
        return Scored(self.inner.build(context, student, teachers))


def settings(folder, **changes):
    return {
        "steps": 2,
        "batch": {"prompts": 4, "group": 3, "micro": 1},
        "rollout": {"max_new_tokens": 8},
        "objective": "grpo",
        "evaluation": {"held_out": 3, "samples": 1, "k": 2},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-3},
        "output": str(folder),
        **changes,
    }


def trained(folder, **changes):
    return opd.distill(
        tiny_model(seed=1), [], TEXTS, tokenizer=character_tokenizer(), quiet=True, **settings(folder, **changes)
    )


def test_a_verifier_compares_the_trajectories_of_a_prompt(tmp_path):
    BUILT.clear()
    result = trained(tmp_path, verifier="shortest_of_the_group", end_tokens=list(range(0, 47, 6)))
    assert [context.device for context in BUILT] == [torch.device("cpu")], "built once, with the run's facts"
    # At least one of three is the shortest.
    assert all(r["train/reward"] >= 1 / 3 for r in result.history if "train/reward" in r)
    assert 0.5 <= result.after["accuracy"] <= 1
    for line in (tmp_path / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert (row["reward"] is None) == row["prompt"].startswith("3")


def test_rewards_that_a_rollout_sets_itself_count(tmp_path):
    result = trained(tmp_path / "a", rollout={"kind": "scored_by_itself", "max_new_tokens": 8})
    losses = [r for r in result.history if "train/loss" in r]
    assert all(0 < r["train/reward"] < 1 and r["train/gradient_norm"] > 0 for r in losses)
    # A verifier's verdicts go before them, and where it has none they stand.
    both = trained(
        tmp_path / "b", rollout={"kind": "scored_by_itself", "max_new_tokens": 8}, verifier="shortest_of_the_group"
    )
    rows = [json.loads(line) for line in (tmp_path / "b" / "rollouts.jsonl").read_text().splitlines()]
    assert all(row["reward"] in (0.0, 1.0) for row in rows if not row["prompt"].startswith("3"))
    assert both.summary["steps"] == 2


def test_without_either_an_objective_of_rewards_is_refused(tmp_path):
    student = save_tiny(tmp_path / "student", seed=1)
    data = settings(tmp_path / "run") | {"student": {"model": student}, "prompts": TEXTS}
    data["prompts"] = {"kind": "inline", "prompts": TEXTS}
    with pytest.raises(RecipeError, match="'verifier' is required"):
        parse_recipe(data)
    assert parse_recipe(data | {"rollout": "scored_by_itself"}).rollout.rewards
    mixed = {"kind": "mixture", "first": "scored_by_itself", "second": "student"}
    with pytest.raises(RecipeError, match="'verifier' is required"):
        parse_recipe(data | {"rollout": mixed})


def test_the_base_gives_no_verdict_as_not_a_number():
    from opd.prompts import Prompt
    from opd.verifiers.exact_match import ExactMatch

    prompts = [Prompt("a", {"answer": "7"}), Prompt("b", {}), Prompt("c", {"answer": "8"})]
    trajectories = trajectories_of([1, 1, 1], prompts=prompts)
    scores = ExactMatch().build(Context(torch.device("cpu"))).score(trajectories, ["7", "7", "7"])
    assert scores.dtype == torch.float32
    assert scores.isnan().tolist() == [False, True, False]
    assert scores.nan_to_num().tolist() == [1.0, 0.0, 0.0]
