"""What requests may say, each of them checked before the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

Ids = list[StrictInt]


class BadRequestError(Exception):
    """A request that is answered with 400 and this text."""


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Attributes:
        length: tokens of a prompt with its completion.
        rows: rows of one request.
        logprobs: ids a position.
        body: bytes.
    """

    length: int
    rows: int = 256
    logprobs: int = 64
    body: int = 64_000_000


class Completion(BaseModel):
    """Of `/v1/completions`, as far as it scores; what else clients send changes no score and is let be."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | Ids | list[Ids]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_tokens_as_token_ids: bool = False
    temperature: float | None = None


class Row(BaseModel):
    """One of `/opd/score`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Ids = Field(min_length=1)
    completion: Ids = Field(min_length=1)


class Exact(BaseModel):
    """Of `/opd/score`."""

    model_config = ConfigDict(extra="forbid")

    rows: list[Row] = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


def check_rows(rows: list[Ids], limits: Limits, vocabulary: int) -> None:
    """Raise `BadRequestError` for rows that are too many, too long, or hold what is no id."""
    if len(rows) > limits.rows:
        raise BadRequestError(f"{len(rows)} rows, and one request may have {limits.rows}")
    for ids in rows:
        if len(ids) > limits.length:
            raise BadRequestError(
                f"a text of {len(ids)} tokens, and this server takes {limits.length} (--max-model-len)"
            )
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise BadRequestError(f"id {wrong} is none of this model's, which end at {vocabulary - 1}")
