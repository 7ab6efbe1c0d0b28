"""A state (nested dicts, lists and tuples of numbers, texts and tensors) as JSON and one flat mapping of tensors."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import JsonValue

MARKS = ("$tensor", "$tuple", "$items")


def flatten(tree: object) -> tuple[JsonValue, dict[str, torch.Tensor]]:
    """JSON with a reference in place of every tensor, and the tensors by their place in the tree, on the CPU.

    Raises:
        TypeError: for a value that is none of the above; its place is named.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def encode(value: object, place: str) -> JsonValue:
        if isinstance(value, torch.Tensor):
            tensors[place] = _alone(value, storages)
            return {"$tensor": place}
        if isinstance(value, dict) and all(isinstance(key, str) and key not in MARKS for key in value):
            return {key: encode(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, dict):
            return {"$items": [[encode(k, place), encode(item, f"{place}/{k}")] for k, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [encode(item, f"{place}/{i}") for i, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{place}: a checkpoint holds no {type(value).__name__}; give its state as numbers or tensors")

    return encode(tree, ""), tensors


def unflatten(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of `flatten`."""
    if isinstance(structure, list):
        return [unflatten(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if "$tensor" in structure:
        return tensors[structure["$tensor"]]
    if "$tuple" in structure:
        return tuple(unflatten(item, tensors) for item in structure["$tuple"])
    if "$items" in structure:
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in structure["$items"]}
    return {key: unflatten(item, tensors) for key, item in structure.items()}


def _alone(tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Contiguous on the CPU in a storage of its own, as safetensors asks; a copy only where it is needed."""
    tensor = tensor.detach().cpu().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor
