"""Recipes: what is accepted, and that every mistake is one short message that names the key."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.catalogue import blocks
from opd.cli import main
from opd.errors import DataError, RecipeError
from opd.prompts import load_prompts, split_held_out
from opd.prompts.file import FilePrompts
from opd.prompts.inline import InlinePrompts
from opd.recipe import all_keys, differences, json_schema, load_recipe, parse_recipe, shipped_recipes

VALID = {
    "name": "t",
    "steps": 5,
    "student": {"model": "models/small", "template": "plain"},
    "teacher": {"model": "models/big", "template": "plain"},
    "prompts": {"kind": "inline", "prompts": ["a", "b", "c"]},
    "rollout": {"kind": "student", "max_new_tokens": 8},
    "objective": {"kind": "jensen_shannon", "beta": 0.5},
    "update": {"kind": "plain", "learning_rate": 1e-4},
    "batch": {"prompts": 4, "group": 2, "micro": 4},
    "evaluation": {"held_out": 1},
    "hardware": {"precision": "fp32"},
}


def run_cli(monkeypatch, capsys, *words):
    """Exit code and stderr of the real entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["opd", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, capsys.readouterr().err


LEAVES = [
    ("steps", st.one_of(st.integers(max_value=0), st.just("many"), st.just([1]), st.just(None))),
    ("name", st.sampled_from(["a b", "x/y", "", 7, []])),
    ("student.model", st.sampled_from([None, 3, ["a"], {}])),
    ("student.dtype", st.sampled_from(["fp32", "int8", 32])),
    ("student.drop_layers", st.sampled_from(["a-b", "1..3", {"a": 1}, "-"])),
    ("student.template", st.sampled_from(["chatty", 1])),
    ("teacher.weight", st.sampled_from([-0.5, -1, "heavy"])),
    ("teacher.batch", st.integers(max_value=0)),
    ("prompts.limit", st.integers(max_value=0)),
    ("prompts.prompts", st.sampled_from(["text", 5, None])),
    ("rollout.max_new_tokens", st.one_of(st.integers(max_value=0), st.floats(1.1, 1.9))),
    ("rollout.top_p", st.one_of(st.floats(max_value=0), st.floats(min_value=1.01, max_value=9))),
    (
        "objective.beta",
        st.one_of(st.floats(max_value=-0.01), st.floats(min_value=1.01), st.just(float("nan"))),
    ),
    ("objective.kind", st.text("abcdefgh_", min_size=1, max_size=12)),
    ("update.learning_rate", st.one_of(st.floats(max_value=-1e-9), st.just("fast"), st.just([[3, 1e-4], [1, 1e-5]]))),
    ("update.betas", st.sampled_from([[0.9], [0.9, 1.5], "x", [1, 2, 3]])),
    ("update.clip_norm", st.sampled_from(["none of it", -1, 0])),
    ("batch.micro", st.integers(max_value=0)),
    ("evaluation.every", st.integers(max_value=-1)),
    ("hardware.precision", st.sampled_from(["half", False, 16])),
    ("hardware.device", st.sampled_from(["gpu", "cuda:x", 0])),
    ("temperature", st.floats(max_value=0)),
]

REQUIRED = ["student", "teacher", "prompts", "student.model", "teacher.model", "prompts.prompts"]


def place(data, key):
    *parents, leaf = key.split(".")
    for part in parents:
        data = data[part]
    return data, leaf


@st.composite
def broken(draw):
    """A recipe with one mistake, and the key that the message must name."""
    data = copy.deepcopy(VALID)
    how = draw(st.sampled_from(["value", "value", "misspelt", "missing", "elsewhere"]))
    if how == "value":
        key, values = draw(st.sampled_from(LEAVES))
        block, leaf = place(data, key)
        block[leaf] = draw(values)
    elif how == "missing":
        key = draw(st.sampled_from(REQUIRED))
        block, leaf = place(data, key)
        del block[leaf]
    else:
        key = draw(st.sampled_from(["steps", "student.model", "rollout.top_p", "update.learning_rate", "batch.group"]))
        block, leaf = place(data, key)
        if how == "elsewhere":
            block, key = data, leaf + "_"
            leaf = leaf + "_"
        else:
            cut = draw(st.integers(1, len(leaf) - 1))
            leaf = leaf[:cut] + draw(st.sampled_from("xqz")) + leaf[cut:]
            key = ".".join([*key.split(".")[:-1], leaf])
        block[leaf] = 1
    return data, key


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=broken())
def test_a_broken_recipe_gives_one_short_message_that_names_the_key(case, tmp_path, monkeypatch, capsys):
    data, key = case
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    code, err = run_cli(monkeypatch, capsys, "train", str(path))
    assert code == 2
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert 1 <= len(lines) <= 2
    assert key in err
    assert str(path) in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "not valid YAML"),
        ("- a\n- b", "mapping of keys"),
        ("steps: 1\nsteps: 2", "stands twice"),
        ("1: 2", "not text"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("", "mapping of keys"),
    ],
)
def test_files_that_are_no_recipe(text, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    code, err = run_cli(monkeypatch, capsys, "check", str(path))
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) <= 2


