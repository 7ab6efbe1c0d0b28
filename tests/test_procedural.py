"""Procedural tasks: answers and steps by brute force, splits, determinism, tokenizers, models, the prompts choice."""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.api import execute
from opd.choice import choices_of
from opd.cli import main
from opd.errors import DataError, ModelError, OpdError, RecipeError
from opd.language.creation import create_model, named_tokenizer, symbol_tokenizer, task_tokenizer
from opd.language.model import load_tokenizer
from opd.policies.causal_lm import CausalLM
from opd.procedural import ANSWER_PATTERN, SPLITS, Task
from opd.procedural.arithmetic import Arithmetic
from opd.procedural.base import split_of
from opd.procedural.list_program import ListProgram
from opd.procedural.register_machine import RegisterMachine
from opd.procedural.running_sum import RunningSum
from opd.prompts import load_prompts
from opd.prompts.base import Prompt
from opd.prompts.procedural import ProceduralPrompts
from opd.recipe import parse_recipe
from opd.verifiers.exact_match import ExactMatch

TASKS = choices_of(Task)
PAGE = Path(__file__).parent.parent / "docs" / "procedural.md"
each_task = pytest.mark.parametrize("task", [task() for task in TASKS.values()], ids=list(TASKS))


def run_list(prompt):
    """The list program again, on a mutable list."""
    start, program = prompt.rstrip(":").split("|")
    digits = list(map(int, start))
    for letter in program:
        if letter == "r":
            digits.reverse()
        elif letter == "s":
            digits.sort()
        elif letter == "i":
            for i in range(len(digits)):
                digits[i] = 0 if digits[i] == 9 else digits[i] + 1
        elif letter == "p":
            digits.insert(0, digits[0])
        elif letter == "d":
            digits.pop(0)
        elif letter == "t":
            digits.pop()
        elif letter == "x":
            digits[0], digits[1] = digits[1], digits[0]
        elif letter == "a":
            digits.insert(0, (digits.pop(0) + digits.pop(0)) % 10)
    return "".join(map(str, digits))


def run_registers(prompt):
    """The register machine again, as Python source."""
    words = {"add": "{1}+={0}", "sub": "{1}-={0}", "copy": "{1}={0}", "inc": "{0}+=1", "dec": "{0}-=1"}
    start, *program, show = prompt.split(" ; ")
    state: dict[str, int] = {}
    exec("\n".join(re.sub(r"([a-f]) (\d)", r"\1=\2\n", start).split()), {}, state)
    for line in program:
        word, *registers = line.split()
        exec(words[word].format(*registers), {}, state)
    return str(state[show.split()[1]] % 10)


BRUTE = {
    "running_sum": lambda prompt: str(eval("+".join(prompt[:-1])) % 10),
    "arithmetic": lambda prompt: str(eval(re.sub(r"\b0+(?=\d)", "", prompt[:-1]))),
    "list_program": run_list,
    "register_machine": run_registers,
}


@each_task
def test_answers_are_those_of_brute_force_and_the_pattern_finds_them(task):
    verifier = ExactMatch(pattern=ANSWER_PATTERN)
    for example in task.examples(1000):
        assert example.answer == BRUTE[task.kind](example.prompt)
        row = Prompt("x", {"prompt": example.prompt, "answer": example.answer})
        assert verifier.score(row, example.response) == 1.0
        for wrong in (example.response + "0", example.response + "#", example.answer, "", f"#0#{example.answer}"):
            assert verifier.score(row, wrong) == 0.0


