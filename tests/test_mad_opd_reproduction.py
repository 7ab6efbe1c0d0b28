"""The reproduction of MAD-OPD: its problems, what teachers learn of a debate, its arms and what its jobs measure."""

from __future__ import annotations

import json
import random

from opd.language.creation import symbol_tokenizer
from opd.recipe import parse_recipe
from opd.teachers.wording import Wording
from reproductions.mad_opd import ARMS, MAD, MT, OTHER, TUNED, UNIFORM, distilled, judged, reproduction
from reproductions.mad_opd_models import (
    ASKED,
    EXPERTS,
    PROBLEMS,
    SYMBOLS,
    TAUGHT,
    WORDING,
    WRONG,
    alone,
    answer,
    asked,
    believed,
    blank,
    lesson,
    problems,
    right,
    sure,
    together,
    transcript,
)
from reproductions.mad_opd_premise import GATES, debate


def test_each_teacher_knows_one_code_and_has_part_of_the_other_wrong():
    for expert, known, other in (("A", "u", "v"), ("B", "v", "u")):
        assert all(believed(expert, known, digit) == right(known, digit) for digit in range(10))
        assert sum(believed(expert, other, digit) != right(other, digit) for digit in range(10)) == WRONG[expert]
    assert (sure("A", "u0u1u2:"), sure("A", "u0v1u2:"), sure("B", "u0v1u2:")) == (99, 50, 16)


def test_a_debate_settles_on_the_word_of_who_knows_and_on_nothing_that_nobody_said():
    for prompt in problems(200, "test"):
        said = {name: alone(name, prompt) for name in EXPERTS}
        assert together(prompt, said) == answer(prompt)
        assert all(digit in {said[name][i] for name in EXPERTS} for i, digit in enumerate(together(prompt, said)))


def test_lessons_are_what_the_debate_has_the_teachers_read():
    """The wording of the recipe and the texts that were learnt from are one format, in the tokenizer's alphabet."""
    wording, rng, seen = Wording(**WORDING), random.Random(0), set()
    assert set(WORDING["tag"]) - set("{number}") <= set(SYMBOLS)
    for prompt in problems(100, "train"):
        first = tuple(f"{alone(name, prompt)}c{sure(name, prompt)}" for name in EXPERTS)
        settled = (f"{answer(prompt)}c95",) * 2
        views = {prompt: alone("A", prompt), wording.first(prompt, "A", "general"): first[0]}
        for rounds in ([first], [first, settled], [first, settled, settled]):
            views[wording.later(prompt, "A", "general", EXPERTS, rounds)] = settled[0]
            views[wording.scoring(prompt, "A", EXPERTS, rounds)] = answer(prompt)
        read, written = lesson("A", prompt, rng)
        assert views[read] == written
        assert set(read + written) <= set(SYMBOLS)
        seen.add((read[0], read[-1]))
    assert {last for _, last in seen} == {":", "!", "="}
    assert transcript([{"A": "1c2", "B": "3c4"}]) == "[A1c2B3c4]"
    assert wording.without_tag("814c50") == "814"


def test_arms_are_asked_what_teachers_did_not_learn_from(tmp_path):
    asked(tmp_path, {}, sizes={"train": 30, "test": 5})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 30
    assert {row["prompt"] for row in rows}.isdisjoint(problems(3000, "train", TAUGHT))
    assert all(row["answer"] == answer(row["prompt"]) for row in rows)
    assert [row["other"] for row in rows[:-1]] == [row["prompt"] for row in rows[1:]]
    assert problems(5, "test", ASKED) != problems(5, "test", TAUGHT)


def test_arms_change_what_they_say_and_nothing_else():
    plain = distilled({})
    for changes in ARMS.values():
        block = distilled(changes)
        parse_recipe(block)
        assert {key for key in block if block[key] != plain[key]} == {k for k in changes if changes[k] != plain[k]}
    assert distilled(ARMS[MT])["teacher"] == debate(0)
    assert distilled(ARMS[UNIFORM])["teacher"] == {**plain["teacher"], "weighting": "uniform"}
    assert distilled(ARMS[OTHER])["teacher"] == {**plain["teacher"], "about": "other"}
    assert plain["teacher"]["rounds"] == 2
    assert MAD in TUNED
    assert len(reproduction.claims) <= 8
    assert next((gate.figure, gate.at_least) for gate in GATES) == ("gain", 0.05)


def test_a_measurement_keeps_every_verdict(tmp_path):
    (tmp_path / "problems").mkdir()
    asked(tmp_path / "problems", {}, sizes={"train": 4, "validation": 3, "test": 4})
    blank(tmp_path, {}, width=16, layers=1, seed=0)
    assert len(symbol_tokenizer(SYMBOLS)) == len(SYMBOLS) + 3
    found = judged(tmp_path / "test", tmp_path / "model", {PROBLEMS: tmp_path / "problems"}, size=3, seed=0)
    assert len(found["items"]["test_accuracy"]) == 3
    assert 0 <= found["test_accuracy"] <= 1