def test_a_recipe_that_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(str(path))


def test_unknown_recipe_names_the_nearest(monkeypatch, capsys):
    code, err = run_cli(monkeypatch, capsys, "train", "quikstart")
    assert code == 2
    assert "'quickstart'" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("update.learnin_rate=1", "did you mean 'update.learning_rate'"),
        ("learning_rate=1", "did you mean 'update.learning_rate'"),
        ("objective=reverse_kll", "did you mean 'reverse_kl'"),
        ("steps", "form key=value"),
        ("steps=[1", "not valid YAML"),
        ("objective=3", "objective"),
        (
            "prompts.prompts.view=3",
            r"prompts.prompts is a list of 3, and an index from 0 to 2 says of which: prompts.prompts.0.view",
        ),
    ],
)
def test_overrides_are_checked_too(override, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALID))
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path), [override])


def test_overrides_reach_every_level(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**VALID, "objective": "reverse_kl", "teacher": [VALID["teacher"]] * 2}))
    recipe = load_recipe(
        str(path),
        ["update.learning_rate=1e-4", "objective.top_k=5", "teacher.1.weight=0.5", "verifier=exact_match"],
    )
    assert recipe.update.learning_rate == 1e-4
    assert recipe.objective[0].top_k == 5
    assert [t.weight for t in recipe.teacher] == [1.0, 0.5]
    assert recipe.verifier.kind == "exact_match"


def test_a_resolved_recipe_reads_back_as_itself():
    recipe = parse_recipe(VALID)
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert differences(recipe.dump(), again.dump()) == []
    other = parse_recipe({**VALID, "steps": 6})
    assert differences(recipe.dump(), other.dump()) == [("steps", 5, 6)]


def test_schema_lists_every_choice_of_every_axis():
    text = json_schema()
    assert json.loads(text)["title"] == "Recipe"
    for kind in ("reverse_kl_sampled", "self", "reasoning_gym", "shuffled"):
        assert f'"{kind}"' in text
    assert {"update.learning_rate", "teacher.sees", "hardware.threads"} <= set(all_keys())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid(name):
    assert load_recipe(name).description