@pytest.mark.parametrize(
    ("task", "prompt", "steps", "answer"),
    [
        (RunningSum(), "3582:", [("3+5=8", "5+3=8", "8"), ("8+8=6", "8+8=6", "6"), ("6+2=8", "2+6=8", "8")], "8"),
        (Arithmetic(), "47+85:", [("7+5+0=2c1", "2c1=7+5+0", "2c1"), ("4+8+1=3c1", "3c1=4+8+1", "3c1")], "132"),
        (Arithmetic(), "52-47:", [("2-7-0=5c1", "5c1=2-7-0", "5c1"), ("5-4-1=0c0", "0c0=5-4-1", "0c0")], "5"),
        (ListProgram(), "3142|rsd:", [("r2413", "2413"), ("s1234", "1234"), ("d234", "234")], "234"),
        (RegisterMachine(), "a 3 b 7 ; add a b ; inc b ; show b :", [("b is 0", "3 0"), ("b is 1", "3 1")], "1"),
        (RegisterMachine(), "a 3 b 7 ; sub b a ; copy a b ; show b :", [("a is 6", "6 7"), ("b is 6", "6 6")], "6"),
    ],
)
def test_steps_by_hand(task, prompt, steps, answer):
    assert task.steps(prompt) == steps
    assert task.answer(prompt) == answer
    assert task.difficulty(prompt) == len(steps) + (task.kind == "running_sum")


@each_task
def test_the_first_wrong_step_is_found_in_every_writing(task):
    rng = random.Random(0)
    for writing in task.writings:
        fixed = type(task)(formats=writing)
        for example in fixed.examples(50, seed=3):
            # The default settings accept every legal writing, also of another set-up.
            assert task.first_wrong_step(example.prompt, example.response) is None
            steps = task.steps(example.prompt)
            at = rng.randrange(len(steps))
            parts = example.response.split(";")
            digit = re.search(r"\d(?=\D*$)", parts[at])
            wrong = parts[at][: digit.start()] + str((int(digit[0]) + 1) % 10) + parts[at][digit.end() :]
            broken = [*parts[:at], wrong, *parts[at + 1 :]]
            assert task.first_wrong_step(example.prompt, ";".join(broken)) == at
            assert task.first_wrong_step(example.prompt, ";".join(parts[:at])) == max(0, at - 1)
            assert task.first_wrong_step(example.prompt, example.response + "7") == len(steps)
            assert task.first_wrong_step(example.prompt, ";".join([*parts[:-1], *parts[-2:]])) == len(steps)
    direct = type(task)(formats={})
    example = direct.examples(1)[0]
    assert example.response.replace(" ", "") == "#" + example.answer
    assert direct.first_wrong_step(example.prompt, example.response) is None
    assert direct.first_wrong_step(example.prompt, "1;" + example.response) == 0


@each_task
def test_splits_share_no_problem_whatever_seed_and_settings(task):
    drawn = {split: {e.prompt for seed in range(3) for e in task.examples(300, seed, split)} for split in SPLITS}
    for split, prompts in drawn.items():
        assert {split_of(prompt) for prompt in prompts} == {split}
    assert all(len(task.examples(300, 0, split)) == 300 for split in SPLITS)
    rng = random.Random(0)
    shares = [split_of(task.draw(rng)) for _ in range(4000)]
    assert abs(shares.count("train") / 4000 - 0.8) < 0.03
    assert abs(shares.count("test") / 4000 - 0.1) < 0.03


@each_task
def test_rows_are_deterministic_and_a_small_size_is_the_start_of_a_large_one(task):
    assert task.examples(40, seed=5) == task.examples(80, seed=5)[:40]
    assert task.examples(40, seed=5) != task.examples(40, seed=6)
    rows = task.examples(400)
    assert len({e.prompt for e in rows}) == len({e.id for e in rows}) == 400


def test_rows_are_the_same_on_every_machine():
    """Written down, so that no release of Python or of this library changes the rows of an experiment unseen."""
    assert [(e.prompt, e.response) for e in RunningSum(terms=6).examples(1, seed=7)] == [
        ("053132:", "5+0=5;3+5=8;8+1=9;9+3=2;4;#4")
    ]


@each_task
def test_every_point_of_difficulty_is_one_step(task):
    rows = sorted(task.examples(500), key=lambda e: e.difficulty)
    counts = [{len(task.steps(e.prompt)) for e in same} for _, same in groupby(rows, key=lambda e: e.difficulty)]
    assert len(counts) > 2
    firsts = [count.pop() for count in counts]
    assert firsts == list(range(firsts[0], firsts[0] + len(firsts)))
    assert not any(counts)


