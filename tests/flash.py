"""Flash attention's functions for rows of unequal length, written out: what `transformers` calls on a GPU, on any
device. Their signatures are those of flash-attn 2."""

from __future__ import annotations

import inspect

import torch
from transformers import modeling_flash_attention_utils as utils

from opd.language.engines import layouts


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """`[L, heads, size]` of rows that lie one behind the other; in each the last query sees the last key."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    queries, keys, values = (
        torch.split(x, bounds.diff().tolist())
        for x, bounds in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    rows = zip(queries, keys, values, strict=True)
    return torch.cat([_attend(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """`[B, L, heads, size]` of rows of one length."""
    rows = zip(q, k, v, strict=True)
    return torch.stack([_attend(*row, softmax_scale, causal, window_size, softcap) for row in rows])


def _attend(q, k, v, scale, causal, window, softcap):
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))[None]
    seen = key <= query if causal else torch.ones_like(key <= query)
    if window[0] >= 0:
        seen = seen & (key >= query - window[0])
    if window[1] >= 0:
        seen = seen & (key <= query + window[1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def in_half_alone(function):
    """As the real ones: another dtype is an error."""

    def refusing(q, k, v, *args, **kwargs):
        if not {q.dtype, k.dtype, v.dtype} <= {torch.bfloat16, torch.float16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return function(q, k, v, *args, **kwargs)

    refusing.__signature__ = inspect.signature(function)
    return refusing


def install(monkeypatch, half=True):
    """Have `transformers` call the functions of this file for `flash_attention_2`."""
    functions = [in_half_alone(f) if half else f for f in (flash_attn_func, flash_attn_varlen_func)]
    found = (*functions, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: found)
    # What was set on import is set back afterwards.
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)


def use(model):
    """Have a built model attend with them."""
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = "flash_attention_2"
    return model


def as_on_cuda(monkeypatch):
    """Have `auto` take what it would take on a CUDA device."""
    usual = layouts.usual_layout
    for module in ("opd.language.engines.decoded", "opd.language.own_outputs"):
        monkeypatch.setattr(f"{module}.usual_layout", lambda model, device: usual(model, "cuda"))
