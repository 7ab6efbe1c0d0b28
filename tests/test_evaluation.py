"""Held-out measurement against numbers worked out by hand, and the benchmarks of lm-eval."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest
import torch
import yaml

from opd.api import execute
from opd.assembly import assemble, load_data
from opd.cli.main import main
from opd.distributions import Sampled, Target, TopK
from opd.errors import RecipeError, RunError
from opd.evaluation import evaluate
from opd.jobs import harness
from opd.monitor import Monitor
from opd.recipe import parse_recipe
from opd.teachers import LiveTeacher
from tests.conftest import CHARACTERS, character_tokenizer, tiny_model

ENTROPY = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))


def save_unigram(folder, **probabilities):
    """A model that says the same at every state: one embedding, layers that add nothing, a head with these logits."""
    model = tiny_model()
    tokenizer = character_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.fill_(-30.0 / model.config.hidden_size)
        for character, probability in probabilities.items():
            token = tokenizer.convert_tokens_to_ids(character.removeprefix("p"))
            model.lm_head.weight[token] = math.log(probability) / model.config.hidden_size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_for(tmp_path, teacher=True, **evaluation):
    """A student that says 1 with probability 3/4 and 2 with 1/4; a teacher that says either with 1/2. Of 96 held-out
    prompts a third has the answer 1, a third 2, a third none."""
    rows = [{"prompt": f"{i}=", "response": "1"} | ({"answer": i % 3} if i % 3 else {}) for i in range(100)]
    data = {
        "output": str(tmp_path / "run"),
        "steps": 1,
        "student": {"model": save_unigram(tmp_path / "student", p1=0.75, p2=0.25), "template": "plain"},
        "prompts": {"kind": "inline", "prompts": rows[:4]},
        "rollout": {"kind": "student", "max_new_tokens": 1},
        "batch": {"prompts": 2, "micro": 32},
        "verifier": "exact_match",
        "evaluation": {"prompts": {"kind": "inline", "prompts": [{"id": f"e{i}", **r} for i, r in enumerate(rows)][4:]}}
        | evaluation,
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
    }
    if teacher:
        data["teacher"] = {"model": save_unigram(tmp_path / "teacher", p1=0.5, p2=0.5), "template": "plain"}
    else:
        data |= {"objective": "sft", "rollout": {"kind": "data", "max_new_tokens": 1}}
    return parse_recipe(data)


def measured(tmp_path, **changes):
    (tmp_path / "run").mkdir(exist_ok=True)
    recipe = recipe_for(tmp_path, **changes)
    return evaluate(assemble(recipe, Monitor(tmp_path / "run", quiet=True)))


def test_divergences_and_entropies_are_those_of_the_two_unigrams(tmp_path):
    metrics = measured(tmp_path).metrics
    assert metrics["student_entropy"] == pytest.approx(ENTROPY, abs=1e-4)
    assert metrics["teacher_entropy"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["reverse_kl"] == pytest.approx(math.log(2) - ENTROPY, abs=1e-4)
    assert metrics["forward_kl"] == pytest.approx(-math.log(2) - 0.5 * math.log(0.75 * 0.25), abs=1e-4)
    assert metrics["length"] == 1
    assert metrics["truncated"] == 1
    assert not {"pass_at_k", "greedy_accuracy", "greedy_length"} & metrics.keys()


class Less(LiveTeacher):
    """A teacher in this process that says of another's answers only the top one, or only the tokens taken."""

    def __init__(self, inner, answers):
        self.inner, self.answers, self.settings = inner, answers, inner.settings

    def answer(self, trajectories, settings, context):
        (target,) = self.inner.answer(trajectories, settings, context)
        whole = target.distribution
        return [Target(TopK.of(whole, 1) if self.answers is TopK else Sampled.of(whole, trajectories.actions))]