def test_writings_follow_their_weights_by_step_and_by_row():
    mixed = RunningSum(terms=12, formats={"sum": 3, "result": 1}).examples(300)
    steps = [step for e in mixed for step in e.response.split(";")[:-1]]
    assert 0.7 < sum("+" in step for step in steps) / len(steps) < 0.8
    by_row = RunningSum(terms=12, formats={"sum": 3, "result": 1}, formats_per="row").examples(300)
    kinds = [{"+" in step for step in e.response.split(";")[:-1]} for e in by_row]
    assert all(len(kind) == 1 for kind in kinds)
    assert 0.65 < sum(True in kind for kind in kinds) / len(kinds) < 0.85


@each_task
def test_a_share_of_reference_answers_can_be_wrong(task):
    noisy = type(task)(wrong_answers=0.25)
    rows = noisy.examples(400)
    wrong = [e for e in rows if noisy.first_wrong_step(e.prompt, e.response) is not None]
    assert 0.18 < len(wrong) / 400 < 0.32
    assert all(noisy.first_wrong_step(e.prompt, e.response) == len(noisy.steps(e.prompt)) for e in wrong)
    assert all(e.answer == task.answer(e.prompt) for e in wrong)


@each_task
def test_tokenizers_give_a_thousand_rows_back(task):
    tokenizer = task_tokenizer(task.kind)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    gap = " " if task.words else ""
    for e in task.examples(1000):
        prompt, response = (tokenizer(text)["input_ids"] for text in (e.prompt, e.response))
        assert min(prompt + response) > 2
        assert tokenizer.decode(prompt) == e.prompt
        assert tokenizer.decode([*response, tokenizer.eos_token_id], skip_special_tokens=True) == e.response
        assert tokenizer(e.prompt + gap + e.response)["input_ids"] == prompt + response


def test_tokenizers_of_several_tasks_and_their_errors(tmp_path):
    both = task_tokenizer("list_program", "arithmetic")
    assert both.get_vocab() == task_tokenizer("arithmetic", "list_program").get_vocab()
    assert set(both.get_vocab()) >= {*Arithmetic.symbols, *ListProgram.symbols}
    assert symbol_tokenizer("ab", pad="<eos>").pad_token_id == symbol_tokenizer("ab").eos_token_id == 1
    assert symbol_tokenizer("a\n")("a\nb")["input_ids"] == [3, 4, 2]
    with pytest.raises(DataError, match="characters and of words"):
        task_tokenizer("running_sum", "register_machine")
    with pytest.raises(ModelError, match="did you mean 'running_sum'"):
        named_tokenizer("task:runing_sum")
    for symbols, words in ((["a", "a"], False), (["ab"], False), (["a b"], True), ([""], True), (["<eos>"], True)):
        with pytest.raises(ModelError, match="symbol"):
            symbol_tokenizer(symbols, words=words)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_created_models_load_in_plain_transformers(family, tmp_path):
    tokenizer = task_tokenizer("running_sum")
    state = torch.random.get_rng_state()
    sizes = {"family": family, "width": 16, "layers": 3, "heads": 2, "feed_forward": 24, "positions": 99}
    folder = create_model(tmp_path / "a", tokenizer, seed=4, **sizes)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(123)
    model, again, other = (
        AutoModelForCausalLM.from_pretrained(create_model(tmp_path / name, tokenizer, seed=seed, **sizes))
        for name, seed in (("b", 4), ("c", 4), ("d", 5))
    )
    assert (model.config.model_type, model.config.num_hidden_layers) == (family, 3)
    assert model.config.intermediate_size == 24
    assert model.config.max_position_embeddings == 99
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.decode(loaded("3582:")["input_ids"]) == "3582:"
    with pytest.raises(ModelError, match="holds a model already"):
        create_model(folder, tokenizer)
    create_model(folder, tokenizer, overwrite=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 10}, "multiple of 8"),
        ({"layers": 0}, "layers is 0"),
        ({"family": "lama"}, "did you mean 'llama'"),
        ({"feed_forward": -1}, "feed_forward is -1"),
    ],
)
def test_sizes_that_fit_no_model(sizes, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        create_model(tmp_path / "m", task_tokenizer("running_sum"), **sizes)
    assert not (tmp_path / "m").exists()


def test_a_recipe_trains_on_a_task(tmp_path):
    tokenizer = task_tokenizer("running_sum")
    folders = [str(create_model(tmp_path / n, tokenizer, width=16, layers=1, seed=i)) for i, n in enumerate("st")]
    task = {"kind": "running_sum", "terms": 4}
    recipe = parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "steps": 2,
            "student": {"model": folders[0], "template": "plain"},
            "teacher": {"model": folders[1], "template": "plain"},
            "prompts": {"kind": "procedural", "task": task, "size": 20, "seed": 2},
            "evaluation": {"prompts": {"kind": "procedural", "task": task, "size": 8, "split": "test"}},
            "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
            "rollout": {"max_new_tokens": 8},
            "batch": {"prompts": 4},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
        }
    )
    rows = load_prompts(recipe.prompts)
    assert len(rows) == 20
    assert set(rows[0].fields) == {"id", "prompt", "response", "answer", "difficulty", "task"}
    assert parse_recipe(recipe.dump()) == recipe
    assert "accuracy" in execute(recipe, quiet=True).after


