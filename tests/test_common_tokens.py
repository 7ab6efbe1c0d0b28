"""Distributions over the tokens that student and teachers have in common: ids that are not are in none of them."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from opd.context import Context
from opd.distributions import Categorical, Head, Vocabulary
from opd.divergences import ReverseKLSampled, Target, compare, divergence_loss
from opd.errors import DataError, IncompatibleError
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.language.agreement import check_tokenizers, common_vocabulary
from opd.language.engines.sampler import Sampler
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens, tokens_of
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import load_prompts
from opd.recipe import parse_recipe
from opd.rollouts.stored import StoredRollout, StoredTrajectories
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.stored import StoredAnswers, StoredTeacher
from tests.conftest import tiny_model
from tests.test_divergences import ON_SUPPORT, definition, scene
from tests.tiny import TEXTS, saved, short_run, turn_tokenizer

EXCLUDED = [0, 7, 8, 33]


def without(head: Head, left_out=EXCLUDED) -> Head:
    return replace(head, vocabulary=replace(head.vocabulary, excluded=tuple(left_out)))


def subset(distribution, hidden, weight, bias):
    """float64 log-probabilities of the ids that count, by the definition of a head, and those ids."""
    head = distribution.head
    ids = [i for i in range(head.size) if i not in head.vocabulary.excluded]
    logits = head.scale * (hidden @ weight[ids].T + (0 if bias is None else bias[ids]))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, -1), torch.tensor(ids)


def pair(**settings):
    student, teacher, weights, actions, lengths = scene(**settings)
    student = Categorical(student.hidden, without(student.head))
    teacher = Categorical(teacher.hidden, without(teacher.head))
    possible = torch.tensor([i for i in range(student.head.size) if i not in EXCLUDED])
    actions = possible[actions % len(possible)]
    given = [student.hidden, student.head.weight, *([] if student.head.bias is None else [student.head.bias])]
    exact = [each.detach().double().requires_grad_() for each in given]
    log_q, ids = subset(student, exact[0], exact[1], exact[2] if len(exact) > 2 else None)
    log_p, _ = subset(teacher, teacher.hidden.double(), teacher.head.weight.double(), None)
    places = torch.searchsorted(ids, actions)
    return student, teacher, weights, actions, lengths, given, exact, log_p.detach(), log_q, places


@pytest.mark.parametrize("divergence", ON_SUPPORT, ids=lambda d: f"{d.kind}-{getattr(d, 'beta', '')}")
@pytest.mark.parametrize(
    "head", [{}, {"temperature": 0.7}, {"softcap": 3.0, "scale": 0.5}, {"vocabulary": 41}, {"bias": True}]
)
@pytest.mark.parametrize("top_k", [None, 6])
def test_divergences_are_those_of_the_distributions_over_the_ids_that_count(divergence, head, top_k):
    student, teacher, weights, actions, lengths, given, exact, log_p, log_q, _ = pair(**head)
    divergence = divergence.model_copy(update={"top_k": top_k})
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    grads = torch.autograd.grad(loss.total, given)
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
    assert not grads[1][EXCLUDED].any()


def test_the_sampled_estimate_is_that_of_the_distributions_over_the_ids_that_count():
    student, teacher, weights, actions, lengths, given, exact, log_p, log_q, places = pair()
    divergence = ReverseKLSampled()
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    grads = torch.autograd.grad(loss.total, given)
    p, q = (each.gather(1, places[:, None]).squeeze(1) for each in (log_p, log_q))
    value, coefficient = divergence.value_and_coefficient(p.float(), q.detach().float(), lengths)
    wanted = torch.autograd.grad((weights.double() * coefficient.double() * q).sum(), exact)
    torch.testing.assert_close(loss.values, value, atol=1e-5, rtol=1e-4)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=1e-4)
    assert not grads[1][EXCLUDED].any()


def test_log_probabilities_and_their_gradient_by_autograd_are_those_of_the_ids_that_count():
    student, *_, given, exact, _, log_q, _ = pair(temperature=0.7)
    ids = [i for i in range(student.head.size) if i not in EXCLUDED]
    log_probs = student.log_probs()
    torch.testing.assert_close(log_probs[:, ids], log_q.detach().float(), atol=1e-5, rtol=1e-4)
    assert not log_probs.exp()[:, EXCLUDED].any()
    got = torch.autograd.grad((log_probs.exp() * log_probs).sum(), given)
    want = torch.autograd.grad((log_q.exp() * log_q).sum(), exact)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-5, rtol=1e-4)
    entropy = compare(student, None, torch.tensor(ids)[torch.arange(len(student)) % len(ids)]).values["student_entropy"]
    torch.testing.assert_close(entropy, -(log_q.exp() * log_q).sum(-1).detach().float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("width", [32, 512], ids=["plain", "ordered"])
def test_no_excluded_id_is_drawn(width):
    """An id that the head likes best, with the head as it is and with its weight ordered for decoding."""
    tokenizer = turn_tokenizer()
    model = tiny_model(vocabulary=512, width=width, layers=1)
    left_out = list(range(300, 512, 2))
    with torch.no_grad():
        model.lm_head.weight[left_out] *= 40
    language = LanguageModel(model, tokenizer, "plain")
    for top_p, top_k in ((1.0, 0), (0.9, 0), (1.0, 450)):
        drawn = {}
        for excluded in ((), tuple(left_out)):
            head = language.head(1.0, Vocabulary(excluded=excluded))
            sampler = Sampler(language, head, (1,), top_p, top_k, packed=True)
            assert (sampler.product is not None) == (width == 512)
            state = sampler.start([torch.tensor([9, 10, 11])], 16, 12, list(range(16)))
            sampler.extend(state, 12)
            drawn[excluded] = {int(i) for actions, _, _ in state.rows() for i in actions}
            assert torch.isfinite(torch.cat([log_probs for _, log_probs, _ in state.rows()])).all()
        assert drawn[()] & set(left_out)
        assert not drawn[tuple(left_out)] & set(left_out)


def models(*tokenizers, vocabulary=100):
    return [LanguageModel(tiny_model(vocabulary=vocabulary, seed=i), t, "plain") for i, t in enumerate(tokenizers)]


def holed_tokenizer(*holes):
    """Without some tokens, whose ids stay free."""
    whole = turn_tokenizer()
    core = type(whole._tokenizer)(
        type(whole._tokenizer.model)({t: i for t, i in whole.get_vocab().items() if t not in holes}, unk_token="<unk>")
    )
    core.pre_tokenizer, core.decoder = whole._tokenizer.pre_tokenizer, whole._tokenizer.decoder
    return type(whole)(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def test_the_common_vocabulary_is_the_tokens_that_all_have():
    plain, extra, holed = turn_tokenizer(), turn_tokenizer(extra=("<tool>", "</tool>")), holed_tokenizer("{", "}")
    size = len(plain)
    assert common_vocabulary(models(plain, plain)) == Vocabulary(size)
    assert common_vocabulary(models(plain)) == Vocabulary(size)
    assert common_vocabulary(models(extra)) == Vocabulary(size + 2)
    assert common_vocabulary(models(plain, extra)) == Vocabulary(size)
    holes = tuple(sorted(plain.convert_tokens_to_ids(["{", "}"])))
    assert common_vocabulary(models(plain, holed)) == Vocabulary(size, holes)
    assert common_vocabulary(models(holed, extra)) == Vocabulary(size, holes)
    assert common_vocabulary(models(plain, vocabulary=60)) == Vocabulary(60)
    assert common_vocabulary(models(plain), [Vocabulary(50, (3, 49))]) == Vocabulary(49, (3,))
    check_tokenizers(*models(plain, holed), "the teacher")
    check_tokenizers(*models(holed, extra), "the teacher")
    check_tokenizers(*models(turn_tokenizer(begins=True), plain), "the teacher")


def test_ids_that_read_alike_have_a_token_each_though_the_vocabulary_tells_of_one():
    alike = turn_tokenizer()
    whole = alike.get_vocab()
    alike.get_vocab = lambda: {token: i for token, i in whole.items() if token not in "{}"}
    assert common_vocabulary(models(alike, turn_tokenizer())) == Vocabulary(len(whole))


def test_holes_and_tokens_of_one_side_are_said_when_the_run_starts():
    student, teacher = models(holed_tokenizer("{"), holed_tokenizer("{", "}"))
    context = Context(torch.device("cpu"))
    built = CausalLMStudent(student, None, context)
    settings = LocalTeacher(model="t", template="plain")
    agreed = built.agree(context, [LanguageTeacher(teacher, settings, context.device)], None)
    holes = sorted(turn_tokenizer().convert_tokens_to_ids(["{", "}"]))
    common = tokens_of(agreed).vocabulary
    assert common.excluded == tuple(holes)
    one_sided, hole = built.notes
    assert one_sided == "1 tokens that not every tokenizer has ('}') are in no distribution"
    assert hole == f"1 ids between tokens (the first: {holes[0]}) are in no distribution"
    assert tokens_of(agreed).vocabulary.outside(
        torch.tensor([9, *holes, tokens_of(agreed).vocabulary.size])
    ).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_mass_does_not_move_to_tokens_that_the_teacher_alone_has(tmp_path, capsys):
    """The teacher would say <tool> at every position; the student's tokenizer has no such token."""
    plain, extra = turn_tokenizer(), turn_tokenizer(extra=("<tool>", "</tool>"))
    student, teacher = tiny_model(vocabulary=98, seed=0), tiny_model(vocabulary=98, seed=1)
    with torch.no_grad():
        states = torch.cat([teacher.model(torch.tensor([plain(t)["input_ids"]])).last_hidden_state[0] for t in TEXTS])
        mean = states.mean(0)
        teacher.lm_head.weight[len(plain)] = 12 * mean / mean.norm() ** 2 + teacher.lm_head.weight[20]
    ids = torch.tensor([plain("add 1+2=")["input_ids"]])

    def mass(model):
        with torch.no_grad():
            return float(torch.softmax(model(ids).logits[0, -1], -1)[len(plain) : len(extra)].sum())

    assert mass(teacher) > 0.9
    before = mass(student)
    result = short_run(
        tmp_path / "run",
        {"model": saved(tmp_path / "s", student, plain), "template": "plain"},
        {"model": saved(tmp_path / "t", teacher, extra), "template": "plain"},
        steps=20,
        update={"learning_rate": 1e-2},
        objective="forward_kl",
    )
    assert mass(result.student) < before + 0.3
    assert "2 tokens that not every tokenizer has ('<tool>', '</tool>')" in capsys.readouterr().err


