"""Values and gradients of every divergence, on hand-checked numbers and against autograd."""

from __future__ import annotations

import pytest
import torch

from opd.distributions import Categorical, Head, Sampled, TopK
from opd.divergences import (
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    ReverseKLSampled,
    Target,
    compare,
    divergence_loss,
)
from opd.divergences.reverse_kl_sampled import discounted_return
from opd.errors import IncompatibleError
from opd.operator.chunks import LARGEST_BUFFER, SMALLEST_CHUNK, chunk_rows, memory_bound

Z = torch.tensor([[1.0, 0.0, -1.0]])
P = torch.tensor([[0.2, 0.5, 0.3]])
FORWARD_GRAD = torch.tensor([[0.46524, -0.25527, -0.20997]])
REVERSE_GRAD = torch.tensor([[0.45605, -0.30120, -0.15485]])


def on_vector(divergence):
    scratch = [torch.empty_like(P) for _ in range(divergence.buffers)] + [torch.empty_like(P)]
    return divergence.value_and_grad(P.log(), torch.log_softmax(Z, -1), scratch)


def test_forward_kl_on_the_worked_example():
    value, grad = on_vector(ForwardKL())
    assert value.item() == pytest.approx(0.477953, abs=1e-5)
    torch.testing.assert_close(grad, FORWARD_GRAD, atol=2e-5, rtol=0)


def test_reverse_kl_on_the_worked_example():
    value, grad = on_vector(ReverseKL())
    assert value.item() == pytest.approx(0.516296, abs=1e-5)
    torch.testing.assert_close(grad, REVERSE_GRAD, atol=2e-5, rtol=0)


