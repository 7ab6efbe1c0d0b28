"""Batched sampling with a KV cache: prompts prefilled once for a group, finished rows leave the batch and others may
join it, exact behaviour log-probabilities, one random stream per row. A family that keeps a state of its own instead of
a cache is computed anew from the row's beginning for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional
from transformers import DynamicCache

from opd.distributions import Head, TopK
from opd.language.engines.base import EncodedPrompt, followed_by, ids_of
from opd.language.engines.cache import cut_columns, join_rows, roomy_cache, take_rows
from opd.language.engines.cpu.decoder import STATIC, Decoder
from opd.language.engines.cpu.packing import ATTENTION
from opd.language.engines.cpu.prepacked import Prepacked, worth_packing
from opd.language.engines.padding import pad
from opd.language.engines.prefill import cache_name, keeps_all, prefill, step
from opd.language.layers import decoder_of

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess


LOOK_EVERY = 8
"""Tokens between two looks, on an accelerator, at which rows have ended: whoever looks waits until the device has done
all that it was given. In between rows that have ended are drawn on, and what they got too much is cut."""


class Drawn(NamedTuple):
    """One token of every row in the batch: ids `[alive]`, log-probabilities `[alive, 1]`, and where they are kept the
    likeliest ids `[alive, K]`."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    likeliest: TopK | None


