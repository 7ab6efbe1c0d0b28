"""Blocks at anchors in texts that are written already: where they are, what stands in them, and what is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opd
from opd.api import execute
from opd.distributions import Categorical, Head, Target
from opd.divergences.of_blocks import Accepted, Rejected
from opd.divergences.pooled import Pooled
from opd.drafting.anchors import shuffled, uniform, walked
from opd.drafting.block import Block
from opd.drafting.chain import Chain
from opd.drafting.evaluation import counts_of
from opd.drafting.record import acceptance_length
from opd.drafting.vocabulary import Frequent
from opd.jobs.sampling import sample
from opd.loop import train
from opd.objectives.cross_entropy import CrossEntropy
from opd.plan import DrafterPlan, make_plan
from opd.policies.draft import slots_of
from opd.prompts import Prompt
from opd.recipe import load_recipe, parse_recipe
from opd.rollouts import PrefixSource, Request
from opd.rollouts.anchored import AnchoredRollout
from opd.rollouts.speculative import SpeculativeRollout
from opd.store import Store, StoreHeader
from opd.teachers.target import TargetTeacher
from opd.trajectories import AUTHORS
from tests.conftest import save_tiny, trajectories_of
from tests.drafters import FORMS, LAYERS, drafted, drafter_of, language, student_of
from tests.test_draft_opd import BLOCK, CHAIN, TEXTS, blocks, build, recipe_for, whole
from tests.test_gpu import on_each_device

PROMPTS = ["12+7=", "spell a word", "9", "what is 3?", "abc def ghi"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("target"), seed=1, layers=LAYERS, initializer_range=0.15)


@pytest.fixture(scope="module")
def store(target, tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    recipe = recipe_for(target, place, rollout={"text_temperature": 1.0})
    return str(sample(recipe, place / "store", quiet=True).path)


# Places.


def test_a_walk_goes_behind_what_stood_and_the_targets_own_token():
    assert walked([2, 9, 9, 0, 3, 9, 9, 9, 1]) == [0, 3, 4, 8]
    assert walked([]) == []
    assert walked([0, 0, 0]) == [0, 1, 2]


def test_uniform_anchors_are_each_as_likely():
    counts = torch.zeros(6)
    for seed in range(600):
        found = uniform(6, 2, torch.Generator().manual_seed(seed))
        assert found == sorted(set(found))
        counts[found] += 1
    assert float((counts / 200 - 1).abs().max()) < 0.25
    assert uniform(3, 9, torch.Generator().manual_seed(0)) == [0, 1, 2]


def test_shuffled_segments_keep_number_and_lengths_and_do_not_overlap():
    lengths, seen = [3, 1, 4, 1], set()
    for seed in range(60):
        anchors, order = shuffled(lengths, 11, torch.Generator().manual_seed(seed))
        assert sorted(order) == [0, 1, 2, 3]
        covered = [at + k for at, i in zip(anchors, order, strict=True) for k in range(1, lengths[i] + 1)]
        assert len(covered) == len(set(covered)) == 9
        assert min(covered) >= 1
        assert max(covered) <= 11
        seen.add(tuple(anchors))
    assert len(seen) > 20
    # Without an empty token they are in another order only.
    anchors, order = shuffled([2, 3], 5, torch.Generator().manual_seed(1))
    assert anchors == [0, [2, 3][order[0]]]


# Rollouts. The texts are those of a rollout by speculative decoding, handed over as if a store had held them.


class Given(PrefixSource):
    """Responses that are there already."""

    def __init__(self, made):
        records = made.contexts
        self.found = replace(
            made,
            contexts=[record.prompt for record in records],
            actions=torch.cat([record.response for record in records]),
            lengths=torch.tensor([len(record.response) for record in records]),
        )

    def __call__(self, request):
        return self.found


def placed(student, made, stream=0, of=AnchoredRollout, **settings):
    settings = of(texts={"kind": "data"}, batch=2, **settings)
    source = settings.build(student.context, student, [TargetTeacher().build(student.context, student)])
    source.sources = [Given(made)]
    return source(Request(made.prompts, 1, 64, stream, settings, student.context))


def students(form, **options):
    model = language(**options)
    return student_of(drafter_of(form, model), model)


FEW = {"vocabulary": 6, "initializer_range": 0.1}
"""Of a target with six ids, of which a drafter without training hits some."""

FORMS_OF_FEW = {
    "chain": Chain(proposals=4),
    "chain of some ids": Chain(proposals=4, vocabulary=[1, 3, 4]),
    "block": Block(mask_token=5, layers=2, block=5),
    "one proposal": Block(mask_token=5, layers=1, block=2),
}


def rolled(student, temperature=0.0, budget=24):
    prompts = [Prompt(f"p{i}", {"prompt": "x"}) for i in range(5)]
    ids = [torch.tensor([1 + (i + j) % 5 for j in range(n)]) for i, n in enumerate((5, 1, 9, 12, 3))]
    student.reader.encode = lambda prompt: ids[int(prompt.id[1:])]
    settings = SpeculativeRollout(text_temperature=temperature)
    source = settings.build(student.context, student, [TargetTeacher().build(student.context, student)])
    return source(Request(prompts, 1, budget, 0, settings, student.context))


@pytest.mark.parametrize("form", FORMS_OF_FEW)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pieces", [2**24, 300])
def test_verified_anchors_are_those_of_speculative_decoding(form, temperature, pieces, monkeypatch):
    """The text as it is, its blocks, what stood, and what the target says at each slot; in one pass or in several."""
    monkeypatch.setattr("opd.drafting.texts.LOGITS", pieces)
    student = students(FORMS_OF_FEW[form], **FEW)
    made = rolled(student, temperature)
    again = placed(student, made)
    assert any(bool(record.accepted.any()) for record in made.contexts)
    for one, other in zip(made.contexts, again.contexts, strict=True):
        for name in ("prompt", "response", "anchors", "accepted", "committed"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        torch.testing.assert_close(one.features, other.features, atol=1e-4, rtol=1e-4)
    assert made.actions.tolist() == again.actions.tolist()
    assert made.learn.tolist() == again.learn.tolist()
    assert made.columns.keys() == again.columns.keys()
    for name, column in made.columns.items():
        torch.testing.assert_close(column, again.columns[name], atol=1e-4, rtol=1e-4, msg=name)
    learnt = made.learn
    one, other = (each.answers[0].distribution.hidden[learnt] for each in (made, again))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    student.check_outputs(again, 1e-4)
    TargetTeacher().build(student.context, student).check_outputs(again, "the teacher")


def plain_hidden(student, record, place, tokens):
    """The target's hidden state behind a text's beginning and given tokens, from a plain pass."""
    text = torch.cat([record.prompt, record.response])[: place + 1]
    return student.reader([torch.cat([text, tokens])], [torch.zeros(1, dtype=torch.int64)], "right")[0]


@pytest.mark.parametrize("anchors", ["every", "uniform", "verified", "random"])
@pytest.mark.parametrize("form", ["chain", "block"])
def test_blocks_of_text_hold_its_tokens_and_are_taught_by_them(form, anchors):
    student = students(FORMS_OF_FEW[form], **FEW)
    made = rolled(student, 1.0)
    again = placed(student, made, anchors=anchors, slots="text", per_text=3 if anchors == "uniform" else None)
    hidden = torch.split(again.answers[0].distribution.hidden, again.lengths.tolist())
    assert "log_q" not in again.columns
    assert set(again.authors.tolist()) == {AUTHORS.index("data")}
    at = 0
    for i, record in enumerate(again.contexts):
        places, count = (record.anchors - len(record.prompt)).tolist(), len(record.response) - 1
        assert len(set(places)) == len(places)
        if anchors == "every":
            assert places == list(range(count))
        elif anchors == "uniform":
            assert len(places) == min(3, count)
        else:
            assert len(places) == len(made.contexts[i].anchors)
        for m, place in enumerate(places):
            for k in range(1, 5):
                here = at + 4 * m + k - 1
                inside = place + k <= count
                assert bool(again.learn[here]) == bool(again.columns["accepted"][here]) == inside
                assert not again.columns["rejected"][here]
                assert not again.columns["corrected"][here]
                assert int(again.columns["slot"][here]) == k
                if inside:
                    assert int(again.actions[here]) == int(again.columns["verified"][here])
                    assert int(again.actions[here]) == int(record.response[place + k])
            if place + 3 <= count:
                told = plain_hidden(student, record, int(record.anchors[m]), record.response[place + 1 : place + 3])
                torch.testing.assert_close(hidden[i][4 * m + 2], told, atol=1e-4, rtol=1e-4)
        at += 4 * len(places)
        assert acceptance_length([record]) != acceptance_length([record]), "these are no steps of verifying"
    student.check_outputs(again, 1e-4)
    TargetTeacher().build(student.context, student).check_outputs(again, "the teacher")


@pytest.mark.parametrize("anchors", ["every", "uniform"])
def test_proposals_at_other_anchors_stand_as_far_as_they_are_the_text(anchors):
    student = students(FORMS_OF_FEW["chain"], **FEW)
    made = rolled(student, 1.0)
    again = placed(student, made, anchors=anchors, per_text=4 if anchors == "uniform" else None)
    proposals = torch.split(again.actions, again.lengths.tolist())
    for record, tokens in zip(again.contexts, proposals, strict=True):
        for at, block, stood in zip(record.anchors, tokens.view(-1, 4).tolist(), record.accepted.tolist(), strict=True):
            behind = record.response[int(at) - len(record.prompt) + 1 :].tolist()
            agree = [a == b for a, b in zip(block, behind, strict=False)]
            assert stood == [*agree, False].index(False)
    assert bool(again.columns["rejected"].any())
    student.check_outputs(again, 1e-4)
    TargetTeacher().build(student.context, student).check_outputs(again, "the teacher")


def test_at_random_anchors_the_streams_are_apart():
    """As many accepted slots as at the verified anchors, elsewhere; the rejected ones where they were."""
    student = students(FORMS_OF_FEW["chain"], **FEW)
    made = rolled(student, 1.0)
    again = placed(student, made, anchors="random", stream=3)
    count = int(made.learn.sum())
    assert int(again.learn.sum()) == count + int(made.columns["corrected"].sum()), "a corrected slot is in both streams"
    for name in ("accepted", "corrected", "rejected"):
        assert int((again.columns[name] & again.learn).sum()) == int((made.columns[name] & made.learn).sum()), name
    shares = {}
    for objective in (Accepted(correction=True), Rejected(), CrossEntropy()):
        shares[type(objective)] = objective.position_weights(again, "token_mean", whole) > 0
    assert not (shares[Accepted] & shares[Rejected]).any()
    assert torch.equal(shares[Accepted], shares[CrossEntropy])
    assert torch.equal(shares[Accepted] | shares[Rejected], again.learn)
    data = AUTHORS.index("data")
    assert set(again.authors[shares[Accepted]].tolist()) == {data}
    assert data not in again.authors[shares[Rejected]].tolist()
    moved = 0
    for one, other in zip(made.contexts, again.contexts, strict=True):
        blocks = len(one.anchors)
        if not blocks:
            continue
        assert other.steps.tolist() == [False] * blocks + [True] * blocks
        assert other.anchors[blocks:].tolist() == one.anchors.tolist()
        assert sorted(other.accepted[:blocks].tolist()) == sorted(one.accepted.tolist())
        moved += sorted(other.anchors[:blocks].tolist()) != one.anchors.tolist()
    assert moved >= 2
    assert acceptance_length(again.contexts) == acceptance_length(made.contexts)
    TargetTeacher().build(student.context, student).check_outputs(again, "the teacher")
    assert torch.equal(placed(student, made, anchors="random", stream=3).actions, again.actions)
    assert not torch.equal(
        placed(student, made, anchors="random", stream=4).columns["accepted"], again.columns["accepted"]
    )


def test_both_streams_at_random_anchors_are_the_drafters_blocks_there():
    student = students(FORMS_OF_FEW["block"], **FEW)
    made = rolled(student, 1.0)
    again = placed(student, made, anchors="random", moved="both")
    assert again.lengths.tolist() == made.lengths.tolist()
    assert bool(again.columns["rejected"].any())
    assert set(again.authors.tolist()) == {AUTHORS.index("student")}
    student.check_outputs(again, 1e-4)
    TargetTeacher().build(student.context, student).check_outputs(again, "the teacher")


def test_a_text_of_one_token_has_no_block():
    student = students(FORMS["chain"])
    made = drafted(student, PROMPTS[:2], budget=1)
    for slots in ("text", "drafter"):
        again = placed(student, made, slots=slots)
        assert again.lengths.tolist() == [0, 0]
        assert student(again).hidden.shape == (0, 32)


@pytest.mark.parametrize(
    ("settings", "walked"),
    [
        ({}, True),
        ({"anchors": "random"}, True),
        ({"anchors": "random", "moved": "both"}, False),
        ({"slots": "text"}, False),
        ({"anchors": "uniform", "per_text": 3}, False),
        ({"anchors": "every"}, False),
    ],
)
@pytest.mark.parametrize("budget", [1, 9])
def test_only_texts_along_which_the_target_verified_count_as_written(settings, walked, budget):
    """One of a single token has no block; it is counted as others of the same rollout are."""
    student = students(FORMS["chain"])
    made = drafted(student, PROMPTS[:2], budget=budget)
    again = placed(student, made, **settings)
    counted = counts_of(again.contexts) | slots_of(again)
    tokens = sum(len(record.response) for record in made.contexts)
    assert (counted["answers"], counted["tokens"]) == ((2, tokens) if walked else (0, 0))
    assert counted["steps"] == (sum(len(record.anchors) for record in made.contexts) if walked else 0)


def test_a_drafter_that_stays_behind_proposes_what_it_did():
    student = students(FORMS_OF_FEW["chain"], **FEW)
    made = rolled(student, 1.0)
    settings = AnchoredRollout(texts={"kind": "data"}, proposer="start")
    frozen = settings.build(student.context, student, [])
    frozen.sources = [Given(made)]
    request = Request(made.prompts, 1, 64, 0, settings, student.context)
    before = frozen(request)
    with torch.no_grad():
        for weight in student.module.parameters():
            weight.add_(torch.randn_like(weight))
    assert torch.equal(frozen(request).actions, before.actions)
    assert "log_q" not in before.columns
    assert not torch.equal(placed(student, made).actions, before.actions)
    assert not frozen.current
    held_out = frozen.held_out(settings, student.context, student).source
    assert held_out.drafter is student.module


def test_it_stays_behind_while_a_target_writes_too(target, tmp_path):
    run = build(recipe_for(target, tmp_path, rollout={"proposer": "start"}, update={"learning_rate": 0.5}), tmp_path)
    request = run.at(0).request(run.held_out, 16, stream=0)
    before, live = run.rollout(request), run.sampler(run.at(0))(run.held_out, 1, 16, 0)
    assert torch.equal(before.actions, live.actions)
    train(run)
    assert torch.equal(run.rollout(request).actions, before.actions)
    assert not torch.equal(run.sampler(run.at(0))(run.held_out, 1, 16, 0).actions, before.actions)


# Objectives.


def test_cross_entropy_is_a_weighted_mean_over_known_tokens_by_hand():
    made = blocks()
    known = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    objective = CrossEntropy(decay=0.5)
    share = known * torch.tensor([1, 0.5, 0.25])
    weights = objective.position_weights(made, "token_mean", whole)
    torch.testing.assert_close(weights.view(4, 3), share / share.sum())
    logits = torch.zeros(12, 2, requires_grad=True)
    loss = objective(
        Categorical(logits, Head(torch.eye(2))), [], weights, replace(made, actions=torch.zeros(12).long())
    )
    assert float(loss.total.detach()) == pytest.approx(0.6931, abs=1e-4)
    loss.total.backward()
    # Token 0 stands at accepted slots and token 1 at corrected ones.
    sign = torch.where(made.columns["accepted"], -0.5, 0.5) * (made.columns["verified"] >= 0)
    torch.testing.assert_close(logits.grad[:, 0], weights * sign)


def test_accepted_slots_may_count_less_along_a_block():
    weights = Accepted(decay=0.5).position_weights(blocks(), "token_mean", whole)
    share = torch.tensor([[1, 0.5, 0], [0, 0, 0], [1, 0.5, 0.25], [1, 0, 0]])
    torch.testing.assert_close(weights.view(4, 3), share / share.sum())


def test_pooled_streams_have_one_denominator_by_hand():
    made = replace(blocks(), actions=torch.ones(12, dtype=torch.int64))
    objective = Pooled(accepted=1.0, rejected=2.0)
    accepted = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]])
    rejected = torch.tensor([[0, 0, 0.64], [1, 0.8, 0.64], [0, 0, 0], [0, 0, 0]])
    weights = objective.position_weights(made, "token_mean", whole)
    bottom = accepted.sum() + 2 * rejected.sum()
    torch.testing.assert_close(weights.view(4, 3), (accepted + 2 * rejected) / bottom)
    logits, one = torch.zeros(12, 2, requires_grad=True), Head(torch.eye(2))
    p = torch.tensor([0.75, 0.25]).log().expand(12, 2)
    loss = objective(Categorical(logits, one), [Target(Categorical(p, one))], weights, made)
    # Of q = (1/2, 1/2): 0.1308 at each accepted slot, whichever token stands there, and 0.1931 at each rejected one.
    wanted = (8 * 0.1308 + 2 * 3.08 * 0.1931) / (8 + 2 * 3.08)
    assert float(loss.total.detach()) == pytest.approx(wanted, abs=1e-4)
    same = objective(Categorical(p.clone().requires_grad_(), one), [Target(Categorical(p, one))], weights, made)
    assert float(same.total.detach()) == pytest.approx(0, abs=1e-6)
    apart = objective(Categorical(logits, one), [Target(Categorical(p, one))], weights, made, per_example=True)
    assert float(apart.per_example.sum().detach()) == pytest.approx(wanted, abs=1e-4)
    whole_kl = Pooled(estimator="whole", correction=False)
    weights = whole_kl.position_weights(made, "token_mean", whole)
    loss = whole_kl(Categorical(logits, one), [Target(Categorical(p, one))], weights, made)
    assert float(loss.total.detach()) == pytest.approx((6 * 0.1308 + 3.08 * 0.1438) / 9.08, abs=1e-4)


# Runs, on a store of the target's texts.


def test_a_store_of_a_drafters_recipe_holds_its_targets_texts(target, tmp_path):
    for temperature in (0.0, 1.0):
        recipe = recipe_for(target, tmp_path, rollout={"text_temperature": temperature})
        kept = sample(recipe, tmp_path / f"store-{temperature}", quiet=True)
        run = build(recipe, tmp_path)
        prompts = [Prompt(name, {"prompt": text}) for name, text in zip(kept.prompt_ids, TEXTS, strict=True)]
        made = run.rollout(run.at(0).request(prompts, 16, stream=0))
        for row, record in enumerate(made.contexts):
            assert kept.actions(row).tolist() == record.response.tolist()


def anchored(target, store, tmp_path, drafter=CHAIN, objective="accepted", **rollout):
    recipe = recipe_for(target, tmp_path, drafter)
    texts = {"kind": "stored", "path": store}
    changes = {"rollout": {"kind": "anchored", "texts": texts, **rollout}, "objective": objective}
    return parse_recipe({**recipe.dump(), **changes, "steps": 12 if objective == "pooled" else 4})


MIX = [{"kind": "accepted", "weight": 0.5}, {"kind": "rejected", "weight": 0.5}]


@pytest.mark.parametrize(
    ("drafter", "rollout", "objective"),
    [
        (BLOCK, {"anchors": "uniform", "per_text": 6, "slots": "text"}, {"kind": "cross_entropy", "decay": 0.8}),
        (CHAIN, {"anchors": "every", "slots": "text"}, {"kind": "accepted", "decay": 0.8}),
        ({**CHAIN, "vocabulary": list(range(3, 40))}, {"anchors": "every", "slots": "text"}, "cross_entropy"),
        (BLOCK, {"anchors": "verified", "slots": "text"}, "sft"),
        (CHAIN, {}, MIX),
        (BLOCK, {"anchors": "random"}, MIX),
        (BLOCK, {"proposer": "start"}, "pooled"),
    ],
)
def test_a_drafter_learns_from_stored_texts(target, store, tmp_path, drafter, rollout, objective):
    recipe = anchored(target, store, tmp_path, drafter, objective, **rollout)
    assert isinstance(make_plan(recipe), DrafterPlan)
    result = execute(recipe, quiet=True)
    # One token of a slot says less than all.
    name = "reverse_kl" if objective == "pooled" else "forward_kl"
    assert result.after[name] < result.before[name]
    steps = [r for r in result.history if "train/loss" in r]
    measured = "train/acceptance_length" in steps[-1]
    assert measured == (rollout.get("slots") != "text")
    if measured:
        assert "train/accepted_at/4" in steps[-1]
        assert "train/accepted_at/5" not in steps[-1]


@on_each_device
@pytest.mark.parametrize("drafter", [CHAIN, BLOCK])
@pytest.mark.parametrize("rollout", [{"anchors": "every", "slots": "text"}, {"anchors": "random"}])
def test_a_run_on_each_device_of_a_target_in_bfloat16(target, store, tmp_path, drafter, rollout, device):
    objective = "accepted" if rollout.get("slots") == "text" else MIX
    data = anchored(target, store, tmp_path, drafter, objective, **rollout).dump()
    data["student"]["target"]["dtype"], data["hardware"]["device"] = "bfloat16", device
    run = build(parse_recipe(data | {"steps": 2}), tmp_path)
    train(run)
    assert run.step == 2
    # The texts are those of the same model in float32.
    assert ("not written with the weights" in " ".join(run.rollout.notes)) == (rollout.get("slots") != "text")


def test_the_papers_control_is_planned_without_store_or_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = make_plan(load_recipe("draft_sft_qwen3_4b"))
    assert (plan.blocks, plan.proposals) == (512, 15)
    assert plan.as_dict()["tokens_per_step"] == {"read": 210 * 4096}
    assert max(plan.peaks.values()) == pytest.approx(min(plan.peaks.values()), rel=1e-2)
    # So nothing is printed of other acceptance lengths.
    assert dict(plan.sections())["memory at the peak of a step"][-1][0] == "sum"
    assert any("no store is there; opd rollout RECIPE --out stores/draft-qwen3-4b makes one" in n for n in plan.notes)


def test_a_plan_counts_the_blocks_of_each_way():
    def blocks_of(**settings):
        return AnchoredRollout(texts={"kind": "data"}, **settings).blocks(40, 2)

    assert blocks_of() == blocks_of(anchors="random", moved="both") == 20
    assert blocks_of(anchors="random") == blocks_of(anchors="every") == 40
    assert blocks_of(anchors="uniform", per_text=15) == 15


def test_a_mixture_of_given_texts_and_new_ones(target, store, tmp_path):
    texts = {"kind": "stored", "path": store}
    first = {"kind": "anchored", "texts": texts, "anchors": "every", "slots": "text"}
    rollout = {"kind": "mixture", "first": first, "second": {"kind": "speculative", "max_new_tokens": 16}}
    data = recipe_for(target, tmp_path).dump() | {"rollout": rollout, "steps": 2, "objective": MIX}
    run = build(parse_recipe(data), tmp_path)
    made = run.rollout(run.at(0).request(run.course.next(0, {}, None).prompts, stream=0))
    assert set(made.authors.tolist()) == {AUTHORS.index("data"), AUTHORS.index("student")}
    train(run)


def test_a_run_on_stored_texts_goes_on_from_its_state(target, store, tmp_path):
    def made(name):
        return build(anchored(target, store, tmp_path / name, anchors="random"), tmp_path / name)

    first = made("a")
    train(first)
    half = made("b")
    half.watch.read = lambda run, step, measured: setattr(run.watch, "ended_by", "enough" if step == 2 else None)
    train(half)
    rest = made("c")
    rest.restore(half.state())
    train(rest)
    for name, one in first.student.state_dict().items():
        torch.testing.assert_close(one, rest.student.state_dict()[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_vocabulary_by_frequency(target, store, tmp_path):
    opened = Store.open(store)
    count = torch.bincount(torch.cat([opened.actions(row) for row in range(opened.header.rows)]), minlength=64)
    ids = Frequent(size=12, store=store).ids(64)
    assert ids == sorted(set(ids))
    assert len(ids) == 12
    assert set(opened.header.end_ids) <= set(ids)
    others = [i for i in range(64) if i not in opened.header.end_ids]
    best = sorted(others, key=lambda i: (-int(count[i]), i))[: 12 - len(opened.header.end_ids)]
    assert set(ids) == set(best) | set(opened.header.end_ids)
    drafter = {**CHAIN, "vocabulary": {"size": 12, "store": store}}
    recipe = anchored(target, store, tmp_path, drafter, anchors="every", slots="text")
    assert make_plan(recipe).drafter.vocabulary == 12
    run = build(recipe, tmp_path)
    assert run.student.drafter.ids == tuple(ids)
    result = execute(recipe_for(target, tmp_path / "a", drafter, steps=1), quiet=True)
    folder = str(result.directory / "student")
    again = build(recipe_for(target, tmp_path / "b", drafter, student={"model": folder}), tmp_path / "b")
    assert again.student.drafter.ids == tuple(ids)
    other = {**CHAIN, "vocabulary": {"size": 13, "store": store}}
    with pytest.raises(opd.OpdError, match=r"vocabulary is .*write that"):
        build(recipe_for(target, tmp_path / "b", other, student={"model": folder}), tmp_path / "b")
    with pytest.raises(opd.OpdError, match=r"vocabulary.size is 65.*between"):
        Frequent(size=65, store=store).ids(64)
    with pytest.raises(opd.OpdError, match="ids end at 5"):
        Frequent(size=3, store=store).ids(6)


def test_of_equally_frequent_ids_the_smaller_come_first(tmp_path):
    """Nothing stands in these texts but the end: all others are as rare."""
    header = StoreHeader(
        prompts=1,
        group=1,
        draws=1,
        prompts_per_shard=1,
        prompts_hash="",
        rollout={},
        temperature=1.0,
        seed=0,
        budget=4,
        authors=["student"],
        student={},
        writers=[],
        tokenizer="",
        template="",
        end_ids=[7],
        vocabulary=8,
        excluded=[1],
        versions={},
    )
    made = trajectories_of([2], vocabulary=8)
    kept = Store.create_or_continue(tmp_path / "store", header, ["t0"])
    kept.write(0, replace(made, actions=torch.tensor([5, 7])))
    assert [Frequent(size=n, store=str(kept.path)).ids(10) for n in (1, 2, 4)] == [[7], [5, 7], [0, 2, 5, 7]]


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"texts": {"kind": "student"}}, r"'student' gives no texts that are written already; take stored or data"),
        ({"anchors": "uniform"}, r"say how many of a text, for instance per_text: 15"),
        ({"per_text": 3}, r"'verified', which has its own number; remove per_text"),
        ({"moved": "both"}, r"anchors: random with slots: drafter"),
        ({"anchors": "every", "slots": "text", "proposer": "start"}, r"nobody proposes; remove the key"),
        ({"proposer": "/nowhere"}, r"rollout.proposer '/nowhere' holds no drafter"),
        ({"proposals": 9}, r"rollout.proposals is 9.*4 at most"),
        ({"texts": {"kind": "stored", "path": "/nowhere"}}, r"no store at /nowhere"),
        ({"texts": {"kind": "data"}}, r"column 'response'"),
    ],
)
def test_mistakes_are_told_of(target, store, tmp_path, rollout, said):
    with pytest.raises(opd.OpdError, match=said):
        build(anchored(target, store, tmp_path, BLOCK, **rollout), tmp_path)


def test_a_proposer_of_other_ids_is_refused(target, store, tmp_path):
    some = {**CHAIN, "vocabulary": list(range(3, 40))}
    folder = str(execute(recipe_for(target, tmp_path / "a", some, steps=1), quiet=True).directory / "student")
    with pytest.raises(opd.OpdError, match="other ids than the drafter that is trained"):
        build(anchored(target, store, tmp_path, proposer=folder), tmp_path)


def test_a_proposer_of_longer_blocks_than_a_drafter_can_learn_is_refused(target, store, tmp_path):
    folder = str(execute(recipe_for(target, tmp_path / "a", {**BLOCK, "block": 8}, steps=1), quiet=True).directory)
    with pytest.raises(opd.OpdError, match=r"proposes 7 tokens.* 4 at most; set rollout.proposals to 4"):
        build(anchored(target, store, tmp_path, BLOCK, proposer=f"{folder}/student"), tmp_path)
    run = build(anchored(target, store, tmp_path, BLOCK, proposer=f"{folder}/student", proposals=4), tmp_path)
    assert run.rollout.drafting.drafter.most == 7


def test_a_ladder_that_goes_beyond_the_texts_is_refused(target, store, tmp_path):
    data = anchored(target, store, tmp_path).dump()
    for lengths, cut, said in (
        ([8, 32], {}, "goes up to 32 and the rows of .* to 16 tokens"),
        ([4, 8], {"max_new_tokens": 6}, "goes up to 8 and rollout.texts.max_new_tokens cuts stored trajectories at 6"),
    ):
        rollout = {**data["rollout"], "texts": {"kind": "stored", "path": store, **cut}}
        ladder = {"kind": "length_ladder", "lengths": lengths, "steps_per_rung": 2}
        with pytest.raises(opd.OpdError, match=said):
            parse_recipe({**data, "rollout": rollout, "curriculum": ladder})


def test_other_students_and_commands_refuse_it(target, store, tmp_path):
    recipe = anchored(target, store, tmp_path)
    with pytest.raises(opd.OpdError, match="'anchored', in which no target writes"):
        sample(recipe, tmp_path / "other")
    data = recipe.dump() | {"student": {"model": target, "template": "plain"}, "objective": "sft", "teacher": []}
    with pytest.raises(opd.OpdError, match="the student is no drafter"):
        build(parse_recipe(data | {"evaluation": {"held_out": 4}}), tmp_path)
