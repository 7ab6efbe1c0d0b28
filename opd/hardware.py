"""What a device is good at."""

from __future__ import annotations

import torch

from opd.errors import RecipeError

DEVICE = r"^(cpu|cuda(:\d{1,4})?|mps|xpu)$"
"""Names of devices that a recipe may give."""


def absent(name: str | None, key: str) -> str | None:
    """Why a run cannot compute where the recipe's `key` says, as this machine, or this torch, has no such device; None
    where it has. `auto` and None name no device."""
    kind, _, number = (name or "auto").partition(":")
    if kind in ("auto", "cpu"):
        return None
    present = {"cuda": torch.cuda, "mps": torch.mps, "xpu": torch.xpu}[kind].device_count()
    if kind == "mps" and not torch.backends.mps.is_available():
        present = 0
    if not present:
        return f"{key} is {name!r} and this machine has no {kind.upper()} device; use auto or cpu"
    if int(number or 0) >= present:
        return f"{key} is {name!r} and this machine has {kind}:0 to {kind}:{present - 1}; take one of them"
    return None


def check_device(name: str | None, key: str) -> None:
    """Raise `RecipeError` with what `absent` says of a device that is not here."""
    why = absent(name, key)
    if why is not None:
        raise RecipeError(why)


def fast_in_bf16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; elsewhere that is emulated and slow."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        # Younger than the oldest torch that we take.
        able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        built_in = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("arm_bf16"))
        return built_in and _bf16_in_use()
    return False


def _bf16_in_use() -> bool:
    """Whether torch and its matrix library use all of this processor: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can
    hold them to an older one's instructions."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and (supported is None or bool(supported()))
