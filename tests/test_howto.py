"""The pages that answer "how do I": what their blocks say is done as printed, with tiny models in place of Qwen's."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import yaml

import opd
from opd.cli.main import app
from opd.measurement import SIGNALS
from opd.plan.language import check_answers
from opd.recipe import all_keys, parse_recipe
from opd.report.glossary import MEANINGS
from opd.shaping import Shaping
from tests.conftest import tiny_model
from tests.tiny import CHAT, saved, turn_tokenizer

ROOT = Path(__file__).parent.parent
HOWTO = sorted((ROOT / "docs" / "howto").glob("*.md"))
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)```', re.M | re.S)
SMALL = {
    "steps": 1,
    "evaluation": {"held_out": 1, "samples": 1, "max_new_tokens": 6},
    "checkpoint": {"every": 0},
    "tracking": {"trackers": []},
    "hardware": {"device": "cpu", "threads": 1},
}
TEACHER = "Qwen/Qwen3-4B"
REST = {"student": "Qwen/Qwen3-0.6B", "teacher": TEACHER, "prompts": "questions.jsonl"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with models by Qwen's names and with every file that a page shows, its rows a few times over."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = turn_tokenizer(CHAT)
    for seed, (name, width) in enumerate({"Qwen3-0.6B": 32, "Qwen3-4B": 48}.items()):
        saved(folder / "Qwen" / name, tiny_model(vocabulary=len(tokenizer), seed=seed, width=width), tokenizer)
    for page in HOWTO:
        for name, text in FILE.findall(page.read_text(encoding="utf-8")):
            head, *rows = text.splitlines(keepends=True) if name.endswith(".csv") else ["", text]
            assert not (folder / name).exists(), f"two pages show {name}"
            (folder / name).write_text(head + "".join(rows) * 6, encoding="utf-8")
    rows = [{"question": f"How many is {i}?", "with_document": f"It is {i}. How many is {i}?"} for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "org" / "questions" / "train.parquet")
    # What pages name and do not show.
    datasets.Dataset.from_list(rows).rename_column("question", "prompt").to_json(folder / "documents.jsonl")
    return folder


@pytest.fixture
def here(desk, monkeypatch):
    monkeypatch.chdir(desk)
    shutil.rmtree("runs", ignore_errors=True)
    real = opd.distill

    def small(student, teacher=None, prompts=None, **given):
        return real(student, teacher, prompts, overwrite=True, quiet=True, **made_small(given))

    monkeypatch.setattr(opd, "distill", small)
    return desk


def made_small(given):
    """The same settings for one short step."""
    batch = {"prompts": 2, "micro": 2, "group": given.get("batch", {}).get("group", 1)}
    return {"output": "runs/one", **given, **SMALL, "batch": batch, "rollout": shortened(given.get("rollout", {}))}


def shortened(rollout):
    """The same rollout with short completions."""
    if isinstance(rollout, str):
        rollout = {"kind": rollout}
    parts = {key: shortened(part) for key, part in rollout.items() if key in ("first", "second")}
    return {**rollout, **parts} if parts else {**rollout, "max_new_tokens": 6}


def blocks(language):
    for page in HOWTO:
        for i, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.M | re.S)
        ):
            yield pytest.param(text, id=f"{page.stem}-{i}")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_recipe_of_a_page_trains(text, here):
    recipe = REST | yaml.safe_load(text)
    if "with_document" in text:
        recipe["prompts"] = "documents.jsonl"
    if recipe.get("objective") == "sft":
        recipe.pop("teacher")
    if "served" in text:
        # Nothing answers at its address; that its answers are enough for the rest is known without.
        check_answers(parse_recipe(recipe))
        recipe["teacher"] = TEACHER
    result = opd.execute(parse_recipe(made_small(recipe)), overwrite=True, quiet=True)
    assert len(result.history) >= 1
    assert (result.directory / "student" / "config.json").exists()


@pytest.mark.parametrize("text", blocks("python"))
def test_the_python_of_a_page_runs(text, here):
    exec(compile(text, "page", "exec"), {})


@pytest.mark.parametrize("text", blocks("bash"))
def test_the_commands_of_a_page_run(text, here, capsys):
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] != "opd":
            # Of these the Makefile and pyproject.toml have tests.
            assert words[0] in {"make", "pip", "source"}, line
            continue
        if not Path("mine.yaml").exists():
            Path("mine.yaml").write_text(yaml.safe_dump(REST | SMALL | {"rollout": {"max_new_tokens": 6}}))
        command, into = (words[1 : words.index(">")], words[-1]) if ">" in words else (words[1:], None)
        app(command, standalone_mode=False)
        told = capsys.readouterr().out
        if into is not None:
            assert yaml.safe_load(told)["teacher"]["kind"] == "self", "the recipe that the page says is printed"


def test_keys_that_save_memory_exist():
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/howto/memory.md").read_text(encoding="utf-8"), re.M)
    keys = [key for row in rows for key in re.findall(r"`(\w+\.\w+)", row)]
    assert len(keys) >= 10
    assert set(keys) <= set(all_keys())


def families():
    return tuple(name for name in MEANINGS if name.endswith("/"))


def test_what_a_run_logs_is_in_the_glossary(here):
    result = opd.distill(
        {"model": REST["student"], "lora": {"rank": 2}},
        [{"model": TEACHER, "name": "large"}, {"kind": "self", "mode": "frozen", "name": "reference"}],
        "questions.jsonl",
        objective=[
            {"kind": "reverse_kl", "teacher": "large", "clip": 5.0},
            {"kind": "grpo", "weight": 0.5},
            {"kind": "forward_kl", "teacher": "reference", "weight": 0.1},
        ],
        shaping=[{"kind": "drift", "teacher": "large"}, {"kind": "log_ratio_gate", "teacher": "large"}],
        verifier=lambda row, completion: len(completion) % 2,
        temperature=[[0, 1.2], [4, 1.0]],
        batch={"group": 2},
    )
    logged = {name for record in result.history for name in record} - {"step"}
    assert {"train/clipped", "train/drifted", "train/gated", "train/objective/grpo", "held_out/accuracy"} <= logged
    assert {name for name in logged if name not in MEANINGS and not name.startswith(families())} == set()


def test_what_is_declared_to_be_logged_is_in_the_glossary():
    def all_of(base):
        return [each for kind in base.__subclasses__() for each in (kind, *all_of(kind))]

    names = {name for kind in all_of(Shaping) if kind.__module__.startswith("opd.") for name in kind.measures} | SIGNALS
    assert {"drifted", "importance_cut", "loss"} <= names
    assert {name for name in names if f"train/{name}" not in MEANINGS} == set()