@dataclass
class Sampling:
    """The state of B rows between segments.

    Attributes:
        actions, log_probs: int64 and float32 `[B, budget]`, what has been drawn so far (end token included).
        lengths: int64 `[B]`, how many of a row's places are filled.
        finished: bool `[B]`, the row has drawn an end token.
        contexts: the prompts of the B rows.
        alive: int64, rows still in the batch, in cache order: neither ended, dropped, nor at the budget.
        drawn: int64 `[alive]`, tokens of each row so far.
        uniforms: float32 `[budget, alive]`, the randomness of every row, fixed at the start.
        cache: keys, values and states of the rows in the batch; None where the family takes no cache.
        width: columns that the cache holds.
        mask: bool `[alive, L]`: what the cache holds of each row, padded on the left; ones for what it may yet hold.
        padded: some row in the batch has padding.
        following: int64 `[alive, 1]`, the position of the first token that is drawn.
        hidden: `[alive, D]`, the states from which the next token is drawn.
        likeliest: the K likeliest ids at each place, `[B, budget, K]`, where they are kept.
    """

    actions: torch.Tensor
    log_probs: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    contexts: list[EncodedPrompt]
    alive: torch.Tensor
    drawn: torch.Tensor
    uniforms: torch.Tensor
    cache: DynamicCache | None
    width: int
    mask: torch.Tensor
    padded: bool
    following: torch.Tensor
    hidden: torch.Tensor
    likeliest: TopK | None = None

    @property
    def budget(self) -> int:
        return self.actions.shape[1]

    def drop(self, rows: torch.Tensor) -> None:
        """Take rows (indices in 0..B-1) out of the batch: they get no further tokens."""
        self._keep(~torch.isin(self.alive, rows.to(self.alive.device)))

    def rows(self) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
        """`(actions, log-probabilities, finished)` of each of the B rows."""
        lengths, ended = self.lengths.tolist(), self.finished.tolist()
        return [(self.actions[i, :n], self.log_probs[i, :n], ended[i]) for i, n in enumerate(lengths)]

    def candidates(self) -> list[TopK]:
        """Of each of the B rows its likeliest ids at each place; none where they are not kept."""
        kept = self.likeliest
        if kept is None:
            return []
        return [TopK(kept.log_probs[i, :n], kept.ids[i, :n]) for i, n in enumerate(self.lengths.tolist())]

    def record(self, latest: list[Drawn]) -> None:
        """Write down the `latest` draws of the rows in the batch. Once for many tokens, because each write to some rows
        of a table costs as much as drawing one."""
        if latest:
            behind = torch.arange(-len(latest), 0, device=self.alive.device)
            here = self.alive[:, None], self.drawn[:, None] + behind
            self.actions[here] = torch.stack([drawn.tokens for drawn in latest], 1)
            self.log_probs[here] = torch.cat([drawn.log_probs for drawn in latest], 1)
            if self.likeliest is not None:
                tops = [drawn.likeliest for drawn in latest if drawn.likeliest is not None]
                self.likeliest.log_probs[here] = torch.stack([top.log_probs for top in tops], 1)
                self.likeliest.ids[here] = torch.stack([top.ids for top in tops], 1)
            self.lengths[self.alive] = self.drawn
            latest.clear()

    def join(self, others: Sampling) -> None:
        """Take in rows of the same budget, behind these; both caches keep all tokens. `others` is used up."""
        assert self.cache is not None
        assert others.cache is not None
        join_rows(self.cache, others.cache)
        width = max(self.width, others.width)
        held = torch.cat(
            [functional.pad(each.mask[:, : each.width], (width - each.width, 0)) for each in (self, others)]
        )
        self.mask = torch.cat([held, held.new_ones(len(held), self.budget)], 1)
        self.alive = torch.cat([self.alive, others.alive + len(self.actions)])
        self.uniforms = torch.cat([self.uniforms, others.uniforms], 1)
        for name in ("actions", "log_probs", "lengths", "finished", "drawn", "following", "hidden"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(others, name)]))
        self.contexts = self.contexts + others.contexts
        if self.likeliest is not None and others.likeliest is not None:
            both = (self.likeliest, others.likeliest)
            self.likeliest = TopK(torch.cat([x.log_probs for x in both]), torch.cat([x.ids for x in both]))
        self.width = width
        self.padded = not bool(held.all())

    def forget(self, first: int, stop: int) -> None:
        """Let go of the rows `first` to `stop - 1`, of which none is in the batch; the later ones move up."""
        rest = torch.cat([torch.arange(first), torch.arange(stop, len(self.actions))]).to(self.alive.device)
        self.contexts = self.contexts[:first] + self.contexts[stop:]
        for name in ("actions", "log_probs", "lengths", "finished"):
            setattr(self, name, getattr(self, name)[rest])
        if self.likeliest is not None:
            self.likeliest = self.likeliest.select(rest)
        self.alive = torch.where(self.alive < first, self.alive, self.alive - (stop - first))

    def _keep(self, keep: torch.Tensor) -> None:
        if bool(keep.all()):
            return
        places = keep.nonzero().squeeze(1)
        self.alive, self.drawn = self.alive[places], self.drawn[places]
        self.hidden = self.hidden[places]
        self.uniforms = self.uniforms[:, places]
        self.following = self.following[places]
        self.mask = self.mask[places]
        if self.padded and self.cache is not None and keeps_all(self.cache) and len(self.alive):
            # What is padding of all rows that are left would be read with every token.
            unread = int(self.mask.any(0).byte().argmax())
            self.mask, self.width = self.mask[:, unread:], self.width - unread
            if unread:
                cut_columns(self.cache, unread)
        self.padded = self.padded and not bool(self.mask[:, : self.width].all())
        if self.cache is not None:
            take_rows(self.cache, places)


