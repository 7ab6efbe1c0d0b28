"""Drafters: texts are the target's own, what is recorded is what was drafted, and what is saved is what was trained."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import opd.drafting.decoding
from opd.distributions import Categorical, Head
from opd.drafting.base import Outline
from opd.drafting.block import Block
from opd.drafting.chain import Chain
from opd.drafting.decoding import Speculation, speculate
from opd.drafting.layers import of_blocks
from opd.drafting.native import difference, load_drafter, save_drafter
from opd.drafting.record import acceptance_length, blocks_of
from opd.drafting.target import Target
from opd.drafting.verification import agreeing, by_ratio
from opd.errors import IncompatibleError, ModelError, SelfTestError
from opd.language.engines.sampler import Sampler, inverse_cdf
from opd.teachers.target import TargetTeacher
from tests.drafters import FORMS, Knowing, drafted, drafter_of, head_of, language, student_of

TEXTS = ["12+7=", "spell a word", "9", "what is 3?", "abc def ghi"]


def prompts_of(seed=0, lengths=(5, 1, 9, 12, 3)):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 47, (n,), generator=g) for n in lengths]


def how(model, drafter, ends=(0,), proposals=4, temperature=0.0, proposing="likeliest"):
    return Speculation(
        Target(model, drafter.taps),
        drafter.eval(),
        model.head(1.0).detach(),
        head_of(drafter, model),
        ends,
        proposals,
        temperature,
        proposing,
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_what_the_target_writes_alone(kind, form, temperature):
    model = language(kind=kind)
    prompts, seeds = prompts_of(), [11, 12, 13, 14, 15]
    found = speculate(how(model, drafter_of(FORMS[form], model), temperature=temperature), prompts, seeds, 40)
    sampler = Sampler(model, model.head(temperature or 1.0), (0,), top_k=0 if temperature else 1)
    alone = sampler.start(prompts, 1, 40, seeds)
    sampler.extend(alone, 40)
    for answer, (text, _, finished) in zip(found, alone.rows(), strict=True):
        assert answer.record.response.tolist() == text.tolist()
        assert answer.finished == finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("proposing", ["likeliest", "drawn"])
def test_rows_do_not_depend_on_who_shares_their_batch(temperature, proposing):
    model = language()
    drafter = drafter_of(FORMS["chain"], model)
    settings = how(model, drafter, temperature=temperature, proposing=proposing)
    prompts, seeds = prompts_of(), [1, 2, 3, 4, 5]
    together = speculate(settings, prompts, seeds, 24)
    for i in range(5):
        (alone,) = speculate(settings, prompts[i : i + 1], seeds[i : i + 1], 24)
        assert alone.record.response.tolist() == together[i].record.response.tolist()
        assert alone.proposed.tolist() == together[i].proposed.tolist()
        torch.testing.assert_close(alone.hidden, together[i].hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("proposing", ["likeliest", "drawn"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_its_target_has_all_proposals_accepted(proposing, temperature):
    model = language()
    drafter = Knowing(model, first=5, proposals=3)
    prompts = [torch.cat([torch.tensor([5]), p]) for p in prompts_of(lengths=(3, 1, 6))]
    settings = how(model, drafter, ends=(), proposals=3, temperature=temperature, proposing=proposing)
    # One token comes from the prompt, then four a step. Likeliest proposals are what is drawn at a temperature of 0.
    found = speculate(settings, prompts, [1, 2, 3], 21)
    length = acceptance_length([answer.record for answer in found])
    if temperature == 0 or proposing == "drawn":
        assert length == 4
        assert all(answer.record.accepted.tolist() == [3] * 5 for answer in found)
    else:
        assert 1 < length < 4


# Losslessness by count: three tokens of a target with six ids, against every text's exact probability.

SMALL, DRAWS = 6, 12_000


def exact_texts(model, prompt, count=3):
    texts = list(itertools.product(range(SMALL), repeat=count))
    contexts, completions = [prompt] * len(texts), [torch.tensor(text) for text in texts]
    log_p = Categorical(model(contexts, completions), model.head(1.0)).log_probs().detach()
    taken = log_p.gather(1, torch.cat(completions)[:, None])[:, 0]
    return taken.view(len(texts), count).sum(1).exp().double()


def p_value(found, expected):
    """Of the counts of texts under their probabilities; cells of fewer than five are one."""
    counts = expected * found.sum()
    small = counts < 5
    pairs = [(found[~small], counts[~small]), (found[small].sum()[None], counts[small].sum()[None])]
    observed, wanted = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


def counts_of_texts(settings, prompt):
    counts = torch.zeros(SMALL**3, dtype=torch.float64)
    for start in range(0, DRAWS, 2000):
        found = speculate(settings, [prompt] * 2000, range(start, start + 2000), 3)
        codes = torch.stack([a.record.response for a in found]) @ torch.tensor([SMALL**2, SMALL, 1])
        counts += torch.bincount(codes, minlength=SMALL**3)
    return counts


@pytest.fixture(scope="module")
def small():
    model = language(vocabulary=SMALL, width=16, initializer_range=0.2, seed=4)
    return model, drafter_of(Chain(proposals=2), model, seed=5), torch.tensor([1, 4])


@pytest.mark.parametrize("proposing", ["likeliest", "drawn"])
def test_texts_are_distributed_as_the_targets(small, proposing):
    model, drafter, prompt = small
    settings = how(model, drafter, ends=(), proposals=2, temperature=1.0, proposing=proposing)
    assert p_value(counts_of_texts(settings, prompt), exact_texts(model, prompt)) > 1e-3


def test_a_wrong_rule_is_found(small, monkeypatch):
    """Likeliest proposals under the ratio of the distributions, as if they had been drawn."""
    model, drafter, prompt = small
    settings = how(model, drafter, ends=(), proposals=2, temperature=1.0, proposing="drawn")
    monkeypatch.setattr(opd.drafting.decoding, "chosen", lambda log_q, uniforms=None: log_q.argmax(-1))
    assert p_value(counts_of_texts(settings, prompt), exact_texts(model, prompt)) < 1e-9


def test_the_rule_of_ratios_by_hand():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
    grid = (torch.arange(1000) + 0.5) / 1000
    rates, tokens = [], torch.zeros(3)
    for d in range(3):
        both = torch.stack([p, p]).expand(1000, 2, 3)
        one = torch.full((1000, 1), d)
        found = by_ratio(both, q.expand(1000, 1, 3), one, grid[:, None], grid.flip(0))
        rates.append(float(found.accepted.float().mean()))
        tokens += q[d] * torch.bincount(torch.where(found.accepted == 1, d, found.token), minlength=3) / 1000
        assert set(found.token[found.accepted == 0].tolist()) <= {0}, "the target has more of the first alone"
    assert rates == pytest.approx([1, 0.5, 1], abs=2e-3)
    torch.testing.assert_close(tokens, p, atol=2e-3, rtol=0)


def test_the_rule_of_agreement_by_hand():
    log_p = torch.tensor([0.5, 0.3, 0.2]).log().expand(1000, 3)
    grid = (torch.arange(1000) + 0.5) / 1000
    drawn = torch.stack([inverse_cdf(log_p, grid), torch.zeros(1000, dtype=torch.int64)], 1)
    found = agreeing(drawn, torch.ones(1000, 1, dtype=torch.int64))
    assert float(found.accepted.float().mean()) == pytest.approx(0.3, abs=2e-3)
    rest = torch.bincount(found.token[found.accepted == 0], minlength=3).float()
    torch.testing.assert_close(rest / rest.sum(), torch.tensor([5 / 7, 0, 2 / 7]), atol=2e-3, rtol=0)
    several = agreeing(torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]]), torch.tensor([[1, 2, 3]] * 3))
    assert several.accepted.tolist() == [3, 1, 0]
    assert several.token.tolist() == [4, 9, 9]


# What is recorded.


def scripted():
    """A student whose drafter is right for 2, 0, 3 and 1 tokens, and a text that ends with its tenth."""
    model = language(seed=8)
    for text in ("a1b2", "abc", "axyz", "a23+4=", "a b c d", "a9876", "a?", "azzz9", "a=1", "a-3-2", "a.b.c"):
        plain = student_of(drafter_of(FORMS["chain"], model), model, end_tokens=[1])
        made = drafted(plain, [text], budget=10)
        y = made.contexts[0].response.tolist()
        if len(y) == 10 and y[9] not in y[:9]:
            break
    else:
        raise AssertionError("no text of ten tokens with a new one at its end")
    right = {0: 2, 3: 0, 4: 3, 8: 1}
    prompt = model.tokenizer(text)["input_ids"]
    drafter = Knowing(
        model, first=prompt[0], proposals=3, wrong=lambda a: (right.get(a - len(prompt), 3) + 1) % (3 + 1)
    )
    return student_of(drafter, model, end_tokens=[y[9]]), text, y


def test_every_step_of_verifying_is_recorded():
    student, text, y = scripted()
    made = drafted(student, [text], budget=30)
    (record,) = made.contexts
    assert record.response.tolist() == y
    assert (record.anchors - len(record.prompt)).tolist() == [0, 3, 4, 8]
    assert record.accepted.tolist() == [2, 0, 3, 1]
    assert record.committed.tolist() == [3, 1, 4, 1]
    assert acceptance_length(made.contexts) == 9 / 4
    assert made.finished.tolist() == [True]
    assert len(record.features) == len(record.prompt) + 8, "what the last block could see"
    assert made.columns["slot"].tolist() == [1, 2, 3] * 4
    accepted, rejected, corrected = (
        made.columns[name].view(4, 3).int().tolist() for name in ("accepted", "rejected", "corrected")
    )
    assert accepted == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert rejected == [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]], "the end cut the last block before it was decided"
    assert corrected == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert made.columns["verified"].view(4, 3).tolist() == [
        [y[1], y[2], y[3]],
        [y[4], -1, -1],
        [y[5], y[6], y[7]],
        [y[9], -1, -1],
    ]
    assert made.learn.view(4, 3).int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 8])
def test_a_budget_cuts_where_it_ends(budget):
    student, text, y = scripted()
    made = drafted(student, [text], budget=budget)
    (record,) = made.contexts
    assert record.response.tolist() == y[:budget]
    assert int(record.committed.sum()) == budget - 1
    assert made.finished.tolist() == [False]
    whole = record.committed == record.accepted + 1
    assert (made.columns["rejected"].view(-1, 3).any(1) <= whole).all()


FEW_IDS = (Chain(proposals=4), Chain(proposals=4, vocabulary=[1, 3, 4]), Block(mask_token=5, layers=2, block=5))
"""Forms for a target with six ids, of which a drafter without training hits some."""


@pytest.mark.parametrize("form", FEW_IDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_walk_along_the_text_finds_the_same_steps(form, temperature):
    """What is proposed without randomness changes no text, so the drafter may be asked at all positions at once."""
    model = language(vocabulary=SMALL, initializer_range=0.1)
    drafter = drafter_of(form, model).eval()
    settings = how(model, drafter, ends=(), temperature=temperature)
    prompts, seen = [prompt % SMALL for prompt in prompts_of()], set()
    for prompt, answer in zip(prompts, speculate(settings, prompts, range(5), 60), strict=True):
        record, blocks = answer.record, answer.proposed.view(-1, settings.proposals).tolist()
        steps = walked(settings, torch.cat([prompt, record.response]), len(prompt))
        assert steps == list(zip(record.anchors.tolist(), record.accepted.tolist(), blocks, strict=True))
        seen |= set(record.accepted.tolist())
    assert len(seen) > 1


@torch.no_grad()
def walked(settings, text, begin):
    """`(anchor, accepted, block)` of each step along a text, of the likeliest proposals at all its positions."""
    positions, anchors, found = torch.arange(len(text) - 1), torch.arange(begin, len(text) - 1), []
    embed = settings.target.embed
    _, features = settings.target.read(text[None, :-1], positions[None], settings.target.begin())
    kept = settings.drafter.read(features, text[None, 1:], positions[None], embed)

    def follow(k, hidden):
        found.append(settings.drafts.vocabulary.named(settings.drafts.logits(hidden[0]).argmax(-1)))
        return found[-1][None]

    before, tokens = features[:, anchors - 1], text[None, anchors]
    settings.drafter.propose(kept, before, tokens, anchors[None], settings.proposals, follow, embed)
    at, steps, proposals = begin, [], torch.stack(found, 1).tolist()
    while at < len(text) - 1:
        block, following = proposals[at - begin], text[at + 1 :].tolist()
        agree = [a == b for a, b in zip(block, following, strict=False)]
        steps.append((at, [*agree, False].index(False), block))
        at += steps[-1][1] + 1
    return steps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("temperature", "proposing"), [(0.0, "likeliest"), (0.7, "likeliest"), (0.7, "drawn")])
def test_drafting_again_gives_what_was_proposed(form, temperature, proposing):
    model = language()
    student = student_of(drafter_of(FORMS[form], model), model)
    if student.drafter.parallel and proposing == "drawn":
        with pytest.raises(IncompatibleError, match="drawn"):
            drafted(student, TEXTS, proposing=proposing)
        return
    made = drafted(student, TEXTS, group=2, budget=20, text_temperature=temperature, proposing=proposing)
    again = student(made, student.context)
    actions = again.vocabulary.columns(made.actions)
    log_q = again.log_probs().gather(1, actions[:, None])[:, 0]
    torch.testing.assert_close(log_q, made.columns["log_q"], atol=2e-5, rtol=1e-4)
    if proposing == "likeliest":
        assert (again.log_probs().argmax(1) == actions).all()
        assert not made.behaviour_log_probs.any()
    # In parts, as micro-batches cut them.
    parts = torch.cat([student(part, student.context).hidden for part, _ in made.split(3)])
    torch.testing.assert_close(parts, again.hidden, atol=2e-5, rtol=1e-4)
    loss = log_q.sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.module.parameters())
    assert not any(p.requires_grad for p in student.target.language.parameters())


def test_the_targets_answers_come_along_for_every_slot():
    model = language()
    student = student_of(drafter_of(FORMS["chain"], model), model)
    made = drafted(student, TEXTS, budget=20, text_temperature=0.9)
    (answer,) = made.answers
    teacher = teacher_of(student)
    (again,) = teacher.answer(made, teacher.settings, student.context)
    torch.testing.assert_close(answer.distribution.log_probs(), again.distribution.log_probs(), atol=1e-4, rtol=1e-4)
    # By hand, of one block: row k - 1 teaches slot k, behind the tokens that were proposed, accepted or not.
    record, proposed = made.contexts[1], made.completions()[1].view(-1, 4)
    block = int((record.accepted < 2).nonzero()[0])
    text = torch.cat([record.prompt, record.response])[: int(record.anchors[block]) + 1]
    logits = model.base(torch.cat([text, proposed[block]])[None]).logits[0, len(text) - 1 : -1, :47]
    mine = answer.select(torch.arange(4) + int(made.lengths[0]) + 4 * block)
    torch.testing.assert_close(mine.distribution.log_probs(), logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert drafted(student, TEXTS[:1], taught=False).answers is None
    teacher.check_outputs(made, "the target")
    broken = replace(
        made, answers=(replace(answer, distribution=answer.distribution.select(torch.arange(made.positions).flip(0))),)
    )
    with pytest.raises(SelfTestError, match="read anew"):
        teacher.check_outputs(broken, "the target")


def teacher_of(student):
    return TargetTeacher().build(student.context, student)


def test_slots_at_which_the_target_wants_what_cannot_be_proposed_are_in_no_loss():
    model = language()
    student = student_of(drafter_of(FORMS["chain of some ids"], model), model)
    made = drafted(student, TEXTS, budget=20)
    (again,) = teacher_of(student).answer(made, TargetTeacher(), student.context)
    whole = model.head(1.0, student.context.agreed.written).logits(again.distribution.hidden).argmax(1)
    able = torch.isin(whole, torch.tensor(student.drafter.ids))
    assert not able.all()
    assert not made.learn[~able].any()
    assert made.learn[able & (made.columns["accepted"] | made.columns["rejected"])].all()
    assert torch.isin(made.actions, torch.tensor(student.drafter.ids)).all()
    assert made.answers[0].distribution.vocabulary.ids == student.drafter.ids


def test_a_block_sees_what_stands_before_its_anchor_and_itself():
    """Six positions, two blocks of two slots at anchors 3 and 4; keys 6 to 9 are the slots'."""
    g = torch.Generator().manual_seed(0)
    queries, context, own = (
        torch.randn(shape, generator=g) for shape in ((1, 2, 2, 2, 4), (1, 1, 6, 4), (1, 1, 2, 2, 4))
    )
    anchors = torch.tensor([[3, 4]])
    plain = of_blocks(queries, (context, context), (own, own), anchors)
    seen = []
    for key in range(10):
        moved = [context.clone(), own.clone()]
        (moved[0][0, 0, key] if key < 6 else moved[1][0, 0, (key - 6) // 2, (key - 6) % 2]).add_(1.0)
        found = of_blocks(queries, (moved[0], moved[0]), (moved[1], moved[1]), anchors)
        seen.append((found - plain).abs().amax((0, 2, 3)) > 1e-6)
    assert [[key for key in range(10) if seen[key][block]] for block in range(2)] == [
        [0, 1, 2, 6, 7],
        [0, 1, 2, 3, 8, 9],
    ]


# On the disk.


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_loaded_again(form, tmp_path):
    model = language()
    outline, head = Outline.of(model.base.config, "the target"), model.head(1.0).detach()
    drafter = drafter_of(FORMS[form], model)
    embedding = model.base.get_input_embeddings().weight
    save_drafter(tmp_path, drafter, embedding)
    assert difference(tmp_path, drafter) is None
    again = load_drafter(str(tmp_path), outline, head)
    assert (again.taps, again.proposals, again.ids) == (drafter.taps, drafter.proposals, drafter.ids)
    prompts, seeds = prompts_of(), [1, 2, 3, 4, 5]
    for one, other in zip(*(speculate(how(model, d), prompts, seeds, 12) for d in (drafter, again)), strict=True):
        assert one.proposed.tolist() == other.proposed.tolist()
    with torch.no_grad():
        next(drafter.parameters()).add_(1)
    assert "is not that of the trained drafter" in difference(tmp_path, drafter)


def test_the_native_format_of_a_chain(tmp_path):
    model = language(vocabulary=64)
    save_drafter(tmp_path, drafter_of(Chain(vocabulary=[1, 3, 4]), model), model.base.get_input_embeddings().weight)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert weights["d2t"].tolist() == [1, 2, 2]
    assert weights["t2d"].nonzero().flatten().tolist() == [1, 3, 4]
    assert weights["lm_head.weight"].shape == (3, 32)
    assert weights["fc.weight"].shape == (32, 96)
    assert weights["embed_tokens.weight"].shape == (64, 32)
    assert weights["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    assert {"norm.weight", *(f"midlayer.{name}.weight" for name in norms)} <= weights.keys()
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["draft_vocab_size"], config["vocab_size"]) == ("llama", 3, 64)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert "eagle_aux_hidden_state_layer_ids" not in config, "servers have this default, and count it each in its way"
    save_drafter(tmp_path, drafter_of(Chain(taps=[0, 3]), model), model.base.get_input_embeddings().weight)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4], "as transformers counts hidden states"


def test_the_native_format_of_a_block_drafter(tmp_path):
    model = language()
    save_drafter(tmp_path, drafter_of(FORMS["block"], model), model.base.get_input_embeddings().weight)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert not any("embed" in name or "lm_head" in name for name in weights)
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} <= weights.keys()
    assert config["dflash_config"] == {"mask_token_id": 2, "target_layer_ids": [1, 4]}
    assert (config["block_size"], config["num_target_layers"], config["model_type"]) == (5, 7, "qwen3")
    assert config["layer_types"] == ["full_attention"] * 2


