"""What a model takes, as far as its configuration says: the currency of plans; and numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """One model as its configuration describes it.

    Attributes:
        trainable: parameters that are trained.
        weight_bytes: of all parameters.
        width, vocabulary, layers, kv_bytes_per_token: of a language model; 0 for others.
        offload: the weights lie on the CPU while they are not used.
        model: on the meta device.
    """

    name: str
    parameters: int
    trainable: int
    weight_bytes: int
    width: int = 0
    vocabulary: int = 0
    layers: int = 0
    kv_bytes_per_token: int = 0
    offload: bool = field(default=False, repr=False)
    model: Any = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes of a parameter."""
        return self.weight_bytes // self.parameters

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("model", "offload")}


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps of one call on the meta device, the model's own weights and buffers not counted."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward()
    return sum(seen.values())


def count_text(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(int(value))


def bytes_text(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
