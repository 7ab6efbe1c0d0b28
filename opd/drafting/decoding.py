"""Speculative decoding of many rows: a drafter proposes a block or a tree, its target reads it and says how much of it
stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from opd.distributions import Head
from opd.drafting.base import Drafter, Pair
from opd.drafting.proposing import Proposing, Tree
from opd.drafting.record import Drafted
from opd.drafting.target import Target, keep, take_rows
from opd.drafting.tree import followed, grow
from opd.drafting.verification import Verdict, agreeing, by_ratio
from opd.language.engines.sampler import cut, inverse_cdf


@dataclass(frozen=True)
class Speculation:
    """How rows are written.

    Attributes:
        target: who verifies; its `written` ids are those that a text may hold.
        drafter: who proposes, in eval mode.
        written: the target's head over the ids that a text may hold, at a temperature of 1.
        drafts: the drafter's head, at a temperature of 1.
        end_ids: ids that end a text.
        proposals: K.
        temperature: of the text; at 0 the likeliest token.
        proposing: see `Proposing`.
        top_p, top_k: cuts of the distribution that the text is drawn from; 1 and 0 cut nothing.
        tree: the shape of proposals; None for one line of them.
    """

    target: Target
    drafter: Drafter
    written: Head
    drafts: Head
    end_ids: tuple[int, ...]
    proposals: int
    temperature: float
    proposing: Proposing
    top_p: float = 1.0
    top_k: int = 0
    tree: Tree | None = None


@dataclass(frozen=True)
class Answer:
    """One row, the N slots of all its blocks. Of a tree these are the slots of one line (`opd.drafting.tree.Line`).

    Attributes:
        record: what a drafter needs to draft the blocks again.
        log_p: float32 `[T]`, the target's log-probability of each token of the text under the distribution that it is
            drawn from; 0 at a temperature of 0.
        finished: it ended by itself.
        proposed: int64 `[N]`.
        log_q: float32 `[N]`, the drafter's log-probability of each proposal at a temperature of 1.
        drawn_log_q: float32 `[N]`, that under the distribution that it was drawn from; 0 for the likeliest.
        hidden: `[N, D]`, the target's final hidden states that teach the slots, those behind a rejection too.
    """

    record: Drafted
    log_p: torch.Tensor
    finished: bool
    proposed: torch.Tensor
    log_q: torch.Tensor
    drawn_log_q: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class _Block:
    """A line of K proposals for each of B rows, and what the target says of it.

    Attributes:
        proposed: int64 `[B, K]`.
        log_q, drawn_log_q: float32 `[B, K]`, as in `Answer`.
        sizes: B numbers of proposals that there are, K or fewer.
        accepted: int64 `[B]`.
        token: int64 `[B]`, the target's own behind those that stand.
        said: float32 `[B, K + 1]`, the target's log-probabilities of what stands and of that token.
        hidden, features: `[B, K + 1, D]` and `[B, K + 1, F]`, of the anchor and the proposals.
    """

    proposed: torch.Tensor
    log_q: torch.Tensor
    drawn_log_q: torch.Tensor
    sizes: list[int]
    accepted: torch.Tensor
    token: torch.Tensor
    said: torch.Tensor
    hidden: torch.Tensor
    features: torch.Tensor


@dataclass
class _Row:
    """One answer while it is written."""

    prompt: torch.Tensor
    tokens: list[int]
    uniforms: torch.Tensor
    generator: torch.Generator
    finished: bool = False
    features: list[torch.Tensor] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    proposed: list[torch.Tensor] = field(default_factory=list)
    log_p: list[torch.Tensor] = field(default_factory=list)
    log_q: list[torch.Tensor] = field(default_factory=list)
    drawn_log_q: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    def answer(self) -> Answer:
        read = self.anchors[-1] if self.anchors else 0
        record = Drafted(
            self.prompt,
            torch.tensor(self.tokens),
            torch.cat(self.features)[:read],
            *(torch.tensor(x, dtype=torch.int64) for x in (self.anchors, self.accepted, self.committed, self.sizes)),
        )
        proposed = torch.cat([torch.zeros(0, dtype=torch.int64), *self.proposed])
        log_q, drawn_log_q = (torch.cat([torch.zeros(0), *parts]) for parts in (self.log_q, self.drawn_log_q))
        return Answer(
            record, torch.cat(self.log_p), self.finished, proposed, log_q, drawn_log_q, torch.cat(self.hidden)
        )


class _Kept:
    """Keys and values that a drafter keeps of rows of unequal length, a column for each position."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def add(self, new: Sequence[Pair], positions: torch.Tensor, present: torch.Tensor, width: int) -> None:
        """Write what was read at int64 `[B, n]` positions, where `present`; no position is beyond `width`."""
        if not self.pairs or self.pairs[0][0].shape[2] < width:
            room = width + width // 4 + 64
            old = self.pairs or [(k[:, :, :0], v[:, :, :0]) for k, v in new]
            self.pairs = [(_wider(k, room), _wider(v, room)) for k, v in old]
        rows, columns = present.nonzero(as_tuple=True)
        for pair, read in zip(self.pairs, new, strict=True):
            for buffer, states in zip(pair, read, strict=True):
                buffer[rows, :, positions[rows, columns]] = states[rows, :, columns]

    def upto(self, width: int) -> list[Pair]:
        return [(k[:, :, :width], v[:, :, :width]) for k, v in self.pairs]

    def take(self, rows: torch.Tensor) -> None:
        self.pairs = [(k[rows], v[rows]) for k, v in self.pairs]


def _wider(states: torch.Tensor, room: int) -> torch.Tensor:
    made = states.new_zeros(states.shape[0], states.shape[1], room, states.shape[3])
    made[:, :, : states.shape[2]] = states
    return made


@torch.no_grad()
def speculate(how: Speculation, prompts: Sequence[torch.Tensor], seeds: Sequence[int], budget: int) -> list[Answer]:
    """B answers of at most `budget` tokens to int64 `[P_i]` prompts, side by side.

    A text does not depend on the drafter: at a temperature of 0, and where the likeliest tokens are proposed, it is
    token by token what `opd.language.engines.sampler.Sampler` draws with the same seed; where tokens are drawn from the
    drafter it has the same distribution.
    """
    batch = _Batch(how, prompts, seeds, budget)
    while batch.rows:
        batch.step()
    return [row.answer() for row in batch.all]


def chosen(log_q: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
    """int64 `[B]`, what is proposed: of float32 `[B, V]` the likeliest column of each row, or one drawn by its
    uniform."""
    return log_q.argmax(-1) if uniforms is None else inverse_cdf(log_q, uniforms)


class _Batch:
    """Rows that are still being written, and what target and drafter keep of them."""

    def __init__(self, how: Speculation, prompts: Sequence[torch.Tensor], seeds: Sequence[int], budget: int):
        self.how, self.budget = how, budget
        self.device = how.target.language.device
        self.cache: DynamicCache = how.target.begin()
        self.kept = _Kept()
        self.all = [
            _Row(
                prompt.cpu(),
                [],
                # A slot behind the last token may be drawn too.
                torch.rand(budget, generator=torch.Generator().manual_seed(seed)),
                torch.Generator().manual_seed(seed ^ 0x5EED),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self.rows = list(self.all)
        self._first()

    def _first(self) -> None:
        """Read the prompts; the first token is the target's own."""
        width = max(len(row.prompt) for row in self.rows)
        ids = torch.stack([torch.nn.functional.pad(row.prompt, (0, width - len(row.prompt))) for row in self.rows])
        positions = torch.arange(width, device=self.device).expand(len(ids), width)
        hidden, features = self.how.target.read(ids.to(self.device), positions, self.cache)
        last = torch.tensor([len(row.prompt) - 1 for row in self.rows], device=self.device)
        final = hidden[torch.arange(len(last), device=self.device), last]
        log_p = self._distribution(final[:, None])
        first = self._drawn(log_p, self._uniforms(1))
        said = self._said(log_p, first)
        tokens = first[:, 0].tolist()
        for i, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            row.features.append(features[i, : len(row.prompt)])
            row.tokens.append(token)
            row.log_p.append(said[i].cpu())
            row.finished = token in self.how.end_ids
            row.hidden.append(final[i : i + 1, :][:0])
        self._drop_written()
        self._let_drafter_read([row.features[0] for row in self.rows])

    def step(self) -> None:
        """One block of every row."""
        how, rows = self.how, self.rows
        anchors = torch.tensor([len(row.prompt) + len(row.tokens) - 1 for row in rows], device=self.device)
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self.device)
        found = self._line(anchors, tokens) if how.tree is None else self._of_tree(how.tree, anchors, tokens)
        news = []
        accepted, behind = found.accepted.tolist(), found.token.tolist()
        for i, (row, size) in enumerate(zip(rows, found.sizes, strict=True)):
            new = [*found.proposed[i, : accepted[i]].tolist(), behind[i]][: self.budget - len(row.tokens)]
            ends = [k for k, token in enumerate(new) if token in how.end_ids]
            row.finished = bool(ends)
            new = new[: ends[0] + 1] if ends else new
            row.anchors.append(int(anchors[i]))
            row.committed.append(len(new))
            row.accepted.append(min(accepted[i], len(new)))
            row.sizes.append(size)
            row.log_p.append(found.said[i, : len(new)].cpu())
            row.proposed.append(found.proposed[i, :size].cpu())
            row.log_q.append(found.log_q[i, :size].cpu())
            row.drawn_log_q.append(found.drawn_log_q[i, :size].cpu())
            row.hidden.append(found.hidden[i, :size])
            row.features.append(found.features[i, : len(new)])
            row.tokens += new
            news.append(row.features[-1])
        alive = self._drop_written()
        self._let_drafter_read([news[i] for i in alive])

    def _line(self, anchors: torch.Tensor, tokens: torch.Tensor) -> _Block:
        """A block of every row, read and verified."""
        count = self.how.proposals
        proposed, log_q, drawn_log_q, q = self._propose(anchors, tokens)
        block = torch.cat([tokens[:, None], proposed], 1)
        positions = anchors[:, None] + torch.arange(count + 1, device=self.device)
        hidden, features = self.how.target.read(block, positions, self.cache)
        log_p = self._distribution(hidden)
        verdict = self._verified(log_p, proposed, q)
        # The text is what was accepted and one token behind it; what would stand behind that is of no row.
        accepts = torch.arange(count + 1, device=self.device) < verdict.accepted[:, None]
        padded = torch.nn.functional.pad(proposed, (0, 1))
        said = self._said(log_p, torch.where(accepts, padded, verdict.token[:, None]))
        sizes = [count] * len(anchors)
        return _Block(proposed, log_q, drawn_log_q, sizes, verdict.accepted, verdict.token, said, hidden, features)

    def _of_tree(self, tree: Tree, anchors: torch.Tensor, tokens: torch.Tensor) -> _Block:
        """The line that the target takes through a tree of every row; keys and values of the others are dropped."""
        how, count = self.how, self.how.proposals
        kept, first = self.kept.upto(int(anchors.max())), anchors[:, None]
        block = (kept, self.before[:, None], tokens[:, None], first)
        grown = grow(how.drafter, tree, how.drafts, *block, count, how.target.embed)
        hidden, features = how.target.read(grown.tokens, first + grown.depths, self.cache, grown.seen())
        uniforms = self._uniforms(count + 1).gather(1, grown.depths)
        drawn, said = [], []
        # As many distributions at once as a line has.
        for of_some, some in zip(hidden.split(count + 1, 1), uniforms.split(count + 1, 1), strict=True):
            log_p = self._distribution(of_some)
            drawn.append(self._drawn(log_p, some))
            said.append(self._said(log_p, drawn[-1]))
        own = torch.cat(drawn, 1)
        line = followed(grown, own)
        keep(self.cache, first + line.nodes, first + torch.arange(count + 1, device=self.device))
        rows = torch.arange(len(anchors), device=self.device)[:, None]
        own_of_line, proposals = own[rows, line.nodes], line.nodes[:, 1:]
        log_q = grown.log_q[rows, proposals]
        return _Block(
            grown.tokens[rows, proposals],
            log_q,
            torch.zeros_like(log_q),
            line.sizes.tolist(),
            line.accepted,
            own_of_line.gather(1, line.accepted[:, None])[:, 0],
            torch.cat(said, 1)[rows, line.nodes],
            hidden[rows, line.nodes],
            features[rows, line.nodes],
        )

    def _drop_written(self) -> list[int]:
        """Take rows that have ended out of the batch; the places of the others."""
        alive = [i for i, row in enumerate(self.rows) if not row.finished and len(row.tokens) < self.budget]
        if len(alive) < len(self.rows):
            places = torch.tensor(alive, dtype=torch.int64, device=self.device)
            take_rows(self.cache, places)
            self.kept.take(places)
            self.rows = [self.rows[i] for i in alive]
        return alive

    def _let_drafter_read(self, news: Sequence[torch.Tensor]) -> None:
        """Hand over the features of what stands and the target has read since the last time."""
        if not self.rows:
            return
        how, counts = self.how, [len(new) for new in news]
        most = max(counts)
        dtype = next(how.drafter.parameters()).dtype
        features = torch.stack([torch.nn.functional.pad(new, (0, 0, 0, most - len(new))) for new in news]).to(dtype)
        following, positions = (torch.zeros(len(news), most, dtype=torch.int64) for _ in range(2))
        present = torch.zeros(len(news), most, dtype=torch.bool)
        width = 0
        for i, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            text = torch.cat([row.prompt, torch.tensor(row.tokens)])
            following[i, :count] = text[-count:]
            positions[i, :count] = torch.arange(len(text) - 1 - count, len(text) - 1)
            present[i, :count] = True
            width = max(width, len(text))
        following, positions, present = (x.to(self.device) for x in (following, positions, present))
        new_pairs = how.drafter.read(features, following, positions, how.target.embed)
        self.kept.add(new_pairs, positions, present, width)
        last = torch.tensor([count - 1 for count in counts], device=self.device)
        self.before = features[torch.arange(len(last), device=self.device), last]

    def _propose(
        self, anchors: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`[B, K]` proposals, the drafter's log-probabilities of them at a temperature of 1 and as they were drawn, and
        where they are drawn the probabilities `[B, K, V]` that they were drawn from, over the columns of the target's
        head."""
        how = self.how
        found, log_q, drawn_log_q, all_q = [], [], [], list[torch.Tensor]()
        uniforms = None
        if how.proposing == "drawn" and how.temperature > 0:
            uniforms = torch.stack([torch.rand(how.proposals, generator=row.generator) for row in self.rows])
            uniforms = uniforms.to(self.device)

        def follow(k: int, hidden: torch.Tensor) -> torch.Tensor:
            logits = how.drafts.logits(hidden[:, 0])
            plain = logits.log_softmax(-1)
            if uniforms is None:
                column = chosen(plain)
                drawn_log_q.append(torch.zeros_like(plain[:, 0]))
            else:
                warped = (logits / how.temperature).log_softmax(-1)
                column = chosen(warped, uniforms[:, k - 1])
                drawn_log_q.append(warped.gather(1, column[:, None])[:, 0])
                all_q.append(self._over_written(warped.exp()))
            found.append(how.drafts.vocabulary.named(column))
            log_q.append(plain.gather(1, column[:, None])[:, 0])
            return found[-1][:, None]

        kept = self.kept.upto(int(anchors.max()))
        how.drafter.propose(
            kept, self.before[:, None], tokens[:, None], anchors[:, None], how.proposals, follow, how.target.embed
        )
        of_slots = (torch.stack(each, 1) for each in (found, log_q, drawn_log_q))
        return *of_slots, torch.stack(all_q, 1) if all_q else None  # type: ignore[return-value]  # three of them

    def _over_written(self, q: torch.Tensor) -> torch.Tensor:
        """`[B, V_d]` probabilities of the drafter's ids as `[B, V]` of the target's."""
        own, theirs = self.how.drafts.vocabulary, self.how.written.vocabulary
        ids = own.named(torch.arange(q.shape[1], device=q.device))
        made = q.new_zeros(len(q), self.how.written.size)
        return made.index_add_(1, theirs.columns(ids), q)

    def _distribution(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `[B, n, V]` of `[B, n, D]` hidden states: log-probabilities of the text's next token; at a
        temperature of 0 logits."""
        how = self.how
        logits = how.written.logits(hidden.flatten(0, 1))
        if how.temperature > 0:
            logits = cut(logits / how.temperature, how.top_p, how.top_k).log_softmax(-1)
        return logits.unflatten(0, hidden.shape[:2])

    def _verified(self, log_p: torch.Tensor, proposed: torch.Tensor, q: torch.Tensor | None) -> Verdict:
        how = self.how
        if q is None:
            return agreeing(self._drawn(log_p, self._uniforms(how.proposals + 1)), proposed)
        chances = torch.stack([torch.rand(how.proposals + 1, generator=row.generator) for row in self.rows])
        chances = chances.to(self.device)
        columns = how.written.vocabulary.columns(proposed)
        found = by_ratio(log_p.exp(), q, columns, chances[:, :-1], chances[:, -1])
        return Verdict(found.accepted, how.written.vocabulary.named(found.token))

    def _uniforms(self, n: int) -> torch.Tensor:
        """float32 `[B, n]`: those by which the next n tokens of each row are drawn; beyond the budget, of no row, 0."""
        of_rows = [torch.nn.functional.pad(row.uniforms[len(row.tokens) :][:n], (0, n))[:n] for row in self.rows]
        return torch.stack(of_rows).to(self.device)

    def _drawn(self, log_p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """int64 `[B, n]`: the target's own tokens at n places of each row, by float32 `[B, n]` uniforms."""
        flat = log_p.flatten(0, 1)
        columns = flat.argmax(-1) if self.how.temperature == 0 else inverse_cdf(flat, uniforms.flatten())
        return self.how.written.vocabulary.named(columns).unflatten(0, log_p.shape[:2])

    def _said(self, log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 `[B, n]`: the log-probabilities of int64 `[B, n]` tokens of the text."""
        if self.how.temperature == 0:
            return torch.zeros(tokens.shape, device=self.device)
        return log_p.gather(2, self.how.written.vocabulary.columns(tokens)[:, :, None])[:, :, 0]
