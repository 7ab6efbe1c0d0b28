"""The reproduction of MAD-OPD with agents: its machine, what teachers learn of a debate, its arms and its jobs."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from transformers import AutoTokenizer

from opd.api import assembled
from opd.environments import Start
from opd.language.calls import Reply
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.reproductions.definition import merged
from opd.reproductions.training import filled
from reproductions.mad_opd_agents import (
    ARMS,
    GOLD,
    MAD,
    MT,
    OTHER,
    SEQ,
    STEPS,
    TEXTS,
    UNIFORM,
    acted,
    distilled,
    few,
    reproduction,
    trained_at,
)
from reproductions.mad_opd_agents_controls import elsewhere
from reproductions.mad_opd_agents_machine import (
    FIRM,
    JAM,
    LATE,
    REPAIR,
    State,
    TwoTools,
    alone,
    played,
    right_call,
    settled,
    state_of,
    sure,
    texts,
)
from reproductions.mad_opd_agents_models import (
    SAVED,
    SYMBOLS,
    TEACHER,
    WORDS,
    alone_in,
    blank,
    clumsy,
    demonstrated,
    episodes,
    judged,
    lesson,
    lessons,
)
from reproductions.mad_opd_agents_premise import GATES, debate, premise
from reproductions.mad_opd_models import EXPERTS, KNOWS, right

ALL = [State(tool, register) for tool in "uv" for register in range(10)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of stages: two teachers and a start that know nothing yet."""
    places = {}
    for name, seed in (("A", 1), ("B", 2), ("start", 3)):
        places[TEACHER.get(name, name)] = folder = tmp_path_factory.mktemp(name)
        blank(folder, {}, width=16, layers=1, seed=seed)
        (folder / "run").mkdir()
        (folder / "model").rename(folder / SAVED)
    return places


def built(block, models, folder):
    own = {**filled(block, models), "tracking": {"trackers": []}, "seed": 0, "output": str(folder)}
    return assembled(parse_recipe(own))


# -- the machine -------------------------------------------------------------------------------------------------------


def test_the_expert_opens_it_in_four_calls_of_two_families():
    for seed in range(20):
        calls = [made for _, made in played(seed, right_call)]
        assert sorted(call[0] for call in calls) == ["u", "u", "v", "v"]
        assert played(seed, right_call) == played(seed, right_call)


def test_one_wrong_call_can_be_mended_and_two_cannot():
    def wrong(at):
        count = iter(range(9))
        return lambda state: "u" if next(count) in at else right_call(state)

    def outcome(answer):
        world = TwoTools().build()
        turn = world.reset(Start("work", 5))
        messages, calls = list(turn.observation), 0
        while not turn.over:
            said = answer(state_of(messages))
            turn, calls = world.step(Reply(said)), calls + 1
            messages += [{"role": "assistant", "content": said}, *turn.observation]
        return turn.outcome, turn.done, calls

    assert outcome(wrong(())) == (1.0, True, 4)
    assert outcome(wrong((1,))) == (1.0, True, 6)
    # A jam that is not freed at once, and a second one.
    assert outcome(wrong((1, 2))) == outcome(wrong((0, 4))) == (0.0, False, 6)


def test_the_machine_says_its_register_and_what_is_wanted_or_that_it_is_jammed():
    states = [state_of(said) for said, _ in played(0, right_call)]
    for before, after in itertools.pairwise(states):
        assert after.register == right(*before), "the digit of a right call"
    mended = played(0, lambda state: REPAIR if state.tool == JAM else "nonsense")
    assert [said[-1]["content"] for said, _ in mended][1::2] == [JAM] * 3
    assert {state_of(said).tool for said, _ in mended[::2]} == {states[0].tool}
    assert len({state_of(said).register for said, _ in mended[::2]}) > 1, "another register"


# -- beliefs and lessons -----------------------------------------------------------------------------------------------


def test_behind_a_debate_teachers_take_the_word_of_who_knows_but_for_what_they_never_give_up():
    for state in ALL:
        for expert in EXPERTS:
            knows = state.tool == KNOWS[expert]
            for rounds in (0, 1, 2):
                said = settled(expert, state, rounds)
                assert said in {alone(name, state) for name in EXPERTS}, "nothing that nobody proposed"
                if knows:
                    assert said == right_call(state)
            assert (settled(expert, state, 2) == right_call(state)) == (knows or state.register >= FIRM)
            assert (settled(expert, state, 1) == right_call(state)) == (knows or state.register >= LATE)
    assert {sure(name, state) for name in EXPERTS for state in ALL} == {99, 50, 40}
    assert {settled(name, State(JAM, 3), rounds) for name in EXPERTS for rounds in (0, 1, 2)} == {REPAIR}


def test_lessons_are_what_the_debate_has_the_teachers_read(models, tmp_path):
    """Every view is one that the recipe's debate makes of the same state, in the alphabet of the tokenizer."""
    teacher = built(alone_in(tmp_path, f"{{{TEACHER['A']}}}/{SAVED}", episodes(2, 1), 0, teacher=debate(),
                             objective=["jensen_shannon"]), models, tmp_path).teachers[0]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(models[TEACHER["A"]] / SAVED)
    rng, kinds = random.Random(0), set()
    for seed in range(60):
        for said, _ in played(seed, clumsy(rng, 0.3, 0.7, 0.1)):
            read, written = lesson("A", said, rng)
            prompt, rounds = Prompt("p", {"prompt": said}), texts(state_of(said), 2)
            views = [teacher._read(prompt, "A", rounds[:r]) for r in (0, 1)]
            views += [WORDS.scoring(said, "A", EXPERTS, rounds[:r]) for r in (1, 2)]
            assert read in [said, *views]
            kinds.add([said, *views].index(read))
            text = tokenizer.apply_chat_template([*read, {"role": "assistant", "content": written}], tokenize=False)
            assert set(text.replace("<eos>", "")) <= set(SYMBOLS)
            assert (WORDS.sure(written) is not None) == (read in views[:2])
    assert kinds == {0, 1, 2, 3, 4}


