"""Three turns with a text environment: the student guesses, the environment answers, and the outcome is the reward."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

import opd
from opd.errors import RecipeError
from opd.loop import train
from opd.recipe import parse_recipe
from opd.rollouts import HeldOutSampler, PrefixSource, Request
from opd.rollouts.base import OneSource
from opd.rollouts.student import StudentRollout
from opd.schedules import OverSteps
from opd.trajectories import AUTHORS, Trajectories
from tests.conftest import save_tiny
from tests.test_loop import build, recipe_for

TURNS = 3
ENVIRONMENT = AUTHORS.index("environment")


class Guessing(OneSource):
    """A letter is to be guessed; after each guess the environment says whether it was too low or too high."""

    kind: Literal["guessing"] = "guessing"
    turn_tokens: Annotated[int, OverSteps(ge=1)] = Field(3, description="Most tokens of a guess")

    @property
    def rewards(self) -> bool:
        return True

    def build(self, context, student, teachers):
        return Playing(StudentRollout().build(context, student, teachers), student.language)


class Playing(PrefixSource):
    authors = frozenset({"student", "environment"})

    def __init__(self, writer: PrefixSource, language):
        self.writer, self.language = writer, language

    def held_out(self, settings, context, student):
        return HeldOutSampler(self, settings, context)

    def reply(self, prompt, guess: str) -> str:
        return " no," if guess[:1] != prompt.fields["wanted"] else " yes"

    def __call__(self, request: Request[Guessing]) -> Trajectories:
        members = [prompt for prompt in request.prompts for _ in range(request.group)]
        empty = torch.zeros(0, dtype=torch.int64)
        actions, log_probs = [empty for _ in members], [torch.zeros(0) for _ in members]
        authors, rewards = [empty for _ in members], torch.zeros(len(members))
        playing = list(range(len(members)))
        for turn in range(TURNS):
            asked = replace(
                request.to(StudentRollout(), budget=request.settings.turn_tokens),
                prompts=[replace(members[i], repeat=i) for i in playing],
                group=1,
                begun=[actions[i] for i in playing],
                stream=request.stream * TURNS + turn,
            )
            said = self.writer(asked)
            guesses = zip(said.completions(), torch.split(said.behaviour_log_probs, said.lengths.tolist()), strict=True)
            going = []
            for i, (guess, density) in zip(playing, guesses, strict=True):
                reply = self.reply(members[i], self.language.decode(guess))
                ids = torch.tensor(self.language.tokenizer(reply)["input_ids"])
                actions[i] = torch.cat([actions[i], guess, ids])
                log_probs[i] = torch.cat([log_probs[i], density, torch.zeros(len(ids))])
                authors[i] = torch.cat([authors[i], torch.zeros_like(guess), torch.full_like(ids, ENVIRONMENT)])
                rewards[i] = float(reply == " yes") / (turn + 1)
                going += [i] if reply != " yes" else []
            playing = going
            if not playing:
                break
        packed = torch.cat(actions)
        return Trajectories(
            prompts=members,
            contexts=[self.language.encode(prompt) for prompt in members],
            actions=packed,
            lengths=torch.tensor([len(each) for each in actions]),
            behaviour_log_probs=torch.cat(log_probs),
            finished=rewards > 0,
            # The environment's positions are told apart by their author, whatever stands here.
            learn=torch.ones_like(packed, dtype=torch.bool),
            authors=torch.cat(authors).to(torch.uint8),
            groups=torch.arange(len(request.prompts)).repeat_interleave(request.group),
            rewards=rewards,
        )


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


PROMPTS = {"kind": "inline", "prompts": [{"prompt": f"guess {c}", "wanted": c} for c in "abcdefghijkl"]}


def recipe_of(models, tmp_path, objective, **changes):
    settings = {
        "rollout": {"kind": "guessing", "max_new_tokens": 40},
        "prompts": PROMPTS,
        "batch": {"prompts": 4, "group": 3, "micro": 2},
        "evaluation": {"held_out": 4, "k": 2},
        "end_tokens": [0, 8],
        **changes,
    }
    return recipe_for(models, tmp_path, objective=objective, steps=2, **settings)


@pytest.mark.parametrize("objective", ["grpo", "reverse_kl"])
def test_three_turns_train_by_outcome_or_by_a_teacher(objective, models, tmp_path, monkeypatch):
    # An untrained student rarely guesses: here half of the first letters are right.
    monkeypatch.setattr(Playing, "reply", lambda self, prompt, guess: " yes" if (guess or "z") < "g" else " no,")
    run = build(recipe_of(models, tmp_path, objective), tmp_path)
    seen, ask = [], run.ask
    run.ask = lambda trajectories, now: seen.append(trajectories) or ask(trajectories, now)
    train(run)
    steps = [r for r in run.monitor.history if "train/loss" in r]
    assert len(steps) == 2
    assert all(r["train/gradient_norm"] > 0 and "train/empty" not in r for r in steps)
    for made, record in zip(seen, steps, strict=True):
        theirs = made.authors == ENVIRONMENT
        assert 0 < int(theirs.sum()) < made.positions
        assert record["train/sampled_tokens"] == int((~theirs).sum())
        assert record["train/reward"] == pytest.approx(float(made.rewards.mean()))
        assert made.group_mean.view(-1, 3).std(1).max() == 0
        weights = run.recipe.objective[0].position_weights(made, "token_mean", lambda x: x)
        assert (weights[theirs] == 0).all()
        assert (weights[~theirs] > 0).all()
        if objective == "reverse_kl":
            assert record["train/positions"] == int((~theirs).sum())
        # The rollout's own log-probabilities are those of training, where the student wrote.
        assert record["train/rollout_gap"] < 1e-3
    after = run.monitor.after.metrics
    assert {"accuracy", "pass_at_k"} <= after.keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert all(set(row["authors"]) == {"student", "environment"} for row in rows)
    assert all(len(row["authors"]) == len(row["tokens"]) for row in rows)
    held_out = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(held_out) == 2 * 4, "one row a prompt, before and after"
    assert all(row["reward"] is not None for row in held_out)


def test_the_gradient_does_not_depend_on_micro_batches_that_cut_groups(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Playing, "reply", lambda self, prompt, guess: " yes" if (guess or "z") < "g" else " no,")
    norms = []
    for micro in (1, 2, 12):
        batch = {"prompts": 4, "group": 3, "micro": micro}
        run = build(recipe_of(models, tmp_path, "grpo", batch=batch), tmp_path)
        train(run)
        norms.append([r["train/gradient_norm"] for r in run.monitor.history if "train/loss" in r])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)


def test_distil_takes_it_and_a_verifiers_verdict_goes_before_the_rollouts_reward(models, tmp_path):
    result = opd.distill(
        {"model": models[0], "template": "plain"},
        {"model": models[1], "template": "plain"},
        [{**row, "answer": "no"} if i % 2 else row for i, row in enumerate(PROMPTS["prompts"])],
        quiet=True,
        steps=2,
        rollout={"kind": "guessing", "max_new_tokens": 40},
        objective=[{"kind": "grpo"}, {"kind": "reverse_kl"}],
        verifier={"kind": "exact_match", "pattern": "(no)"},
        batch={"prompts": 8, "group": 2, "micro": 4},
        evaluation={"held_out": 4},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        output=str(tmp_path / "run"),
    )
    # No letter is guessed, which the rollout rewards with 0; the verifier finds its word where it has an answer.
    rewards = {row["reward"] for row in map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines())}
    assert rewards == {0.0, 1.0}
    assert result.summary["steps"] == 2


def test_without_a_reward_of_anybody_the_recipe_is_refused(models, tmp_path):
    with pytest.raises(RecipeError, match="key 'verifier' is required"):
        recipe_of(models, tmp_path, "grpo", rollout={"kind": "student", "max_new_tokens": 8})


def test_nobody_learns_from_the_environment_alone_and_greedy_is_refused_where_there_is_none(models, tmp_path):
    with pytest.raises(RecipeError, match="written_by"):
        recipe_of(models, tmp_path, {"kind": "reverse_kl", "written_by": ["environment"]})
    recipe = recipe_of(models, tmp_path, "reverse_kl", evaluation={"held_out": 4, "greedy": True})
    with pytest.raises(opd.OpdError, match=r"'guessing'.*has no 'top_p'.*evaluation\.greedy"):
        build(parse_recipe(recipe.dump()), tmp_path)
