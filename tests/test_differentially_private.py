"""The private update: what one record can change, the noise, the budget, and what a private recipe may not say."""

from __future__ import annotations

import math

import pytest
import torch

from opd.distributions import Target
from opd.divergences.jensen_shannon import JensenShannon
from opd.errors import IncompatibleError
from opd.language.engines.transformers import LanguageModel
from opd.objectives.sft import SFT
from opd.policies.causal_lm import CausalLMStudent, LoRA, with_lora
from opd.reduction import position_weights
from opd.updates.per_example import Batched, NotApartError, OneByOne, cut
from tests.conftest import character_tokenizer, tiny_model, trajectories_of

ROWS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(1, 8) for b in range(1, 9)]
PUBLIC = {"kind": "inline", "prompts": [f"{a}-{b}=" for a in range(1, 4) for b in range(1, 3)]}
EXPECTED = 4
JS = (JensenShannon(beta=0.5),)


def student_of(kind="llama", lora=False, context=None, **options):
    from opd.context import Context
    from opd.language.tokens import Tokens

    model = tiny_model(kind, **options).train()
    if lora:
        model = with_lora(model, LoRA(rank=2, alpha=4), [])
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    language = LanguageModel(model, character_tokenizer(), template="plain")
    return CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))


def weights_of(student):
    return [p for p in student.module.parameters() if p.requires_grad]


def losses_of(student, teacher, trajectories, objectives):
    """`([B] losses over the expected number, the cut)` of one micro-batch."""
    opened, where = cut(student(trajectories), trajectories.lengths)
    with torch.no_grad():
        answers = [Target(teacher(trajectories).detach())]
    weights = position_weights(trajectories, "sequence_mean", expected=EXPECTED)
    made = [each(opened, answers, weights, trajectories, True).per_example for each in objectives]
    return torch.stack(made).sum(0), where


def gradients(student, teacher, trajectories, way=OneByOne, objectives=JS, bound=math.inf):
    """`(norms [B], the sum of what was scaled down to the bound)`."""
    weights = weights_of(student)
    made = way(weights) if way is OneByOne else way(student.module, weights)
    student.layout = "auto" if way is OneByOne else "right"
    losses, where = losses_of(student, teacher, trajectories, objectives)
    totals = [torch.zeros_like(w) for w in weights]
    norms = made.add(losses, where, lambda n: (bound / n).clamp(max=1.0), totals)
    if way is Batched:
        made.close()
    return norms, totals


MODELS = [
    ({"tie_word_embeddings": True}, False),
    ({"tie_word_embeddings": False, "kind": "qwen3"}, False),
    ({"tie_word_embeddings": True}, True),
]


@pytest.mark.parametrize(("options", "lora"), MODELS)
def test_gradients_by_trajectory_are_those_of_passes_alone(options, lora):
    """Batched, one by one, and a plain backward pass for each trajectory, in the usual layout."""
    student, teacher = student_of(lora=lora, seed=1, **options), student_of(seed=2)
    micro = trajectories_of([5, 3, 1, 6])
    objectives = (*JS, SFT(weight=0.3))
    wanted = []
    for i in range(4):
        one, _ = micro.pick([i])
        loss, where = losses_of(student, teacher, one, objectives)
        reached, *of_head = torch.autograd.grad(
            loss.sum(), [where.leaf, *(leaf for leaf in where.leaves if leaf.requires_grad)]
        )
        roots = [where.hidden, *(own for own in where.head if own.requires_grad)]
        grads = torch.autograd.grad(roots, weights_of(student), [reached, *of_head], allow_unused=True)
        wanted.append(
            [torch.zeros_like(w) if g is None else g for w, g in zip(weights_of(student), grads, strict=True)]
        )
    norms = torch.stack([torch.stack([g.norm() for g in each]).norm() for each in wanted])
    bound = float(norms.median()) * 0.9
    for way in (OneByOne, Batched):
        found, totals = gradients(student, teacher, micro, way, objectives, bound)
        torch.testing.assert_close(found, norms, atol=1e-6, rtol=1e-4)
        for j, total in enumerate(totals):
            summed = sum(each[j] * min(1.0, bound / float(norms[i])) for i, each in enumerate(wanted))
            torch.testing.assert_close(total, summed, atol=1e-6, rtol=1e-3)


def test_layers_of_other_kinds_are_taken_by_rows():
    """GPT-2 has its own linear layer, biases, LayerNorm and learnt positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, attn_pdrop=0, embd_pdrop=0)
    config.resid_pdrop = 0
    student = student_of(seed=1)
    student.language.model = GPT2LMHeadModel(config).train()
    student = CausalLMStudent(student.language, None, student.context)
    micro, teacher = trajectories_of([4, 2, 5]), student_of(seed=2)
    alone, wanted = gradients(student, teacher, micro, OneByOne, bound=0.01)
    norms, totals = gradients(student, teacher, micro, Batched, bound=0.01)
    torch.testing.assert_close(norms, alone, atol=1e-6, rtol=1e-4)
    for total, one in zip(totals, wanted, strict=True):
        torch.testing.assert_close(total, one, atol=1e-6, rtol=1e-3)


class Mixes(torch.nn.Module):
    """A layer in which rows are not apart: it subtracts their mean."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x - x.mean(0, keepdim=True).detach() + x.mean(0, keepdim=True))