def test_mixture_is_linear_in_both_kls():
    _, grad = on_vector(Mixture(reverse_weight=0.25))
    torch.testing.assert_close(grad, 0.25 * REVERSE_GRAD + 0.75 * FORWARD_GRAD, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("beta", "end"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
def test_jensen_shannon_ends_are_the_two_kls(beta, end):
    value, grad = on_vector(JensenShannon(beta=beta))
    expected_value, expected_grad = on_vector(end)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected_grad)


def test_jensen_shannon_is_not_the_mixture():
    assert on_vector(JensenShannon(beta=0.5))[0] < 0.5 * on_vector(Mixture(reverse_weight=0.5))[0]


def definition(divergence, log_p, log_q):
    """The textbook formula, for autograd."""
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    if isinstance(divergence, ForwardKL):
        return forward
    if isinstance(divergence, ReverseKL):
        return reverse
    if isinstance(divergence, Mixture):
        lam = divergence.reverse_weight
        return lam * reverse + (1 - lam) * forward
    beta = divergence.beta
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


ON_SUPPORT = [
    ForwardKL(),
    ReverseKL(),
    Mixture(reverse_weight=0.3),
    JensenShannon(beta=0.5),
    JensenShannon(beta=0.1),
]


def scene(n=37, vocabulary=50, width=8, teacher_width=12, seed=0, bias=False, **head):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    hidden = rand(n, width).requires_grad_()
    weight = (rand(vocabulary, width) / width**0.5).requires_grad_()
    student_bias = rand(vocabulary).requires_grad_() if bias else None
    student = Categorical(hidden, Head(weight, student_bias, **head))
    teacher = Categorical(rand(n, teacher_width), Head(rand(vocabulary, teacher_width) / teacher_width**0.5, **head))
    weights = torch.rand(n, generator=g)
    actions = torch.randint(0, min(vocabulary, student.head.size), (n,), generator=g)
    return student, teacher, weights, actions, torch.tensor([n])


def leaves(student):
    return [t for t in (student.hidden, student.head.weight, student.head.bias) if t is not None]


@pytest.mark.parametrize("divergence", ON_SUPPORT, ids=lambda d: f"{d.kind}-{getattr(d, 'beta', '')}")
@pytest.mark.parametrize(
    "head", [{}, {"temperature": 0.7}, {"softcap": 3.0, "scale": 0.5}, {"vocabulary": 41}, {"bias": True}]
)
@pytest.mark.parametrize("top_k", [None, 6])
def test_operator_matches_autograd_of_the_definition(divergence, head, top_k):
    student, teacher, weights, actions, lengths = scene(**head)
    divergence = divergence.model_copy(update={"top_k": top_k})
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    grads = torch.autograd.grad(loss.total, leaves(student))

    log_p, log_q = teacher.log_probs(), student.log_probs()
    if top_k:
        ids = log_p.topk(top_k).indices

        def buckets(x):
            near = x.gather(1, ids)
            return torch.cat([near, torch.log1p(-near.exp().sum(-1, keepdim=True))], -1)

        log_p, log_q = buckets(log_p), buckets(log_q)
    expected_values = definition(divergence, log_p, log_q)
    expected = torch.autograd.grad((expected_values * weights).sum(), leaves(student))
    torch.testing.assert_close(loss.values, expected_values.detach(), atol=1e-5, rtol=1e-4)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_top_k_rows_and_live_teacher_with_top_k_agree():
    student, teacher, weights, actions, lengths = scene()
    live = divergence_loss(ReverseKL(top_k=6), student, [Target(teacher)], weights, actions, lengths)
    stored = divergence_loss(ReverseKL(), student, [Target(TopK.of(teacher, 6))], weights, actions, lengths)
    torch.testing.assert_close(live.values, stored.values)


def test_student_support_uses_the_students_ids():
    student, teacher, weights, actions, lengths = scene()
    by_teacher = divergence_loss(ReverseKL(top_k=3), student, [Target(teacher)], weights, actions, lengths)
    by_student = divergence_loss(
        ReverseKL(top_k=3, support_from="student"), student, [Target(teacher)], weights, actions, lengths
    )
    ids = student.log_probs().topk(3).indices
    rows = Categorical(teacher.hidden, teacher.head).log_probs().gather(1, ids)
    chosen = divergence_loss(ReverseKL(), student, [Target(TopK(rows, ids))], weights, actions, lengths)
    torch.testing.assert_close(by_student.values, chosen.values)
    assert not torch.allclose(by_teacher.values, by_student.values)


@pytest.mark.parametrize("divergence", ON_SUPPORT, ids=lambda d: f"{d.kind}-{getattr(d, 'beta', '')}")
@pytest.mark.parametrize("support_from", ["teacher", "student"])
def test_without_a_tail_both_sides_are_renormalised_over_the_ids(divergence, support_from):
    student, teacher, weights, actions, lengths = scene(softcap=3.0)
    settings = {"top_k": 6, "tail": "none", "support_from": support_from}
    bare = divergence.model_copy(update=settings)
    loss = divergence_loss(bare, student, [Target(teacher)], weights, actions, lengths, rows=5)
    log_p, log_q = teacher.log_probs(), student.log_probs()
    ids = (log_p if support_from == "teacher" else log_q).topk(6).indices
    values = definition(divergence, *(each.gather(1, ids).log_softmax(-1) for each in (log_p, log_q)))
    torch.testing.assert_close(loss.values, values.detach(), atol=1e-5, rtol=1e-4)
    for got, want in zip(
        torch.autograd.grad(loss.total, leaves(student)),
        torch.autograd.grad((values * weights).sum(), leaves(student)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert not bare.unbiased
    assert bare.descends == f"{divergence.descends} given the 6 ids"
    answer = TopK.of(teacher, 6)
    if support_from == "teacher":
        stored = divergence_loss(bare, student, [Target(answer)], weights, actions, lengths)
        torch.testing.assert_close(stored.values, loss.values)


def test_a_tail_that_nobody_has_is_refused():
    with pytest.raises(IncompatibleError, match="compares K ids, and the teacher answers for all: set top_k"):
        ReverseKL(tail="none").check_accepts(Categorical, "the teacher")
    ReverseKL(tail="none").check_accepts(TopK, "the teacher")
    ReverseKL(tail="none", top_k=3).check_accepts(Categorical, "the teacher")


def test_several_teachers_are_a_weighted_sum_of_divergences():
    student, teacher, weights, actions, lengths = scene()
    other = scene(seed=1)[1]
    per_row = torch.linspace(0, 1, len(student))
    both = divergence_loss(
        ReverseKL(),
        student,
        [Target(teacher, 0.3), Target(other, per_row)],
        weights,
        actions,
        lengths,
        rows=7,
    )
    one = divergence_loss(ReverseKL(), student, [Target(teacher)], weights * 0.3, actions, lengths)
    two = divergence_loss(ReverseKL(), student, [Target(other)], weights * per_row, actions, lengths)
    torch.testing.assert_close(both.total, one.total + two.total)
    for got, a, b in zip(
        torch.autograd.grad(both.total, leaves(student)),
        torch.autograd.grad(one.total, leaves(student)),
        torch.autograd.grad(two.total, leaves(student)),
        strict=True,
    ):
        torch.testing.assert_close(got, a + b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("divergence", ON_SUPPORT[:4], ids=lambda d: d.kind)
@pytest.mark.parametrize("per_example", [False, True])
def test_a_clipped_position_contributes_the_clip_and_its_gradient_shrinks_with_it(divergence, per_example):
    student, teacher, weights, actions, _ = scene()
    lengths = torch.tensor([20, 17])
    raw = definition(divergence, teacher.log_probs(), student.log_probs())
    clip = float(raw.detach().median())
    clipped = divergence.model_copy(update={"clip": clip})
    loss = divergence_loss(clipped, student, [Target(teacher)], weights, actions, lengths, 8, per_example)
    expected = (raw * (clip / raw.detach()).clamp(max=1) * weights).sum()
    assert 10 < int((loss.values > clip).sum()) < 27
    torch.testing.assert_close(loss.values, raw.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss.total, expected, atol=1e-5, rtol=1e-4)
    capped = (raw.detach().clamp(max=clip) * weights).sum()
    torch.testing.assert_close(loss.total.detach(), capped, atol=1e-5, rtol=1e-4)
    for got, want in zip(
        torch.autograd.grad(loss.total, leaves(student)),
        torch.autograd.grad(expected, leaves(student)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)
    assert divergence.unbiased
    assert not clipped.unbiased


def test_masked_rows_are_never_projected():
    student, teacher, weights, actions, lengths = scene()
    weights[::2] = 0
    poisoned = student.hidden.detach().clone()
    poisoned[::2] = float("nan")
    hidden = poisoned.requires_grad_()
    loss = divergence_loss(ReverseKL(), Categorical(hidden, student.head), [Target(teacher)], weights, actions, lengths)
    grad = torch.autograd.grad(loss.total, hidden)[0]
    assert torch.isfinite(loss.total)
    assert torch.equal(grad[::2], torch.zeros_like(grad[::2]))


@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_chunk_size_does_not_change_the_result(rows):
    student, teacher, weights, actions, lengths = scene()
    reference = divergence_loss(JensenShannon(), student, [Target(teacher)], weights, actions, lengths, rows=13)
    loss = divergence_loss(JensenShannon(), student, [Target(teacher)], weights, actions, lengths, rows=rows)
    torch.testing.assert_close(loss.values, reference.values)
    for a, b in zip(
        torch.autograd.grad(loss.total, leaves(student)),
        torch.autograd.grad(reference.total, leaves(student)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_sampled_reverse_kl_is_a_policy_gradient(discount, clamp):
    student, teacher, weights, actions, _ = scene()
    lengths = torch.tensor([20, 10, 7])
    divergence = ReverseKLSampled(discount=discount, clamp=clamp)
    loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=5)
    log_q = student.log_probs().gather(1, actions[:, None]).squeeze(1)
    log_p = teacher.log_probs().gather(1, actions[:, None]).squeeze(1)
    advantage = (log_p - log_q).detach()
    if clamp:
        advantage = advantage.clamp(-clamp, clamp)
    if discount:
        advantage = discounted_return(advantage, lengths, discount)
    expected = torch.autograd.grad(-(weights * advantage * log_q).sum(), leaves(student))
    for got, want in zip(torch.autograd.grad(loss.total, leaves(student)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    stored = divergence_loss(divergence, student, [Target(Sampled(log_p.detach()))], weights, actions, lengths)
    torch.testing.assert_close(stored.values, loss.values)


def test_discounted_return_by_hand():
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0])
    got = discounted_return(reward, torch.tensor([3, 2]), 0.5)
    torch.testing.assert_close(got, torch.tensor([2.75, 3.5, 3.0, 20.0, 20.0]))


def test_teacher_equal_to_student_gives_no_loss_and_no_gradient():
    student, _, weights, actions, lengths = scene()
    for divergence in [*ON_SUPPORT, ReverseKLSampled(), ReverseKL(top_k=5)]:
        loss = divergence_loss(divergence, student, [Target(student.detach())], weights, actions, lengths)
        assert loss.values.abs().max() < 1e-5
        assert max(g.abs().max() for g in torch.autograd.grad(loss.total, leaves(student))) < 1e-4


def test_frozen_head_gets_no_gradient_buffer():
    student, teacher, weights, actions, lengths = scene()
    frozen = Categorical(student.hidden, student.head.detach())
    loss = divergence_loss(ReverseKL(), frozen, [Target(teacher)], weights, actions, lengths)
    loss.total.backward()
    assert student.hidden.grad is not None
    assert student.head.weight.grad is None


def test_tied_and_adapted_heads_receive_their_gradient_through_autograd():
    student, teacher, weights, actions, lengths = scene()
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    base = student.head.weight.detach()
    adapted = Categorical(student.hidden, Head(base + b @ a))
    loss = divergence_loss(ReverseKL(), adapted, [Target(teacher)], weights, actions, lengths)
    got = torch.autograd.grad(loss.total, [a, b])
    log_q = torch.log_softmax(student.hidden @ (base + b @ a).T, -1)
    want = torch.autograd.grad((definition(ReverseKL(), teacher.log_probs(), log_q) * weights).sum(), [a, b])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_statistics_agree_with_the_divergences():
    student, teacher, _, actions, lengths = scene()
    ones = torch.ones(len(student))
    stats = compare(student, teacher, actions)
    for name, divergence in [("forward_kl", ForwardKL()), ("reverse_kl", ReverseKL())]:
        values = divergence_loss(divergence, student, [Target(teacher)], ones, actions, lengths).values
        torch.testing.assert_close(stats.values[name], values, atol=1e-5, rtol=1e-4)
    assert 0 <= stats.sums(torch.ones(len(student), dtype=torch.bool))["top1_agreement"] <= len(student)
    log_q = student.log_probs()
    torch.testing.assert_close(
        stats.values["student_entropy"], -(log_q.exp() * log_q).sum(-1).detach(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(), ReverseKLSampled(), ReverseKL(top_k=5)])
def test_per_example_gradients_are_those_of_each_example_alone(divergence):
    student, teacher, weights, actions, _ = scene(bias=True)
    lengths = torch.tensor([20, 10, 7])
    both = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=6, per_example=True)
    assert both.per_example.shape == (3,)
    whole = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths)
    torch.testing.assert_close(both.total, whole.total)
    start = 0
    for i, n in enumerate(lengths.tolist()):
        here = slice(start, start + n)
        start += n
        got = torch.autograd.grad(both.per_example[i], leaves(student), retain_graph=True)
        alone = divergence_loss(
            divergence,
            student.select(here),
            [Target(teacher.select(here))],
            weights[here],
            actions[here],
            lengths[i : i + 1],
        )
        for a, b in zip(got, torch.autograd.grad(alone.total, leaves(student)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    mixed = torch.autograd.grad((both.per_example * torch.tensor([0.0, 2.0, -1.0])).sum(), leaves(student))
    parts = [
        torch.autograd.grad(v, leaves(student), retain_graph=True)
        for v in divergence_loss(
            divergence, student, [Target(teacher)], weights, actions, lengths, per_example=True
        ).per_example
    ]
    for got, _zero, two, one in zip(mixed, *parts, strict=True):
        torch.testing.assert_close(got, 2 * two - one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("vocabulary", [3, 8192, 49152, 98304, 98305, 151936, 262144, 2**21])
def test_a_chunk_has_many_rows_unless_its_buffer_would_be_too_large(vocabulary):
    rows = chunk_rows(vocabulary)
    full = 4 * vocabulary * SMALLEST_CHUNK <= LARGEST_BUFFER
    assert (SMALLEST_CHUNK if full else 8) <= rows <= 1024
    assert full or 4 * vocabulary * rows <= max(LARGEST_BUFFER, 32 * vocabulary)
    assert full or 4 * vocabulary * (rows + 8) > LARGEST_BUFFER


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon(), ReverseKL(top_k=8)])
@pytest.mark.parametrize(("positions", "vocabulary"), [(256, 4096), (1024, 4096), (256, 16384)])
def test_memory_stays_under_the_stated_bound(divergence, positions, vocabulary):
    """Every allocation of the call, counted by the profiler's allocator records, at its highest."""
    student, teacher, weights, actions, lengths = scene(positions, vocabulary, 32, 48)
    rows = 64

    def call():
        loss = divergence_loss(divergence, student, [Target(teacher)], weights, actions, lengths, rows=rows)
        return torch.autograd.grad(loss.total, leaves(student))

    call()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        call()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    bound = memory_bound(divergence, positions, 48, vocabulary, rows)
    assert 0.3 * bound < peak <= bound
