"""Rows that take the places of those that ended: the same draws as side by side, in a batch that stays full."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from opd.context import Context
from opd.language.engines.base import Drawing, Look, Looker
from opd.language.engines.batches import Batches
from opd.language.engines.cache import ROOM
from opd.language.engines.sampler import Sampler, Sampling
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from tests.conftest import tiny_model
from tests.families import FAMILIES, tiny
from tests.tiny import turn_tokenizer

BUDGET = 20
CPU = Context(torch.device("cpu"), agreed=Tokens(end_ids=(2, 9, 17, 30, 41)))
LENGTHS = [7, 3, 12, 5, 5, 9, 1, 4, 30, 6]
CACHED = {family.label or family.name: family for family in FAMILIES if family.draws == "cache"}
WAVES = ("gemma2", "gemma3_text", "mistral", "bamba", "mamba", "lfm2")
"""Families with windows or states."""


def ids(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


@pytest.fixture
def language(student):
    return student.language


def same(some, others, tolerance=1e-4):
    for own, other in zip(some, others, strict=True):
        assert own.actions.tolist() == other.actions.tolist()
        torch.testing.assert_close(own.log_probs, other.log_probs, atol=tolerance, rtol=tolerance)
        assert (own.finished, own.stopped) == (other.finished, other.stopped)


def counted(monkeypatch):
    """Counts rows that join others, and tokens drawn one after the other."""
    count = {"joined": 0, "steps": 0}
    join, draw = Sampling.join, Sampler._distribution

    def joined(state, others):
        count["joined"] += len(others.alive)
        join(state, others)
        held = [layer.get_seq_length() for layer in state.cache.layers]
        assert set(held) == {state.width}
        # The longest row that is left has no padding.
        assert state.width == int((state.following[:, 0] + state.drawn).max())
        assert state.mask[:, : state.width].any(0).all()

    def drawn(sampler, state):
        count["steps"] += 1
        return draw(sampler, state)

    monkeypatch.setattr(Sampling, "join", joined)
    monkeypatch.setattr(Sampler, "_distribution", drawn)
    return count


@pytest.mark.parametrize("name", CACHED)
def test_a_family_draws_the_same_tokens_in_few_places(name, monkeypatch):
    family = CACHED[name]
    if family.name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family.name}")
    model = LanguageModel(tiny(family), turn_tokenizer(), "plain").requires_grad_(False).eval()
    joins = model.sampler(Drawing(CPU)).joins
    if name in WAVES:
        assert not joins
    elif not joins:
        return
    count = counted(monkeypatch)
    arguments = ids(LENGTHS), 1, 12, range(len(LENGTHS))
    side_by_side = model.sample(*arguments, Drawing(CPU))
    assert count["joined"] == 0
    # Recurrences between layers enlarge what rounding makes.
    same(model.sample(*arguments, Drawing(CPU, batch=3)), side_by_side, 5e-3)
    assert (count["joined"] > 0) == joins


def test_the_families_with_full_attention_and_fixed_angles_are_those_that_refill():
    joining = {"llama", "qwen2", "qwen3", "gpt2", "bloom", "phi3", "olmo2", "qwen3_moe"}
    for name in joining | set(WAVES):
        model = LanguageModel(tiny(CACHED[name]), turn_tokenizer(), "plain")
        assert model.sampler(Drawing(CPU)).joins == (name in joining)
    growing = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert not LanguageModel(growing, turn_tokenizer(), "plain").sampler(Drawing(CPU)).joins


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("modules", [False, True])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.8}, {"top_k": 9}])
@pytest.mark.parametrize("group", [1, 3])
def test_groups_and_cut_distributions_draw_the_same_tokens(group, cuts, modules, attention, language, monkeypatch):
    if modules:
        monkeypatch.setattr("opd.language.engines.sampler.Decoder.known", lambda body: False)
    language.base.set_attn_implementation(attention)
    count = counted(monkeypatch)
    arguments = ids(LENGTHS), group, BUDGET, range(group * len(LENGTHS))
    side_by_side = language.sample(*arguments, Drawing(CPU, **cuts))
    assert count["joined"] == 0
    refilled = language.sample(*arguments, Drawing(CPU, batch=4 * group, **cuts))
    assert 0 < count["joined"] <= group * (len(LENGTHS) - 4)
    same(refilled, side_by_side)
    lengths = {len(row.actions) for row in refilled}
    assert max(lengths) == BUDGET
    assert len(lengths) > 5


def test_a_refilled_batch_takes_fewer_steps_than_waves(language, monkeypatch):
    count = counted(monkeypatch)
    contexts, few = ids([5] * 24), Drawing(CPU, batch=4)
    rows = language.sample(contexts, 1, 60, range(24), few)
    refilled = count["steps"]
    # Between the sum of all tokens over the places, and what the last rows need beyond it.
    tokens = sum(len(row.actions) for row in rows)
    assert tokens / 4 <= refilled <= tokens / 4 + 60
    monkeypatch.setattr(Batches, "_enough", lambda batches, waiting: batches.places)
    same(language.sample(contexts, 1, 60, range(24), few), rows)
    assert refilled < 0.8 * (count["steps"] - refilled)


class Stops(Looker):
    """Ends a row after a number of looks that is the row's own; notes which batches are under way together."""

    segment, candidates = 4, 3

    def __init__(self):
        self.open, self.most, self.ended = set(), 0, {}

    def begin(self, written):
        self.open.add(tuple(written.rows))
        self.most = max(self.most, len(self.open))
        assert list(written.going) == list(range(len(written.rows)))
        return StopsOne(self)


