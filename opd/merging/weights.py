"""The safetensors of a model folder, read and written tensor by tensor; nothing else is ever opened as weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd.errors import ModelError

SHARD_BYTES = 2**30
"""A component that takes more is written in several files of at most so much."""

ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What peft and diffusers call the weights of an adapter."""

SHARD = re.compile(r"(?P<stem>.+?)(-\d+-of-\d+)?\.safetensors")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Weights:
    """The tensors of one component, which may lie in several files; they are read when asked for.

    Raises:
        ModelError: a file that is no safetensors file.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._open: dict[str, Any] = {}
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read as safetensors ({error}); save it again") from None
            self._open |= dict.fromkeys(handle.keys(), handle)
            self.metadata = handle.metadata() or {}

    @cached_property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype, as safetensors calls it, and shape by name; no tensor is read."""
        slices = {name: handle.get_slice(name) for name, handle in sorted(self._open.items())}
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}

    def bytes(self, name: str) -> int:
        dtype, shape = self.shapes[name]
        return prod(shape) * BYTES.get(dtype, 8)

    def __call__(self, name: str) -> torch.Tensor:
        return self._open[name].get_tensor(name)


def components(folder: Path) -> dict[str, Weights]:
    """A model folder's components by path without ending: `model`, `transformer/diffusion_pytorch_model`, ...

    Adapters, and the folder `adapter` beside a trained student's merged weights, are none of them.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.relative_to(folder)
        found = SHARD.fullmatch(path.name)
        if found and path.name not in ADAPTER_FILES and "adapter" not in place.parts[:-1]:
            files.setdefault((place.parent / found["stem"]).as_posix(), []).append(path)
    return {name: Weights(paths) for name, paths in files.items()}


def write(folder: Path, component: str, like: Weights, make: Callable[[str], torch.Tensor]) -> None:
    """Write a component of the names and shapes of `like`, each tensor made when its file is.

    Memory: one file, at most `SHARD_BYTES` or the largest tensor, and what `make` needs for one tensor.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in like.shapes:
        if shards[-1] and size + like.bytes(name) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += like.bytes(name)
    stem = folder / component
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        paths = [stem.with_name(f"{stem.name}.safetensors")]
    for path, names in zip(paths, shards, strict=True):
        save_file({name: make(name).contiguous() for name in names}, path, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        total = sum(like.bytes(name) for name in like.shapes)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        stem.with_name(f"{stem.name}.safetensors.index.json").write_text(text, encoding="utf-8")


def average(named: Mapping[str, Callable[[], torch.Tensor]], weights: Sequence[float], name: str) -> torch.Tensor:
    """`sum_i weights[i] * x_i`, summed in float32 or better, in the dtype of the first; what is the same in all stays
    bit for bit.

    Args:
        named: each expert's tensor when it is called, by the expert's name.
        name: of the tensor, for the error.

    Raises:
        ModelError: integers that differ.
    """
    (_, first_of), *others = named.items()
    first = first_of()
    total = first.to(torch.promote_types(first.dtype, torch.float32)) * weights[0]
    same = True
    for (expert, of), weight in zip(others, weights[1:], strict=True):
        tensor = of()
        same = same and torch.equal(tensor, first)
        if not (same or first.is_floating_point()):
            raise ModelError(f"{expert}: {name} holds other integers than in the first expert; there is no average")
        total.add_(tensor.to(total.dtype), alpha=weight)
    return first if same else total.to(first.dtype)
