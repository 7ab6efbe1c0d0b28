"""What a device is good at."""

from __future__ import annotations

import torch


def fast_in_bf16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; elsewhere that is emulated and slow."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # younger than the oldest torch that we take
        built_in = bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("arm_bf16"))
        return built_in and _bf16_in_use()
    return False


def _bf16_in_use() -> bool:
    """Whether torch and its matrix library use all of this processor: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can
    hold them to an older one's instructions."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.cpu.get_cpu_capability() != "AVX2" and (supported is None or bool(supported()))
