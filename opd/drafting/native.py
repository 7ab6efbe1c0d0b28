"""Drafters on the disk, in the formats that servers load: `model.safetensors` and `config.json` of their kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from opd.choice import choices_of
from opd.distributions import Head
from opd.drafting import formats
from opd.drafting.base import Drafter, DrafterSettings, Outline
from opd.errors import ModelError
from opd.files.whole import told

EMBEDDING = "embed_tokens.weight"
"""Of the target; a drafter has none of its own."""


def forms() -> dict[str, type[DrafterSettings]]:
    """The forms of drafters by what a native `config.json` calls them."""
    found = choices_of(DrafterSettings).values()
    return {form.architecture: form for form in found if issubclass(form, DrafterSettings)}


def save_drafter(folder: Path, drafter: Drafter, embedding: torch.Tensor) -> None:
    """Write the weights, then the config.

    Args:
        embedding: `[V, D]`, the target's, written beside the drafter where its format has one.

    Raises:
        OSError, SafetensorError: they cannot be written.
    """
    dtype = next(drafter.parameters()).dtype
    weights = drafter.state_dict() | drafter.extras()
    if drafter.ships_embedding:
        weights[EMBEDDING] = embedding.to(dtype=dtype)
    config = drafter.config() | {"dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.57.0"}
    formats.write(folder, weights, config)


def read_config(folder: str, key: str) -> dict[str, Any]:
    """The native config of a saved drafter; `key` is what a recipe calls the folder.

    Raises:
        ModelError: there is none, or it is of no form that is known here.
    """
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        saved, hint = Path(folder) / "student", "give a drafter's folder; one of the hub is fetched by hf download"
        raise ModelError(
            f"{key} {folder!r} holds no drafter: "
            + ("no config.json is in it" if path.parent.is_dir() else "there is no such folder here")
            + "; "
            + (f"did you mean {str(saved)!r}?" if (saved / "config.json").is_file() else hint)
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("its config.json holds no keys")
    except (OSError, ValueError) as error:
        raise ModelError(f"{key} {folder!r} holds no drafter ({told(error)}); give a drafter's folder") from None
    found = config.get("architectures")
    names = found if isinstance(found, list) and found else [found]
    known, new = forms(), key == "student.model"
    if not isinstance(names[0], str) or names[0] not in known:
        raise ModelError(
            f"{key} {folder!r} is {names[0]!r}, and drafters are {' or '.join(known)}: give a drafter's "
            "folder" + (", or leave it out and say with student.drafter which form a new one has" if new else "")
        )
    return config


def saved_form(
    folder: str, target: Outline, key: str = "student.model", asked: DrafterSettings | None = None
) -> DrafterSettings:
    """The form of a saved drafter of a target, of whose weights none but the ids that it may propose are read.

    Args:
        asked: what a recipe says of its form, as far as it says something.

    Raises:
        ModelError: the folder holds none, or one of another target, or another than was asked for.
    """
    config = read_config(folder, key)
    try:
        with safe_open(Path(folder).expanduser() / "model.safetensors", framework="pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys() if name == "t2d"}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key} {folder!r}: its weights cannot be read ({told(error)})") from None
    return _form(config, weights, target, folder, key, asked)


def _form(
    config: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    target: Outline,
    folder: str,
    key: str,
    asked: DrafterSettings | None,
) -> DrafterSettings:
    try:
        settings = forms()[config["architectures"][0]].of_config(config, weights, target)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{key} {folder!r}: its config.json lacks a part ({told(error)})") from None
    except ModelError as error:
        raise ModelError(f"{key} {folder!r}: {error}") from None
    taps = getattr(settings, "taps", [])
    if list(taps) != sorted(set(taps)) or not all(0 <= tap < target.layers for tap in taps):
        raise ModelError(
            f"{key} {folder!r}: the drafter reads layers {taps} of a target, and this one has layers 0 to "
            f"{target.layers - 1}: it was made for another"
        )
    asked = None if asked is None else asked.settled(target)
    for name in () if asked is None else type(asked).model_fields:
        wanted, has = getattr(asked, name), getattr(settings, name, None)
        if wanted not in (None, []) and wanted != has:
            raise ModelError(
                f"student.drafter.{name} is {str(wanted)[:60]}, and the drafter in {folder} has "
                f"{'another form' if has is None else str(has)[:60]}; write that, or leave student.drafter out"
            )
    return settings


def load_drafter(
    folder: str,
    target: Outline,
    head: Head,
    key: str = "student.model",
    asked: DrafterSettings | None = None,
) -> Drafter:
    """A saved drafter of a target, which begins with the target's `head` where it has one of its own; `key` is what a
    recipe calls the folder.

    Args:
        asked: what a recipe says of its form, as far as it says something.

    Raises:
        ModelError: the folder holds none, or one of another target, or another than was asked for.
    """
    config = read_config(folder, key)
    path = Path(folder).expanduser() / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key} {folder!r}: its weights cannot be read ({told(error)})") from None
    settings = _form(config, weights, target, folder, key, asked)
    drafter = settings.build(target, head)
    own = drafter.state_dict()
    beside = {EMBEDDING, *drafter.extras()}
    lacking = sorted(own.keys() - weights.keys()) + sorted(weights.keys() - own.keys() - beside)
    wrong = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if lacking or wrong:
        name = (lacking + wrong)[0]
        raise ModelError(
            f"{key} {folder!r}: its weights are not those of its config.json ({name} is "
            f"{'absent on one side' if lacking else 'of another shape'}); give the folder as it was saved"
        )
    drafter.load_state_dict({name: weights[name] for name in own})
    return drafter


def difference(folder: Path, drafter: Drafter) -> str | None:
    """How a saved drafter differs from the live one; None where every weight is the same."""
    return formats.difference(folder, drafter.state_dict() | drafter.extras())