def test_a_layer_that_ties_rows_together_is_found_out():
    student, teacher = student_of(seed=1), student_of(seed=2)
    layer = student.language.model.model.layers[0]
    layer.mlp = Mixes(layer.mlp)
    with pytest.raises(NotApartError, match=r"measures .* by itself and .* in a batch"):
        gradients(student, teacher, trajectories_of([5, 3, 8]), Batched)


def test_a_loss_that_reaches_other_trajectories_is_found_out():
    student, teacher = student_of(seed=1), student_of(seed=2)
    losses, where = losses_of(student, teacher, trajectories_of([5, 3]), JS)
    assert where.check_apart(losses)
    assert not where.check_apart(losses[:1]), "one says nothing of others"
    with pytest.raises(IncompatibleError, match=r"the loss of one depends on another"):
        where.check_apart(losses.flip(0).cumsum(0))


@pytest.mark.parametrize("way", [OneByOne, Batched])
def test_one_record_changes_the_sum_by_no_more_than_the_bound(way):
    student, teacher = student_of(seed=1, tie_word_embeddings=True), student_of(seed=2)
    micro, bound = trajectories_of([5, 3, 8, 6], seed=4), 0.01
    norms, whole = gradients(student, teacher, micro, way, bound=bound)
    assert bool((norms > bound).all())
    for gone in range(4):
        rest, _ = micro.pick([i for i in range(4) if i != gone])
        _, totals = gradients(student, teacher, rest, way, bound=bound)
        change = torch.stack([(a - b).norm() for a, b in zip(whole, totals, strict=True)]).norm()
        assert float(change) <= bound * (1 + 1e-3)
        assert float(change) >= bound * (1 - 1e-3), "it is clipped, and counts"


@pytest.mark.parametrize("way", [OneByOne, Batched])
def test_a_gradient_does_not_depend_on_who_stands_beside_it(way):
    student, teacher = student_of(seed=1, tie_word_embeddings=True), student_of(seed=2)
    micro = trajectories_of([5, 3, 30, 2], seed=3)
    one, _ = micro.pick([1])
    alone, total = gradients(student, teacher, one, way)
    beside, _ = gradients(student, teacher, micro, way)
    torch.testing.assert_close(beside[1], alone[0], atol=1e-6, rtol=1e-4)
    other, _ = micro.pick([1, 3])
    torch.testing.assert_close(gradients(student, teacher, other, way)[0][0], alone[0], atol=1e-6, rtol=1e-4)
    assert all(bool(t.isfinite().all()) for t in total)


def test_prompts_and_padding_get_no_gradient_of_their_own():
    """Of the student's final states those alone are reached that predict a token of the continuation."""
    student, teacher = student_of(seed=1), student_of(seed=2)
    micro = trajectories_of([5, 3])
    losses, where = losses_of(student, teacher, micro, (JensenShannon(),))
    assert len(where.leaf) == micro.positions == 8
    (first,) = torch.autograd.grad(losses[0], [where.leaf], retain_graph=True)
    assert bool((first[:5] != 0).any())
    assert not bool((first[5:] != 0).any())
    assert not any(p.grad is not None for p in teacher.module.parameters())
    assert not micro.actions.is_floating_point()


def opacus_norms(model, ids, labels):
    opacus = pytest.importorskip("opacus")
    made = opacus.GradSampleModule(model, batch_first=True, loss_reduction="sum")
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    logits = made(input_ids=ids, position_ids=positions, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
    losses.sum().backward()
    found = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in made.parameters()]).norm(dim=0)
    made.remove_hooks()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_opacus_and_functional_gradients_agree(tied):
    """On cross-entropy, where the head is called as a module: what Opacus hooks, `vmap(grad)`, and ours."""
    student = student_of(seed=1, tie_word_embeddings=tied)
    model = student.language.model
    micro = trajectories_of([6, 6, 6], contexts=[torch.tensor([5, 6 + i, 9]) for i in range(3)])
    ids = torch.stack([torch.cat([c, y]) for c, y in zip(micro.contexts, micro.completions(), strict=True)])
    weights = position_weights(micro, "sequence_mean", expected=1)

    found = {}
    for way in (OneByOne, Batched):
        student.layout = "right"
        made = way(weights_of(student)) if way is OneByOne else way(student.module, weights_of(student))
        opened, where = cut(student(micro), micro.lengths)
        losses = SFT()(opened, [], weights, micro, True).per_example
        found[way] = made.add(losses, where, torch.ones_like, [torch.zeros_like(w) for w in weights_of(student)])
        if way is Batched:
            made.close()

    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, row):
        positions = torch.arange(len(row))[None]
        out = torch.func.functional_call(
            model, values, kwargs={"input_ids": row[None], "position_ids": positions, "use_cache": False}
        )
        return torch.nn.functional.cross_entropy(out.logits[0, 2:-1], row[3:])

    rows = [torch.func.grad(loss)(named, row) for row in ids]
    exact = torch.stack([torch.stack([g.norm() for g in each.values()]).norm() for each in rows])
    for norms in found.values():
        torch.testing.assert_close(norms, exact, atol=1e-5, rtol=1e-3)

    logits_of = ids.clone()
    labels = torch.full_like(ids, -100)
    labels[:, 2:-1] = logits_of[:, 3:]
    losses = opacus_norms(model, ids, labels)
    # `mean` over all columns of the row, of which six count.
    torch.testing.assert_close(losses * ids.shape[1] / 6, exact, atol=1e-5, rtol=1e-3)
