"""Completions scored as they grow: through keys and values that grow along, or by whole passes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from opd.context import Context
from opd.distributions import Categorical
from opd.language.engines.base import EncodedPrompt, Scorer, same_prompt
from opd.language.engines.cache import RoomyLayer, roomy_cache, take_rows
from opd.language.engines.padding import pad
from opd.language.engines.prefill import cache_name, prefill, step

if TYPE_CHECKING:
    from opd.language.engines.in_process import InProcess

KEPT = (RoomyLayer, DynamicSlidingWindowLayer)
"""Layers to which several tokens can be added at once. A state takes in the padding of shorter rows."""


class WholeScorer(Scorer):
    """Every extension is a pass over all of each row that is named; any model can do that."""

    def __init__(self, model: InProcess, contexts: Sequence[EncodedPrompt], context: Context):
        self.model, self.contexts, self.context = model, contexts, context
        self.given: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(contexts))}

    @torch.no_grad()
    def extend(self, tokens: Mapping[int, torch.Tensor]) -> Categorical:
        for row, new in tokens.items():
            self.given[row].append(new)
        whole = [torch.cat(self.given[row]) for row in tokens]
        scored = self.model.score([self.contexts[row] for row in tokens], whole, self.context)
        of_each = torch.split(scored.hidden, [len(y) for y in whole])
        new_ones = [hidden[-len(new) :] for hidden, new in zip(of_each, tokens.values(), strict=True)]
        return Categorical(torch.cat(new_ones), scored.head)

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.given.pop(row, None)


class CachedScorer(Scorer):
    """A pass over new tokens alone. Rows of a step take turns in one batch: one that gets fewer tokens than others of
    the same extension, or none, leaves the cache, and is scored by whole passes where it is named again."""

    def __init__(self, model: InProcess, contexts: Sequence[EncodedPrompt], context: Context):
        self.model, self.contexts, self.context = model, contexts, context
        self.whole = WholeScorer(model, contexts, context)
        self.name = cache_name(model)
        self.cache: DynamicCache | None = None
        self.rows = list(range(len(contexts)))
        self.mask = torch.zeros(0)
        self.following = torch.zeros(0)
        """int64 `[rows, 1]`, the position of the next token that is fed."""
        self.before = torch.zeros(0)
        self.waiting: dict[int, torch.Tensor] = {}
        """The last token of each row: what it is followed by is not asked before the row is extended."""

    @staticmethod
    def fits(model: InProcess) -> bool:
        """Whether a model's layers all keep keys and values."""
        name = cache_name(model)
        return name is not None and all(type(layer) in KEPT for layer in roomy_cache(model.base.config).layers)

    @torch.no_grad()
    def extend(self, tokens: Mapping[int, torch.Tensor]) -> Categorical:
        with self.model.quiet():
            first = self.cache is None
            if first:
                self._begin()
            most = max(len(new) for new in tokens.values())
            held = [row for row in self.rows if row in tokens]
            found = self._through_cache(held, tokens, first) if held else {}
        for row in held:
            self.whole.given[row].append(tokens[row])
            self.waiting[row] = tokens[row][-1:]
        self._keep([row for row in held if len(tokens[row]) == most])
        others = {row: new for row, new in tokens.items() if row not in found}
        if others:
            of_each = torch.split(self.whole.extend(others).hidden, [len(new) for new in others.values()])
            found |= dict(zip(others, of_each, strict=True))
        return Categorical(torch.cat([found[row] for row in tokens]), self.model.head_of(self.context).detach())

    def drop(self, rows: Sequence[int]) -> None:
        self.whole.drop(rows)
        gone = set(rows)
        if self.cache is not None:
            self._keep([row for row in self.rows if row not in gone])
        else:
            self.rows = [row for row in self.rows if row not in gone]

    def _begin(self) -> None:
        """Prefill the prompts, each run of equal neighbours once."""
        contexts = [self.contexts[row] for row in self.rows]
        of_run = [0]
        for earlier, later in itertools.pairwise(contexts):
            of_run.append(of_run[-1] + (not same_prompt(earlier, later)))
        starts = [contexts[of_run.index(run)] for run in range(of_run[-1] + 1)]
        self.cache = roomy_cache(self.model.base.config)
        self.before, self.mask, self.following = prefill(self.model, str(self.name), starts, self.cache)
        if len(starts) < len(contexts):
            each = torch.tensor(of_run, device=self.before.device)
            take_rows(self.cache, each)
            self.before, self.mask, self.following = self.before[each], self.mask[each], self.following[each]

    def _through_cache(
        self, held: Sequence[int], tokens: Mapping[int, torch.Tensor], first: bool
    ) -> dict[int, torch.Tensor]:
        """Hidden states `[n_i, D]` by row; the cache takes in all new tokens but the last of each row."""
        assert self.cache is not None
        self._keep(held)
        waiting = [self.waiting.get(row, tokens[row][:0]) for row in held]
        fed = [torch.cat([last, tokens[row][:-1]]).cpu() for last, row in zip(waiting, held, strict=True)]
        states = [self.before[i : i + 1] if first else self.before[:0] for i in range(len(held))]
        if max(len(new) for new in fed):
            ids, present = (each.to(self.model.device) for each in pad(fed, "right"))
            position = self.following + (present.cumsum(-1) - 1).clamp(min=0)
            self.following = self.following + present.sum(-1, keepdim=True)
            self.mask = torch.cat([self.mask, present], 1)
            mask = None if bool(self.mask.all()) else self.mask
            hidden = step(self.model, str(self.name), ids, mask, position, self.cache)
            states = [torch.cat([s, hidden[i, : len(new)]]) for i, (s, new) in enumerate(zip(states, fed, strict=True))]
        return dict(zip(held, states, strict=True))

    def _keep(self, rows: Sequence[int]) -> None:
        if list(rows) == self.rows or self.cache is None:
            return
        places = torch.tensor([self.rows.index(row) for row in rows], dtype=torch.int64, device=self.mask.device)
        take_rows(self.cache, places)
        self.mask, self.before, self.following = self.mask[places], self.before[places], self.following[places]
        self.rows = list(rows)