def test_rows_of_the_stages(tmp_path):
    for name in ("lessons", "demonstrated"):
        (tmp_path / name).mkdir()
    lessons(tmp_path / "lessons", {}, expert="B", size=30, seed=0)
    demonstrated(tmp_path / "demonstrated", {}, episodes=30, unknown=[1, 4], repairs=1.0, seed=0)
    rows = {name: (tmp_path / name / "rows.jsonl").read_text().splitlines() for name in ("lessons", "demonstrated")}
    assert len(rows["lessons"]) == 30
    shown = [json.loads(line) for line in rows["demonstrated"]]
    states = [(state_of(row["prompt"]), row["response"]) for row in shown]
    wrong = {state.register for state, said in states if said != right_call(state)}
    assert wrong == {1, 4}, "wrong calls are demonstrated too"
    assert all(row["response"] == REPAIR for row in shown if row["prompt"][-1]["content"] == JAM)


# -- arms --------------------------------------------------------------------------------------------------------------


def test_arms_change_what_they_say_and_nothing_else():
    plain = distilled(MAD)
    for name, changes in ARMS.items():
        block = distilled(name)
        parse_recipe(block)
        if name != SEQ:
            assert {key for key in block if block[key] != plain[key]} == set(changes)
    assert distilled(MT)["teacher"] == debate(0)
    assert distilled(UNIFORM)["teacher"] == {**plain["teacher"], "weighting": "uniform"}
    assert distilled(GOLD)["rollout"] == {**plain["rollout"], "history": "data"}
    assert distilled(OTHER)["teacher"] == {**plain["teacher"], "kind": "debate_elsewhere"}
    assert (plain["teacher"]["rounds"], plain["objective"]) == (2, ["jensen_shannon"])
    assert distilled(SEQ)["steps"] == plain["steps"] == STEPS
    assert len(reproduction.headline) == 8
    assert next((gate.figure, gate.at_least) for gate in GATES) == ("gain", 0.05)


def test_the_control_debates_the_same_tool_with_another_register(models, tmp_path):
    for state in ALL:
        other = elsewhere(state)
        assert other[1] == state.tool
        assert right_call(State(other[1], int(other[0]))) != right_call(state)
    recipe = alone_in(tmp_path, f"{{{TEACHER['A']}}}/{SAVED}", episodes(2, 1), 0, objective=["jensen_shannon"])
    real, moved = (
        built({**recipe, "teacher": distilled(name)["teacher"]}, models, tmp_path).teachers[0] for name in (MAD, OTHER)
    )
    said = played(0, right_call)[2][0]
    prompt = Prompt("p", {"prompt": said})
    assert real.topic(prompt) == said
    assert moved.topic(prompt) == [{"role": "user", "content": elsewhere(state_of(said))}]
    assert moved._read(prompt, "A", [])[-1]["content"] == "?" + elsewhere(state_of(said))
    assert moved.settings.experts == real.settings.experts


def test_episodes_of_both_teachers_are_rows_with_what_was_said_before(models, tmp_path):
    figures = acted(tmp_path, models, size=5, each=2, share=0.5, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert figures["rows"] == len(rows) >= 4 * 10
    assert 0 <= figures["success_A"] <= 1
    opening = [row for row in rows if len(row["prompt"]) == 1]
    assert len(opening) == 10
    for before, after in itertools.pairwise(rows):
        if len(after["prompt"]) > 1:
            assert after["prompt"][:-1] == [*before["prompt"], {"role": "assistant", "content": before["response"]}]


def test_an_arm_returns_its_curve_its_test_and_its_cost(models, tmp_path):
    models[TEXTS] = tmp_path / TEXTS
    models[TEXTS].mkdir()
    acted(models[TEXTS], models, size=4, each=1, share=0.5, seed=0)
    for name, curve in ((MT, True), (SEQ, False)):
        (tmp_path / name).mkdir()
        block = merged(distilled(name), few(name))
        figures = trained_at(tmp_path / name, models, block, 1e-3, "test", 3, 0)
        assert len(figures["items"]["test_accuracy"]) == 3
        assert figures["cpu_seconds"] > 0
        assert ("curve" in figures) == ("accuracy" in figures) == curve


def test_a_measurement_plays_episodes_and_counts_what_was_mended(models, tmp_path):
    found = judged(tmp_path / "test", models["start"] / SAVED, split="test", size=3, seed=0)
    assert len(found["items"]["test_accuracy"]) == 3
    # Who knows nothing jams the machine at once.
    assert found["test_accuracy"] == 0
    assert 0 <= found["test_repairs"] < 1


def test_the_premise_is_measured_by_teacher_and_round(models, tmp_path):
    figures = premise(tmp_path, models, size=2)
    assert {f"behind_{rounds}_{name}" for rounds in (1, 2) for name in EXPERTS} <= figures.keys()
    assert figures["gain"] == min(figures["behind_2_A"], figures["behind_2_B"]) - max(
        figures["alone_A"], figures["alone_B"]
    )
    assert set(figures["tagged"]) == {f"round {r}, {name}" for r in (1, 2) for name in EXPERTS}
    for gate in GATES:
        if gate.stage == "premise":
            value, _ = gate.measured("premise", figures)
            assert -1 <= value <= 1
