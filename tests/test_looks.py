"""A sampler that looks only now and then at which rows have ended: the rows of one that looks at every token."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.context import Context
from opd.language.engines.base import Drawing, Look, Looker
from opd.language.engines.sampler import LOOK_EVERY, Sampler, Sampling
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from tests.conftest import tiny_model
from tests.families import FAMILIES, tiny
from tests.tiny import turn_tokenizer

ENDS = (2, 9, 17, 30, 41)
CPU = Context(torch.device("cpu"), agreed=Tokens(end_ids=ENDS))
LENGTHS = [7, 3, 12, 5, 5, 9, 1, 4, 30, 6]
BUDGET = 21
"""No multiple of the tokens between two looks."""


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def language_of(model):
    # In float64 no rounding decides a draw, whoever shares a batch.
    return LanguageModel(model, turn_tokenizer(), "plain").double().requires_grad_(False).eval()


def sampled(monkeypatch, language, every, looker=None, **drawing):
    """Rows of a sampler that looks `every` so many tokens."""
    made = Sampler.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        assert self.look_every == 1, "a CPU has nothing to wait for"
        self.look_every = every

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__init__", init)
        return language.sample(prompts(), 2, BUDGET, range(2 * len(LENGTHS)), Drawing(CPU, **drawing), looker)


def same(some, others):
    for own, other in zip(some, others, strict=True):
        assert own.actions.tolist() == other.actions.tolist()
        torch.testing.assert_close(own.log_probs, other.log_probs, atol=1e-6, rtol=1e-6)
        assert (own.finished, own.stopped) == (other.finished, other.stopped)


@pytest.mark.parametrize("drawing", [{}, {"batch": 6}, {"batch": 1}, {"top_p": 0.7, "top_k": 20}])
@pytest.mark.parametrize("every", [2, LOOK_EVERY, 100])
def test_rows_are_those_of_looking_at_every_token(every, drawing, monkeypatch):
    """With ends at different places, rows at their budget, and rows that join others."""
    language = language_of(tiny_model())
    joined = []
    join = Sampling.join
    monkeypatch.setattr(Sampling, "join", lambda state, others: joined.append(len(others.alive)) or join(state, others))
    each = sampled(monkeypatch, language, 1, **drawing)
    assert len({len(row.actions) for row in each}) > 4
    assert {row.finished for row in each} == {True, False}
    assert (len(joined) > 0) == (drawing.get("batch") == 6)
    for row in each:
        assert not set(row.actions[:-1].tolist()) & set(ENDS)
    joined.clear()
    same(sampled(monkeypatch, language, every, **drawing), each)
    # Who looks at the budget alone sees all rows end at once.
    assert (len(joined) > 0) == (drawing.get("batch") == 6 and every < BUDGET)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt", "mistral", "lfm2", "mamba", "rwkv", "gemma3_text"])
def test_families_with_windows_and_states_too(name, monkeypatch):
    language = language_of(tiny(next(family for family in FAMILIES if family.name == name)))
    same(sampled(monkeypatch, language, LOOK_EVERY), sampled(monkeypatch, language, 1))


class Counting(Looker, Look):
    """Sees candidates, and ends the rows of the third prompt after the second look."""

    candidates = 3

    def __init__(self, segment):
        self.segment, self.seen = segment, []

    def begin(self, written):
        return self

    def look(self, written):
        for place in written.going:
            rows = written.rows[place], written.actions[place].tolist(), written.candidates[place].ids.tolist()
            self.seen.append(rows)
        long = [place for place in written.going if len(written.actions[place]) >= 2 * self.segment]
        return {place: "long" for place in long if written.rows[place] // 2 == 2}

    def end(self, written):
        self.seen += [(written.rows[i], actions.tolist()) for i, actions in enumerate(written.actions)]
        for actions, candidates in zip(written.actions, written.candidates, strict=True):
            assert candidates.ids.shape == (len(actions), 3)


@pytest.mark.parametrize("segment", [3, 8, 11])
def test_a_looker_sees_the_same_rows(segment, monkeypatch):
    language = language_of(tiny_model())
    each, other = Counting(segment), Counting(segment)
    rows = sampled(monkeypatch, language, 1, each, batch=6)
    same(sampled(monkeypatch, language, LOOK_EVERY, other, batch=6), rows)
    assert sorted(other.seen, key=str) == sorted(each.seen, key=str)


WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default")


class Waiting(TorchDispatchMode):
    """Counts what a device would have to be waited for: numbers that Python asks for, and shapes that hang on them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masked = str(function).startswith(("aten.index.Tensor", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += str(function) in WAITS or masked
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_nothing_waits_between_two_looks(kind, tokenizer):
    """Of rows of unequal length, through the family's own modules, as on an accelerator."""
    language = LanguageModel(tiny_model(kind), tokenizer, "plain").requires_grad_(False).eval()
    counts = {}
    for every in (1, LOOK_EVERY):
        sampler = Sampler(language, language.head(1.0), [])
        sampler.decoder, sampler.look_every = None, every
        state = sampler.start(prompts([7, 3, 5]), 2, 65, range(6))
        with Waiting() as waiting:
            sampler.extend(state, 64)
        assert int(state.drawn.min()) == 64
        counts[every] = waiting.count
    assert counts[1] >= 64
    assert counts[LOOK_EVERY] <= 2 * 64 / LOOK_EVERY