def test_taps_of_real_depths():
    deep = Outline(36, 8, 9, 1, 1, 8, 8, 1e-6, 1e4, 64)
    head, taps = Head(torch.zeros(9, 8)), {}
    for layers, drafting in ((30, 3), (36, 5)):
        outline = replace(deep, layers=layers)
        forms = (Chain(), Block(mask_token=0, layers=drafting))
        taps[layers] = tuple(form.build(outline, head).taps for form in forms)
    # Of the chain one less than transformers' numbers of hidden states, 2, n/2 and n - 3.
    assert taps[36] == ((1, 17, 32), (1, 9, 17, 25, 33))
    assert taps[30] == ((1, 14, 26), (1, 14, 27))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Chain(taps=[9]), "layers 0 to 6"),
        (Chain(taps=[2, 1]), "ascending"),
        (Chain(vocabulary=[3, 70]), "end at 63"),
        (Block(mask_token=64, layers=2), "end at 63"),
    ],
)
def test_a_form_that_does_not_fit_its_target_is_refused(form, said):
    with pytest.raises(ModelError, match=said):
        drafter_of(form, language())


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    model, other = language(), language(width=48)
    save_drafter(tmp_path, drafter_of(FORMS["chain"], model), model.base.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=r"width 32 .* width 48"):
        load_drafter(str(tmp_path), Outline.of(other.base.config, "t"), other.head(1.0))
    outline, head = Outline.of(model.base.config, "t"), model.head(1.0)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ModelError, match=r"'LlamaForCausalLM', and drafters are .*give a drafter's folder"):
        load_drafter(str(tmp_path), outline, head)
    with pytest.raises(ModelError, match="holds no drafter"):
        load_drafter(str(tmp_path / "none"), outline, head)
    for broken in ("[]", '{"architectures": 5}', '{"architectures": [["x"]]}', '"x"'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ModelError, match="drafter"):
            load_drafter(str(tmp_path), outline, head)


