"""How servers are asked to score given ids, and how their answers are read: nothing of them is believed unchecked."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from opd.remote.client import Job, RequestError, read_json

TOKEN = "token_id:"
"""What stands before an id where a server writes ids for texts of tokens."""

MORE_THAN_ALL = 1e-2
"""Probability beyond 1 that K of a state's ids may have together, by the rounding of a server in bfloat16."""


class Scored(NamedTuple):
    """What a server says of one completion of T tokens: float32 `[T]` log-probabilities of its own tokens, and of the K
    likeliest ids int64 `[T, K]` their float32 `[T, K]`, descending."""

    log_probs: torch.Tensor
    ids: torch.Tensor
    top: torch.Tensor


Entries = Mapping[int, float]
"""Log-probabilities by id of one state."""


class Dialect(ABC):
    """How one kind of server is asked. All of them score at temperature 1, over all ids of their model."""

    kind: ClassVar[str]
    spare: ClassVar[int] = 0
    """Tokens beyond a text that the server's longest must hold."""

    def job(self, model: str, ids: Sequence[int], start: int, k: int) -> Job[Scored]:
        """Ask about the tokens `ids[start:]` behind `ids[:start]`, and the `k` likeliest at each of them."""

        def read(data: bytes) -> Scored:
            try:
                return _checked(self.read(data, ids, start), k)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise RequestError("another form", f"{type(error).__name__}: {error}"[:120]) from None

        return Job(self.path, self.body(model, ids, start, k), read)

    path: ClassVar[str]

    @abstractmethod
    def body(self, model: str, ids: Sequence[int], start: int, k: int) -> dict[str, Any]: ...

    @abstractmethod
    def read(self, data: bytes, ids: Sequence[int], start: int) -> list[tuple[float, Entries]]:
        """For each token from `start` on its log-probability and those by id of the likeliest, as the server wrote
        them; what is not of the form that it should be may raise whatever indexing does."""


class VLLM(Dialect):
    """`prompt_logprobs` of `/v1/completions`: for each token of the prompt a map from ids to log-probability and rank,
    null for the first, in which the given token is beside the k likeliest where it is none of them."""

    kind = "vllm"
    path = "/v1/completions"
    spare = 1

    def body(self, model: str, ids: Sequence[int], start: int, k: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": max(k, 1),
        }

    def read(self, data: bytes, ids: Sequence[int], start: int) -> list[tuple[float, Entries]]:
        rows = read_json(data)["choices"][0]["prompt_logprobs"]
        _same_length(len(rows), len(ids))
        found: list[tuple[float, Entries]] = []
        for token, row in zip(ids[start:], rows[start:], strict=True):
            entries: Entries = {int(i): number(entry["logprob"]) for i, entry in row.items()}
            if token not in entries:
                raise RequestError("other ids", f"no log-probability of the given id {token}")
            found.append((entries[token], entries))
        return found


class OpenAI(Dialect):
    """`echo` of `/v1/completions`: the prompt comes back with `logprobs`, and with `return_tokens_as_token_ids` tokens
    are written as `token_id:N`, so that they can be compared with what was sent."""

    kind = "openai"
    path = "/v1/completions"

    def __init__(self, most: int = 0):
        self.most = most
        """`max_tokens`; some servers refuse 0."""
        self.spare = most  # type: ignore[misc]  # of this one

    def body(self, model: str, ids: Sequence[int], start: int, k: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(ids),
            "max_tokens": self.most,
            "temperature": 1.0,
            "echo": True,
            "logprobs": max(k, 1),
            "return_tokens_as_token_ids": True,
        }

    def read(self, data: bytes, ids: Sequence[int], start: int) -> list[tuple[float, Entries]]:
        found = read_json(data)["choices"][0]["logprobs"]
        tokens, of_tokens, tops = found["tokens"], found["token_logprobs"], found["top_logprobs"]
        # Where one token is written behind the prompt, it comes last.
        for rows in (tokens, of_tokens, tops):
            _same_length(len(rows) - (self.most if len(rows) > len(ids) else 0), len(ids))
        rows = []
        for at in range(start, len(ids)):
            _same_id(listed_id(tokens[at]), ids[at])
            rows.append((number(of_tokens[at]), {listed_id(i): number(value) for i, value in tops[at].items()}))
        return rows


class SGLang(Dialect):
    """`/generate` with `input_ids`: `input_token_logprobs` are triples of log-probability, id and text, the first of
    them without a number, and `input_top_logprobs` lists of such."""

    kind = "sglang"
    path = "/generate"

    def body(self, model: str, ids: Sequence[int], start: int, k: int) -> dict[str, Any]:
        return {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": max(start - 1, 0),
            "top_logprobs_num": max(k, 1),
            "return_text_in_logprobs": False,
        }

    def read(self, data: bytes, ids: Sequence[int], start: int) -> list[tuple[float, Entries]]:
        found = read_json(data)["meta_info"]
        count = len(ids) - start
        of_tokens, tops = found["input_token_logprobs"], found["input_top_logprobs"]
        for rows in (of_tokens, tops):
            if len(rows) < count:
                _same_length(len(rows), count)
        rows = []
        for token, one, top in zip(ids[start:], of_tokens[-count:], tops[-count:], strict=True):
            _same_id(int(one[1]), token)
            rows.append((number(one[0]), {int(i): number(value) for value, i, *_ in top}))
        return rows


DIALECTS: dict[str, type[Dialect]] = {cls.kind: cls for cls in (VLLM, OpenAI, SGLang)}


def _checked(rows: list[tuple[float, Entries]], k: int) -> Scored:
    """Tensors of what was read, after every number of it was looked at."""
    log_probs, likeliest, values = [], [], []
    for own, entries in rows:
        top = sorted(entries.items(), key=lambda entry: -entry[1])[:k]
        if len(top) < k:
            raise RequestError("too few ids", f"{len(top)} of the {k} likeliest")
        if sum(math.exp(value) for _, value in top) > 1 + MORE_THAN_ALL:
            raise RequestError("probability above 1", f"of the {k} likeliest ids together")
        log_probs.append(own)
        likeliest.append([i for i, _ in top])
        values.append([value for _, value in top])
    shape = (len(rows), k)
    return Scored(
        torch.tensor(log_probs, dtype=torch.float32),
        torch.tensor(likeliest, dtype=torch.int64).view(shape),
        torch.tensor(values, dtype=torch.float32).view(shape),
    )


def number(value: object) -> float:
    """A log-probability; `RequestError` where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError("no number", f"{value!r} for a log-probability"[:80])
    if math.isnan(value):
        raise RequestError("NaN", "for a log-probability")
    if math.isinf(value):
        raise RequestError("infinite", "for a log-probability")
    if value > 0:
        raise RequestError("positive", f"{value:g} for a log-probability")
    return float(value)


def listed_id(text: str) -> int:
    """The id of `token_id:N`; `RequestError` where something else is written."""
    if not text.startswith(TOKEN):
        raise RequestError("texts for ids", f"{text[:20]!r} where {TOKEN}N was asked for")
    return int(text.removeprefix(TOKEN))


def _same_id(found: int, asked: int) -> None:
    if found != asked:
        raise RequestError("other ids", f"id {found} where {asked} was asked about")


def _same_length(found: int, asked: int) -> None:
    if found != asked:
        raise RequestError("wrong length", f"{found} tokens where {asked} were asked about")