def test_shipped_recipes_are_listed_also_those_without_a_teacher(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["opd", "recipes"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    shown = capsys.readouterr().out
    assert all(name in shown for name in shipped_recipes())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "quickstrat"), "did you mean 'quickstart'"),
        (("train", "quickstart", "steps"), "not of the form key=value"),
        (("check", "broken.yaml"), "broken.yaml:3: not valid YAML"),
        (("eval", "quickstart", "steps=["), "the value:1: not valid YAML"),
        (("chain", "quickstart", "nowhere.yaml"), "nowhere.yaml' does not exist"),
    ],
)
def test_names_files_and_overrides_are_checked_before_the_libraries_load(tmp_path, arguments, told):
    (tmp_path / "broken.yaml").write_text("steps: 3\nname: [\n")
    code = (
        "import sys\nfrom opd.cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_blocks_without_choices_are_shown(monkeypatch, capsys):
    of_blocks = {
        "batch": ("prompts", "group", "micro"),
        "recipe": ("steps", "reduction"),
        "evaluation": ("held_out", "max_new_tokens", "teacher_answers", "frames"),
    }
    for name, keys in of_blocks.items():
        assert {each.key for each in blocks()[name]} >= set(keys)
        monkeypatch.setattr("sys.argv", ["opd", "choices", name])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code in (0, None)
        shown = capsys.readouterr().out
        assert all(key in shown for key in keys)
    assert not {each.key for each in blocks()["recipe"]} & {"student", "batch", "objective"}


def bad_file(tmp_path, content, name="p.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return FilePrompts(path=str(path))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "p.jsonl", "no rows"),
        ("\n\n", "p.txt", "no rows"),
        ('{"question": "a"}\n', "p.jsonl", r"p.jsonl:1: no column 'prompt'.*'question'"),
        (
            '{"prompt": "a"}\n{"prompt": "  "}\n',
            "p.jsonl",
            "p.jsonl:2: the prompt in column 'prompt' is empty",
        ),
        ('{"prompt": []}\n', "p.jsonl", "is empty"),
        ('{"prompt": 3}\n', "p.jsonl", "holds int"),
        ('{"prompt": [{"text": "x"}]}\n', "p.jsonl", "'role' and 'content'"),
        (
            '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n',
            "p.jsonl",
            r"duplicate prompt id '1'.*:1 and .*:2",
        ),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "p.jsonl", "p.jsonl:2: not UTF-8"),
        ('{"prompt": "a"}\n{oops\n', "p.jsonl", "p.jsonl:2: not JSON"),
        ("[1]\n", "p.jsonl", "must be one JSON object"),
        ("a,b\n1,2\n", "p.csv", "no column 'prompt'"),
        (b"\xff\xfe,b\n", "p.csv", "cannot be read as csv"),
        ("x", "p.parquet", "cannot be read as parquet"),
        ("x", "p.bin", "accepted are .jsonl"),
    ],
)
def test_bad_prompt_sets_are_named_by_row(content, name, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        load_prompts([bad_file(tmp_path, content, name)])
    assert len(str(error.value).splitlines()) <= 2


def test_good_prompt_files(tmp_path):
    text = bad_file(tmp_path, "one\n\ntwo\n", "p.txt").load()
    assert [p.view() for p in text] == ["one", "two"]
    table = bad_file(tmp_path, "prompt,answer\nx,1\n", "p.csv")
    assert table.load()[0].fields["answer"] == "1"
    chat = InlinePrompts(prompts=[{"prompt": [{"role": "user", "content": "hi"}], "teacher_prompt": "better"}])
    assert chat.load()[0].view("teacher_prompt") == "better"
    with pytest.raises(DataError, match="no column 'nothing'"):
        chat.load()[0].view("nothing")


def test_missing_prompt_file_and_too_many_held_out(tmp_path):
    with pytest.raises(DataError, match="no file"):
        FilePrompts(path=str(tmp_path / "absent.jsonl")).load()
    with pytest.raises(DataError, match=rf"no file 'absent\.jsonl' in {Path.cwd()}, nor beside the recipe or in the"):
        FilePrompts(path="absent.jsonl").load()
    prompts = InlinePrompts(prompts=["a", "b"]).load()
    with pytest.raises(DataError, match="hold out at most 1"):
        split_held_out(prompts, 2, 0)
    training, held_out = split_held_out(prompts, 1, 0)
    assert {p.id for p in training} | {p.id for p in held_out} == {"inline-0", "inline-1"}