@pytest.mark.parametrize("answers", [TopK, Sampled])
def test_teachers_that_answer_less_are_measured_as_far_as_that_goes(answers, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = assemble(recipe_for(tmp_path), Monitor(tmp_path / "run", quiet=True))
    run.teachers = [Less(run.teachers[0], answers)]
    found = [evaluate(run), evaluate(run)][1]
    assert capsys.readouterr().err.count("are left out") == 1
    assert found.metrics["student_entropy"] == pytest.approx(ENTROPY, rel=1e-4)
    ones = sum(row["completion"] == "1" for row in found.rows) / 96
    if answers is TopK:
        # One of two equal tokens and the rest: as coarse as the two unigrams are, so nothing is lost.
        forward = 0.5 * (math.log(0.5 / 0.75) + math.log(0.5 / 0.25))
        reverse = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        assert found.metrics["forward_kl_top_k"] == pytest.approx(forward, rel=1e-4)
        assert found.metrics["reverse_kl_top_k"] == pytest.approx(reverse, rel=1e-4)
        assert found.metrics["top1_agreement"] in (0.0, 1.0)
    else:
        sampled = ones * math.log(0.75 / 0.5) + (1 - ones) * math.log(0.25 / 0.5)
        assert found.metrics["reverse_kl_sampled"] == pytest.approx(sampled, rel=1e-3)
        assert found.rows[0]["values"]["log_p"] == pytest.approx([math.log(0.5)], abs=1e-3)
    assert not {"forward_kl", "reverse_kl", "teacher_entropy"} & found.metrics.keys()
    assert set(found.rows[0]["alternatives"]) == {"student"}


def test_a_best_checkpoint_by_what_cannot_be_measured_is_refused_at_start(tmp_path):
    recipe = recipe_for(tmp_path, teacher=False, every=1)
    recipe = parse_recipe({**recipe.dump(), "checkpoint": {"every": 1, "keep_best": "reverse_kl"}})
    with pytest.raises(RecipeError, match=r"keep_best is 'reverse_kl'.*student_entropy"):
        execute(recipe, quiet=True)


def test_avg_at_k_and_pass_at_k(tmp_path):
    k = 4
    result = measured(tmp_path, k=k)
    # 64 prompts with an answer: half are right with 3/4, half with 1/4.
    assert result.metrics["accuracy"] == pytest.approx(0.5, abs=4 * math.sqrt(0.75 * 0.25 / (64 * k)))
    expected = 0.5 * (1 - 0.25**k) + 0.5 * (1 - 0.75**k)
    assert result.metrics["pass_at_k"] == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 64))
    # Reports show one sample a prompt, and prompts without an answer have no verdict.
    assert [row["id"] for row in result.rows] == [f"e{i}" for i in range(4, 100)]
    assert [row["reward"] is None for row in result.rows] == [i % 3 == 0 for i in range(4, 100)]
    assert measured(tmp_path, k=k).metrics == result.metrics


def test_k_samples_agree_with_their_own_rows(tmp_path):
    alone = measured(tmp_path, k=1)
    verdicts = [row["reward"] for row in alone.rows if row["reward"] is not None]
    assert len(verdicts) == 64
    assert alone.metrics["accuracy"] == pytest.approx(sum(verdicts) / 64)


def test_greedy_takes_the_likeliest_beside_the_samples(tmp_path):
    metrics = measured(tmp_path, greedy=True).metrics
    assert metrics["greedy_accuracy"] == 0.5
    assert metrics["greedy_length"] == 1
    assert 0 < metrics["accuracy"] < 1


@pytest.mark.parametrize("settings", [{"temperature": 0.02}, {"top_k": 1}, {"top_p": 0.7}])
def test_the_sampler_of_evaluation_has_settings_of_its_own(settings, tmp_path):
    metrics = measured(tmp_path, k=3, **settings).metrics
    assert metrics["accuracy"] == metrics["pass_at_k"] == 0.5
    # What is compared stays the distribution of the run, whatever was drawn from.
    assert metrics["student_entropy"] == pytest.approx(ENTROPY, abs=1e-4)
    assert metrics["reverse_kl"] == pytest.approx(math.log(2) - ENTROPY, abs=1e-4)


