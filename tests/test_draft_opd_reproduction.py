"""Parts of the reproduction of Draft-OPD: texts, the control with a misplaced teacher, and what its gates look at."""

from __future__ import annotations

import json
import random
import re
from typing import Literal

import pytest
import torch

from opd.recipe import parse_recipe
from opd.rollouts.anchored import AnchoredRollout
from reproductions.draft_opd_controls import Misplaced
from reproductions.draft_opd_models import MASK, SYMBOLS, facts, program, texts
from reproductions.draft_opd_premise import premise, room
from reproductions.draft_opd_training import GREEDY, SAMPLED, best_of
from tests.test_anchored import FEW, FORMS_OF_FEW, placed, rolled, students


def test_texts_are_right_of_known_words_and_no_prompt_is_in_two_files(tmp_path):
    sizes = {"train": 40, "test": 20}
    texts(tmp_path, {}, sizes=sizes, seed=3)
    found = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in sizes
    }
    assert {name: len(rows) for name, rows in found.items()} == sizes
    asked = [row["prompt"] for rows in found.values() for row in rows]
    assert len(set(asked)) == len(asked)
    for row in found["train"] + found["test"]:
        assert set(f"{row['prompt']} {row['response']}".split()) <= set(SYMBOLS)
    assert MASK == 2  # `<unk>`, behind `<pad>` and `<eos>`.


def test_programs_are_worked_off_and_facts_keep_to_the_thing():
    for seed in range(30):
        prompt, text = program(random.Random(seed))
        state = dict(zip("abcd", map(int, prompt.split()[1:5]), strict=True))
        for step in text.split(" . "):
            operation, source, into = re.match(r"\w+ (\w+) (\w) \w+ (\w) :", step).groups()
            given = state[source]
            state[into] = {"add": state[into] + given, "take": state[into] - given, "copy": given}[operation] % 10
            assert f"{into} is {state[into]} state {' '.join(map(str, state.values()))}" in step
    said: dict[str, set[str]] = {}
    for seed in range(300):
        for sentence in facts(random.Random(seed))[1].split(" . "):
            thing = sentence.split()[1]
            said.setdefault(thing, set()).add(re.search(r"k\d", sentence)[0])
    assert len(said) == 48
    assert all(len(sorts) == 1 for sorts in said.values())


def stage(folder, name, **figures):
    (folder / name).mkdir()
    (folder / name / "job.json").write_text(json.dumps({"figures": figures}))
    return folder / name


def test_what_the_gates_look_at(tmp_path):
    start = stage(tmp_path, "start", **{GREEDY: 4.0, SAMPLED: 3.2, f"earlier_{GREEDY}": 3.2, f"earlier_{SAMPLED}": 3.2})
    again = stage(tmp_path, "again", **{f"validation_{GREEDY}": 4.1, f"validation_{SAMPLED}": 3.0})
    found = premise(tmp_path, {"start": start, "again": again}, start="start", again="again", seed=0)
    drawn = {"share_of_block": 0.4, "last_quarter": 0.0, "restart": -0.0625}
    greedy = {"share_of_block_greedy": 0.5, "last_quarter_greedy": 0.25, "restart_greedy": 0.025}
    assert found == pytest.approx(drawn | greedy)
    one, other = (
        stage(tmp_path, "one", **{GREEDY: 4.4, SAMPLED: 3.2}),
        stage(tmp_path, "other", **{GREEDY: 4.0, SAMPLED: 3.52}),
    )
    found = room(tmp_path, {"start": start, "one": one, "other": other}, start="start", of=["one", "other"])
    assert found["room"] == pytest.approx(0.1)


def test_the_best_of_several_is_that_of_validation_prompts(tmp_path):
    def measured(name, validation, test):
        return stage(tmp_path, name, **{f"validation_{GREEDY}": validation, f"validation_{SAMPLED}": 3.0, "test": test})

    inputs = {"one": measured("one", 4.0, 9.0), "other": measured("other", 4.2, 1.0)}
    assert best_of(tmp_path, inputs, of=["one", "other"], seed=0)["test"] == 1.0


def test_a_misplaced_teacher_speaks_of_the_block_before():
    student = students(FORMS_OF_FEW["block"], **FEW)
    made = rolled(student, 1.0)
    right, wrong = placed(student, made), placed(student, made, of=Misplaced)
    hidden = [found.answers[0].distribution.hidden for found in (right, wrong)]
    slots = student.drafter.proposals
    assert torch.equal(hidden[1][slots:], hidden[0][:-slots])
    assert torch.equal(hidden[1][:slots], hidden[0][-slots:])
    for name in right.columns:
        assert torch.equal(right.columns[name], wrong.columns[name])


def test_a_choice_that_holds_others_of_its_axis_is_accepted_by_recipes_that_were_there_before(tmp_path):
    """Its own types know it when it is defined; those of recipes must learn of it too."""
    data = {
        "student": {"kind": "draft", "target": "org/target", "drafter": "chain"},
        "teacher": {"kind": "target"},
        "prompts": {"kind": "inline", "prompts": ["a"]},
        "objective": ["accepted"],
        "output": str(tmp_path),
    }
    parse_recipe({**data, "rollout": {"kind": "anchored", "texts": "data"}})

    class Later(AnchoredRollout):
        kind: Literal["later"] = "later"

    assert isinstance(parse_recipe({**data, "rollout": {"kind": "later", "texts": "data"}}).rollout, Later)
