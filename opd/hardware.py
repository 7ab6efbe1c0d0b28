"""What a device is good at."""

from __future__ import annotations

import torch


def fast_in_bf16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; elsewhere that is emulated and slow."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("arm_bf16"))
    return False
