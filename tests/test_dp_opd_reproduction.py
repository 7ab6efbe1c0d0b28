"""The reproduction of DP-OPD: its grammar and exact floor, its premise, and what its arms change."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from reproductions.dp_opd import (
    ARMS,
    DISTIL,
    DPKD,
    FULL,
    HALF,
    LABELS,
    NO_NOISE,
    PUBLIC_PROMPTS,
    SGD,
    block,
    reproduction,
)
from reproductions.dp_opd_models import LENGTH, SHIFT, measured, new_model, recipe, rows, seeded
from reproductions.dp_opd_premise import verdict
from reproductions.dp_opd_reviews import CLASSES, PHRASES, QUARTER, entropy, reviews, score, table, tokenizer, word


def test_the_grammar_is_a_distribution_and_a_shift_moves_it():
    for shift in (0.0, SHIFT):
        assert np.allclose(table(shift).sum(-1), 1)
    apart = (table(0.0) * np.log(table(0.0) / table(SHIFT))).sum(-1).mean()
    assert 0.1 < apart < 0.5
    assert len(tokenizer()) == 3 + 13 + 480


def test_the_floor_is_the_mean_loss_of_the_grammar_itself():
    codes, words = reviews(12_000, SHIFT, 7)
    cut = QUARTER * CLASSES
    losses = []
    for place in range(cut, words.shape[1]):
        row = table(SHIFT)[place % CLASSES, codes[:, 0], codes[:, 1], words[:, place - 1] % 4]
        losses.append(-np.log(row[np.arange(len(words)), words[:, place]]))
    assert entropy(12_000, SHIFT, 7) == pytest.approx(float(np.mean(losses)), abs=0.01)


def test_rows_are_cut_behind_the_first_quarter_and_known_to_the_tokenizer():
    made = load_prompts(parse_recipe(recipe("none", 1, prompts=rows(4, SHIFT, 2))).prompts)
    assert len({prompt.fields["prompt"] + prompt.fields["response"] for prompt in made}) == 4
    words = tokenizer()
    for prompt in made:
        assert len(words(prompt.fields["prompt"])["input_ids"]) == 2 + QUARTER * CLASSES
        ids = words(prompt.fields["response"])["input_ids"]
        assert len(ids) == CLASSES * (PHRASES - QUARTER) == LENGTH - 1
        assert words.unk_token_id not in ids
        losses, right = score(prompt.fields["prompt"], prompt.fields["response"], SHIFT)
        assert all(right)
        assert all(math.isfinite(loss) for loss in losses)


def test_what_is_no_word_of_the_class_is_not_valid_and_has_the_loss_of_any_word():
    begun = "type1 stars2 " + " ".join(word(i % CLASSES, 3) for i in range(12))
    losses, right = score(begun, f"{word(0, 5)} {word(0, 5)} {word(2, 1)} <eos>", 0.0)
    assert right == [True, False, True, False]
    assert losses[0] == pytest.approx(-math.log(table(0.0)[0, 1, 2, 3, 5]))
    assert losses[1] == losses[3] == pytest.approx(math.log(480))
    assert losses[2] == pytest.approx(-math.log(table(0.0)[2, 1, 2, 0, 1]))


def test_a_model_of_random_weights_is_far_from_the_floor(tmp_path):
    new_model(tmp_path, {}, width=32, layers=1, seed=0)
    found = measured(tmp_path / "run" / "student", size=4, shift=SHIFT, seed=0)
    assert found["nll"] == pytest.approx(math.log(496), abs=0.3)
    assert 0 <= found["valid"] < 0.5
    assert len(found["items"]["nll"]) == 4


def test_arms_say_what_they_are():
    made = {name: block(name, "{start}/run/student", SHIFT, 2) for name in ARMS}
    for name, recipe_of in made.items():
        assert (recipe_of["update"].get("kind") == "differentially_private") == (name != DISTIL)
        parsed = parse_recipe({**seeded(recipe_of, 3), "seed": 0})
        if name != DISTIL:
            assert parsed.update.seed == parsed.curriculum.seed == 3
    epsilons = {name: each["update"].get("epsilon") for name, each in made.items()}
    assert epsilons == {
        **dict.fromkeys(ARMS, 2.0),
        DPKD: 1.0,
        DISTIL: None,
        PUBLIC_PROMPTS: None,
        NO_NOISE: None,
    }
    assert made[HALF]["rollout"]["share"] == 0.5
    assert made[FULL]["rollout"]["kind"] == "student"
    assert made[SGD]["teacher"] == []
    assert made[PUBLIC_PROMPTS]["prompts"]["shift"] == 0
    assert made[LABELS]["objective"][1]["written_by"] == ["data"]
    assert len(reproduction.headline) == 8


def test_the_premise_says_which_condition_fails():
    good = {"teacher_public": 0.1, "room": 0.3, "knows": 2.0}
    assert verdict(good)[0]
    for name, worse in (("teacher_public", 0.3), ("room", 0.0), ("knows", 0.5)):
        holds, lines = verdict({**good, name: worse})
        assert not holds
        assert sum(line.endswith("NO") for line in lines) == 1
