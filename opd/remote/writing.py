"""How a server is asked to write completions of given ids, and to take up weights: the routes of vLLM, which
`opd serve` has too. What it answers is checked as scores are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opd.remote.client import Job, RequestError, read_json
from opd.remote.dialects import listed_id, number

COMPLETIONS = "/v1/completions"
RPC, RESET, LABEL, LABELLED = "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/weight_info"
LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
SLEEP, WAKE, SLEEPING = "/sleep?level=1&mode=wait", "/wake_up", "/is_sleeping"
"""The routes."""


class Drawn(NamedTuple):
    """One completion: int64 `[T]` ids, the end token included; float32 `[T]` log-probabilities; whether an end token
    ended it; and of the K likeliest ids int64 `[T, K]` their float32 `[T, K]`, descending."""

    actions: torch.Tensor
    log_probs: torch.Tensor
    finished: bool
    ids: torch.Tensor
    top: torch.Tensor


class Draws(NamedTuple):
    """How tokens are drawn: 1 and 0 cut nothing."""

    temperature: float
    top_p: float
    top_k: int
    end_ids: tuple[int, ...]


def write_job(model: str, ids: Sequence[int], budget: int, seed: int, draws: Draws, k: int = 0) -> Job[Drawn]:
    """Ask for one completion of at most `budget` tokens, and the `k` likeliest ids at each of its states."""
    # Whatever the server's generation config says, nothing but this decides what is drawn.
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": budget,
        "n": 1,
        "seed": seed,
        "temperature": draws.temperature,
        "top_p": draws.top_p,
        "top_k": draws.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": list(draws.end_ids),
        "skip_special_tokens": False,
        "logprobs": max(k, 1),
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }

    def read(data: bytes) -> Drawn:
        try:
            return _drawn(read_json(data)["choices"][0], budget, draws.end_ids, k)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise RequestError("another form", f"{type(error).__name__}: {error}"[:120]) from None

    return Job(COMPLETIONS, body, read)


def _drawn(choice: Mapping[str, Any], budget: int, end_ids: Sequence[int], k: int) -> Drawn:
    actions = [_is_id(i) for i in choice["token_ids"]]
    said = choice["logprobs"]
    log_probs = [number(value) for value in said["token_logprobs"]]
    if len(log_probs) != len(actions):
        raise RequestError("wrong length", f"{len(log_probs)} log-probabilities of {len(actions)} tokens")
    if [listed_id(token) for token in said["tokens"]] != actions:
        raise RequestError("other ids", "its log-probabilities are of other ids than it wrote")
    ended = [i for i, token in enumerate(actions) if token in end_ids]
    finished = bool(ended)
    if not actions or len(actions) > budget or (finished and ended[0] < len(actions) - 1):
        raise RequestError("wrong length", f"{len(actions)} tokens of at most {budget}, the first end at {ended[:1]}")
    if not finished and len(actions) < budget:
        raise RequestError("cut off", f"{len(actions)} of {budget} tokens ({choice.get('finish_reason')})", again=True)
    tops: list[list[tuple[int, float]]] = []
    for entries in said["top_logprobs"] if k else ():
        pairs = [(listed_id(name), number(value)) for name, value in entries.items()]
        tops.append(sorted(pairs, key=lambda pair: -pair[1])[:k])
    if any(len(pairs) < k for pairs in tops) or (k and len(tops) != len(actions)):
        raise RequestError("too few ids", f"fewer than the {k} likeliest")
    shape = (len(actions), k)
    return Drawn(
        torch.tensor(actions, dtype=torch.int64),
        torch.tensor(log_probs, dtype=torch.float32),
        finished,
        torch.tensor([i for pairs in tops for i, _ in pairs], dtype=torch.int64).view(shape),
        torch.tensor([value for pairs in tops for _, value in pairs], dtype=torch.float32).view(shape),
    )


def reload_job(folder: str) -> Job[None]:
    """Have it read the weights in a folder that it can see."""
    return _told(RPC, {"method": "reload_weights", "kwargs": {"weights_path": folder}})


def reset_job() -> Job[None]:
    """Have it forget keys and values that other weights computed."""

    def read(data: bytes) -> None:
        # Some versions answer with nothing.
        if data and read_json(data).get("success") is False:
            raise RequestError("busy", "the prefix cache could not be dropped", again=True)

    return Job(RESET, {}, read)


def label_job(label: str) -> Job[None]:
    """Name the weights that it has now."""
    return _told(LABEL, {"new_version": label})


def labelled_job() -> Job[str]:
    """How the weights are named that it has now."""
    return Job(LABELLED, None, lambda data: str(read_json(data).get("weight_version")))


def load_job(name: str, folder: str) -> Job[None]:
    """Have it read an adapter, which goes by that name then."""
    return _told(LOAD, {"lora_name": name, "lora_path": folder})


def unload_job(name: str) -> Job[None]:
    return _told(UNLOAD, {"lora_name": name})


def names_job() -> Job[list[str]]:
    """The names that it serves."""

    def read(data: bytes) -> list[str]:
        try:
            return [str(card["id"]) for card in read_json(data)["data"]]
        except (KeyError, TypeError):
            raise RequestError("another form", "no list of models") from None

    return Job(MODELS, None, read)


def sleep_job() -> Job[None]:
    """Have it give its memory back once what it writes is written."""
    return _told(SLEEP, {})


def wake_job() -> Job[None]:
    return _told(WAKE, {})


def _told(path: str, body: dict[str, Any]) -> Job[None]:
    """A request of which the status alone is read."""
    return Job(path, body, lambda data: None)


def _is_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError("other ids", f"{value!r} for an id"[:80])
    return value
