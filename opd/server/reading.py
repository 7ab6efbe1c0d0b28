"""What requests may say, each of them checked before the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    prompt: str | Ids | list[Ids] = Field(description="Ids to score, of one text or several; or a text")
    model: str | None = Field(None, description="The name that is served; default that")
    max_tokens: int | None = Field(None, ge=0, description="0, or 1 of clients that must write something")
    echo: bool = Field(False, description="Answer about the prompt's tokens in `logprobs`")
    logprobs: int | None = Field(None, ge=0, description="Likeliest ids at each position, with echo")
    prompt_logprobs: int | None = Field(None, ge=0, description="Likeliest ids at each position of the prompt")
    return_tokens_as_token_ids: bool = Field(False, description="Write token_id:N for texts of tokens")
    temperature: float | None = Field(None, description="0 or 1: scores are those of 1")


class Row(BaseModel):
    """One of `/opd/score`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Ids = Field(min_length=1, description="What stands before")
    completion: Ids = Field(min_length=1, description="What is scored")


class Exact(BaseModel):
    """Of `/opd/score`."""

    model_config = ConfigDict(extra="forbid")

    rows: list[Row] = Field(min_length=1, description="Of one forward pass")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the answer")


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
