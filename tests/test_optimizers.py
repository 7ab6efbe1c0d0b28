"""The optimisers of the plain update: that each moves what it says, survives a kill, and is refused where it cannot."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from opd.api import execute, export
from opd.checkpoints.tree import flatten, unflatten
from opd.context import Context
from opd.errors import RecipeError, RunError
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLMStudent
from opd.updates import optimizers
from opd.updates.optimizers import Together, make_optimizer
from opd.updates.plain import PlainUpdate
from tests.checkpoints import assert_same_run, killed_at, make, models  # noqa: F401
from tests.conftest import tiny_model

THERE = [
    k
    for k in ("adamw", "sgd", "muon", "adamw_8bit", "schedule_free")
    if importlib.util.find_spec(optimizers.PACKAGES.get(k, "torch"))
]
SETTINGS = {"rate": 0.1, "decay": 0.01, "betas": (0.9, 0.99), "momentum": None}


@pytest.mark.parametrize("kind", THERE)
def test_a_run_that_is_killed_goes_on_bit_for_bit_and_is_measured_as_it_is_saved(kind, make, monkeypatch, tmp_path):  # noqa: F811
    rate = {"sgd": 0.3}.get(kind, 1e-2)
    block = {"optimizer": kind, "learning_rate": [[0, rate], [5, rate / 2]], "weight_decay": 0.01}
    settings = {"update": block, "checkpoint": {"every": 2}}
    undisturbed, broken = make("undisturbed", **settings), make("broken", **settings)
    result = execute(undisturbed, quiet=True)
    assert result.after["reverse_kl"] < result.before["reverse_kl"]
    killed_at(monkeypatch, broken, 3)
    killed_at(monkeypatch, broken, 5, resume=True)
    execute(broken, quiet=True, resume=True)
    assert_same_run(undisturbed, broken)
    # What is exported from the last checkpoint is what was measured and saved.
    from transformers import AutoModelForCausalLM

    out = AutoModelForCausalLM.from_pretrained(export(undisturbed.directory, tmp_path / "out")).state_dict()
    for name, weight in result.student.state_dict().items():
        torch.testing.assert_close(out[name], weight, msg=name)


def test_adamw_is_torchs_own_and_the_default():
    assert PlainUpdate().optimizer == "adamw"
    model, twin = tiny_model(), tiny_model()
    mine = make_optimizer("adamw", model, **SETTINGS)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for _ in range(3):
        for one, optimizer in ((model, mine), (twin, reference)):
            optimizer.zero_grad()
            one(torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_inside_and_adamw_the_rest(tied):
    model = tiny_model(tie_word_embeddings=tied)
    optimizer = make_optimizer("muon", model, **SETTINGS)
    assert isinstance(optimizer, Together)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ([names[id(p)] for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    assert sorted([*muon, *adamw]) == sorted(names.values())
    assert all(".mlp." in name or ".self_attn." in name for name in muon)
    assert len(muon) == 2 * 7
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(adamw)
    assert ("lm_head.weight" in adamw) == (not tied)
    twin = tiny_model(tie_word_embeddings=tied)
    alone = torch.optim.Muon(
        [twin.get_parameter(name) for name in muon], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    others = [twin.get_parameter(name) for name in adamw]
    rest = torch.optim.AdamW(others, lr=0.1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for _ in range(3):
        for one, steps in ((model, [optimizer]), (twin, [alone, rest])):
            one.zero_grad()
            one(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
            for each in steps:
                each.step()
        # A state that was written and read again is the same state, shared by both parts.
        optimizer.load_state_dict(optimizer.state_dict())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name), msg=name)


@pytest.mark.skipif("adamw_8bit" not in THERE, reason="bitsandbytes is not installed")
def test_moments_of_8_bits_stay_such_through_a_checkpoint(tokenizer):
    def built():
        language = LanguageModel(tiny_model(width=96), tokenizer, template="plain")
        student = CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))
        return student, PlainUpdate(optimizer="adamw_8bit", learning_rate=1e-2).build(student, Accelerator(cpu=True))

    def step(student, update):
        student.language.model(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
        update.apply(update.settings)

    student, update = built()
    step(student, update)
    structure, tensors = flatten({"update": update.state_dict(), "student": student.state_dict()})
    state = unflatten(structure, tensors)
    again, other = built()
    again.load_state_dict(state["student"])
    other.load_state_dict(state["update"])
    assert torch.uint8 in {value.dtype for value in flatten(other.state_dict())[1].values()}
    for one, its in ((student, update), (again, other)):
        step(one, its)
    for (name, a), b in zip(student.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("now", THERE)
@pytest.mark.parametrize("then", THERE)
def test_what_an_optimiser_keeps_is_stored_by_name_and_fits_no_other_one(then, now, tokenizer):
    """Optimisers number parameters otherwise: Muon has the matrices first."""

    def built(kind, **options):
        language = LanguageModel(tiny_model(width=96, **options), tokenizer, template="plain")
        student = CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))
        return student, PlainUpdate(optimizer=kind, learning_rate=1e-2).build(student, Accelerator(cpu=True))

    student, update = built(then)
    student.language.model(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
    update.apply(update.settings)
    state = unflatten(*flatten(update.state_dict()))
    parameters = dict(student.language.model.named_parameters())
    assert all(any(whole.endswith(name) or name.endswith(whole) for whole in parameters) for name in state["moments"])
    if then == now:
        _, other = built(now)
        other.load_state_dict(state)
        before, after = (flatten(each.state_dict()) for each in (update, other))
        assert before[0] == after[0]
        assert all(torch.equal(before[1][name], after[1][name]) for name in before[1] if "/average/" not in name)
        for options in ({"layers": 1}, {"layers": 3}, {"intermediate_size": 32}):
            with pytest.raises(RunError, match=r"does not fit the update: the trained .* (there|here)"):
                built(now, **options)[1].load_state_dict(state)
    else:
        with pytest.raises(RunError, match=rf"update.optimizer is '{now}'.*set update.optimizer={then}"):
            built(now)[1].load_state_dict(state)


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({}, {"optimizer": "muon"}, "update.optimizer is 'muon', and the checkpoint holds what 'adamw' kept"),
        ({"optimizer": "muon"}, {}, "update.optimizer is 'adamw', and the checkpoint holds what 'muon' kept"),
        ({}, {"average": {"every": 1}}, "update.average is set, and the checkpoint holds no mean"),
    ],
)
def test_another_update_is_refused_even_if_changes_are_accepted(then, now, words, make):  # noqa: F811
    execute(make("run", update=then, steps=1), quiet=True)
    with pytest.raises(RunError, match=r"does not fit, (what it holds of update is|it holds no mean)"):
        execute(make("run", update=now, steps=2), quiet=True, resume=True)
    with pytest.raises(RunError, match=words) as error:
        execute(make("run", update=now, steps=2), quiet=True, resume=True, force_changed=True)
    assert len(str(error.value).splitlines()) <= 2


def test_momentum_is_the_recipes():
    for kind, given, expected in (("sgd", None, 0.9), ("sgd", 0.5, 0.5), ("muon", None, 0.95), ("muon", 0.6, 0.6)):
        optimizer = make_optimizer(kind, tiny_model(), **{**SETTINGS, "momentum": given})
        assert optimizer.param_groups[0]["momentum"] == expected


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"momentum": 0.5}, "momentum is a setting of sgd and muon; adamw has betas"),
        ({"optimizer": "sgd", "betas": [0.8, 0.9]}, "sgd has no betas"),
        ({"optimizer": "schedule_free", "average": {}}, "leave average out"),
        ({"optimizer": "lion"}, "adamw_8bit"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(block, words, make):  # noqa: F811
    with pytest.raises(RecipeError, match=words):
        make("run", update=block)


@pytest.mark.parametrize("kind", ["adamw_8bit", "schedule_free"])
def test_packages_that_are_not_there_are_named(kind, make, monkeypatch):  # noqa: F811
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=rf"{kind}.*pip install {optimizers.PACKAGES[kind]}"):
        execute(make("run", update={"optimizer": kind}), quiet=True)


def test_what_cannot_be_sharded_is_refused():
    student = SimpleNamespace(module=tiny_model(), shards=True)
    with pytest.raises(RecipeError, match="take adamw or sgd"):
        PlainUpdate(optimizer="muon").build(student, SimpleNamespace(is_fsdp2=True))
