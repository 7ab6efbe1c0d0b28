"""Runs whose teachers have a tokenizer of their own: what they log, and what is refused before them."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

import opd
from opd.api import execute
from opd.context import Context
from opd.distributions import spans_in
from opd.divergences import ReverseKL
from opd.divergences.reverse_kl_sampled import ReverseKLSampled
from opd.errors import IncompatibleError, RecipeError
from opd.failures import Skips
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.plan import make_plan
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import load_prompts
from opd.recipe import Failures, parse_recipe
from opd.report.page import _run
from opd.server import ServedModel
from opd.server.serving import application
from opd.store.targets import COMPARED, _begun
from opd.teachers.base import unanswered
from opd.teachers.local import LocalTeacher
from opd.teachers.served import ServedTeacher
from tests.conftest import tiny_model
from tests.other_tokenizers import byte_level, characters, sentencepiece
from tests.serving import serving
from tests.test_other_tokenizers import gradients, language, reader, written
from tests.tiny import saved, short_run

PROMPTS = ["the quick brown fox", "She said: hello", "what is 3.50 + 12?", "the dog", "hello", "12", "x + 1", "fox"]
BOTH = [{"kind": "reverse_kl"}, {"kind": "reverse_kl_sampled", "spans": "several"}]


def model(folder, tokenizer, seed=0, width=32):
    made = tiny_model(vocabulary=len(tokenizer.get_vocab()), seed=seed, width=width, initializer_range=0.1)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return saved(folder, made, tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "student": model(folder / "student", characters()),
        "bytes": model(folder / "bytes", byte_level(), seed=1, width=48),
        "pieces": model(folder / "pieces", sentencepiece(), seed=2),
    }


def teacher(models, which, **more):
    return {"model": models[which], "template": "plain", "tokenizer": "own", **more}


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_what_was_compared_and_the_report_shows_it(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    result = short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, objective=BOTH)
    # Both read the same prompts, and the lengths of two tokenizers are not compared.
    assert "prompt_tokens" not in result.summary
    steps = [record for record in records(tmp_path) if "train/loss" in record]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train/alignment/single_bytes"] < 1
        assert 0 < step["train/alignment/span_bytes"] < 1
        assert 0 < step["train/alignment/common_mass"] < 1
        assert 0 <= step["train/alignment/left_out"] < 1
    assert any("held_out/reverse_kl_sampled" in record for record in records(tmp_path))
    page = (tmp_path / "report.html").read_text() if (tmp_path / "report.html").exists() else ""
    assert not page or "another tokenizer: one token on both sides" in page


def test_figures_of_a_teacher_say_of_which_prompts_they_are(models, tmp_path, capsys):
    """A student of bytes writes some that are no text, before and after training to other prompts."""
    student = {"model": models["bytes"], "template": "plain"}
    held_out = {"prompts": {"kind": "inline", "prompts": PROMPTS}, "samples": 1}
    changes = {"objective": BOTH, "evaluation": held_out, "update": {"learning_rate": 0.1}}
    changes |= {"rollout": {"max_new_tokens": 2}, "failures": {"max_invalid": 1.0, "invalid_over": 1}}
    prompts = [f"a {i}" for i in range(8)]
    result = short_run(tmp_path, student, teacher(models, "student"), prompts, **changes)
    said = [line for line in capsys.readouterr().err.splitlines() if "held-out measurement leaves out" in line]
    counts = [int(re.search(r"leaves out (\d+) of 8 rollouts, which got no answer", line)[1]) for line in said]
    # The reasons are of each measurement alone, and nothing of the training between them.
    assert [sum(map(int, re.findall(r": (\d+)", line.partition("(")[2]))) for line in said] == counts
    compared = result.summary["compared"]
    assert [8 - count for count in counts] == [compared["before"], compared["after"]]
    assert compared["both"] < min(compared["before"], compared["after"])
    told = (
        f"8 prompts held out; the teacher's figures are of {compared['before']} before and {compared['after']} after, "
        f"of which {compared['both']} are the same: they compare different prompts"
    )
    assert f"| {told} | before | after |" in (tmp_path / "student" / "README.md").read_text()
    assert _run(tmp_path, {})["notes"] == [told]
    assert json.loads((tmp_path / "summary.json").read_text())["compared"] == compared


def test_a_step_without_a_common_token_names_the_objective_that_compares_spans():
    def told(objective, **signals):
        said = []
        of_run = SimpleNamespace(
            step=1,
            signals={"empty": 1.0, "length": 3.0, "positions": 5.0, **signals},
            recipe=SimpleNamespace(objective=objective),
            monitor=SimpleNamespace(warn=said.append),
        )
        Skips(Failures()).after_step(of_run)
        return said[0]

    none, some = {"alignment/single_bytes": 0.0}, {"alignment/single_bytes": 0.1}
    assert "add {kind: reverse_kl_sampled, spans: several} to objective" in told([ReverseKL()], **none)
    for objective, signals in (([ReverseKL()], some), ([ReverseKL()], {}), ([ReverseKLSampled()], none)):
        assert "student and teachers agree" in told(objective, **signals)


def test_several_teachers_and_routes_of_several_tokenizers(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    rows = [{"prompt": text, "task": "a" if i % 2 else "b"} for i, text in enumerate(PROMPTS)]
    routed = {
        "kind": "routed",
        "name": "experts",
        "by": "task",
        "routes": {"a": teacher(models, "bytes"), "b": teacher(models, "pieces")},
    }
    teachers = [routed, teacher(models, "pieces", name="anchor", weight=0.5)]
    short_run(tmp_path, student, teachers, rows, objective={"kind": "reverse_kl"})
    step = next(record for record in records(tmp_path) if "train/loss" in record)
    assert {"train/alignment/single_bytes@a", "train/alignment/single_bytes@anchor"} <= step.keys()


@pytest.fixture(scope="module")
def url():
    """A server of the teacher `bytes`."""
    tokenizer = byte_level()
    made = tiny_model(vocabulary=len(tokenizer.get_vocab()), seed=1, width=48, initializer_range=0.1)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    served = ServedModel(LanguageModel(made, tokenizer, template="plain"), "bytes", 16, None, False)
    with serving(application(served, None)) as running:
        yield running.url
    served.batcher.close()


def answers(settings, models, student):
    context = Context(torch.device("cpu"))
    made = settings.build(context, student)
    context = student.agree(context, [made], None)
    made.check_student(student, context)
    trajectories = written(student, ["the lazy dog", "hello 12"])
    (target,) = made.answer(trajectories, made.settings, context)
    made.close()
    return trajectories, target, made.pair(context)


@pytest.mark.parametrize("kind", ["exact", "sampled", "top_k"])
def test_a_served_teacher_says_what_it_says_in_this_process(models, url, kind):
    student = CausalLMStudent(language(characters()), None, Context(torch.device("cpu")))
    local = LocalTeacher(model=models["bytes"], template="plain", tokenizer="own")
    served = ServedTeacher(
        url=[url],
        tokenizer=f"own:{models['bytes']}",
        template="plain",
        answers=kind,
        **({"top_k": 30} if kind == "top_k" else {}),
    )
    trajectories, here, both = answers(local, models, student)
    _, there, _ = answers(served, models, student)
    mine, theirs = spans_in(here.distribution), spans_in(there.distribution)
    torch.testing.assert_close(theirs.log_probs, mine.log_probs, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs.single, mine.single)
    assert there.distribution.kind == ("spans" if kind == "sampled" else "aligned")
    weights = torch.ones(trajectories.positions)
    if kind == "exact":
        values = [ReverseKL()(student(trajectories), [t], weights, trajectories).values for t in (here, there)]
        torch.testing.assert_close(*values, atol=1e-4, rtol=1e-3)
    if kind != "top_k":
        return
    # By hand: the teacher's likeliest ids that are common tokens, and the rest of each.
    found, loss = gradients(student, ReverseKL(), [there], trajectories)
    at = here.distribution.places
    log_p = here.distribution.common.answer.log_probs()
    log_q = student(trajectories).log_probs()[at >= 0]
    pairs = {b: a for a, b in zip(*both.common, strict=True)}
    total = torch.zeros(())
    for n in range(len(log_p)):
        ids = [i for i in log_p[n].topk(30).indices.tolist() if i in pairs]
        p, q = log_p[n][ids], log_q[n][[pairs[i] for i in ids]]
        p, q = (torch.cat([each, torch.log1p(-each.exp().sum())[None]]) for each in (p, q))
        total = total + (q.exp() * (q - p)).sum()
    assert float(loss.values.sum()) == pytest.approx(float(total.detach()), rel=1e-3)
    student.module.zero_grad()
    (total / trajectories.positions).backward()
    expected = torch.cat([p.grad.flatten() for p in student.module.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-2)


def test_a_run_under_a_served_teacher_of_another_tokenizer(models, url, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    served = {"kind": "served", "url": url, "tokenizer": f"own:{models['bytes']}", "template": "plain"}
    short_run(tmp_path, student, {**served, "answers": "top_k", "top_k": 12}, PROMPTS, objective=BOTH)
    steps = [record for record in records(tmp_path) if "train/loss" in record]
    assert all(0 < step["train/alignment/common_mass"] < 1 for step in steps)


def test_what_a_server_cannot_say_is_refused(models):
    with pytest.raises(ValueError, match="own:org/model"):
        ServedTeacher(url=["http://127.0.0.1:1"], tokenizer="own")


def test_another_tokenizer_is_refused_with_the_setting_that_takes_it(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    with pytest.raises(IncompatibleError, match=r"another tokenizer than the student.*Set tokenizer: own"):
        short_run(tmp_path, student, {**teacher(models, "bytes"), "tokenizer": None}, PROMPTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": {"kind": "reverse_kl_candidates"}}, "answers 'aligned'"),
        ({"objective": {"kind": "reverse_kl", "top_k": 500}}, "ids in common"),
        ({"shaping": {"kind": "log_ratio_gate", "limit": 1.0}}, "answers 'aligned'"),
        ({"rollout": {"max_new_tokens": 8, "watch": {"kind": "drift"}}}, "rollout.watch"),
    ],
)
def test_what_cannot_be_computed_from_spans_is_refused(models, tmp_path, changes, told):
    student = {"model": models["student"], "template": "plain"}
    with pytest.raises(IncompatibleError, match=told):
        short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, **changes)


def test_who_would_write_in_other_ids_is_told_so(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    with pytest.raises(IncompatibleError, match="the teacher that writes has tokenizer: own"):
        short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, objective=BOTH, rollout="teacher")
    asks = {"held_out": 2, "teacher_answers": True}
    with pytest.raises(IncompatibleError, match="teacher_answers is true, and the teacher has tokenizer: own"):
        short_run(tmp_path, student, teacher(models, "bytes"), PROMPTS, objective=BOTH, evaluation=asks)


def test_own_is_said_of_teachers_alone():
    with pytest.raises(RecipeError, match="said of a teacher"):
        parse_recipe(
            {"student": {"model": "a/b", "tokenizer": "own"}, "teacher": {"model": "a/c"}, "prompts": ["x"]}, "r"
        )


def test_a_plan_says_how_well_two_tokenizers_go_together(models, tmp_path):
    recipe = {
        "student": {"model": models["student"], "template": "plain"},
        "teacher": [teacher(models, "bytes", name="a"), teacher(models, "pieces", name="b")],
        "prompts": {"kind": "inline", "prompts": PROMPTS},
        "objective": BOTH,
        "evaluation": {"held_out": 2},
        "output": str(tmp_path),
    }
    plan = make_plan(parse_recipe(recipe, "r"))
    told = dict(plan.tokenizers)
    assert told["a: tokens in common"].startswith("50 of the student's 55")
    assert 0 < float(told["a: one token on both sides"].split("%")[0]) < 100
    assert float(told["a: its tokens for one of the student's"]) < 1
    assert "b: several tokens on a side" in told
    assert "tokenizers" in dict(plan.sections())
    assert plan.as_dict()["tokenizers"] == told


def stored_recipe(models, output, which="bytes", **changes):
    return {
        "steps": 2,
        "student": {"model": models["student"], "template": "plain"},
        "teacher": teacher(models, which),
        "prompts": {"kind": "inline", "prompts": PROMPTS},
        "objective": {"kind": "squared_log_ratio"},
        "rollout": {"max_new_tokens": 8},
        "batch": {"prompts": 2, "micro": 2},
        "evaluation": {"held_out": 2, "samples": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(output),
        **changes,
    }


def test_a_store_keeps_spans_and_names_both_tokenizers(models, tmp_path):
    recipe = parse_recipe(stored_recipe(models, tmp_path / "run"), "r")
    store = sample(recipe, tmp_path / "store", quiet=True)
    with pytest.raises(IncompatibleError, match="--kind sampled"):
        score(recipe, store.path, "exact", quiet=True)
    targets = score(recipe, store.path, "sampled", quiet=True)
    header = targets.header
    assert header.kind == "spans"
    assert {header.tokenizer, store.header.tokenizer} == {
        reader(each()).tokenizer_hash for each in (characters, byte_level)
    }

    student = CausalLMStudent(language_of_folder(models["student"]), None, Context(torch.device("cpu")))
    live = LocalTeacher(model=models["bytes"], template="plain", tokenizer="own").build(student.context, student)
    context = student.agree(Context(torch.device("cpu")), [live], None)
    prompts = {p.id: p for p in load_prompts(recipe.prompts)}
    rows = list(range(store.header.rows))
    trajectories = store.trajectories(rows, [prompts[name] for name in store.prompt_ids], torch.device("cpu"))
    (said,) = live.answer(trajectories, live.settings, context)
    found = targets.answer(rows, trajectories.lengths.tolist())
    for name, value in vars(said.distribution.spans).items():
        torch.testing.assert_close(getattr(found, name), value, atol=1e-5, rtol=1e-5)
    assert targets.left_out(rows) == unanswered(trajectories, [said]).tolist()

    trained = stored_recipe(
        models,
        tmp_path / "trained",
        teacher={"kind": "stored", "path": str(store.path)},
        rollout={"kind": "stored", "path": str(store.path)},
    )
    result = execute(parse_recipe(trained, "r"), quiet=True)
    assert result.history
    for objective, told in (
        ({"kind": "reverse_kl"}, "answers 'spans'"),
        ({"kind": "reverse_kl_sampled"}, "own samples"),
    ):
        with pytest.raises(IncompatibleError, match=told):
            execute(parse_recipe({**trained, "objective": objective}, "r"), quiet=True, overwrite=True)


def test_of_a_beginning_of_a_row_a_span_that_goes_beyond_it_does_not_count():
    marks = torch.tensor([7, 3, 2, 2, 7, 0], dtype=torch.uint8)
    row = {"log_probs": torch.tensor([-1.0, -2.0, 0.0, 0.0, -3.0, 0.0]), "marks": marks}
    for length, compared in ((6, 5), (5, 5), (4, 4), (3, 1), (2, 1), (1, 1), (0, 0)):
        begun = _begun(row, length)
        found = begun["marks"][:length]
        assert int((found & COMPARED != 0).sum()) == compared
        assert float(begun["log_probs"][:length].sum()) == float(row["log_probs"][:compared].sum())
    assert torch.equal(marks, torch.tensor([7, 3, 2, 2, 7, 0], dtype=torch.uint8)), "the row stays as it is"


def language_of_folder(folder):
    return LanguageModel.load(ModelSettings(model=folder, template="plain"), "cpu")


def test_own_with_a_place(models, tmp_path):
    student = {"model": models["student"], "template": "plain"}
    placed = teacher(models, "bytes", tokenizer=f"own:{models['bytes']}")
    found = short_run(tmp_path, student, placed, PROMPTS)
    assert found is not None
    assert opd.__version__
