"""Mistakes in recipes and overrides: one message that names the key, exit code 2, and nothing else is done instead."""

from __future__ import annotations

import sys

import pytest
import yaml

import opd
from opd.cli import main
from opd.errors import RecipeError
from opd.files.recipes import LARGEST
from opd.recipe import all_keys, load_recipe, parse_recipe
from opd.recipe.explaining import ELSEWHERE
from tests.conftest import save_tiny
from tests.tiny import TEXTS, short_run

ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))

REFUSED = {
    # Numbers that no library behind can hold, or that a run would never come to an end with.
    "seed=4294967296": "seed is 4294967296",
    "seed=-1": "seed is -1",
    "steps=99999999999999999999999": "64 bits",
    "hardware.threads=100000000000": "threads is 100000000000",
    "batch.prompts=999999999": "batch.prompts is 999999999",
    "batch.group=99999999": "batch.group",
    "evaluation.k=100000000": "evaluation.k",
    "evaluation.max_new_tokens=100000000": "evaluation.max_new_tokens",
    "rollout.max_new_tokens=1000000000000": "rollout.max_new_tokens",
    "student.lora={rank: 100000}": "student.lora.rank",
    "prompts={kind: procedural, task: running_sum, size: 10000000000}": "prompts.size",
    "prompts={kind: procedural, task: running_sum, seed: -1}": "prompts.seed",
    "verifier={kind: math_verify, seconds: 99999999999}": "verifier.seconds",
    "temperature=1e-300": "temperature is",
    "temperature=.inf": "temperature is inf",
    "evaluation.temperature=1e30": "evaluation.temperature",
    "update.learning_rate=nan": "finite number",
    # Values of another type that would be taken for something.
    "steps=true": "true is no number",
    "hardware.threads=yes": "true is no number",
    "evaluation.every=true": "true is no number",
    "student.drop_layers=[true]": "true is no number",
    "update.learning_rate=[[true, 1]]": "true is no number",
    "update.learning_rate={kind: cosine, start: true}": "true is no number",
    "name=2024-01-01": "quote what YAML takes for a date",
    "name=2024-13-45": "month must be in 1..12",
    # Values that would do nothing, or something else.
    "student.drop_layers=[-1]": "-1 is no layer",
    "student.drop_layers=1-0": "'1-0' is no range",
    "student.drop_layers=0-99999999999": "no range of layers",
    "student.drop_layers=²": "not a list of layers",
    "student.revision=abc": "no revisions",
    "student.template_options={enable_thinking: false}": "applies no template",
    "student.freeze=['']": "an empty text names nothing",
    "student.lora={targets: ''}": "an empty text names nothing",
    "output=''": "an empty text names nothing",
    "output=\"a\\0b\"": "zero byte",
    "tracking.project=''": "an empty text names nothing",
    "tracking={project: a/../../b}": "give one name",
    "tracking={project: student}": "not the run's own",
    "tracking.trackers=[tensorboard, tensorboard]": "listed twice",
    "teacher.name=''": "an empty text names nothing",
    "teacher.weight=0": "nothing would be learnt",
    "teacher={kind: self, mode: frozen, rate: 0.3}": "mode: frozen has no share of the student to set",
    "end_tokens=[-1]": "end_tokens",
    "end_tokens=[99999999]": "end_tokens names 99999999",
    "end_tokens=[]": "end_tokens is []",
    "objective={kind: reverse_kl, weight: 0}": "nothing would be learnt",
    "objective={kind: reverse_kl, written_by: []}": "written_by",
    "objective={kind: reverse_kl, support_from: student}": "set top_k",
    "objective=[reverse_kl, reverse_kl]": "listed twice alike",
    "rollout={kind: teacher, teacher: nope}": "rollout.teacher is 'nope'",
    "rollout={kind: mixture, second: {kind: teacher, teacher: nope}}": "rollout.teacher is 'nope'",
    # Devices that are not there.
    "hardware.device=cuda:4096": "device",
    "teacher.device=gpu": "teacher.device is 'gpu'",
    "teacher.device=cuda:4096": "teacher.device is 'cuda:4096'",
    # Places in the recipe.
    "prompts.²=3": "unknown key",
    "teacher.x.y.z=1": "unknown key 'teacher.x'",
    "a..b=1": "unknown key",
    "=1": "form key=value",
    # A word that is no kind names a model, or prompts.
    "teacher=models/big": "tokenizer 'models/big' cannot be loaded",
    "teacher=[models/big]": "tokenizer 'models/big' cannot be loaded",
    "teacher={kind: routed, by: t, routes: {a: models/big}}": "tokenizer 'models/big' cannot be loaded",
    "student=models/small": "tokenizer 'models/small' cannot be loaded",
    "prompts=p.jsonl": "no file 'p.jsonl'",
    "evaluation.prompts=p.jsonl": "no file 'p.jsonl'",
    # Where a key of that name does stand.
    # Other tests of this process may have made choices known that have it too.
    "max_new_tokens=4": "'rollout.max_new_tokens' or 'evaluation.max_new_tokens'?",
    "rank=8": "did you mean 'student.lora.rank'",
    "rollout.temperature=0.5": "did you mean 'temperature'",
    "update.learnin_rate=1": "did you mean 'update.learning_rate'",
    "lerning_rate=1": "did you mean 'update.learning_rate'",
    # Where another kind of the same place has it.
    "objective={kind: reverse_kl, k: 4}": "k is a setting of kind reverse_kl_candidates, and this is kind reverse_kl",
    "curriculum={kind: shuffled, lengths: [3]}": "a setting of kind length_ladder, and this is kind shuffled, which",
    "rollout={watch: {kind: drift, times: 3}}": "times is a setting of kind repetition, and this is kind drift",
    "shaping=[{kind: drift, delta: 1}]": "unknown key 'shaping.0.delta'; delta is a setting of kind margin_mask, ma",
    # Another type than the place takes.
    "rollout.segment=4": "rollout: segment is 4, and without a watch",
    "batch.prompts=x": "batch.prompts is 'x': it takes a whole number",
    "batch.prompts=1.5": "batch.prompts is 1.5: it takes a whole number",
    "update.learning_rate=null": "update.learning_rate is None: it takes a number; leave the key out",
    "skip_bad_prompts=maybe": "it takes true or false",
    "name=7": "name is 7: it takes a text; quote what YAML takes for a number",
    "end_tokens=7": "end_tokens is 7: it takes a list",
    "tracking.trackers=null": "it takes a list, [item, ...]; leave the key out for its default",
    "student.lora=3": "student.lora is 3: it takes a block of keys, {key: value, ...} with keys such as rank, alpha",
    "evaluation.stop=3": "evaluation.stop is 3: it takes a block of keys, {key: value, ...} with keys such as metric",
    "teacher={kind: routed, by: t, routes: []}": "teacher.routes is []: it takes a block of keys",
    "reduction=3": "reduction is 3: accepted: token_mean, sequence_mean, sequence_sum",
    "objective={kind: reverse_kl, tail: null}": "accepted: bucket, none; leave the key out for its default",
    # Weights that stop being numbers.
    "update.learning_rate=1e300": "not a number",
    "teacher.cache={path: /dev/null/x}": "teacher.cache",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    student, teacher = (save_tiny(folder / str(seed), seed=seed) for seed in (0, 1))
    data = {
        "output": str(folder / "run"),
        "steps": 1,
        "student": {"model": student, "template": "plain"},
        "teacher": {"model": teacher, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": ["12+7=", "abc", "9", "what is 3?"]},
        "rollout": {"max_new_tokens": 4},
        "batch": {"prompts": 2, "micro": 2},
        "evaluation": {"held_out": 1, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def exit_and_message(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["opd", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("override", REFUSED)
def test_an_override_that_cannot_be_meant_is_one_message(override, recipe_file, monkeypatch, capsys):
    code, err = exit_and_message(monkeypatch, capsys, "train", str(recipe_file), override, "--quiet", "--overwrite")
    assert code == 2, err
    assert REFUSED[override] in err
    assert len(err.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "aliases stand for too many values"),
        (MERGES, "merge"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: 2024-99-99", "month must be in 1..12"),
        ("a: !!float x", "not valid YAML"),
        ("steps: " + "9" * 6000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("#" * (LARGEST + 1), "put prompts into a file of their own"),
    ],
    ids=["aliases", "merges", "itself", "deep", "date", "float", "digits", "zero byte", "huge"],
)
def test_a_text_that_no_reader_gets_to_the_end_of(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message) as found:
        load_recipe(str(path))
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 400


def test_an_override_is_read_within_the_same_bounds(recipe_file):
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(str(recipe_file), ["name=" + "[" * 100_000])


def test_hints_stay_near_the_key_or_name_what_other_trainers_call_so(recipe_file):
    assert set(ELSEWHERE.values()) <= set(all_keys())
    hints = {
        "batch.size=8": r"unknown key 'batch\.size' \(did you mean 'batch\.prompts'\?\)",
        "update.lr=1": r"did you mean 'update\.learning_rate'",
        "evaluation.metric=x": r"did you mean 'evaluation\.stop\.metric'",
        "hardware.dtype=x": r"accepted here: device, precision, threads \(another block has student\.dtype",
        "rollout.size=3": r"accepted here: max_new_tokens, .*\(another block has prompts\.size",
    }
    for override, hint in hints.items():
        with pytest.raises(RecipeError, match=hint):
            load_recipe(str(recipe_file), [override])


@pytest.mark.parametrize("value", ["null", "[]", "[null]", "[1]", "7", "true", "{kind: nope}", "nope", "{kind: 3}"])
def test_what_is_no_choice_is_answered_with_the_choices(value, recipe_file):
    """Of every axis, in the words of a recipe."""
    axes = ("student", "teacher", "prompts", "curriculum", "rollout", "verifier", "shaping", "objective", "update")
    places = ("rollout.watch", "shaping={kind: drift}", "batch", "evaluation", "checkpoint", "hardware", "tracking")
    for place in (*axes, *places):
        key, _, above = place.partition("=")
        overrides = [place, f"{key}.signal={value}"] if above else [f"{key}={value}"]
        if place in ("verifier", "rollout.watch") and value == "null":
            continue
        with pytest.raises(RecipeError) as found:
            load_recipe(str(recipe_file), overrides)
        said = str(found.value)
        assert key in said
        assert len(said.splitlines()) <= 2
        assert len(said) < 500
        for words in ("input should", "dictionary", "instance of", "fields from", "validation"):
            assert words not in said.lower(), said
        if place in axes and value in ("7", "true"):
            kinds = {"curriculum": "shuffled", "student": "causal_lm", "objective": "reverse_kl"}.get(place, "")
            assert kinds in said


def test_a_path_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reference in ("runs/nowhere", "nowhere.yaml", str(tmp_path / "nowhere.yaml")):
        with pytest.raises(RecipeError, match=r"/nowhere(\.yaml)?' does not exist"):
            load_recipe(reference)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"'empty' is a folder without recipe\.yaml, so no run"):
        load_recipe("empty")
    (tmp_path / "empty" / "recipe.yaml").write_text("steps: 1")
    with pytest.raises(RecipeError, match=r"its recipe is empty/recipe\.yaml"):
        load_recipe("empty")
    with pytest.raises(RecipeError, match=r"no recipe 'quickstrat' \(did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"does not exist \(did you mean 'quickstart'"):
        load_recipe("quickstrat.yaml")


def test_a_teacher_that_is_missing_is_told_what_it_may_be():
    with pytest.raises(RecipeError, match=r"distill\(\).*'teacher' is required.*a live one.*self, served, stored"):
        opd.distill("org/small", prompts=["1+1="])
    with pytest.raises(RecipeError, match=r"distill\(\): prompts is missing; give strings, rows"):
        opd.distill("org/small", "org/large")


def test_ordinary_anchors_and_single_layers_are_taken(recipe_file, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("x: &m {model: a/b}\n".replace("x: ", "student: ") + "teacher: *m\nprompts: {path: p.txt}\n")
    recipe = load_recipe(str(path), ["teacher.model=c/d"])
    assert (recipe.student.model, recipe.teacher[0].model) == ("a/b", "c/d")
    assert load_recipe(str(recipe_file), ["student.drop_layers=1"]).student.drop_layers == [1]


def test_a_rung_beyond_the_sources_of_a_mixture_is_refused(recipe_file):
    """They would cut it; of one source the rung's length is what counts."""
    ladder = "curriculum={kind: length_ladder, lengths: [400], steps_per_rung: 1}"
    assert load_recipe(str(recipe_file), [ladder]).curriculum.lengths == [400]
    with pytest.raises(RecipeError, match="goes up to 400 and a source of the mixture to 8"):
        load_recipe(str(recipe_file), [ladder, "rollout={kind: mixture, first: {kind: student, max_new_tokens: 8}}"])


def test_keys_are_found_at_every_depth():
    assert {"student.lora.rank", "update.average.decay", "teacher.cache.gigabytes", "prompts.task"} <= set(all_keys())
    assert len(set(all_keys())) == len(all_keys())


SAME = "the student itself"


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"teacher": {"model": "STUDENT", "template": "plain"}}, True),
        ({"teacher": {"model": "COPY", "template": "plain"}}, True),
        ({"teacher": {"model": "STUDENT", "template": "plain", "drop_layers": [1]}}, False),
        ({"teacher": {"model": "STUDENT", "template": "plain", "sees": "hint"}}, False),
        ({"teacher": {"kind": "self"}}, True),
        ({"teacher": {"kind": "self", "mode": "frozen"}}, True),
        ({"teacher": {"kind": "self", "sees": "hint"}}, False),
        ({"teacher": {"kind": "self"}, "student": {"model": "STUDENT", "template": "plain", "lora": {}}}, True),
    ],
)
def test_a_teacher_that_is_the_student_under_its_own_view_is_warned_about(changes, warned, tmp_path, capfd):
    """At the start, and of models that the recipe names in `opd check` too; weights are compared, wherever they lie."""
    places = {"STUDENT": save_tiny(tmp_path / "s"), "COPY": save_tiny(tmp_path / "c")}
    other = {"model": save_tiny(tmp_path / "t", seed=1), "template": "plain"}

    def block(name, default):
        found = changes.get(name, default)
        return {**found, "model": places.get(found["model"], found["model"])} if "model" in found else found

    student = block("student", {"model": "STUDENT", "template": "plain"})
    teacher = block("teacher", other)
    rows = [{"prompt": text, "hint": f"{text} hint"} for text in TEXTS]
    short_run(tmp_path / "run", student, teacher, rows, steps=1)
    assert (SAME in capfd.readouterr().err) == warned

    from opd.plan import make_plan

    data = {"student": student, "teacher": teacher, "prompts": {"kind": "inline", "prompts": rows}}
    notes = make_plan(parse_recipe({**data, "evaluation": {"held_out": 1}})).notes
    elsewhere = changes.get("teacher", {}).get("model") == "COPY"
    assert any(SAME in note for note in notes) == (warned and not elsewhere)


def test_an_anchor_beside_a_reward_is_no_mistake(tmp_path, capfd):
    """A frozen copy of the student keeps reinforcement learning near where it began."""
    short_run(
        tmp_path / "run",
        {"model": save_tiny(tmp_path / "s"), "template": "plain"},
        {"kind": "self", "mode": "frozen", "name": "reference"},
        [{"prompt": text, "answer": "a"} for text in TEXTS],
        objective=[{"kind": "grpo"}, {"kind": "reverse_kl", "teacher": "reference", "weight": 0.1}],
        verifier="exact_match",
        batch={"prompts": 2, "group": 2, "micro": 4},
        steps=1,
    )
    assert SAME not in capfd.readouterr().err