def test_a_response_with_a_token_that_not_all_have_is_refused_with_its_row(tmp_path):
    plain, extra = turn_tokenizer(), turn_tokenizer(extra=("<tool>", "</tool>"))
    with pytest.raises(DataError, match=r"prompts\[1\].*column 'response' holds '<tool>'"):
        short_run(
            tmp_path / "run",
            {"model": saved(tmp_path / "s", tiny_model(vocabulary=98, seed=0), extra), "template": "plain"},
            {"model": saved(tmp_path / "t", tiny_model(vocabulary=98, seed=1), plain), "template": "plain"},
            [{"prompt": t, "response": "<tool>" if i == 1 else "a"} for i, t in enumerate(TEXTS)],
            rollout={"kind": "data"},
            objective="forward_kl",
            evaluation={"prompts": [{"kind": "inline", "prompts": ["a"]}]},
        )


def test_stored_targets_know_which_tokens_they_are_over(tmp_path):
    """Scored by a teacher whose tokenizer has holes, a store serves runs over the same ids and no others."""
    plain, holed = turn_tokenizer(), holed_tokenizer("{", "}")
    student = {"model": saved(tmp_path / "s", tiny_model(vocabulary=98, seed=0), plain), "template": "plain"}
    teacher = {"model": saved(tmp_path / "t", tiny_model(vocabulary=98, seed=1), holed), "template": "plain"}
    recipe = parse_recipe(
        {
            "student": student,
            "teacher": teacher,
            "prompts": {"kind": "inline", "prompts": ["1+1=", "2+2="]},
            "rollout": {"kind": "student", "max_new_tokens": 3},
            "hardware": {"device": "cpu"},
            "evaluation": {"held_out": 1},
        }
    )
    store = sample(recipe, tmp_path / "store", quiet=True)
    assert (store.header.vocabulary, store.header.excluded) == (len(plain), [])
    holes = sorted(plain.convert_tokens_to_ids(["{", "}"]))
    targets = score(recipe, tmp_path / "store", "top_k", quiet=True, top_k=5)
    assert (targets.header.vocabulary, targets.header.excluded) == (len(plain), holes)
    context = Context(torch.device("cpu"), agreed=Tokens(Vocabulary(len(plain), tuple(holes))))
    answers = StoredAnswers(StoredTeacher(path=str(tmp_path / "store"), consistency="ignored"))
    assert answers.vocabulary == tokens_of(context).vocabulary
    answers.check_student(None, context)
    with pytest.raises(IncompatibleError, match="another vocabulary"):
        answers.check_student(None, context.with_(agreed=Tokens(vocabulary=Vocabulary(len(plain)))))
    # And its trajectories serve no run in which a token of theirs has no probability.
    language = LanguageModel.load(recipe.student, "cpu")
    for left_out, fits in ((tuple(holes), True), ((int(store.actions(0)[0]),), False)):
        run = context.with_(agreed=Tokens(Vocabulary(len(plain), left_out), tuple(store.header.end_ids)))
        source = StoredTrajectories(StoredRollout(path=str(store.path), max_new_tokens=3), language, run)
        with contextlib.nullcontext() if fits else pytest.raises(DataError, match=r"prompts\[0\].*holds a token"):
            source.check_prompts(load_prompts(recipe.prompts)[:1])
