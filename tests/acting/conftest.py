"""Policies that the tests of acting share."""

from __future__ import annotations

import pytest

from opd.acting.model import PolicySettings, load_policy
from tests.acting.tiny import policy


@pytest.fixture(scope="session")
def policies(tmp_path_factory):
    """Folders of a student that sees pictures and of a teacher that sees the state."""
    folder = tmp_path_factory.mktemp("policies")
    return policy(folder / "student"), policy(folder / "teacher", reads=["state"], seed=1)


@pytest.fixture
def model(policies):
    return load_policy(PolicySettings(model=policies[0]), "cpu")
