"""An adapter of peft where a model is named: a folder (or hub name) with an adapter_config.json, and its base model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter lies, and what it says of itself.

    Attributes:
        folder: its folder, or the hub name.
        base: the model that it changes, as a recipe would name it.
        config: content of its adapter_config.json.
    """

    folder: str
    base: str
    config: dict[str, Any]


def adapter_of(reference: str, revision: str | None = None, local_only: bool = False) -> AdapterSource | None:
    """The adapter that a reference names: a folder with one, or a saved student without merged weights, which has it in
    `adapter`. None for a whole model.

    Raises:
        ModelError: an adapter that does not say which model it changes, or of a kind that is no part of the model's own
            modules.
    """
    if reference.startswith("package:") or reference.endswith(".gguf"):
        return None
    given = Path(reference).expanduser()
    if given.is_dir():
        places = [given] if (given / "config.json").is_file() else [given, given / "adapter"]
        folder = next((place for place in places if (place / CONFIG).is_file()), None)
        if folder is None:
            return None
        return _read(str(folder), folder / CONFIG)
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        return None
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(reference, revision=revision, local_files_only=local_only)
    except (OSError, ValueError):
        # Whoever loads the model says what is wrong with the name.
        return None
    return None if found is None else _read(reference, Path(found))


def _read(folder: str, path: Path) -> AdapterSource:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); save the adapter again") from None
    if not base:
        raise ModelError(
            f"{folder} is an adapter that does not say of which model; set base_model_name_or_path in {path}"
        )
    if kind != "LORA":
        raise ModelError(f"{folder} is a {kind} adapter of {base}; opd loads LORA. Merge it, and give the merged model")
    return AdapterSource(folder, str(base), config)


def load_adapter(base: PreTrainedModel, source: AdapterSource) -> PeftModel:
    """`base` under the adapter, as peft wraps it; the adapter can be trained, the base cannot."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(f"{source.folder} is an adapter of peft; loading it needs: pip install 'opd[lora]'") from None
    try:
        model = PeftModel.from_pretrained(base, source.folder, is_trainable=True)
        _check_complete(model, source)
        return model
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter {source.folder} does not fit its model {source.base} "
            f"({' '.join(str(error).split())[:160]}); check base_model_name_or_path"
        ) from None


def _check_complete(model: Any, source: AdapterSource) -> None:
    """peft leaves an adapter as it was made where the file says nothing of it, and drops what the model has no place
    for: of a model with other layers that would be another adapter."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = {name for name in load_peft_weights(source.folder, device="cpu") if "lora_" in name}
    wanted = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in name}
    if stored != wanted:
        only = sorted(stored - wanted) or sorted(wanted - stored)
        raise ModelError(
            f"the adapter {source.folder} was made for another model than {source.base}: {len(stored)} matrices are "
            f"stored and the model has places for {len(wanted)} ({only[0]} on one side alone). Take the merged model"
        )


def tokenizer_places(reference: str, source: AdapterSource) -> list[str]:
    """Where an adapter's tokenizer may be, first to last: where it was named, beside its weights, with its model."""
    own = [folder for folder in (reference, source.folder) if (Path(folder) / "tokenizer_config.json").is_file()]
    return [*own, source.base]