def test_without_a_teacher_the_student_is_measured_alone(tmp_path):
    result = measured(tmp_path, teacher=False, k=2, greedy=True)
    assert set(result.metrics) == {
        "student_entropy",
        "length",
        "truncated",
        "accuracy",
        "pass_at_k",
        "greedy_accuracy",
        "greedy_length",
    }
    assert result.metrics["student_entropy"] == pytest.approx(ENTROPY, abs=1e-4)
    assert result.rows[0]["values"].keys() == {"student_entropy", "log_q"}
    assert result.rows[0]["alternatives"].keys() == {"student"}


def opd(monkeypatch, capsys, *words):
    """`(exit code, output, errors)` of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["opd", *words])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def saved(recipe, path):
    path.write_text(yaml.safe_dump(recipe.dump()), encoding="utf-8")
    return str(path)


def test_the_command_measures_a_recipe_and_a_saved_student(tmp_path, monkeypatch, capsys):
    path = saved(recipe_for(tmp_path, greedy=True), tmp_path / "recipe.yaml")
    code, out, err = opd(monkeypatch, capsys, "eval", path, "evaluation.k=2", "--json")
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["student_entropy"] == pytest.approx(ENTROPY, abs=1e-4)
    assert metrics["greedy_accuracy"] == 0.5
    assert "pass_at_k" in metrics
    teacher = str(tmp_path / "teacher")
    code, out, err = opd(monkeypatch, capsys, "eval", path, "--student", teacher, "--json")
    assert json.loads(out)["reverse_kl"] == pytest.approx(0, abs=1e-6)
    code, out, err = opd(monkeypatch, capsys, "eval", path)
    assert code == 0
    assert "greedy_accuracy" in out
    assert "96 held-out prompts" in out
    assert metrics["held_out_prompts"] == 96


def test_the_command_says_where_a_run_was_trained_on_what_it_measures(tmp_path, monkeypatch, capsys):
    rows = [{"id": f"r{i}", "prompt": f"{i % 9}=", "answer": 1} for i in range(12)]
    block = recipe_for(tmp_path).dump() | {"prompts": {"kind": "inline", "prompts": rows}}
    recipe = parse_recipe(block | {"evaluation": {"held_out": 4}})
    execute(recipe, quiet=True)

    def told(*words):
        code, out, err = opd(monkeypatch, capsys, "eval", str(recipe.directory), "--json", *words)
        assert code == 0, err
        lines = [line for line in err.splitlines() if line.startswith("opd: ")]
        return json.loads(out)["held_out_prompts"], lines

    assert told() == (4, [])
    count, lines = told("evaluation.held_out=7")
    # Of seven that are drawn, four were held out at most.
    assert count == 7
    assert len(lines) == 1
    number = int(lines[0].split()[1])
    assert 3 <= number <= 7
    held_out = {row.id for row in load_data(recipe)[1]}
    larger = parse_recipe(block | {"evaluation": {"held_out": 7}})
    assert number == len({row.id for row in load_data(larger)[1]} - held_out)
    assert "of these 7 prompts are training prompts of the run (" in lines[0]
    assert lines[0].endswith(
        "Take evaluation.held_out=4 and seed=0 as the run did, or evaluation.prompts that it did not train on"
    )
    ours = next(row.fields["prompt"] for row in load_data(recipe)[0])
    given = [{"prompt": ours}, {"prompt": "other"}]
    count, lines = told(f"evaluation.prompts={json.dumps([{'kind': 'inline', 'prompts': given}])}")
    assert count == 2
    assert lines[0].startswith("opd: 1 of these 2 prompts are training prompts of the run (")
    assert lines[0].endswith("are not held out. Take evaluation.prompts that it did not train on")
    # Of a student from elsewhere nobody knows what it was trained on.
    count, lines = told("evaluation.held_out=7", "--student", str(tmp_path / "teacher"))
    assert count == 7
    assert not any("training prompts" in line for line in lines)


@pytest.mark.parametrize("words", [["--limit", "3"], ["--include-path", "tasks"]])
def test_settings_of_lm_eval_need_its_tasks(words, tmp_path, monkeypatch, capsys):
    path = saved(recipe_for(tmp_path), tmp_path / "recipe.yaml")
    code, _, err = opd(monkeypatch, capsys, "eval", path, *words)
    assert code == 2
    assert "belong to --lm-eval" in err


def test_without_lm_eval_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"pip install 'opd\[lm-eval\]'"):
        harness.run_harness(recipe_for(tmp_path), ["sums"])


needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture
def tasks(tmp_path):
    """Two tasks on local files: choose between 1 and 2, and write a character. Answers: 1, 1, 2."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"prompt": f"{i}+1=", "choices": ["1", "2"], "gold": gold} for i, gold in enumerate([0, 0, 1])]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
    }
    choose = {
        "task": "opd_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        "task": "opd_write",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["#"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return folder


@needs_lm_eval
def test_lm_eval_measures_the_student_and_writes_beside_the_run(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = saved(recipe_for(tmp_path), tmp_path / "recipe.yaml")
    common = ["eval", path, "--include-path", str(tasks), "--json"]
    code, out, err = opd(monkeypatch, capsys, *common, "--lm-eval", "opd_choose,opd_write")
    assert code == 0, err
    # The student finds 1 more likely everywhere.
    assert json.loads(out)["opd_choose acc,none"] == pytest.approx(2 / 3)
    assert json.loads(out)["opd_write exact_match,none"] == pytest.approx(2 / 3)
    file = tmp_path / "run" / harness.FILE
    assert {task: row["examples"] for task, row in json.loads(file.read_text()).items()} == {
        "opd_choose": 3,
        "opd_write": 3,
    }
    # Another student, two examples: that task's entry changes, the other stays.
    two = save_unigram(tmp_path / "two", p1=0.25, p2=0.75)
    code, out, err = opd(monkeypatch, capsys, *common, "--lm-eval", "opd_choose", "--limit", "2", "--student", two)
    assert code == 0, err
    entries = json.loads(file.read_text())
    assert entries["opd_choose"]["metrics"]["acc,none"] == 0
    assert (entries["opd_choose"]["limit"], entries["opd_choose"]["student"]) == (2, two)
    assert entries["opd_write"]["metrics"]["exact_match,none"] == pytest.approx(2 / 3)


@needs_lm_eval
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lm-eval", "opd_chose"], "did you mean 'opd_choose'?"),
        (["--lm-eval", "opd_choose", "--include-path", "nowhere"], "no folder 'nowhere'"),
        (["--lm-eval", "opd_missing"], "opd_missing: "),
    ],
)
def test_mistakes_with_lm_eval_are_one_line(words, message, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    missing = yaml.safe_load((tasks / "opd_choose.yaml").read_text())
    missing |= {"task": "opd_missing", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}
    (tasks / "opd_missing.yaml").write_text(yaml.safe_dump(missing))
    path = saved(recipe_for(tmp_path), tmp_path / "recipe.yaml")
    code, _, err = opd(monkeypatch, capsys, "eval", path, "--include-path", str(tasks), *words)
    assert code == 2
    assert message in err.splitlines()[-1]


def test_the_unigram_is_one(tmp_path):
    model = tiny_model().from_pretrained(save_unigram(tmp_path / "m", p1=0.75, p2=0.25))
    ids = torch.randint(0, 3 + len(CHARACTERS), (2, 5))
    found = model(ids).logits.softmax(-1)
    one = character_tokenizer().convert_tokens_to_ids("1")
    torch.testing.assert_close(found[..., one], torch.full((2, 5), 0.75), atol=1e-4, rtol=0)
