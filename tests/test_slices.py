"""Heads over a chosen set of ids: everything is that of the distributions over those ids, and no other id moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.context import Context
from opd.distributions import EVERY_ID, Categorical, Head, Routed, Sampled, TopK, Vocabulary
from opd.divergences import ReverseKLSampled, Target, compare, divergence_loss
from opd.divergences.lightning import Lightning
from opd.errors import IncompatibleError
from opd.language.agreement import common_vocabulary
from opd.language.engines.sampler import Sampler
from opd.language.engines.transformers import LanguageModel
from opd.language.own_outputs import check_draws
from opd.language.tokens import Tokens
from opd.objectives.sft import SFT
from opd.teachers.local import LanguageTeacher, LocalTeacher
from tests.conftest import tiny_model, trajectories_of
from tests.test_common_tokens import models
from tests.test_divergences import ON_SUPPORT, definition, scene
from tests.tiny import turn_tokenizer

SLICE = Vocabulary.of([44, 3, 7, 8, 20, 21, 30, 33, 48, 49])
IDS = list(SLICE.ids)
OTHERS = [i for i in range(50) if i not in IDS]


def given(student):
    return [student.hidden, student.head.weight, *([] if student.head.bias is None else [student.head.bias])]


def pair(lora=False, **settings):
    """Student and teacher over the slice, their leaves, and float64 log-probabilities over an explicit subset."""
    student, teacher, weights, actions, lengths = scene(**settings)
    leaves = given(student)
    weight = student.head.weight
    if lora:
        g = torch.Generator().manual_seed(5)
        a, b = (torch.randn(*s, generator=g).mul_(0.3).requires_grad_() for s in ((3, 8), (50, 3)))
        leaves = [student.hidden, a, b]
        weight = weight.detach() + b @ a
    head = Head(weight, student.head.bias, student.head.scale, student.head.softcap, student.head.temperature)
    exact = [each.detach().double().requires_grad_() for each in leaves]
    wide = student.head.weight.detach().double() + exact[2] @ exact[1] if lora else exact[1]

    def log_probs(hidden, weight, bias):
        logits = head.scale * (hidden @ weight[IDS].T + (0 if bias is None else bias[IDS]))
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return torch.log_softmax(logits / head.temperature, -1)

    log_q = log_probs(exact[0], wide, exact[2] if len(exact) > 2 and not lora else None)
    log_p = log_probs(teacher.hidden.double(), teacher.head.weight.double(), None).detach()
    actions = torch.tensor(IDS)[actions % len(IDS)]
    mine = Categorical(student.hidden, head.over(SLICE))
    theirs = Categorical(teacher.hidden, teacher.head.over(SLICE))
    return mine, theirs, weights, actions, lengths, leaves, exact, log_p, log_q


HEADS = [{}, {"temperature": 0.7}, {"softcap": 3.0, "scale": 0.5}, {"bias": True}, {"lora": True}]


@pytest.mark.parametrize("divergence", ON_SUPPORT, ids=lambda d: f"{d.kind}-{getattr(d, 'beta', '')}")
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("top_k", [None, 4])
def test_divergences_are_those_over_the_slice(divergence, head, top_k):
    student, teacher, weights, actions, lengths, leaves, exact, log_p, log_q = pair(**head)
    divergence = divergence.model_copy(update={"top_k": top_k})
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    grads = torch.autograd.grad(loss.total, leaves, retain_graph=True)
    torch.testing.assert_close(
        loss.log_probs, log_q.gather(1, SLICE.columns(actions)[:, None]).squeeze(1).detach().float()
    )
    if top_k:
        chosen = log_p.topk(top_k).indices

        def buckets(x):
            near = x.gather(1, chosen)
            return torch.cat([near, torch.log1p(-near.exp().sum(-1, keepdim=True))], -1)

        log_p, log_q = buckets(log_p), buckets(log_q)
    values = definition(divergence, log_p, log_q)
    wanted = torch.autograd.grad((values * weights.double()).sum(), exact)
    torch.testing.assert_close(loss.values, values.detach().float(), atol=1e-5, rtol=1e-4)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-4)
    assert not grads[-1 if head else 1][OTHERS].any()
    if top_k:
        answer = TopK.of(teacher, top_k)
        assert set(answer.ids.unique().tolist()) <= set(IDS)
        stored = divergence_loss(divergence, student, [Target(answer)], weights, actions, lengths)
        torch.testing.assert_close(stored.values, loss.values)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("divergence", [ReverseKLSampled(), ReverseKLSampled(discount=0.5), Lightning()], ids=str)
def test_estimates_from_the_action_are_those_over_the_slice(divergence, head):
    student, teacher, weights, actions, lengths, leaves, exact, log_p, log_q = pair(**head)
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    places = SLICE.columns(actions)[:, None]
    p, q = (each.gather(1, places).squeeze(1) for each in (log_p, log_q))
    value, coefficient = divergence.value_and_coefficient(p.float(), q.detach().float(), lengths)
    wanted = torch.autograd.grad((weights.double() * coefficient.double() * q).sum(), exact)
    torch.testing.assert_close(loss.values, value, atol=1e-5, rtol=1e-4)
    for got, want in zip(torch.autograd.grad(loss.total, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-4)
    told = Sampled.of(teacher, actions)
    torch.testing.assert_close(told.log_probs, p.float(), atol=1e-5, rtol=1e-4)


def test_each_example_of_a_slice_and_imitation():
    student, teacher, weights, actions, lengths, leaves, exact, _, log_q = pair(bias=True)
    lengths = torch.tensor([20, 17])
    loss = divergence_loss(ON_SUPPORT[0], student, [Target(teacher)], weights, actions, lengths, per_example=True)
    whole = divergence_loss(ON_SUPPORT[0], student, [Target(teacher)], weights, actions, lengths)
    torch.testing.assert_close(loss.per_example.sum(), whole.total)
    for a, b in zip(
        torch.autograd.grad(loss.per_example.sum(), leaves, retain_graph=True),
        torch.autograd.grad(whole.total, leaves, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    imitated = SFT()(student, [], weights, replace(trajectories_of([20, 17]), actions=actions))
    wanted = torch.autograd.grad(-(weights * log_q.gather(1, SLICE.columns(actions)[:, None]).squeeze(1)).sum(), exact)
    for got, want in zip(torch.autograd.grad(imitated.total, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-4)


def test_log_probabilities_and_statistics_name_the_ids():
    student, teacher, _, actions, _, leaves, exact, log_p, log_q = pair(temperature=0.7)
    log_probs = student.log_probs()
    torch.testing.assert_close(log_probs, log_q.float(), atol=1e-5, rtol=1e-4)
    got = torch.autograd.grad((log_probs.exp() * log_probs).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((log_q.exp() * log_q).sum(), exact, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)
    found = compare(student, teacher, actions)
    torch.testing.assert_close(found.tops["teacher"][0][:, 0], torch.tensor(IDS)[log_p.argmax(1)])
    taken = log_q.gather(1, SLICE.columns(actions)[:, None]).squeeze(1).detach().float()
    torch.testing.assert_close(found.values["log_q"], taken, atol=1e-5, rtol=1e-4)
    assert (found.values["top1_agreement"] == (log_p.argmax(1) == log_q.argmax(1)).float()).all()
    top = compare(student, TopK.of(teacher, 3), actions)
    assert (top.values["top1_agreement"] == found.values["top1_agreement"]).all()


def test_an_action_of_no_column_is_refused_unless_it_does_not_count():
    student, teacher, weights, actions, lengths, *_ = pair()
    actions[4] = 5
    with pytest.raises(IncompatibleError, match="id 5 is none of this run's vocabulary \\(10 ids from 3 to 49\\)"):
        divergence_loss(ON_SUPPORT[0], student, [Target(teacher)], weights, actions, lengths)
    weights[4] = 0
    divergence_loss(ON_SUPPORT[0], student, [Target(teacher)], weights, actions, lengths)


def test_student_and_teachers_are_over_one_set():
    student, teacher, weights, actions, lengths, *_ = pair()
    wide = Categorical(teacher.hidden, scene()[1].head)
    routed = Routed((teacher, wide), torch.arange(37) % 2, torch.arange(37))
    for answer in (wide, routed):
        with pytest.raises(IncompatibleError, match=r"teacher 'expert' answers over all ids .* 10 ids from 3 to 49"):
            divergence_loss(ON_SUPPORT[0], student, [Target(answer, 1.0, "expert")], weights, actions, lengths)
    language = LanguageModel(tiny_model(vocabulary=40), turn_tokenizer(), "plain")
    settings, context = LocalTeacher(model="t", name="expert", template="plain"), Context(torch.device("cpu"))
    expert = LanguageTeacher(language, settings, context.device)
    with pytest.raises(IncompatibleError, match="the teacher expert has 40 ids and this run's vocabulary is 10 ids"):
        expert.check_student(None, context.with_(agreed=Tokens(vocabulary=SLICE)))
    expert.check_student(None, context.with_(agreed=Tokens(vocabulary=Vocabulary.of([39, 2]))))
    with pytest.raises(IncompatibleError, match="ascending"):
        Vocabulary(ids=(4, 3))
    with pytest.raises(IncompatibleError, match="not both"):
        Vocabulary(10, ids=(3, 4))


def test_the_common_vocabulary_with_a_fixed_slice_is_a_slice():
    plain = turn_tokenizer()
    size = len(plain)
    assert common_vocabulary(models(plain), [Vocabulary.of([9, 3, size + 4])]) == Vocabulary.of([3, 9])
    assert common_vocabulary(models(plain), [Vocabulary.of([3, 9, 12]), Vocabulary(11, (9,))]) == Vocabulary.of([3])
    assert not EVERY_ID.outside(torch.tensor([0, 99])).any()
    assert SLICE.outside(torch.tensor([3, 4])).tolist() == [False, True]
    assert [SLICE.holds(i) for i in (44, 45)] == [True, False]


@pytest.mark.parametrize("width", [32, 2048], ids=["plain", "ordered"])
def test_only_ids_of_the_slice_are_drawn_and_their_log_probabilities_are_the_models(width):
    model = tiny_model(vocabulary=512, width=width, layers=1)
    language = LanguageModel(model, turn_tokenizer(), "plain")
    members = Vocabulary.of(range(100, 500, 4))
    sampler = Sampler(language, language.head(0.8, members), (104, 7), packed=True)
    assert (sampler.product is not None) == (width == 2048)
    state = sampler.start([torch.tensor([9, 10, 11])], 16, 12, list(range(16)))
    sampler.extend(state, 12)
    rows = state.rows()
    assert {int(i) for actions, _, _ in rows for i in actions} <= set(members.ids)
    assert all((int(actions[-1]) == 104) == ended for actions, _, ended in rows)
    check_draws(sampler, [torch.tensor([9, 10, 11])], language, "the student", 1e-4)
