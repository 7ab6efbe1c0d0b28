"""Solutions that change their manner, and the measurement of whether overlap falls along them."""

from __future__ import annotations

import random
import re

import pytest
import torch

from reproductions.prune_opd_models import solution
from reproductions.prune_opd_premise import by_quarter, events, overlap, verdict


def test_a_solution_goes_over_to_the_thorough_manner_for_good():
    rng = random.Random(0)
    assert solution("2846", 0.0, 0, 0.0, False, rng) == "2+8=046;0+4=46;4+6=0;#0"
    assert solution("2846", 1.0, 1, 0.0, False, rng) == ("2+8=046;046:4+0=46:04;46:6+4=0:4604;#0")
    lost = solution("2846", 1.0, 1, 0.0, True, rng)
    assert lost.startswith("2+8=046;")
    shape = r"2\+8=046;\d{3}:\d\+\d=\d{2}:\d{2};\d{2}:\d\+\d=\d:\d{4};#\d"
    assert re.fullmatch(shape, lost)
    assert "046:4+0=46:04" not in lost


def test_a_slip_is_off_by_one_and_is_followed_up():
    text = solution("55", 0.0, 0, 1.0, False, random.Random(1))
    assert text in ("5+5=1;#1", "5+5=9;#9")


def test_overlap_is_a_share_of_sets():
    own, others = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[4, 3, 2, 1], [1, 7, 8, 9]])
    assert overlap(own, others).tolist() == [1.0, 0.25]


def test_quarters_are_of_each_rollout_and_the_error_is_over_rollouts():
    same = torch.tensor([1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])
    means, fall, error = by_quarter([same, same])
    assert means == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert (fall, error) == pytest.approx((0.75, 0.0))
    # Falls of 0 and 1: their mean, and sd / sqrt(n) of two.
    means, fall, error = by_quarter([torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.0])])
    assert (fall, error) == pytest.approx((0.5, 0.5))
    assert events([same, same], 0.75) == pytest.approx([0.0, 0.0, 1.0, 1.0])


def test_the_worst_class_decides():
    figures = {"student_accuracy": 0.5, "greedy_d": 0.99, "accuracy_c": 0.97}
    figures |= {"fall_d": {"7": 0.15, "8": 0.12}, "fall_c": {"7": 0.01, "8": 0.04}}
    assert verdict(figures)[0]
    for name, worse in (("fall_d", {"7": 0.15, "8": 0.09}), ("fall_c", {"7": 0.06, "8": 0.0}), ("accuracy_c", 0.9)):
        holds, lines = verdict({**figures, name: worse})
        assert not holds
        assert sum(line.endswith("NO") for line in lines) == 1
