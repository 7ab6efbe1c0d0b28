"""From hidden states to the bytes of an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from opd.distributions import Head, TopK
from opd.language.engines.base import Row
from opd.server.reading import Completion

ROWS_AT_ONCE = 128
"""Positions whose logits exist together."""


def exact_answer(hidden: Sequence[torch.Tensor], dtype: str) -> bytes:
    """Hidden states of all rows, packed, as safetensors."""
    whole = torch.cat(list(hidden)).to(getattr(torch, dtype)).cpu().contiguous()
    return save({"hidden": whole})


def head_answer(head: Head) -> bytes:
    """The head's matrix and bias as safetensors."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    return save(tensors)


def completion_answer(
    hidden: Sequence[torch.Tensor],
    prompts: Sequence[list[int]],
    asked: Completion,
    head: Head,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> bytes:
    """What `/v1/completions` says of the tokens of prompts; `hidden` `[T - 1, D]` predicts all but the first of each.

    Raises:
        ArithmeticError: the model computed something that is no number.
    """
    echoed, prompted = asked.logprobs if asked.echo else None, asked.prompt_logprobs
    k = max(echoed or 0, prompted or 0)
    choices = []
    for index, (ids, states) in enumerate(zip(prompts, hidden, strict=True)):
        rows = _rows(states, ids, head, k)
        choice: dict[str, Any] = {"index": index, "text": tokenizer.decode(ids) if asked.echo else ""}
        choice |= {"finish_reason": "length", "logprobs": None}
        if prompted is not None:
            choice["prompt_logprobs"] = [None, *(_entries(row, prompted) for row in rows)]
        if echoed is not None:
            choice["logprobs"] = _echo(ids, rows, echoed, tokenizer, asked.return_tokens_as_token_ids)
        choices.append(choice)
    tokens = sum(len(ids) for ids in prompts)
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    return json.dumps(_answer(name, choices, usage)).encode()


def written_answer(
    row: Row, likeliest: TopK | None, asked: Completion, prompt: int, tokenizer: PreTrainedTokenizerBase, name: str
) -> bytes:
    """What `/v1/completions` says of a completion that was written behind `prompt` tokens.

    Raises:
        ArithmeticError: the model computed something that is no number.
    """
    if not bool(row.log_probs.isfinite().all()):
        raise ArithmeticError("the model computed something that is no number; serve it with another --dtype")
    actions, log_probs = row.actions.tolist(), row.log_probs.tolist()

    def named(i: int) -> str:
        return f"token_id:{i}" if asked.return_tokens_as_token_ids else str(tokenizer.decode([i]))

    choice: dict[str, Any] = {"index": 0, "text": tokenizer.decode(actions, skip_special_tokens=True)}
    choice |= {"finish_reason": "stop" if row.finished else "length", "logprobs": None}
    if asked.return_token_ids:
        choice["token_ids"] = actions
    if asked.logprobs is not None:
        tops: list[dict[str, float]] = [{} for _ in actions]
        if likeliest is not None:
            of_each = zip(likeliest.ids.tolist(), likeliest.log_probs.tolist(), strict=True)
            tops = [{named(i): value for i, value in zip(ids, values, strict=True)} for ids, values in of_each]
        for entry, i, value in zip(tops, actions, log_probs, strict=True):
            entry.setdefault(named(i), value)
        choice["logprobs"] = {
            "tokens": [named(i) for i in actions],
            "token_logprobs": log_probs,
            "top_logprobs": tops,
            "text_offset": [],
        }
    usage = {"prompt_tokens": prompt, "completion_tokens": len(actions), "total_tokens": prompt + len(actions)}
    return json.dumps(_answer(name, [choice], usage)).encode()


def _answer(name: str, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": "opd",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
        "choices": choices,
        "usage": usage,
    }


Scores = tuple[int, float, int, list[int], list[float]]
"""The token, its log-probability and rank, and the likeliest ids with theirs."""


def _rows(states: torch.Tensor, ids: list[int], head: Head, k: int) -> list[Scores]:
    found: list[Scores] = []
    for start in range(0, len(states), ROWS_AT_ONCE):
        log_probs = torch.log_softmax(head.logits(states[start : start + ROWS_AT_ONCE]), -1)
        if not bool(log_probs.isfinite().all()):
            raise ArithmeticError("the model computed something that is no number; serve it with another --dtype")
        tokens = torch.tensor(ids[start + 1 : start + 1 + len(log_probs)], device=log_probs.device)
        own = log_probs.gather(1, tokens[:, None])
        ranks = (log_probs > own).sum(1) + 1
        top = log_probs.topk(k, -1)
        of_each = (tokens, own.squeeze(1), ranks, top.indices, top.values)
        found += zip(*(values.tolist() for values in of_each), strict=True)
    return found


def _entries(row: Scores, k: int) -> dict[str, dict[str, float | int]]:
    token, own, rank, ids, values = row
    entries: dict[str, dict[str, float | int]] = {str(token): {"logprob": own, "rank": rank}}
    for place, (i, value) in enumerate(zip(ids[:k], values[:k], strict=True), start=1):
        entries.setdefault(str(i), {"logprob": value, "rank": place})
    return entries


def _echo(
    ids: list[int], rows: Sequence[Scores], k: int, tokenizer: PreTrainedTokenizerBase, as_ids: bool
) -> dict[str, Any]:
    def named(i: int) -> str:
        return f"token_id:{i}" if as_ids else str(tokenizer.decode([i]))

    tops = [{named(int(i)): entry["logprob"] for i, entry in _entries(row, k).items()} for row in rows]
    return {
        "tokens": [named(i) for i in ids],
        "token_logprobs": [None, *(row[1] for row in rows)],
        "top_logprobs": [None, *tops],
        "text_offset": [],
    }
