"""LoRA adapters on disk: those of peft, and the files that diffusers' pipelines load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from opd.errors import ModelError
from opd.merging.weights import ADAPTER_FILES, Weights

if TYPE_CHECKING:
    from peft import PeftModel

A, B = ".lora_A.weight", ".lora_B.weight"
PEFT_PREFIX = "base_model.model."
DIFFUSERS_METADATA = "lora_adapter_metadata"
NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of peft with which the weight's change is not `alpha / r * B @ A` at every module, or not all of it."""


@dataclass(frozen=True)
class Adapter:
    """One expert's adapter: `scale * B @ A` is added to each module's weight.

    Attributes:
        file: its safetensors file.
        config: what `adapter_config.json` holds (peft), or the metadata of the file (diffusers); may be empty there.
        weights: the factors by name.
    """

    file: Path
    config: dict[str, Any]
    weights: Weights

    @property
    def of_peft(self) -> bool:
        return self.file.name == ADAPTER_FILES[0]

    @property
    def modules(self) -> list[str]:
        return [name.removesuffix(A) for name in self.weights.shapes if name.endswith(A)]

    def rank(self, module: str) -> int:
        return self.weights.shapes[module + A][1][0]

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        prefix = "" if self.of_peft else f"{module.split('.', 1)[0]}."
        alpha = self.config.get(f"{prefix}lora_alpha", rank)
        return float(alpha) / (rank**0.5 if self.config.get(f"{prefix}use_rslora") else rank)

    def target(self, module: str) -> tuple[str, str]:
        """Folder of the component that a module belongs to (empty at the top), and the name of its weight there."""
        if self.of_peft:
            return "", f"{module.removeprefix(PEFT_PREFIX)}.weight"
        folder, _, rest = module.partition(".")
        return folder, f"{rest}.weight"


def find(folder: Path) -> Adapter | None:
    """The adapter in a folder, or in `adapter` in it where a trained student has one.

    Raises:
        ModelError: an adapter that is not plain LoRA.
    """
    for path in (place / name for place in (folder, folder / "adapter") for name in ADAPTER_FILES):
        if path.is_file():
            return _read(path)
    return None


def _read(path: Path) -> Adapter:
    weights = Weights([path])
    if path.name == ADAPTER_FILES[0]:
        try:
            config = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path.parent} has no readable adapter_config.json ({error}); save the adapter again"
            ) from None
        if config.get("peft_type") != "LORA":
            raise ModelError(f"{path.parent} is a {config.get('peft_type')} adapter; opd merges LORA")
    else:
        config = json.loads(weights.metadata.get(DIFFUSERS_METADATA, "{}"))
    for key, value in config.items():
        if value and key.rsplit(".", 1)[-1] in (*NOT_PLAIN, "bias") and value != "none":
            raise ModelError(f"{path.parent} has {key} {value!r}; opd merges plain LoRA, where that is not set")
    for name in weights.shapes:
        other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
        if not name.endswith((A, B)) or other not in weights.shapes:
            raise ModelError(f"{path} has {name!r}, which is not one of the two factors of a linear module")
    return Adapter(path, config, weights)


def check_alike(adapters: Sequence[Adapter], equal_factors: bool) -> None:
    """Refuse adapters of other modules or shapes than the first's; with `equal_factors` of other ranks or scales."""
    first = adapters[0]
    for other in adapters[1:]:
        if other.of_peft != first.of_peft:
            raise ModelError(
                f"{other.file} and {first.file} are of two formats; save both as peft or both as diffusers do"
            )
        for module in sorted({*first.modules, *other.modules}):
            if module not in first.modules or module not in other.modules:
                lacking = first if module not in first.modules else other
                raise ModelError(f"{lacking.file} has no factors for {module}, which another expert has adapted")
            shapes = [
                (one.weights.shapes[module + B][1][0], one.weights.shapes[module + A][1][1]) for one in (first, other)
            ]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"{other.file}: {module} changes a weight of {shapes[1]}, and of {shapes[0]} in {first.file}"
                )
            if equal_factors and (first.rank(module), first.scale(module)) != (other.rank(module), other.scale(module)):
                raise ModelError(
                    f"{other.file}: {module} has rank {other.rank(module)} and scale {other.scale(module):g}, "
                    f"{first.file} {first.rank(module)} and {first.scale(module):g}; factors have an average only when "
                    "these are equal, take the average of weights"
                )


