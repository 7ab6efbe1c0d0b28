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
    """Of `/v1/completions`: it scores where `prompt_logprobs` or `echo` is given, and else it writes. What else clients
    send and what would change what is drawn is refused; the rest is let be."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | Ids | list[Ids] = Field(description="Ids to score, of one text or several; or a text")
    model: str | None = Field(None, description="The name that is served; default that")
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens to write; with scores 0, or 1 of clients that must write something"
    )
    echo: bool = Field(False, description="Answer about the prompt's tokens in `logprobs`")
    logprobs: int | None = Field(None, ge=0, description="Likeliest ids at each position that is written, or echoed")
    prompt_logprobs: int | None = Field(None, ge=0, description="Likeliest ids at each position of the prompt")
    return_tokens_as_token_ids: bool = Field(False, description="Write token_id:N for texts of tokens")
    return_token_ids: bool = Field(False, description="Answer with `token_ids` too")
    temperature: float | None = Field(None, ge=0, le=1000, description="Of what is written; scores are those of 1")
    top_p: float | None = Field(None, gt=0, le=1, description="Write from the likeliest ids of this mass")
    top_k: int | None = Field(None, ge=-1, description="Write from so many of the likeliest ids; 0 and -1 of all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Of what is written; default another each time")
    stop_token_ids: list[StrictInt] | None = Field(
        None, description="Ids that end what is written, besides the model's"
    )
    ignore_eos: bool = Field(False, description="Let no ids end it but those in stop_token_ids")
    n: int = Field(1, ge=1, description="1")
    best_of: int | None = Field(None, description="1")
    suffix: str | None = Field(None, description="Refused")
    stream: bool | None = Field(None, description="false")
    stop: str | list[str] | None = Field(None, description="Refused")
    logit_bias: dict[str, float] | None = Field(None, description="Refused")
    allowed_token_ids: list[int] | None = Field(None, description="Refused")
    bad_words: list[str] | None = Field(None, description="Refused")
    min_tokens: int | None = Field(None, description="0")
    min_p: float | None = Field(None, description="0")
    repetition_penalty: float | None = Field(None, description="1")
    presence_penalty: float | None = Field(None, description="0")
    frequency_penalty: float | None = Field(None, description="0")

    @property
    def scores(self) -> bool:
        return self.prompt_logprobs is not None or self.echo

    def unknown(self) -> list[str]:
        """What would change what is drawn, and is not done here."""
        neutral = {"n": 1, "best_of": 1, "min_tokens": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stream": False}
        names = (*neutral, "suffix", "stop", "logit_bias", "allowed_token_ids", "bad_words")
        given = {name: getattr(self, name) for name in names}
        return [name for name, value in given.items() if value not in (None, neutral.get(name), [], {}, "")]


class Row(BaseModel):
    """One of `/opd/score`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Ids = Field(min_length=1, description="What stands before")
    completion: Ids = Field(min_length=1, description="What is scored")


class WeightsPath(BaseModel):
    """Where `/collective_rpc` finds weights."""

    model_config = ConfigDict(extra="forbid")
    weights_path: str = Field(min_length=1, max_length=4096, description="A folder that this machine sees")


# The plugin of mypy gives every model an __init__ with **kwargs, and takes the alias for another one.
class Rpc(BaseModel):  # type: ignore[no-redef]
    """Of `/collective_rpc`: reading weights anew is all that it does here."""

    model_config = ConfigDict(extra="ignore")
    method: Literal["reload_weights"] = Field(description="What is asked for")
    where: WeightsPath = Field(validation_alias="kwargs", description="From where")


class Version(BaseModel):
    """Of `/update_weight_version`."""

    model_config = ConfigDict(extra="ignore")
    new_version: str = Field(min_length=1, max_length=200, description="What the weights are called from now on")


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