@pytest.mark.parametrize("form", ["chain", "block"])
def test_a_folder_for_a_target_of_another_depth_is_refused_by_the_key_that_names_it(form, tmp_path):
    model = language()
    save_drafter(tmp_path, drafter_of(FORMS[form], model), model.base.get_input_embeddings().weight)
    outline, head = Outline.of(model.base.config, "t"), model.head(1.0).detach()
    for layers in (6, 12):
        with pytest.raises(ModelError, match=rf"^rollout.engine.model .* 7 layers, and this target has .*{layers}"):
            load_drafter(str(tmp_path), replace(outline, layers=layers), head, "rollout.engine.model")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    # What others made does not say how deep its target is.
    for name in ("opd_target_layers", "num_target_layers"):
        config.pop(name, None)
    if form == "chain":
        path.write_text(json.dumps(config))
        load_drafter(str(tmp_path), replace(outline, layers=12), head)
        with pytest.raises(ModelError, match=r"^student.model .* reads layers \[1, 2, 2\] .* layers 0 to 5"):
            load_drafter(str(tmp_path), replace(outline, layers=6), head)
    for name, value in (("rope_parameters", [1]), ("rope_scaling", "x"), ("intermediate_size", "x")):
        path.write_text(json.dumps(config | {"num_target_layers": 7, name: value}))
        with pytest.raises(ModelError, match=r"^student.model"):
            load_drafter(str(tmp_path), outline, head)


