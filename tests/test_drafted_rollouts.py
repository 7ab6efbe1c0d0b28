"""A student that samples with a drafter's help writes what it writes alone."""

from __future__ import annotations

import pytest
import torch

import opd
from opd.api import execute
from opd.drafting.native import save_drafter
from opd.errors import IncompatibleError, ModelError
from opd.language.engines.transformers import LanguageModel
from opd.plan import make_plan
from opd.recipe import parse_recipe
from tests.conftest import character_tokenizer, rolled_out, save_tiny, tiny_model
from tests.drafters import FORMS, LAYERS, drafter_of
from tests.test_loop import build, recipe_for

OPTIONS = {"layers": LAYERS, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tuple(save_tiny(folder / name, seed=seed, **OPTIONS) for seed, name in enumerate(("student", "teacher")))


@pytest.fixture(scope="module")
def drafters(models, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("drafters"), {}
    model = LanguageModel(tiny_model(seed=0, **OPTIONS), character_tokenizer(), "plain")
    for name, form in FORMS.items():
        found[name] = str(folder / name)
        save_drafter(folder / name, drafter_of(form, model), model.base.get_input_embeddings().weight)
    other = LanguageModel(tiny_model(seed=0, width=48, **OPTIONS), character_tokenizer(), "plain")
    save_drafter(folder / "wide", drafter_of(FORMS["chain"], other), other.base.get_input_embeddings().weight)
    found["wide"] = str(folder / "wide")
    return found


def engine(drafter, **settings):
    return {"kind": "drafted", "model": drafter, **settings}


def helped(models, tmp_path, drafter, **rollout):
    return recipe_for(models, tmp_path, rollout={"engine": engine(drafter), **rollout})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.8}, {"top_k": 1}])
def test_texts_and_their_log_probabilities_are_the_students_own(models, drafters, tmp_path, form, cuts):
    plain = build(recipe_for(models, tmp_path, rollout=cuts, temperature=0.9), tmp_path)
    prompts = plain.course.next(0, {}, None).prompts
    alone = rolled_out(plain, prompts, 3, 20)
    rollout = {"engine": engine(drafters[form]), "batch": 7, **cuts}
    recipe = recipe_for(models, tmp_path, rollout=rollout, temperature=0.9)
    together = rolled_out(build(recipe, tmp_path), prompts, 3, 20)
    assert together.actions.tolist() == alone.actions.tolist()
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.finished.tolist() == alone.finished.tolist()
    torch.testing.assert_close(together.behaviour_log_probs, alone.behaviour_log_probs, atol=1e-4, rtol=1e-4)


def test_drawn_proposals_have_exact_log_probabilities(models, drafters, tmp_path):
    recipe = helped(models, tmp_path, drafters["chain"])
    drawn = engine(drafters["chain"], proposing="drawn", proposals=2)
    run = build(recipe_for(models, tmp_path, rollout={"engine": drawn}), tmp_path)
    assert recipe.rollout.engine.proposing == "likeliest"
    made = rolled_out(run, run.course.next(0, {}, None).prompts, 2, 20)
    own = run.student(made).log_probs().gather(1, made.actions[:, None])[:, 0]
    torch.testing.assert_close(own.detach(), made.behaviour_log_probs, atol=1e-4, rtol=1e-4)