class Sampler:
    """Samples completions from a model in this process.

    The distribution drawn from is the head's softmax at the run's temperature, cut to `top_k` ids and `top_p` mass
    when set; `log_probs` are exact under that distribution. A row's draws depend on its own seed alone, not on the
    batch it shares or on how the budget is cut into segments. It samples from the model as it was when it was made.
    """

    def __init__(
        self,
        model: InProcess,
        head: Head,
        end_ids: Sequence[int],
        top_p: float = 1.0,
        top_k: int = 0,
        packed: bool = False,
        candidates: int = 0,
    ):
        self.model, self.head = model, head
        self.candidates = min(candidates, head.size)
        self.cache_name = cache_name(model)
        body = decoder_of(model.base)
        self.decoder = Decoder(body, packed) if model.caches and Decoder.known(body) else None
        matrix = head.masked_weight()
        self.product = Prepacked(matrix) if packed and worth_packing(matrix) else None
        last = head.size if head.vocabulary.ids is None else head.vocabulary.ids[-1] + 1
        self.ends = torch.zeros(max([last, *(i + 1 for i in end_ids)]), dtype=torch.bool, device=model.device)
        self.ends[sorted(end_ids)] = True
        self.top_p, self.top_k = top_p, top_k
        self.look_every = 1 if model.device.type == "cpu" else LOOK_EVERY
        """Tokens between two looks at which rows have ended. Without a cache it is looked at each."""
        # A window would keep the padding of rows that join, a state would have to go without it, and angles that depend
        # on the longest row would make draws depend on who shares a batch.
        fixed = all(getattr(part, "rope_type", "default") in STATIC for part in body.modules())
        self.joins = self.cache_name is not None and fixed and keeps_all(roomy_cache(model.base.config))
        """Whether rows may join others that have been drawn from (`Sampling.join`)."""

    @torch.no_grad()
    def start(self, contexts: Sequence[EncodedPrompt], group: int, budget: int, seeds: Sequence[int]) -> Sampling:
        """Prefill each prompt once and repeat its cache for `group` rows; B = len(contexts) * group."""
        rows = len(contexts) * group
        device = self.model.device
        uniforms = torch.stack([torch.rand(budget, generator=torch.Generator().manual_seed(s)) for s in seeds])
        cache: DynamicCache | None = None
        if self.cache_name is None:
            hidden = self.model(contexts, [ids_of(c)[:1] for c in contexts])
            mask = pad([ids_of(c) for c in contexts], "left")[1].to(device)
            following = mask.sum(-1, keepdim=True)
        else:
            cache = roomy_cache(self.model.base.config)
            hidden, mask, following = prefill(self.model, self.cache_name, contexts, cache)
        if group > 1:
            each = torch.arange(len(contexts), device=device).repeat_interleave(group)
            if cache is not None:
                take_rows(cache, each)
            hidden, mask, following = hidden[each], mask[each], following[each]
        return Sampling(
            actions=torch.zeros(rows, budget, dtype=torch.int64, device=device),
            log_probs=torch.zeros(rows, budget, device=device),
            lengths=torch.zeros(rows, dtype=torch.int64, device=device),
            finished=torch.zeros(rows, dtype=torch.bool, device=device),
            contexts=[context for context in contexts for _ in range(group)],
            alive=torch.arange(rows, device=device),
            drawn=torch.zeros(rows, dtype=torch.int64, device=device),
            uniforms=uniforms.T.contiguous().to(device),
            cache=cache,
            width=mask.shape[1],
            mask=torch.cat([mask, mask.new_ones(rows, budget)], dim=1).bool(),
            padded=not bool(mask.all()),
            following=following,
            hidden=hidden,
            likeliest=TopK(
                torch.zeros(rows, budget, self.candidates, device=device),
                torch.zeros(rows, budget, self.candidates, dtype=torch.int64, device=device),
            )
            if self.candidates
            else None,
        )

    @torch.no_grad()
    def extend(self, state: Sampling, tokens: int, fewest: int = 0) -> Sampling:
        """Draw up to `tokens` more for every row still in the batch (never past the budget), as long as more than
        `fewest` rows are in it; those that end are seen to have ended every `look_every` tokens and at the end."""
        as_it_is = state.cache is not None and self._sees_everything(state.cache)
        decoder = self.decoder if as_it_is and not torch.is_autocast_enabled("cpu") else None
        latest: list[Drawn] = []
        every = 1 if state.cache is None or self.cache_name is None else self.look_every
        unseen, room = 0, 0
        for left in range(tokens - 1, -1, -1):
            if len(state.alive) <= fewest:
                break
            if every > 1 and not unseen:
                # No row passes its budget unseen.
                room = min(every, state.budget - int(state.drawn.max()))
            log_probs, likeliest = self._distribution(state)
            column = inverse_cdf(log_probs, state.uniforms.gather(0, state.drawn[None])[0])
            token = self.head.vocabulary.named(column)
            latest.append(Drawn(token, log_probs.gather(1, column[:, None]), likeliest))
            state.drawn = state.drawn + 1
            unseen += 1
            if every == 1 or unseen == room or not left:
                token = self._look(state, latest, unseen)
                unseen = 0
            if not len(token):
                break
            if state.cache is None or self.cache_name is None:
                state.record(latest)
                state.hidden = self._anew(state)
                continue
            mask = None
            if state.padded and _attends(state.cache):
                mask = state.mask[:, : state.width + 1]
                # One new token sees whatever is no padding: handed over as it is, the mask costs nothing to make.
                mask = mask[:, None, None] if as_it_is else mask.long()
            position = state.following + (state.drawn[:, None] - 1)
            state.width += 1
            if decoder is not None:
                state.hidden = decoder(token, mask, position, state.cache)
            else:
                hidden = step(self.model, self.cache_name, token[:, None], mask, position, state.cache)
                state.hidden = hidden[:, -1]
        state.record(latest)
        return state

    def _look(self, state: Sampling, latest: list[Drawn], unseen: int) -> torch.Tensor:
        """Take rows out that ended in the last `unseen` draws, or are at their budget; the last token of the others."""
        token = latest[-1].tokens
        ends = self.ends[token if unseen == 1 else torch.stack([drawn.tokens for drawn in latest[-unseen:]], 1)]
        ended = ends if unseen == 1 else ends.any(1)
        over = ended | (state.drawn == state.budget)
        if not bool(over.any()):
            return token
        state.record(latest)
        if unseen > 1:
            # Each count is of the ends up to and with a token: what comes behind the first is too much.
            state.lengths[state.alive] -= (ends.cumsum(1) - ends.long() > 0).sum(1)
        state.finished[state.alive] = ended
        state._keep(~over)
        return token[~over]

    def _anew(self, state: Sampling) -> torch.Tensor:
        """The states `[alive, D]` after all that has been drawn, by the pass that training makes."""
        rows = [followed_by(state.contexts[i], state.actions[i, : state.lengths[i]]) for i in state.alive.tolist()]
        hidden: torch.Tensor = self.model(rows, [ids_of(row)[:1] for row in rows])
        return hidden

    def _sees_everything(self, cache: DynamicCache) -> bool:
        """Whether every layer attends to all tokens before, through an interface that takes a boolean mask."""
        config = decoder_of(self.model.base).config
        # Biases by distance are made of the mask of tokens.
        masked = config._attn_implementation in ("sdpa", ATTENTION) and not getattr(config, "alibi", False)
        return masked and keeps_all(cache)

    def _distribution(self, state: Sampling) -> tuple[torch.Tensor, TopK | None]:
        """float32 `[alive, V]`: normalised log-probabilities of the next token, a column of the head each; and before
        any cut the likeliest ids, where they are wanted."""
        logits = self.head.logits(state.hidden, self.product)
        likeliest = None
        if self.candidates:
            top = logits.topk(self.candidates, dim=-1)
            normalised = top.values - logits.logsumexp(-1, keepdim=True)
            likeliest = TopK(normalised, self.head.vocabulary.named(top.indices))
        return torch.log_softmax(cut(logits, self.top_p, self.top_k), dim=-1), likeliest


def cut(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """`[B, V]` logits, minus infinity outside of the `top_k` likeliest (0: of all) and of the least set of likeliest
    ids that has the mass `top_p`."""
    if top_k:
        floor = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    if top_p < 1.0:
        ordered, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return logits


def _attends(cache: DynamicCache) -> bool:
    """Whether a layer looks back at tokens. A state took in the prompt without its padding, and a family of states
    alone would multiply its one new token by the mask of all tokens."""
    return any(getattr(layer, "keys", None) is not None for layer in cache.layers)


def inverse_cdf(log_probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """int64 `[B]` draws from `[B, V]` log-probabilities by one uniform each; never an id of probability zero."""
    cdf = log_probs.exp()
    cdf = torch.cumsum(cdf, -1, out=cdf)
    total = cdf[:, -1:].contiguous()
    token = torch.searchsorted(cdf, (uniforms[:, None] * total).contiguous(), right=True)
    # Rounding may put the draw at the very end: the first id that reaches the total is the last one with mass.
    # Where the weights are not numbers there is no such id; the caller sees it in the log-probability.
    return torch.minimum(token, torch.searchsorted(cdf, total)).squeeze(1).clamp(max=log_probs.shape[-1] - 1)
