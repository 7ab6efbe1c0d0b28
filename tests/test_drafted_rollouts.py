"""A student that samples with a drafter's help writes what it writes alone."""

from __future__ import annotations

import pytest
import torch

import opd
from opd.api import execute
from opd.drafting.native import save_drafter
from opd.errors import IncompatibleError, ModelError
from opd.language.engines.transformers import LanguageModel
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


def helped(models, tmp_path, drafter, **rollout):
    return recipe_for(models, tmp_path, rollout={"drafter": {"model": drafter}, **rollout})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.8}, {"top_k": 1}])
def test_texts_and_their_log_probabilities_are_the_students_own(models, drafters, tmp_path, form, cuts):
    plain = build(recipe_for(models, tmp_path, rollout=cuts, temperature=0.9), tmp_path)
    prompts = plain.course.next(0, {}, None).prompts
    alone = rolled_out(plain, prompts, 3, 20)
    recipe = recipe_for(
        models, tmp_path, rollout={"drafter": {"model": drafters[form]}, "batch": 7, **cuts}, temperature=0.9
    )
    together = rolled_out(build(recipe, tmp_path), prompts, 3, 20)
    assert together.actions.tolist() == alone.actions.tolist()
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.finished.tolist() == alone.finished.tolist()
    torch.testing.assert_close(together.behaviour_log_probs, alone.behaviour_log_probs, atol=1e-4, rtol=1e-4)


def test_drawn_proposals_have_exact_log_probabilities(models, drafters, tmp_path):
    recipe = helped(models, tmp_path, drafters["chain"])
    drafter = {"model": drafters["chain"], "proposing": "drawn", "proposals": 2}
    run = build(recipe_for(models, tmp_path, rollout={"drafter": drafter}), tmp_path)
    assert recipe.rollout.drafter.proposing == "likeliest"
    made = rolled_out(run, run.course.next(0, {}, None).prompts, 2, 20)
    own = run.student(made).log_probs().gather(1, made.actions[:, None])[:, 0]
    torch.testing.assert_close(own.detach(), made.behaviour_log_probs, atol=1e-4, rtol=1e-4)


def test_a_run_with_a_drafter_takes_the_steps_of_one_without(models, drafters, tmp_path):
    runs = [
        execute(recipe_for(models, tmp_path / str(i), rollout=rollout), quiet=True)
        for i, rollout in enumerate(({}, {"drafter": {"model": drafters["chain"]}}))
    ]
    losses = [[r["train/loss"] for r in run.history if "train/loss" in r] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert all(r["train/rollout_gap"] < 1e-4 for r in runs[1].history if "train/rollout_gap" in r)


def test_a_beginning_is_gone_on_from(models, drafters, tmp_path):
    first = {"kind": "teacher", "max_new_tokens": 12}
    texts = []
    for name, then in (("a", {}), ("b", {"drafter": {"model": drafters["block"]}})):
        rollout = {"kind": "switch", "first": first, "then": {"kind": "student", "max_new_tokens": 12, **then}}
        recipe = recipe_for(models, tmp_path / name).dump() | {"rollout": {**rollout, "position": 4}}
        (tmp_path / name).mkdir()
        run = build(parse_recipe(recipe), tmp_path / name)
        texts.append(rolled_out(run, run.course.next(0, {}, None).prompts, 1, 12).actions.tolist())
    assert texts[0] == texts[1]


def test_mistakes_are_told_of(models, drafters, tmp_path):
    with pytest.raises(ModelError, match=r"drafter is for a target of width 48"):
        build(helped(models, tmp_path, drafters["wide"]), tmp_path)
    with pytest.raises(ModelError, match=r"rollout.drafter.model 'nowhere' holds no drafter"):
        build(helped(models, tmp_path, "nowhere"), tmp_path)
    for changes, said in (({"proposals": 9}, "4 at most"), ({"proposing": "drawn"}, "drawn apart")):
        drafter = {"model": drafters["block"], **changes}
        with pytest.raises(IncompatibleError, match=said):
            build(recipe_for(models, tmp_path, rollout={"drafter": drafter}), tmp_path)
    with pytest.raises(opd.OpdError, match="remove watch, or drafter"):
        helped(models, tmp_path, drafters["chain"], watch="repetition")