def test_a_model_from_scratch_learns_the_reference_completions(tmp_path):
    folder = create_model(tmp_path / "m", task_tokenizer("running_sum"), width=32, layers=1, heads=2)
    task = {"kind": "running_sum", "terms": 2, "formats": "result"}
    recipe = parse_recipe(
        {
            "output": str(tmp_path / "run"),
            "steps": 60,
            "student": {"model": str(folder), "template": "plain"},
            "teacher": [],
            "objective": "sft",
            "prompts": {"kind": "procedural", "task": task, "size": 64},
            "rollout": {"kind": "data"},
            "verifier": {"kind": "exact_match", "pattern": ANSWER_PATTERN},
            "update": {"learning_rate": 1e-2},
            "batch": {"prompts": 32, "micro": 32},
            "evaluation": {"held_out": 4},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
        }
    )
    losses = [r["train/loss"] for r in execute(recipe, quiet=True).history if "train/loss" in r]
    # Of `d;#d` and the end token only one digit is hard: 60 steps bring four of five tokens near certainty.
    assert losses[0] > 2.5
    assert losses[-1] < 0.8


def test_a_student_made_for_another_task_is_refused(tmp_path):
    folder = str(create_model(tmp_path / "m", task_tokenizer("running_sum"), width=16, layers=1))
    model = {"model": folder, "template": "plain"}
    prompts = {"kind": "procedural", "task": "list_program"}
    recipe = parse_recipe({"output": str(tmp_path / "run"), "student": model, "teacher": model, "prompts": prompts})
    with pytest.raises(DataError, match=r"list_program train\[0\]: the student's tokenizer has no token"):
        execute(recipe, quiet=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "running_sun"}, "did you mean 'running_sum'"),
        ({"kind": "running_sum", "terms": [9, 3]}, "prompts.task.terms .*9 is more than 3"),
        ({"kind": "running_sum", "terms": 0}, "prompts.task.terms.*greater than or equal to 1"),
        ({"kind": "running_sum", "terms": "many"}, "prompts.task.terms"),
        ({"kind": "running_sum", "term": 3}, "did you mean 'prompts.task.terms'"),
        ({"kind": "running_sum", "formats": "swaped"}, "no writing 'swaped' .did you mean 'swapped'"),
        ({"kind": "running_sum", "formats": {"sum": 0}}, "all weights are 0"),
        ({"kind": "running_sum", "formats": {"sum": -1}}, "prompts.task.formats.sum"),
        ({"kind": "running_sum", "wrong_answers": 2}, "prompts.task.wrong_answers"),
        ({"kind": "arithmetic", "operations": ["*"]}, "prompts.task.operations"),
        ({"kind": "list_program", "allowed": ["drop", "swap"]}, "a list of one digit needs"),
        ({"kind": "register_machine", "registers": 9}, "prompts.task.registers"),
    ],
)
def test_settings_that_make_no_task_are_named(task, message):
    data = {"student": {"model": "-"}, "teacher": {"model": "-"}, "prompts": {"kind": "procedural", "task": task}}
    with pytest.raises(RecipeError, match=message) as error:
        parse_recipe(data)
    assert len(str(error.value).splitlines()) <= 2


