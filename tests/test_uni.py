"""Uni-OPD: margins, balancing by outcome and by difficulty, and the gate, against the specification's vectors."""

from __future__ import annotations

import pytest
import torch

import opd
from opd.errors import RunError
from opd.recipe import parse_recipe
from opd.shaping import Shape, Shaper, joint_shape, looked
from tests.conftest import trajectories_of

PLAIN = {
    "student": {"model": "org/none"},
    "teacher": {"model": "org/none"},
    "prompts": {"kind": "inline", "prompts": ["a", "b", "c"]},
}


class Fixed(Shaper):
    """Says what it was given, and counts its looks."""

    def __init__(self, shape, name):
        self.shape, self.name = shape, name

    def look(self, trajectories, targets, settings, sum_over_processes):
        trajectories.columns.setdefault("looks", []).append(self.name)
        return trajectories

    def __call__(self, student, targets, micro, settings):
        return self.shape


def test_of_several_shapings_weights_are_multiplied_and_offsets_added():
    micro = trajectories_of([2, 1])
    ones = torch.ones(3)
    first = Fixed(Shape(torch.tensor([1.0, 0.5, 2.0]), measured={"a": ones}), "first")
    second = Fixed(Shape(torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.1, 0.2, 0.3]), {"b": ones}), "second")
    third = Fixed(Shape(ones, torch.tensor([1.0, -1.0, 0.0])), "third")
    shape = joint_shape([first, second, third], [None] * 3, None, [], micro)
    assert shape.weights.tolist() == [0.0, 1.5, 2.0]
    torch.testing.assert_close(shape.offsets, torch.tensor([1.1, -0.8, 0.3]))
    assert shape.measured.keys() == {"a", "b"}
    assert joint_shape([first], [None], None, [], micro).offsets is None
    looked([first, second, third], [None] * 3, micro, [], None)
    assert micro.columns["looks"] == ["first", "second", "third"]
    with pytest.raises(RunError, match="two shapings measure 'a'"):
        joint_shape([first, first], [None] * 2, None, [], micro)


def test_a_recipe_has_one_shaping_or_a_list():
    assert parse_recipe({**PLAIN, "shaping": "uniform"}) == parse_recipe({**PLAIN, "shaping": ["uniform"]})
    both = parse_recipe({**PLAIN, "shaping": [{"kind": "drift"}, "uniform"]})
    assert [each["kind"] for each in both.dump()["shaping"]] == ["drift", "uniform"]
    with pytest.raises(opd.OpdError, match="shapings drift and drift both measure 'drifted'; list one of them"):
        parse_recipe({**PLAIN, "shaping": [{"kind": "drift"}, {"kind": "drift", "drop": 0.2}]})
    with pytest.raises(opd.OpdError, match=r"shaping is \[\]"):
        parse_recipe({**PLAIN, "shaping": []})
