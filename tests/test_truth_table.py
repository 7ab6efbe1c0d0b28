"""Every selectable objective descends what it says; the shipped table is what the code gives."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import peer_objectives
from benchmarks.enumerated import from_loss
from benchmarks.objectives import detached_kl_as_reward, k1_direct, k2_direct, k3_direct
from opd.cli import main
from opd.divergences import ForwardKL, ReverseKL, ReverseKLSampled
from opd.divergences.gaussian_kl import GaussianKL
from opd.objectives.base import label
from opd.scenes import SequenceScene
from opd.truth_table import (
    load_table,
    measure,
    measure_choice,
    measure_under_another_tokenizer,
    selectable,
    under_another_tokenizer,
)

SCENE = [SequenceScene.random(0)]


@pytest.mark.parametrize("divergence", selectable(), ids=label)
def test_expected_gradient_is_the_promised_one(divergence):
    row = measure_choice(divergence, [divergence.scene.random(0)])
    if divergence.unbiased:
        assert row.cosine >= 0.999
        assert row.bias <= 1e-3
    else:
        assert row.bias > 1e-3, "no bias was found: say so in the class"


@pytest.mark.parametrize("settings", GaussianKL.variants, ids=str)
def test_expected_gradient_of_gaussians(settings):
    divergence = GaussianKL(**settings)
    row = measure_choice(divergence)
    shipped = {row.objective: row for row in load_table()}[row.objective]
    assert row.variance == pytest.approx(shipped.variance, rel=1e-3, abs=1e-6)
    if divergence.estimator == "pg_detached":
        assert row.norm_ratio < 1e-4
        assert not row.unbiased
    else:
        assert row.cosine >= 0.999
        assert row.bias <= 1e-3
    assert (row.variance > 0.1) == (divergence.estimator != "kl_direct")


def test_the_shipped_table_lists_every_selectable_objective_with_the_figures_of_this_code():
    table = {row.objective: row for row in load_table()}
    for divergence in selectable():
        assert label(divergence) in table
    fresh = measure_choice(ReverseKLSampled())
    shipped = table["reverse_kl_sampled"]
    assert fresh.variance == pytest.approx(shipped.variance, rel=1e-3)
    assert fresh.to_forward_kl == pytest.approx(shipped.to_forward_kl, abs=1e-3)


@pytest.mark.parametrize(("divergence", "unbiased"), under_another_tokenizer(), ids=lambda each: str(each)[:40])
def test_under_another_tokenizer_expected_gradients_are_the_promised_ones(divergence, unbiased):
    row = measure_under_another_tokenizer(divergence, unbiased, [0])
    if unbiased:
        assert row.cosine >= 0.999
        assert row.bias <= 1e-3
    else:
        assert row.bias > 1e-3
    assert row.objective in {shipped.objective for shipped in load_table()}


def test_the_three_estimators_differentiated_as_losses():
    """k1 gives nothing, k2 gives reverse KL, k3 gives forward KL."""
    assert measure("k1", from_loss(k1_direct), ReverseKL(), False, SCENE).norm_ratio < 1e-9
    assert measure("k2", from_loss(k2_direct), ReverseKL(), False, SCENE).bias < 1e-9
    assert measure("k3", from_loss(k3_direct), ForwardKL(), False, SCENE).bias < 1e-9
    assert measure("r", from_loss(detached_kl_as_reward), ReverseKL(), False, SCENE).norm_ratio < 1e-9


def test_sampled_gradient_equals_k2_sequence_by_sequence():
    """`-sg(A) grad log q = grad 0.5 (log q - log p)^2`: the identity behind offline scoring."""
    ours = SCENE[0].gradients(ReverseKLSampled())
    k2 = from_loss(k2_direct)(SCENE[0])
    torch.testing.assert_close(ours, k2, atol=1e-5, rtol=1e-4)


def test_a_peer_that_cannot_be_measured_is_a_line_with_the_reason():
    def missing():
        raise ImportError("no such library")

    def present():
        return [peer_objectives.Case("k3", k3_direct, ReverseKL())]

    contestants = [peer_objectives.Peer("gone", (), missing), peer_objectives.Peer("here", (), present)]
    found, skipped = peer_objectives.measure_peers(contestants, SCENE)
    assert skipped == {"gone": "ImportError: no such library"}
    assert [row.objective for row in found["here"]] == ["here (k3)"]
    assert not found["here"][0].unbiased
    line = peer_objectives.last_line(found, skipped)
    assert "1 of 2 peers measured (gone skipped)" in line
    assert "here (k3)" in line


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["opd", "objectives"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    said = capsys.readouterr().out
    assert "reverse_kl_sampled" in said
    assert "control" in said