def test_a_split_that_is_too_small_is_refused():
    task = RunningSum(terms=2)
    for split in SPLITS:
        every = sum(split_of(f"{n:02d}:") == split for n in range(100))
        assert len(task.examples(every, split=split)) == every
        with pytest.raises(DataError, match=f"size is {every + 1} and split '{split}'.*has about {every} problems"):
            task.examples(every + 1, split=split)


def test_wrong_answers_need_a_second_answer(monkeypatch):
    monkeypatch.setattr(RunningSum, "answer", lambda self, prompt: "1")
    with pytest.raises(DataError, match="every problem of task 'running_sum' has the answer '1'"):
        RunningSum(wrong_answers=1).examples(1)


def test_two_sources_with_the_same_problem_are_refused():
    sources = [ProceduralPrompts(task=RunningSum(terms=2), size=60, seed=seed) for seed in (0, 1)]
    with pytest.raises(DataError, match="duplicate prompt id 'running_sum-"):
        load_prompts(sources)


def run_cli(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, *capsys.readouterr()


def examples_of_the_page():
    """`(command, what the page shows)` of each command of the page's console blocks."""
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


@pytest.mark.parametrize(("command", "shown"), list(examples_of_the_page()))
def test_the_page_shows_what_its_commands_print(command, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, told = run_cli(monkeypatch, capsys, shlex.split(command))
    assert (code, out) == (0, shown)
    # What a new model needs beside its name is said where no script reads it.
    assert "template: plain" in told if command.startswith("opd create-model") else told == ""


def test_the_page_shows_every_task():
    text = PAGE.read_text(encoding="utf-8")
    for kind, task in TASKS.items():
        assert f"$ opd procedural {kind}" in text
        assert f"::: {task.__module__}.{task.__name__}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["procedural", "runing_sum"], "did you mean 'running_sum'"),
        (["procedural", "running_sum", "term=3"], "did you mean 'prompts.task.terms'"),
        (["procedural", "running_sum", "terms"], "form key=value"),
        (["procedural", "running_sum", "--split", "tests"], "prompts.split"),
        (["procedural", "running_sum", "--size", "0"], "prompts.size"),
        (["procedural", "running_sum", "terms=1", "--size", "20"], "ask for fewer, or allow longer problems"),
        (["create-model", "m", "--tokenizer", "task:sums"], "no procedural task 'sums'"),
        (["create-model", "m", "--tokenizer", "./nowhere"], "nowhere"),
        (["create-model", "m", "--tokenizer", "task:running_sum", "--heads", "0"], "heads is 0"),
        (["create-model", "file", "--tokenizer", "task:running_sum"], "is a file"),
    ],
)
def test_commands_tell_mistakes_in_a_line_or_two(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out, err = run_cli(monkeypatch, capsys, ["opd", *words])
    assert (code, out) == (OpdError.exit_code, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


def test_a_model_that_was_made_is_named_as_recipes_must_name_it(tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "m")
    code, out, err = run_cli(monkeypatch, capsys, ["opd", "create-model", folder, "--tokenizer", "task:running_sum"])
    assert (code, out) == (0, f"{folder}\n")
    assert f"{{model: {folder}, template: plain}}" in err
    with pytest.raises(ModelError, match=r"set template: plain beside it \(student.template, teacher.template\)"):
        load_tokenizer(CausalLM(model=folder))


def test_rows_print_as_json_lines(monkeypatch, capsys):
    code, out, _ = run_cli(monkeypatch, capsys, ["opd", "procedural", "arithmetic", "--size", "3", "--split", "test"])
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["prompt"] for row in rows] == [e.prompt for e in Arithmetic().examples(3, split="test")]