class StopsOne(Look):
    def __init__(self, of):
        self.of, self.looks = of, 0

    def look(self, written):
        self.looks += 1
        assert {len(written.actions[place]) for place in written.going} == {4 * self.looks}
        assert [len(likeliest) for likeliest in written.candidates] == [len(actions) for actions in written.actions]
        return {place: "enough" for place in written.going if written.rows[place] % 5 == self.looks}

    def end(self, written):
        assert not written.going
        self.of.open.remove(tuple(written.rows))
        for row, actions, likeliest in zip(written.rows, written.actions, written.candidates, strict=True):
            self.of.ended[row] = (actions.clone(), likeliest.log_probs.clone())


def test_rows_that_are_ended_make_room_and_are_ended_where_they_would_be_alone(language, monkeypatch):
    count = counted(monkeypatch)
    arguments = ids(LENGTHS), 2, BUDGET + 1, range(2 * len(LENGTHS))
    first, second = Stops(), Stops()
    side_by_side = language.sample(*arguments, Drawing(CPU), first)
    assert (count["joined"], first.most) == (0, 1)
    refilled = language.sample(*arguments, Drawing(CPU, batch=6), second)
    assert count["joined"] > 0
    assert second.most > 1
    same(refilled, side_by_side)
    stopped = [row.stopped for row in refilled]
    assert 0 < stopped.count("enough") < len(stopped)
    for row in range(2 * len(LENGTHS)):
        assert torch.equal(second.ended[row][0], refilled[row].actions)
        torch.testing.assert_close(second.ended[row][1], first.ended[row][1], atol=1e-4, rtol=1e-4)


def test_neither_cache_nor_tables_grow_with_the_rows_that_were_written(language, monkeypatch):
    held, tables = [], []
    join = Sampling.join

    def joined(state, others):
        join(state, others)
        held.append(state.cache.layers[0].room[0].shape)
        tables.append(len(state.actions))

    monkeypatch.setattr(Sampling, "join", joined)
    often = Context(torch.device("cpu"), agreed=Tokens(end_ids=tuple(range(2, 64, 4))))
    rows = language.sample(ids([6] * 200), 1, 40, range(200), Drawing(often, batch=8))
    assert sum(len(row.actions) for row in rows) > 600
    assert len(held) > 50
    assert max(shape[0] for shape in held) <= 8
    assert max(shape[2] for shape in held) <= (6 + 40) * 5 // 4 + ROOM
    assert max(tables) < 60