def test_a_run_with_a_drafter_takes_the_steps_of_one_without(models, drafters, tmp_path):
    runs = [
        execute(recipe_for(models, tmp_path / str(i), rollout=rollout), quiet=True)
        for i, rollout in enumerate(({}, {"engine": engine(drafters["chain"])}))
    ]
    losses = [[r["train/loss"] for r in run.history if "train/loss" in r] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(r["train/rollout_gap"] < 1e-4 for r in runs[1].history if "train/rollout_gap" in r)


def test_a_beginning_is_gone_on_from(models, drafters, tmp_path):
    first = {"kind": "teacher", "max_new_tokens": 12}
    texts = []
    for name, then in (("a", {}), ("b", {"engine": engine(drafters["block"])})):
        rollout = {"kind": "switch", "first": first, "then": {"kind": "student", "max_new_tokens": 12, **then}}
        recipe = recipe_for(models, tmp_path / name).dump() | {"rollout": {**rollout, "position": 4}}
        (tmp_path / name).mkdir()
        run = build(parse_recipe(recipe), tmp_path / name)
        texts.append(rolled_out(run, run.course.next(0, {}, None).prompts, 1, 12).actions.tolist())
    assert texts[0] == texts[1]


def test_mistakes_are_told_of(models, drafters, tmp_path):
    with pytest.raises(ModelError, match=r"drafter is for a target of width 48"):
        build(helped(models, tmp_path, drafters["wide"]), tmp_path)
    with pytest.raises(ModelError, match=r"rollout.engine.model 'nowhere' holds no drafter"):
        build(helped(models, tmp_path, "nowhere"), tmp_path)
    for changes, said in (({"proposals": 9}, "4 at most"), ({"proposing": "drawn"}, "drawn apart")):
        rollout = {"engine": engine(drafters["block"], **changes)}
        with pytest.raises(IncompatibleError, match=said):
            build(recipe_for(models, tmp_path, rollout=rollout), tmp_path)
    with pytest.raises(opd.OpdError, match="'drafted' writes rows that have none; remove watch, or engine"):
        helped(models, tmp_path, drafters["chain"], watch="repetition")


def test_a_copy_in_another_dtype_verifies_and_follows_the_student(models, drafters, tmp_path):
    run = build(helped(models, tmp_path, drafters["chain"], dtype="bfloat16"), tmp_path)
    assert run.rollout.dtype == torch.bfloat16
    assert not run.rollout.elsewhere
    prompts = run.course.next(0, {}, None).prompts
    gaps = []
    for _ in range(2):
        made = rolled_out(run, prompts, 2, 12)
        own = run.student(made).log_probs().detach().gather(1, made.actions[:, None])[:, 0]
        gaps.append(float((own - made.behaviour_log_probs).abs().mean()))
        with torch.no_grad():
            for weight in run.student.module.parameters():
                weight.copy_(weight.roll(1, 0))
    assert 0 < max(gaps) < 0.1


def test_a_plan_counts_the_sampling_and_tells_of_the_drafter(models, drafters, tmp_path):
    alone = make_plan(recipe_for(models, tmp_path))
    with_one = make_plan(helped(models, tmp_path, drafters["chain"]))
    assert with_one.memory == alone.memory
    (told,) = (note for note in with_one.notes if "proposes to the student" in note)
    assert drafters["chain"] in told


@pytest.mark.parametrize("tree", [None, {"width": 2, "nodes": 8}])
def test_what_was_saved_is_logged(models, drafters, tmp_path, tree):
    settings = engine(drafters["chain"], tree=tree)
    result = execute(
        recipe_for(models, tmp_path, rollout={"engine": settings, "top_k": 1}, self_test=False), quiet=True
    )
    steps = [record for record in result.history if "train/loss" in record]
    for i, record in enumerate(steps):
        passes, tokens, length = (
            record[f"train/engine/{name}"] for name in ("target_passes", "written_tokens", "acceptance_length")
        )
        assert record["train/engine/passes_saved"] == pytest.approx(1 - passes / tokens)
        if i:  # before the first, held-out answers were written
            assert tokens == record["train/sampled_tokens"]
            assert (tokens - 16) / (passes - 16) == pytest.approx(length)
        assert 1 <= length <= 5


def test_a_tree_writes_what_the_student_writes_alone(models, drafters, tmp_path):
    plain = build(recipe_for(models, tmp_path), tmp_path)
    prompts = plain.course.next(0, {}, None).prompts
    alone = rolled_out(plain, prompts, 2, 12)
    rollout = {"engine": engine(drafters["chain of some ids"], tree={"width": 4, "nodes": 16})}
    together = rolled_out(build(recipe_for(models, tmp_path, rollout=rollout), tmp_path), prompts, 2, 12)
    assert together.actions.tolist() == alone.actions.tolist()
    torch.testing.assert_close(together.behaviour_log_probs, alone.behaviour_log_probs, atol=1e-4, rtol=1e-4)
    for model, tree, said in (("block", {}, "do not see each other"), ("chain", {"nodes": 2}, "4 proposals already")):
        rollout = {"engine": engine(drafters[model], tree=tree)}
        with pytest.raises(IncompatibleError, match=rf"rollout\.engine\.tree.*{said}"):
            build(recipe_for(models, tmp_path, rollout=rollout), tmp_path)
