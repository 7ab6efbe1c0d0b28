"""Taking, joining and going on treat every field by what it has one entry of, answers and named columns too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.distributions import Categorical, Head, Sampled, Target
from opd.trajectories import AUTHORS, continued, join
from tests.conftest import trajectories_of


def noted(lengths, seed=0, teacher="t", **changes):
    """Trajectories whose columns and answers say at which position they are."""
    made = trajectories_of(lengths, seed=seed)
    at = torch.arange(made.positions).float() + 100 * seed
    return replace(
        made,
        columns={"drift": at, "slot": at.long()},
        answers=(Target(Sampled(-at), at / 2, teacher),),
        stored=torch.arange(len(lengths)) + 10 * seed,
        **changes,
    )


def said(trajectories):
    (target,) = trajectories.answers
    return target.distribution.log_probs


def test_what_is_noted_and_answered_by_position_goes_with_its_position():
    made = noted([3, 1, 2])
    part, here = made.rows(1, 3)
    assert part.columns["drift"].tolist() == [3.0, 4.0, 5.0] == (-said(part)).tolist()
    assert part.answers[0].weight.tolist() == [1.5, 2.0, 2.5]
    assert part.stored.tolist() == [1, 2]
    assert here == slice(3, 6)
    picked, here = made.pick([2, 0])
    assert picked.columns["slot"].tolist() == [4, 5, 0, 1, 2] == here.tolist()
    assert (-said(picked)).tolist() == [4.0, 5.0, 0.0, 1.0, 2.0]
    assert picked.stored.tolist() == [2, 0]
    assert picked.groups.tolist() == [2, 0]
    nothing, here = made.pick([])
    assert len(nothing) == nothing.positions == len(here) == len(said(nothing)) == 0


def test_parts_that_are_joined_keep_each_positions_own():
    a, b = noted([2, 1]), noted([3], seed=1)
    both = join([a, b], [2, 0, 1])
    assert both.lengths.tolist() == [1, 3, 2]
    assert both.columns["drift"].tolist() == [2.0, 100.0, 101.0, 102.0, 0.0, 1.0] == (-said(both)).tolist()
    assert both.answers[0].weight.tolist() == [1.0, 50.0, 50.5, 51.0, 0.0, 0.5]
    assert both.stored.tolist() == [1, 10, 0]
    assert both.groups.tolist() == [0, 1, 2]


def test_what_one_part_lacks_is_absent_and_never_taken_for_known():
    a, b = noted([2]), trajectories_of([1], seed=1)
    both = join([a, b], [0, 1])
    assert both.answers is None
    assert both.stored.tolist() == [0, -1]
    assert both.columns["slot"].tolist() == [0, 1, -1]
    assert both.columns["drift"].isnan().tolist() == [False, False, True]
    assert join([a, noted([1], seed=1, teacher="another")], [0, 1]).answers is None
    rewarded = a.rewarded(torch.ones(1), 0.0)
    lacking = join([rewarded, b], [0, 1])
    assert lacking.rewards.isnan().tolist() == [False, True]
    assert lacking.group_mean is None
    assert lacking.reward_spread is None


def test_a_trajectory_goes_on_with_what_was_noted_of_both():
    first, rest = noted([2, 2, 1]), noted([2, 1], seed=1, finished=torch.tensor([False, True]))
    first = replace(first, finished=torch.tensor([False, True, False]))
    whole = continued(first, [0, 2], rest)
    assert whole.lengths.tolist() == [4, 2, 2]
    assert whole.finished.tolist() == [False, True, True]
    assert whole.columns["drift"].tolist() == [0.0, 1.0, 100.0, 101.0, 2.0, 3.0, 4.0, 102.0] == (-said(whole)).tolist()
    assert whole.stored.tolist() == [0, 1, 2]


def test_answers_of_different_heads_stay_each_positions_own():
    def with_hidden(lengths, width, seed):
        made = trajectories_of(lengths, seed=seed)
        hidden = torch.randn(made.positions, width, generator=torch.Generator().manual_seed(seed))
        weight = torch.randn(64, width, generator=torch.Generator().manual_seed(seed + 9))
        return replace(made, answers=(Target(Categorical(hidden, Head(weight))),))

    a, b = with_hidden([2, 1], 4, 0), with_hidden([2], 6, 1)
    both = join([a, b], [0, 2, 1])
    expected = [a.rows(0, 1)[0], b, a.rows(1, 2)[0]]
    values = torch.cat([part.answers[0].distribution.log_probs() for part in expected])
    torch.testing.assert_close(both.answers[0].distribution.log_probs(), values)


@pytest.mark.parametrize("author", AUTHORS)
def test_authors_are_told_apart_by_number(author):
    made = trajectories_of([2])
    made = replace(made, authors=torch.full_like(made.authors, AUTHORS.index(author)))
    assert (join([made, trajectories_of([1])], [1, 0]).authors[1:] == AUTHORS.index(author)).all()
