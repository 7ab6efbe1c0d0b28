"""A module's weights: those that training moves, which a checkpoint holds, and a fingerprint of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

from opd.errors import RunError
from opd.sharding import full, like

PART = 2**20
"""Numbers of a weight that are read together."""

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters (a tied one once) and persistent buffers of a module, by name; detached, not copied."""
    seen: set[int] = set()
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        frozen = isinstance(value, torch.nn.Parameter) and not value.requires_grad
        if isinstance(value, torch.Tensor) and not frozen and id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def present(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters (a tied one once) and persistent buffers of a module as they lie there now, by name; detached, not
    copied. Of a module whose weights are whole for a time (`opd.sharding.whole`) the whole ones: its own `state_dict`
    would cut them again."""
    found = {name: p.detach() for name, p in module.named_parameters()}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}".strip(".")] = buffer
    return found


def frozen(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters that training leaves as they are."""
    return [(name, full(p.detach())) for name, p in module.named_parameters() if not p.requires_grad]


@torch.no_grad()
def copy_into(targets: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], whose: str) -> None:
    """Overwrite `targets` with `stored`, all or nothing.

    The values are copied: memory that a file is mapped into may be aligned otherwise, and then kernels may round
    otherwise.

    Raises:
        RunError: names, shapes or dtypes differ; nothing was written.
    """
    for name in dict.fromkeys([*targets, *stored]):
        here, there = (_describe(side.get(name)) for side in (targets, stored))
        if here != there:
            raise RunError(f"the checkpoint does not fit the {whose}: {name} is {there} there and {here} here")
    for name, target in targets.items():
        target.copy_(like(stored[name], target))


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identity of weights that a checkpoint does not hold: names, shapes, dtypes and the sum of each one's bits.

    A sum of integers is exact and the same on every device, and costs one reading of the weights.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        words = weight.contiguous().view(-1).view(WORDS[weight.element_size()])
        total = int(words.sum(dtype=torch.int64))
        digest.update(f"{name} {_describe(weight)} {total}\n".encode())
    return digest.hexdigest()


def contents(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identity of weights as they are at the moment, which tells those of two steps apart: a hash of names, shapes,
    dtypes, and of each one's bits times a number of their place.

    The plain sum of `fingerprint` will not do: a step that moves one number a bit up and another a bit down leaves it,
    as those of a few weights in bfloat16 do.
    """
    digest = hashlib.sha256()
    factors: dict[torch.device, torch.Tensor] = {}
    for name, weight in weights:
        words = weight.contiguous().view(-1).view(WORDS[weight.element_size()])
        if weight.device not in factors:
            factors[weight.device] = _mixed(PART, weight.device)
        sums = [int((part.long() * factors[weight.device][: len(part)]).sum()) for part in torch.split(words, PART)]
        digest.update(f"{name} {_describe(weight)} {sums}\n".encode())
    return digest.hexdigest()


def _mixed(count: int, device: torch.device) -> torch.Tensor:
    """int64 `[count]`: numbers without a pattern, the same on every device; as integers wrap, exactly so."""
    numbers = torch.arange(1, count + 1, device=device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift)) * factor
    return numbers | 1


def weights_hash(model: torch.nn.Module) -> str:
    """`sha256:...` over names, shapes and float32 values of all weights: bfloat16 weights loaded as float32 are the
    same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(value.shape)} {value.is_floating_point()}\n".encode())
        rows = value.detach().reshape(-1)
        for part in torch.split(rows, 2**24):
            plain = part.cpu().float() if part.is_floating_point() else part.cpu()
            digest.update(plain.contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _describe(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