Factors = tuple[torch.Tensor, torch.Tensor, float]
"""`A [r, in]`, `B [out, r]` in float32, and the scale of their product."""


def of_products(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors:
    """Factors of rank `sum_i r_i` whose product is `sum_i weights[i] * scale_i * B_i @ A_i`, at scale 1."""
    a = torch.cat([one.weights(module + A).float() for one in adapters])
    b = torch.cat(
        [one.weights(module + B).float() * (w * one.scale(module)) for one, w in zip(adapters, weights, strict=True)], 1
    )
    return a, b, 1.0


def of_factors(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors:
    """`sum_i weights[i] * A_i` and `sum_i weights[i] * B_i`, as Flow-OPD's release merges: their product holds products
    of one expert's A with another's B."""

    def mean(end: str) -> torch.Tensor:
        parts = (w * one.weights(module + end).float() for one, w in zip(adapters, weights, strict=True))
        return torch.stack(list(parts)).sum(0)

    return mean(A), mean(B), adapters[0].scale(module)


CARD = """---
library_name: peft
tags: [on-policy-distillation, opd]
---

# A LoRA adapter

It belongs to the student in the folder above, whose README.md says what it was trained from, by whom and how far.
`adapter_config.json` names its base model: by its name on the hub, or by where its folder lies on the machine that
trained it. Elsewhere load the base first, and lay the adapter over it: `PeftModel.from_pretrained(base, FOLDER)`.
"""
BASE = "base_model_name_or_path"
"""Of adapter_config.json: the model that the adapter changes."""


def write(folder: Path, model: PeftModel, embeddings: str | bool = "auto") -> None:
    """The adapter of `model` as peft writes it, with a card of our own: peft's is a form to fill in, and names the
    base by where it lies on this machine. `embeddings` is peft's `save_embedding_layers`."""
    model.save_pretrained(str(folder), save_embedding_layers=embeddings)
    path = folder / "adapter_config.json"
    config = wherever(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def wherever(config: dict[str, Any]) -> dict[str, Any]:
    """What an adapter says of itself, with a base that is a folder here named by its whole path: peft looks for a
    relative one in the directory of whoever loads the adapter, and then asks a hub for it."""
    base = config.get(BASE)
    if not isinstance(base, str) or not base or not Path(base).expanduser().is_dir():
        return config
    return {**config, BASE: str(Path(base).expanduser().resolve())}


def save(folder: Path, first: Adapter, merged: Iterable[tuple[str, Factors]]) -> None:
    """An adapter in the format of `first`, with the factors of each module, all of one scale."""
    tensors: dict[str, torch.Tensor] = {}
    rank, alpha = 0, 0.0
    for module, (a, b, scale) in merged:
        dtype = first.weights(module + A).dtype
        tensors |= {module + A: a.to(dtype).contiguous(), module + B: b.to(dtype).contiguous()}
        rank, alpha = len(a), scale * len(a)
    whole = int(alpha) if alpha.is_integer() else alpha
    changes = {"r": rank, "lora_alpha": whole, "use_rslora": False, "init_lora_weights": True}
    metadata = {"format": "pt"}
    if first.of_peft:
        config = wherever(first.config | changes)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    elif first.config:
        prefixes = {key.rsplit(".", 1)[0] for key in first.config if key.endswith(".r")}
        config = first.config | {f"{p}.{key}": value for p in prefixes for key, value in changes.items()}
        metadata[DIFFUSERS_METADATA] = json.dumps(config, indent=2, sort_keys=True)
    save_file(tensors, folder / first.file.name, metadata=metadata)
