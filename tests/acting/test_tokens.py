"""Actions as tokens: the bins, ids and statistics of OpenVLA, and the sequence that OpenVLA-OFT reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from opd.acting.deciding import PolicyActor, State
from opd.acting.layout import read_statistics, write_statistics
from opd.acting.model import PolicySettings, load_policy
from opd.acting.openvla import KNOWN, OPENVLA_OFT
from opd.acting.outline import policy_shape
from opd.acting.seeing import ActionTokens, Seen, Statistics
from opd.errors import IncompatibleError, ModelError
from tests.acting.tiny import policy

LIBERO = Statistics("libero", (-0.5, -1.0, 0.0), (0.5, 1.0, 1.0), (True, True, False))


def test_ids_are_the_last_of_the_vocabulary_and_edges_are_equally_spaced():
    tokens = OPENVLA_OFT.actions
    assert (tokens.ids[0], tokens.ids[-1], len(tokens.ids)) == (31744, 31999, 256)
    assert tokens.encode(np.array([-1.0, 0.0, 1.0, -7.0])).tolist() == [31999, 31872, 31744, 31999]
    # 255 centres of 256 edges: the last index is clipped on to the last centre.
    assert len(tokens.centres) == 255
    assert tokens.decode(np.array([31999, 31745, 31744])) == pytest.approx([-1 + 1 / 255, 1 - 1 / 255, 1 - 1 / 255])


def test_token_to_action_to_token_is_a_round_trip():
    for bins in (2, 16, 64, 256):
        tokens = ActionTokens(bins, 1000)
        ids = np.arange(1000 - bins + 1, 1000)
        assert (tokens.encode(tokens.decode(ids)) == ids).all()
        values = np.linspace(-1, 1, 999)
        assert np.abs(tokens.decode(tokens.encode(values)) - values).max() <= 1 / (bins - 1) + 1e-9


def test_statistics_scale_what_is_marked_and_leave_the_gripper():
    actions = np.array([[0.25, -1.0, 1.0], [9.0, 0.0, 0.0]])
    scaled = LIBERO.scale(actions)
    np.testing.assert_allclose(scaled, [[0.5, -1.0, 1.0], [1.0, 0.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(LIBERO.unscale(scaled[0]), actions[0], atol=1e-6)


def test_a_gaussian_over_bins_is_a_distribution_whose_likeliest_token_is_that_of_its_mean():
    tokens = ActionTokens(32, 500)
    mean, spread = np.array([0.3, -1.0, -0.97]), np.full(3, 0.02)
    log_probs = tokens.log_probs(mean, spread)
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)
    assert (log_probs.argmax(-1) + tokens.ids[0] == tokens.encode(mean)).all()
    assert log_probs.min() > np.log(1e-4 / 32) - 1e-3, "no token is impossible"


def test_checkpoints_name_statistics_by_data_set(tmp_path):
    write_statistics(tmp_path, LIBERO)
    assert read_statistics(tmp_path) == LIBERO
    two = {
        name: {"action": {"q01": [0.0], "q99": [1.0], "min": [-3.0], "max": [3.0]}}
        for name in ("libero_goal_no_noops", "libero_10_no_noops")
    }
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(two))
    with pytest.raises(ModelError, match=r"several data sets.*set statistics to one of libero_10_no_noops"):
        read_statistics(tmp_path)
    with pytest.raises(ModelError, match="did you mean 'libero_goal_no_noops'"):
        read_statistics(tmp_path, "libero_goal")
    assert read_statistics(tmp_path, "libero_10_no_noops", "extremes").low == (-3.0,)


def test_other_statistics_are_another_language():
    other = Statistics("other", (-0.5, -2.0, 0.0), (0.5, 1.0, 1.0), (True, True, False))
    with pytest.raises(IncompatibleError, match=r"dimension 1 goes from -1 to 1.*'libero'.*from -2 to 1"):
        LIBERO.check(other, "the teacher")
    # Bounds of a dimension that is not scaled mean nothing.
    LIBERO.check(Statistics("same", (-0.5, -1.0, 5.0), (0.5, 1.0, 6.0), (True, True, False)), "the teacher")


def states(count, texts=("put the red block on the grey ring",)):
    rng = np.random.default_rng(0)
    return [
        State(
            texts[i % len(texts)],
            Seen(
                rng.integers(0, 255, (1, 24, 24, 3), dtype=np.uint8),
                rng.uniform(-1, 1, 4).astype(np.float32),
                rng.uniform(-1, 1, 10).astype(np.float32),
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("queries", [False, True])
def test_the_sequence_is_openvla_ofts(queries, tmp_path, monkeypatch):
    """`<s>`, patches, the body, words, M zeros, `</s>`; everything sees everything; read one place before. Small models
    learn the placeholders and are read there."""
    model = load_policy(PolicySettings(model=policy(tmp_path / "policy", queries=queries)), "cpu")
    layout, seen = model.layout, {}
    inner = model.backbone.forward

    def noted(**given):
        seen.update(given)
        seen["out"] = inner(**given)
        return seen["out"]

    monkeypatch.setattr(model.backbone, "forward", noted)
    (state,) = states(1)
    words = model.words(state.instruction)
    hidden = model([state.seen], [words])
    embedded = seen["inputs_embeds"][0]
    assert len(embedded) == 1 + layout.patches + 1 + len(words) + layout.tokens + 1
    table = model.backbone.embed_tokens.weight
    first = len(embedded) - 1 - layout.tokens
    torch.testing.assert_close(embedded[0], table[layout.begin])
    torch.testing.assert_close(embedded[-1], table[layout.stop])
    torch.testing.assert_close(embedded[first - len(words) : first], table[words])
    torch.testing.assert_close(embedded[first:-1], model.queries if queries else torch.zeros_like(embedded[first:-1]))
    # One place before the first placeholder is the last word.
    read = first if queries else first - 1
    torch.testing.assert_close(hidden[0], seen["out"].last_hidden_state[0, read : read + layout.tokens])
    # The first token depends on what stands behind it: attention goes both ways.
    with torch.no_grad():
        table[layout.stop] += 1
        assert not torch.equal(model([state.seen], [words])[0, 0], hidden[0, 0])


def test_a_state_does_not_depend_on_what_else_is_in_the_batch(model):
    texts = ("put the red block on the grey ring", "put the blue", "ring")
    several = states(3, texts)
    actor = PolicyActor(model)
    with torch.no_grad():
        together = actor.believe(several, 1.0).log_probs()
        alone = torch.cat([actor.believe([state], 1.0).log_probs() for state in several])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_head_is_over_the_action_ids_and_the_temperature_divides(model):
    (state,) = states(1)
    belief = PolicyActor(model).believe([state], 1.6)
    whole = model.lm_head(belief.hidden)
    want = (whole[:, -model.layout.bins :] / 1.6).log_softmax(-1)
    torch.testing.assert_close(belief.log_probs(), want)
    assert belief.vocabulary.ids == tuple(model.layout.actions.ids)


def test_the_published_layout_has_seven_billion_parameters():
    notes = []
    shape = policy_shape(PolicySettings(model=next(iter(KNOWN))), notes)
    assert 7.4e9 < shape.parameters < 7.7e9
    assert "not read" in notes[0]
    assert (OPENVLA_OFT.tokens, OPENVLA_OFT.patches) == (56, 256)