def test_rows_of_unequal_numbers_of_blocks_are_padded():
    model = language()
    student = student_of(drafter_of(FORMS["chain"], model), model)
    made = drafted(student, TEXTS, budget=9)
    short = drafted(student, TEXTS[:1], budget=1)
    assert short.positions == 0
    nothing = student(short, student.context)
    assert len(nothing) == 0
    nothing.hidden.sum().backward()
    weights = dict(student.module.named_parameters())
    assert not weights.pop("lm_head.weight").grad
    assert all(p.grad is not None and not p.grad.any() for p in weights.values()), "a pass that others may wait for"
    blocks = blocks_of(made.contexts, made.completions(), torch.device("cpu"))
    assert blocks.present.all(2).sum(1).tolist() == [len(each.anchors) for each in made.contexts]
    assert (blocks.proposals[blocks.present].flatten() == made.actions).all()


def test_attention_in_parts_is_attention(monkeypatch):
    torch.manual_seed(0)
    rows, heads, kept, blocks, slots, d = 2, 4, 6, 5, 3, 8
    inputs = [
        torch.randn(rows, heads, blocks, slots, d),
        torch.randn(rows, 2, kept, d),
        torch.randn(rows, 2, kept, d),
        torch.randn(rows, 2, blocks, 2, d),
        torch.randn(rows, 2, blocks, 2, d),
    ]
    anchors = torch.randint(1, kept + 1, (rows, blocks))
    found = []
    for most in (2**26, 400):
        monkeypatch.setattr("opd.drafting.layers.SCORES", most)
        queries, keys, values, own_keys, own_values = live = [x.clone().requires_grad_() for x in inputs]
        mixed = of_blocks(queries, (keys, values), (own_keys, own_values), anchors)
        found.append([mixed.detach(), *torch.autograd.grad(mixed.square().sum(), live)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)
