"""A tracker that a recipe names and nobody installed is refused before anything is read, made or removed.

huggingface/accelerate#520 and #918 ask for it: `accelerate` leaves such a tracker out without a word.
"""

from __future__ import annotations

import sys

import pytest
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType

from opd.api import chain, execute
from opd.cli.main import main
from opd.errors import RecipeError
from opd.trackers import check_trackers
from tests.test_loop import recipe_for


@pytest.fixture(autouse=True)
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])


@pytest.fixture
def recipe(tmp_path):
    """Of models that are not there: nobody may come so far as to look for them."""
    return recipe_for(("nowhere/s", "nowhere/t"), tmp_path, tracking={"trackers": ["tensorboard", "wandb", "comet_ml"]})


def test_it_is_refused_with_the_line_that_installs_it(recipe):
    words = r"names wandb, comet_ml, which are not installed: pip install wandb comet-ml, or set .*=\[tensorboard\]"
    recipe.directory.mkdir()
    (recipe.directory / "recipe.yaml").write_text("of an earlier run")
    with pytest.raises(RecipeError, match=words):
        execute(recipe, quiet=True, overwrite=True)
    with pytest.raises(RecipeError, match=words):
        next(chain([recipe], quiet=True, overwrite=True))
    assert (recipe.directory / "recipe.yaml").read_text() == "of an earlier run"


def test_from_the_command_line(recipe, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    monkeypatch.setattr(sys, "argv", ["opd", "train", str(path), "tracking.trackers=[mlflow]"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert "pip install mlflow" in capsys.readouterr().err


def test_what_is_installed_is_taken(monkeypatch):
    check_trackers([])
    check_trackers(["tensorboard"])
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    check_trackers(["wandb", "tensorboard"])
