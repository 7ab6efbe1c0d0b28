"""What `opd serve` says beyond other servers: hidden states of given completions, and its model's head once.

Bytes are those of safetensors, so nothing that was sent is run. A position takes `4 * D` bytes in float32 and `2 * D`
in bfloat16; the head takes `V * D` numbers of its own dtype, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from opd.distributions import Head
from opd.remote.client import Job, RequestError

ABOUT, HEAD, SCORE = "/opd/model", "/opd/head", "/opd/score"
"""The routes."""

WireDtype = Literal["float32", "bfloat16"]


class ModelHeader(BaseModel):
    """What a server says of its model.

    Attributes:
        model: its name there.
        weights: hash over all of them.
        tokenizer, template: hashes.
        width, rows: of the head, `D` and `V`.
        dtype: of the weights.
        scale, softcap: of the head.
        longest: tokens of a prompt with its completion that it takes.
        batch: rows that it takes in one request.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    format: Literal[1] = 1
    model: str
    weights: str
    tokenizer: str
    template: str
    width: int
    rows: int
    dtype: str
    scale: float
    softcap: float | None
    longest: int
    batch: int


def about_job() -> Job[ModelHeader]:
    """Asks what is served."""

    def read(data: bytes) -> ModelHeader:
        try:
            return ModelHeader.model_validate_json(data)
        except ValidationError as error:
            raise RequestError("another form", f"{ABOUT}: {error.errors()[0]['msg']}") from None

    return Job(ABOUT, None, read)


def head_job(about: ModelHeader) -> Job[Head]:
    """Asks for the head, at temperature 1 and over all its rows."""

    def read(data: bytes) -> Head:
        found = _tensors(data)
        weight = found.get("weight")
        if weight is None or tuple(weight.shape) != (about.rows, about.width):
            raise RequestError("wrong length", f"{HEAD} holds no head [{about.rows}, {about.width}]")
        return Head(weight, found.get("bias"), scale=about.scale, softcap=about.softcap)

    return Job(HEAD, None, read)


def score_job(
    contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], about: ModelHeader, dtype: WireDtype
) -> Job[torch.Tensor]:
    """Asks for the hidden states `[N, D]` that predict the completions' tokens, packed in order."""
    body: dict[str, Any] = {
        "rows": [{"prompt": list(p), "completion": list(c)} for p, c in zip(contexts, completions, strict=True)],
        "dtype": dtype,
    }
    count = sum(len(completion) for completion in completions)

    def read(data: bytes) -> torch.Tensor:
        hidden = _tensors(data).get("hidden")
        if hidden is None or tuple(hidden.shape) != (count, about.width):
            found = None if hidden is None else list(hidden.shape)
            raise RequestError("wrong length", f"hidden states {found} where [{count}, {about.width}] were asked for")
        if not bool(hidden.isfinite().all()):
            raise RequestError("NaN", "among hidden states")
        return hidden

    return Job(SCORE, body, read)


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RequestError("not safetensors", f"{len(data)} bytes: {str(error)[:80]}", again=True) from None
