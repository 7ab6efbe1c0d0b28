"""Batched sampling with a KV cache: prompts prefilled once for a group, finished rows leave the batch, exact
behaviour log-probabilities, one random stream per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from opd.distributions import Head
from opd.language.model import LanguageModel, pad
from opd.language.packing import can_pack, pack, runs_of_equal


@dataclass
class Sampling:
    """The state of B rows between segments.

    Attributes:
        tokens, log_probs: per row, what has been drawn so far (end token included).
        finished: bool `[B]`, the row has drawn an end token.
        alive: int64, rows still in the batch, in cache order.
        uniforms: float32 `[B, budget]`, the randomness of every row, fixed at the start.
    """

    tokens: list[list[torch.Tensor]]
    log_probs: list[list[torch.Tensor]]
    finished: torch.Tensor
    alive: torch.Tensor
    uniforms: torch.Tensor
    cache: DynamicCache
    mask: torch.Tensor
    hidden: torch.Tensor
    drawn: int = 0

    def drop(self, rows: torch.Tensor) -> None:
        """Take rows (indices in 0..B-1) out of the batch: they get no further tokens."""
        keep = ~torch.isin(self.alive, rows.to(self.alive.device))
        self._keep(keep)

    def _keep(self, keep: torch.Tensor) -> None:
        if bool(keep.all()):
            return
        self.alive = self.alive[keep]
        self.hidden = self.hidden[keep]
        self.mask = self.mask[keep]
        self.cache.batch_select_indices(keep.nonzero().squeeze(1))


class Sampler:
    """Samples completions from a `LanguageModel`.

    The distribution drawn from is the head's softmax at the run's temperature, cut to `top_k` ids and `top_p` mass
    when set; `log_probs` are exact under that distribution. A row's draws depend on its own seed alone, not on the
    batch it shares or on how the budget is cut into segments.
    """

    def __init__(self, model: LanguageModel, head: Head, end_ids: Sequence[int], top_p: float = 1.0, top_k: int = 0):
        self.model, self.head = model, head
        self.end_ids = torch.tensor(sorted(end_ids), device=model.device)
        self.top_p, self.top_k = top_p, top_k

    @torch.no_grad()
    def start(self, contexts: Sequence[torch.Tensor], group: int, budget: int, seeds: Sequence[int]) -> Sampling:
        """Prefill each prompt once and repeat its cache for `group` rows; B = len(contexts) * group."""
        rows = len(contexts) * group
        uniforms = torch.stack([torch.rand(budget, generator=torch.Generator().manual_seed(s)) for s in seeds])
        cache = DynamicCache(config=self.model.base.config)
        hidden, mask = self._prefill(contexts, cache)
        if group > 1:
            cache.batch_repeat_interleave(group)
            hidden, mask = hidden.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
        return Sampling(
            tokens=[[] for _ in range(rows)],
            log_probs=[[] for _ in range(rows)],
            finished=torch.zeros(rows, dtype=torch.bool),
            alive=torch.arange(rows, device=self.model.device),
            uniforms=uniforms.to(self.model.device),
            cache=cache,
            mask=mask,
            hidden=hidden,
        )

    @torch.no_grad()
    def extend(self, state: Sampling, tokens: int) -> Sampling:
        """Draw up to `tokens` more for every row still in the batch (never past the budget)."""
        stop = min(state.drawn + tokens, state.uniforms.shape[1])
        while state.drawn < stop and len(state.alive):
            log_probs = self._distribution(state.hidden)
            token = inverse_cdf(log_probs, state.uniforms[state.alive, state.drawn])
            taken = log_probs.gather(1, token[:, None]).squeeze(1)
            for i, row in enumerate(state.alive.tolist()):
                state.tokens[row].append(token[i])
                state.log_probs[row].append(taken[i])
            state.drawn += 1
            ended = torch.isin(token, self.end_ids)
            state.finished[state.alive[ended].cpu()] = True
            state._keep(~ended)
            token = token[~ended]
            if len(token) and state.drawn < state.uniforms.shape[1]:
                state.mask = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], dim=1)
                position = state.mask.sum(-1, keepdim=True) - 1
                state.hidden = self._step(token[:, None], state.mask, position, state.cache)
        return state

    def _prefill(self, contexts: Sequence[torch.Tensor], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden state `[B, D]` and left-padded mask of the prompts; their keys and values go into the cache."""
        ids, mask = pad(list(contexts), "left")
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        if not can_pack(self.model.base) or bool(mask.all()):
            return self._step(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache), mask
        # Prompts of unequal length are computed without padding, then their keys and values are moved to the right.
        row = pack(contexts, [c[:1] for c in contexts]).to(self.model.device)
        hidden = self.model.packed_body(row, past_key_values=cache, use_cache=True)
        places = torch.arange(row.ids.shape[1], device=self.model.device)
        of_group = [torch.cat([places[part] for part in parts]) for parts in row.contexts]
        order = torch.cat(
            [of_group[g] for g, (first, stop) in enumerate(runs_of_equal(contexts)) for _ in range(first, stop)]
        )
        present = mask.bool()
        for layer in cache.layers:
            for name in ("keys", "values"):
                packed = getattr(layer, name)[0]
                moved = packed.new_zeros(len(contexts), mask.shape[1], packed.shape[0], packed.shape[2])
                moved[present] = packed.transpose(0, 1)[order]
                setattr(layer, name, moved.transpose(1, 2).contiguous())
        return hidden[0, row.scored], mask

    def _step(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        attention = None if bool(mask.all()) else mask
        output = self.model.body(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def _distribution(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head.logits(hidden)
        if self.top_k:
            floor = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < floor, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
        return torch.log_softmax(logits, dim=-1)


def inverse_cdf(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 `[B]` draws from `[B, V]` log-probabilities by one uniform each; never an id of probability zero."""
    cdf = log_probs.exp().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    token = torch.searchsorted(cdf, (uniforms[:, None] * total).contiguous(), right=True)
    # Rounding may put the draw at the very end: the first id that reaches the total is the last one with mass.
    return torch.minimum(token, torch.searchsorted(cdf, total)).squeeze(1)
