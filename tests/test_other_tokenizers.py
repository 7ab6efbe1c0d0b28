"""Teachers with another tokenizer: one text under two, and what is compared of it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from opd.context import Context
from opd.distributions import Aligned, Sampled, Spans, Target, Vocabulary, spans_in
from opd.distributions.spans import spans_of
from opd.divergences import ForwardKL, ReverseKL, ReverseKLSampled, compare
from opd.divergences.jensen_shannon import JensenShannon
from opd.errors import IncompatibleError
from opd.language.agreement import common_vocabulary, end_ids
from opd.language.alignment import CONTROL, NO_TEXT, NOT_GIVEN_BACK, shares
from opd.language.engines.transformers import LanguageModel
from opd.language.token_bytes import token_bytes
from opd.language.tokens import Tokens
from opd.policies.causal_lm import CausalLMStudent
from opd.prompts import Prompt
from opd.teachers.base import unanswered
from opd.teachers.debate import DebateTeacher, LiveDebate
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.routed import RoutedTeacher, RoutedTeachers
from opd.teachers.translated import TranslatedTeacher, pair_of
from opd.trajectories import Trajectories
from tests.conftest import tiny_model
from tests.other_tokenizers import KINDS, TEXTS, byte_level, characters, lower_case, sentencepiece

PAIRS = [(a, b) for a, b in itertools.product(KINDS, KINDS)]
CPU = torch.device("cpu")


def reader(tokenizer):
    return LanguageModel(None, tokenizer, "chat" if tokenizer.chat_template else "plain")


def pair(student, teacher):
    ours, theirs = reader(student), reader(teacher)
    return pair_of(ours, theirs, Tokens(common_vocabulary([ours], [Vocabulary(10**6)]), tuple(end_ids(ours))))


def language(tokenizer, seed=0, **options):
    size = len(tokenizer.get_vocab()) + 3
    made = LanguageModel(tiny_model(vocabulary=size, seed=seed, **options), tokenizer, "plain")
    made.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return made


def built(student_tokenizer, teacher_tokenizer, seed=1, **settings):
    """A student, its teacher of another tokenizer and the context that they agree on."""
    student = CausalLMStudent(language(student_tokenizer), None, Context(CPU))
    theirs = language(teacher_tokenizer, seed=seed, width=48).requires_grad_(False)
    inner = LanguageTeacher(theirs, LocalTeacher(model="(live)", **settings), CPU)
    teacher = TranslatedTeacher(inner, theirs, student.language)
    context = student.agree(Context(CPU), [teacher], None)
    student.context = context
    teacher.check_student(student, context)
    return student, teacher, context


def written(student, texts, ended=True, prompt="the "):
    """What a student of these texts would have written, as trajectories."""
    tokenizer = student.language.tokenizer
    texts_ = token_bytes(tokenizer, "the student")
    end = [tokenizer.eos_token_id] if ended else []
    rows = [torch.tensor([*(texts_.encode(text) or []), *end]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    prompts = [Prompt(f"p{i}", {"prompt": prompt}) for i in range(len(rows))]
    count = int(lengths.sum())
    return Trajectories(
        prompts=prompts,
        contexts=[student.language.encode(each) for each in prompts],
        actions=torch.cat(rows),
        lengths=lengths,
        behaviour_log_probs=torch.zeros(count),
        finished=torch.full((len(rows),), ended),
        learn=torch.ones(count, dtype=torch.bool),
        authors=torch.zeros(count, dtype=torch.uint8),
        groups=torch.arange(len(rows)),
    )


def gradients(student, objective, targets, trajectories):
    student.module.zero_grad()
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    loss = objective(student(trajectories), targets, weights, trajectories)
    loss.total.backward()
    return torch.cat([p.grad.flatten().clone() for p in student.module.parameters()]), loss


# -- bytes of tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_a_text_are_its_bytes(kind, text):
    texts = token_bytes(KINDS[kind](), "the model")
    ids = texts.encode(text)
    if ids is None and "sentencepiece" in kind:
        # It writes spaces so, and cannot tell them apart.
        assert "▁" in text
    elif ids is None:
        assert kind == "characters"
        assert not set(text) <= set("".join(map(bytes.decode, texts.of.values())))
    else:
        assert texts.bytes(ids) == text.encode()


def test_control_tokens_have_no_bytes_and_their_names_are_text():
    texts = token_bytes(byte_level(), "the model")
    assert byte_level().eos_token_id not in texts.of
    ids = texts.encode("<eos>")
    assert byte_level().eos_token_id not in ids
    assert byte_level()("<eos>", add_special_tokens=False)["input_ids"] == [byte_level().eos_token_id]


def test_of_two_tokens_of_the_same_bytes_the_one_that_is_no_fallback_counts():
    texts = token_bytes(sentencepiece(), "the model")
    newline = texts.ids[b"a"]
    assert newline not in texts.raw
    assert sentencepiece().convert_ids_to_tokens(newline) == "a"
    assert texts.ids[b"\xf0"] in texts.raw


def test_a_tokenizer_whose_texts_are_not_its_tokens_is_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(IncompatibleError, match="the teacher has a tokenizer whose texts are not its tokens"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), "the teacher")


# -- spans -------------------------------------------------------------------------------------------------------------


def test_spans_of_a_text_by_hand():
    assert spans_of([2, 3], [2, 3]) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert spans_of([2, 3], [5]) == [(0, 2, 0, 1)]
    assert spans_of([5], [2, 3]) == [(0, 1, 0, 2)]
    assert spans_of([2, 3, 1], [3, 2, 1]) == [(0, 2, 0, 2), (2, 3, 2, 3)]
    assert spans_of([2, 2], [2, 1]) == [(0, 1, 0, 1)], "what is left has no counterpart"
    assert spans_of([0, 2, 1], [2, 1]) == [(0, 2, 0, 1), (2, 3, 1, 2)], "a token without bytes belongs to the next"
    assert spans_of([], []) == []


def test_spans_hold_every_byte_once_and_cannot_be_divided():
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randrange(1, 30)
        sides = []
        for _ in range(2):
            cuts = sorted({0, size, *(draw.randrange(size + 1) for _ in range(draw.randrange(12)))})
            sides.append([b - a for a, b in itertools.pairwise(cuts)])
        ours, theirs = sides
        spans = spans_of(ours, theirs)
        ends = [set(itertools.accumulate(side)) for side in sides]
        at = 0
        for span in spans:
            mine, other = sum(ours[span.start : span.stop]), sum(theirs[span.first : span.last])
            assert mine == other
            assert not any(at < cut < at + mine for cut in ends[0] & ends[1])
            at += mine
        assert at == size
        assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
        assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_both_sides_of_each_span_are_the_same_bytes(ours, theirs):
    both = pair(KINDS[ours](), KINDS[theirs]())
    for text in TEXTS:
        ids = both.student.texts.encode(text)
        if ids is None:
            continue
        reading = both.read([*ids, both.student.end])
        if isinstance(reading, str):
            assert reading == NOT_GIVEN_BACK
            assert theirs == "characters" or "▁" in text
            continue
        *inner, last = reading.spans
        for span in inner:
            mine = both.student.texts.bytes(ids[span.start : span.stop])
            assert mine == both.teacher.texts.bytes(reading.ids[span.first : span.last])
        assert b"".join(both.student.texts.bytes(ids[s.start : s.stop]) for s in inner) == text.encode()
        assert last == (len(ids), len(ids) + 1, len(reading.ids) - 1, len(reading.ids))
        assert reading.ids[-1] == both.teacher.end, "an end of turn means the same on both sides"


def test_what_cannot_be_read_says_why():
    both = pair(byte_level(), sentencepiece())
    fox = both.student.texts.encode(" fox")
    assert both.read([*fox, byte_level().unk_token_id, *fox]) == CONTROL
    assert pair(byte_level(), characters()).read([*fox, 10**6]) == CONTROL
    broken = both.student.texts.encode("é")[-1:]
    if len(both.student.texts.of[broken[0]]) == 1:
        assert both.read([*broken, *fox]) == NO_TEXT
    assert pair(byte_level(), lower_case()).read(both.student.texts.encode("She said")) == NOT_GIVEN_BACK
    assert not isinstance(pair(byte_level(), lower_case()).read(both.student.texts.encode("she")), str)


def test_control_tokens_of_one_name_are_read_as_such_and_text_between_them_as_text():
    both = pair(byte_level(chat=True), sentencepiece(chat=True))
    ours, theirs = byte_level(chat=True), sentencepiece(chat=True)
    fox, turn = both.student.texts.encode(" fox"), ours.convert_tokens_to_ids("<turn>")
    reading = both.read([*fox, turn, *fox, both.student.end])
    there = theirs.convert_tokens_to_ids("<turn>")
    assert reading.ids.count(there) == 1
    assert both.teacher.texts.bytes(reading.ids[: reading.ids.index(there)]) == b" fox"
    assert (len(fox), len(fox) + 1, reading.ids.index(there), reading.ids.index(there) + 1) in reading.spans
    assert reading.spans[-1].stop == 2 * len(fox) + 2


def test_half_a_character_at_the_end_of_what_a_budget_cut_has_no_counterpart():
    both = pair(byte_level(), byte_level(520))
    ids = both.student.texts.encode("the lazy 🙂")[:-1]
    reading = both.read(ids)
    assert not isinstance(reading, str)
    covered = both.student.texts.bytes(ids[: reading.spans[-1].stop])
    assert b"the lazy ".startswith(covered)
    assert both.read([*ids, both.student.end]) == NO_TEXT, "an end within a character is no text"


def test_the_end_of_what_a_budget_cut_is_settled_only_where_the_teacher_could_not_have_read_on():
    both = pair(characters(), byte_level())
    assert b" the" in both.teacher.ids
    cut = both.student.texts.encode("dog th")
    reading = both.read(cut)
    # " th" might have become " the": no span of those tokens counts.
    assert both.student.texts.bytes(cut[: reading.spans[-1].stop if reading.spans else 0]) in (b"dog", b"do", b"d", b"")
    whole = pair(byte_level(), byte_level())
    ids = whole.student.texts.encode("dog th")
    assert [s.stop for s in whole.read(ids).spans] == list(range(1, len(ids) + 1)), "of one tokenizer all is settled"


# -- common tokens -----------------------------------------------------------------------------------------------------


def test_common_tokens_are_the_same_bytes_and_the_ends_of_turns():
    both = pair(byte_level(chat=True), sentencepiece(chat=True))
    ours, theirs = both.common
    assert ours == sorted(ours)
    ended = byte_level(chat=True).convert_tokens_to_ids("<end_of_turn>")
    assert both.student.end == ended
    for a, b in zip(ours, theirs, strict=True):
        if a == ended:
            assert b == sentencepiece(chat=True).convert_tokens_to_ids("<end_of_turn>")
        elif a in both.student.texts.of:
            assert both.student.texts.of[a] == both.teacher.texts.of[b]
        else:
            names = [byte_level(chat=True).convert_ids_to_tokens(a), sentencepiece(chat=True).convert_ids_to_tokens(b)]
            assert names[0] == names[1]
    assert len(set(ours)) == len(set(theirs)) == len(ours) > 60


def test_shares_of_a_text():
    same = shares(pair(byte_level(), byte_level()), TEXTS)
    assert (same.single, same.several, same.tokens) == (1.0, 0.0, pytest.approx(1.0, abs=0.2))
    other = shares(pair(byte_level(), characters()), ["the lazy dog", "日本"])
    assert other.single + other.several == pytest.approx(12 / 18)
    assert other.tokens > 1


# -- a tokenizer against itself ----------------------------------------------------------------------------------------

OBJECTIVES = [
    ReverseKL(),
    ForwardKL(),
    JensenShannon(),
    ReverseKL(top_k=5),
    ReverseKL(top_k=5, support_from="student"),
    ReverseKL(top_k=5, tail="none"),
    ReverseKL(clip=0.05),
    ReverseKLSampled(),
    ReverseKLSampled(clamp=0.1),
    ReverseKLSampled(discount=0.5),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.model_dump_json(exclude_defaults=True))
@pytest.mark.parametrize("ended", [True, False])
def test_a_tokenizer_against_itself_gives_the_losses_and_gradients_of_one_tokenizer(objective, ended):
    student, teacher, context = built(byte_level(), byte_level())
    trajectories = written(student, ["the lazy dog", " hello 🙂 there", "12"], ended)
    inner = teacher.inner
    own = student.agree(Context(CPU), [inner], None)
    assert own.agreed == context.agreed
    plain, expected = gradients(student, objective, inner.answer(trajectories, inner.settings, own), trajectories)
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    assert isinstance(target.distribution, Aligned)
    assert target.missing is None
    found, loss = gradients(student, objective, [target], trajectories)
    torch.testing.assert_close(loss.values, expected.values, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(found, plain, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(loss.total, expected.total)


# -- several tokens: the chain rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("byte level", "characters"), ("characters", "byte level")])
def test_a_spans_log_probability_is_the_chain_rules(kinds):
    student, teacher, context = built(KINDS[kinds[0]](), KINDS[kinds[1]]())
    trajectories = written(student, ["the lazy dog", "hello there"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    spans = spans_in(target.distribution)
    both = teacher.pair(context)
    sums = spans.sums(spans.log_probs)
    place, several = 0, 0
    for prompt, actions in zip(trajectories.prompts, trajectories.completions(), strict=True):
        reading = both.read(actions.tolist())
        prefix = teacher.own_reader.encode(prompt)
        for span in reading.spans:
            expected = 0.0
            for n in range(span.first, span.last):
                before = torch.cat([prefix, torch.tensor(reading.ids[:n], dtype=torch.int64)])
                logits = teacher.own_reader.model(before[None]).logits[0, -1].float()
                held = torch.tensor([both.teacher.vocabulary.holds(i) for i in range(len(logits))])
                expected += float(logits.masked_fill(~held, -1e9).log_softmax(-1)[reading.ids[n]])
            assert float(sums[place]) == pytest.approx(expected, abs=1e-4)
            place += 1
            several += not span.single
    assert place == len(sums)
    assert several


def test_the_gradient_of_a_span_is_its_log_ratio_times_that_of_each_of_its_tokens():
    student, teacher, context = built(characters(), byte_level())
    trajectories = written(student, ["the lazy dog"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    found, loss = gradients(student, ReverseKLSampled(), [target], trajectories)
    spans = target.distribution.spans
    log_q = Sampled.of(student(trajectories), trajectories.actions).log_probs
    ratio = (spans.sums(spans.log_probs) - spans.sums(log_q)).detach()
    student.module.zero_grad()
    (-(ratio * spans.sums(log_q)).sum() / trajectories.positions).backward()
    expected = torch.cat([p.grad.flatten() for p in student.module.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spans.sums(loss.values), -ratio, atol=1e-5, rtol=1e-5)


def test_whole_distributions_and_sampled_spans_share_the_positions_out():
    student, teacher, context = built(characters(), byte_level())
    trajectories = written(student, ["the lazy dog", "12"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    spans, places = target.distribution.spans, target.distribution.places
    weights = torch.ones(trajectories.positions)
    whole = ReverseKL()(student(trajectories), [target], weights, trajectories)
    rest = ReverseKLSampled(spans="several")(student(trajectories), [target], weights, trajectories)
    assert bool((spans.single == (places >= 0)).all())
    assert bool(spans.single.any())
    assert bool((~spans.single).any())
    assert torch.equal(whole.computed, spans.single)
    assert torch.equal(rest.computed, spans.compared & ~spans.single)
    assert float(whole.values[~spans.single].abs().max()) == 0
    assert float(rest.values[spans.single].abs().max()) == 0


# -- one to one: common tokens and the rest ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL(), JensenShannon()], ids=lambda o: o.kind)
def test_common_tokens_and_the_rest_of_each_by_hand(objective):
    student, teacher, context = built(byte_level(), sentencepiece())
    trajectories = written(student, ["the lazy dog for 12", "hello"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    found, loss = gradients(student, objective, [target], trajectories)

    both = teacher.pair(context)
    ours, theirs = (torch.tensor(each) for each in both.common)
    assert len(ours) < len(both.student.ids)
    at, hidden = target.distribution.places, target.distribution.common.answer
    log_p = hidden.log_probs()
    log_q = student(trajectories).log_probs()[at >= 0]

    def buckets(log_probs, ids):
        near = log_probs[:, ids]
        return torch.cat([near, torch.log1p(-near.exp().sum(-1, keepdim=True))], -1)

    value = objective.exact(buckets(log_p, theirs), buckets(log_q, ours))
    torch.testing.assert_close(loss.values[at >= 0], value.detach(), atol=1e-5, rtol=1e-4)
    student.module.zero_grad()
    (value.sum() / trajectories.positions).backward()
    expected = torch.cat([p.grad.flatten() for p in student.module.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


# -- what is logged, left out and refused ------------------------------------------------------------------------------


def test_texts_that_do_not_survive_are_counted_and_left_out():
    student, teacher, context = built(byte_level(), lower_case())
    trajectories = written(student, ["the dog", "She said", "hello"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    assert unanswered(trajectories, [target]).tolist() == [False, True, False]
    assert teacher.failures() == {NOT_GIVEN_BACK: 1}
    signals = teacher.own_signals(lambda x: x)
    assert signals["alignment/left_out"] == pytest.approx(1 / 3)
    assert signals["alignment/single_bytes"] == 1
    assert signals["alignment/single_spans"] == 1
    assert signals["alignment/uncompared_bytes"] == 0
    assert signals["alignment/common_mass"] == pytest.approx(1, abs=1e-4)
    assert teacher.own_signals(lambda x: x) == {}, "nobody has asked since"


def test_a_step_without_a_text_has_an_answer_all_the_same():
    student, teacher, context = built(byte_level(), lower_case())
    (target,) = teacher.answer(written(student, ["She"]), teacher.settings, context)
    assert bool(target.missing.all())
    assert len(target.distribution) == len(target.missing)


def test_shares_of_bytes_and_of_probability():
    student, teacher, context = built(byte_level(), characters())
    (target,) = teacher.answer(written(student, ["the lazy dog", "x"]), teacher.settings, context)
    signals = teacher.own_signals(lambda x: x)
    spans = target.distribution.spans
    assert signals["alignment/single_bytes"] + signals["alignment/span_bytes"] == pytest.approx(1)
    assert 0 < signals["alignment/single_bytes"] < 1
    assert signals["alignment/single_spans"] == pytest.approx(
        float((spans.begins & spans.single).sum() / spans.begins.sum())
    )
    _, theirs = (torch.tensor(each) for each in teacher.pair(context).common)
    mass = target.distribution.common.answer.log_probs()[:, theirs].exp().sum(-1).mean()
    assert signals["alignment/common_mass"] == pytest.approx(float(mass), abs=1e-5)


def test_what_was_counted_of_answers_before_a_step_is_not_the_steps():
    student, teacher, context = built(byte_level(), characters())
    routed = RoutedTeachers(RoutedTeacher(by="task", routes={"a": teacher.settings}), {"a": teacher})
    teacher.answer(written(student, ["the lazy dog"]), teacher.settings, context)
    routed.begin_step()
    assert routed.own_signals(lambda x: x) == {}
    teacher.answer(written(student, ["the lazy dog"]), teacher.settings, context)
    assert "alignment/single_bytes@a" in routed.own_signals(lambda x: x)


def test_a_debate_without_rounds_passes_on_what_its_experts_count():
    student, teacher, context = built(byte_level(), characters())
    own = LocalTeacher(model="(live)", template="plain", tokenizer="own")
    debate = LiveDebate(DebateTeacher(experts={"a": own}, rounds=0), {"a": teacher})
    debate.answer(written(student, ["the lazy dog"]), debate.settings, context)
    signals = debate.own_signals(lambda x: x)
    assert signals["alignment/single_bytes@a"] + signals["alignment/span_bytes@a"] == pytest.approx(1)


def test_prompts_are_counted_as_the_teachers_own_tokens():
    student, teacher, _ = built(byte_level(), characters())
    routed = RoutedTeachers(RoutedTeacher(by="task", routes={"a": teacher.settings}), {"a": teacher})
    prompt = Prompt("p", {"prompt": "the lazy dog", "task": "a"})
    assert teacher.prompt_length(prompt) == routed.prompt_length(prompt) == len(teacher.own_reader.encode(prompt))
    assert teacher.prompt_length(prompt) > student.prompt_length(prompt)


def test_held_out_comparisons_know_spans():
    student, teacher, context = built(characters(), byte_level())
    trajectories = written(student, ["the lazy dog", "hello"], ended=False)
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    found = compare(student(trajectories), target.distribution, trajectories.actions)
    spans = target.distribution.spans
    log_q = found.values["log_q"]
    each = found.values["reverse_kl_sampled"]
    assert torch.equal(each.isnan(), ~spans.compared)
    torch.testing.assert_close(spans.sums(each), spans.sums(log_q) - spans.sums(spans.log_probs), atol=1e-5, rtol=1e-5)
    sums = found.sums(torch.ones_like(spans.compared))
    assert sums["reverse_kl_sampled"] == pytest.approx(float(each[spans.compared].mean()) * len(each), rel=1e-4)


def test_selecting_joining_and_routing_keep_spans_together():
    from opd.distributions import joined

    student, teacher, context = built(characters(), byte_level())
    trajectories = written(student, ["the lazy dog", "12", "hello there"])
    (target,) = teacher.answer(trajectories, teacher.settings, context)
    whole, objective = target.distribution, ReverseKLSampled()
    weights = torch.ones(trajectories.positions)
    expected = objective(student(trajectories), [target], weights, trajectories).values
    parts, positions = [], []
    for which in ([1], [0, 2]):
        part, here = trajectories.pick(which)
        (answer,) = teacher.answer(part, teacher.settings, context)
        parts.append(answer.distribution)
        positions.append(here)
    routed = joined(parts, positions)
    assert not isinstance(routed, Aligned | Spans)
    for objective in (ReverseKLSampled(), ReverseKL()):
        expected = objective(student(trajectories), [Target(whole)], weights, trajectories)
        found = objective(student(trajectories), [Target(routed)], weights, trajectories)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-5)
    micro, here = trajectories.rows(1, 3)
    part = objective(student(micro), [target.select(here)], weights[here], micro)
    torch.testing.assert_close(part.values, expected.values[here], atol=1e-5, rtol=1e-5)


def test_an_objective_for_spans_of_several_tokens_is_refused_beside_one_tokenizer():
    from opd.distributions import Categorical

    with pytest.raises(IncompatibleError, match="the teacher has the student's tokenizer"):
        ReverseKLSampled(spans="several").check_accepts(Categorical, "the teacher")
    ReverseKLSampled(spans="several").check_accepts(Spans, "the teacher")
    with pytest.raises(IncompatibleError, match="answers 'spans'"):
        ReverseKL().check_accepts(Spans, "the teacher")
    with pytest.raises(ValueError, match="discount: 0"):
        ReverseKLSampled(discount=0.5, spans="several")
