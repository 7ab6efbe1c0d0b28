"""Weights in the layout of the matrix library, for the thin products of token-by-token decoding on a CPU.

A product of a few rows with a weight matrix is bound by reading the matrix. The default library reads it two to five
times slower than memory allows, or orders it anew at every call; oneDNN reads a matrix that it has ordered once at the
speed of memory. A rollout makes hundreds of such products with the same weights, so it orders them once, at its start,
for about what ten tokens cost. Results differ from the usual product's by rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from opd.hardware import fast_in_bf16

SMALLEST = 2**17
"""Entries of a matrix below which the call costs more than is won."""
FEWEST = 20
"""Products with one matrix from which on ordering it pays."""
ROWS = 16
"""Rows that the layout is chosen for; 1 to 256 were as fast as with layouts of their own."""


class Prepacked:
    """`x @ weight.T + bias` for a weight `[N, K]` that stays as it is while this object lives; without gradient."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), ROWS)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
            return linear(x, self.weight, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


def worth_packing(weight: torch.Tensor) -> bool:
    """Whether `Prepacked` takes this weight and is faster with it."""
    return (
        weight.device.type == "cpu"
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and fast_in_bf16("cpu")))
        and not isinstance(weight, DTensor)
        and weight.dim() == 2
        and weight.numel() >= SMALLEST
        and can_prepack(weight.dtype)
    )


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch on this processor packs and multiplies matrices of `dtype`, found by trying once.

    The operators are torch's own private ones: another version may lack them or call them otherwise, and a processor
    without AVX-512 has no ordering of bfloat16.
    """
    weight = torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    x = torch.linspace(-1, 1, 2 * 16).view(2, 16).to(dtype)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            product = Prepacked(weight, None)(x)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return torch.allclose(product.float(), linear(x.float(), weight.float()), rtol=0.05, atol=0.05)


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, `model`'s large linear layers multiply by packed copies of their weights, which must not change.

    Forward passes without a gradient only. The copies take as many bytes as the layers' weights and go at the end.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and worth_packing(m.weight)]
    for layer in layers:
        layer.forward = Prepacked(layer.weight, layer.bias)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again
