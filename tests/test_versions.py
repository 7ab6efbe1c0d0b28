"""What other packages are about to change, and the file of the versions that were tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opd.language.engines.sampler import Decoder
from tests.conftest import save_tiny
from tests.tiny import TEXTS, short_run

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings(
    "error::FutureWarning",
    "error::DeprecationWarning:transformers",
    "ignore:.is_gradient_checkpointing.",  # peft asks for it
)
@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("change", [{}, {"lora": {"rank": 2}}, {"gradient_checkpointing": True}])
def test_training_uses_nothing_that_is_about_to_be_removed(change, written_out, tmp_path, monkeypatch):
    """Sampling token by token through transformers' modules, and through our own products."""
    if not written_out:
        monkeypatch.setattr(Decoder, "known", lambda body: False)
    model = {"model": save_tiny(tmp_path / "s"), "template": "plain"}
    teacher = {"model": save_tiny(tmp_path / "t", seed=1), "template": "plain"}
    assert short_run(tmp_path / "run", {**model, **change}, teacher, TEXTS).summary["steps"] == 2


def test_tested_versions_are_names_and_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    names = [_name(pin.split("==")[0]) for pin in pins]
    assert len(set(names)) == len(names)
    text = (ROOT / "pyproject.toml").read_text()
    wanted = {_name(n) for n in re.findall(r'^\s*"([A-Za-z0-9_-]+)(?:\[[^\]]*\])?[><=]', text, re.MULTILINE)}
    extras = {"lm-eval", "ray", "hatchling"}  # not part of the environment that the tests run in
    assert wanted - extras - set(names) == set()


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()
