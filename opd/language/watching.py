"""Between an engine that writes rows and a watch that knows prompts: whose rows they are, and what was found."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from opd.context import Context
from opd.distributions.target import joined_targets
from opd.errors import RunError
from opd.language.engines.base import EncodedPrompt, Look, Looker, Written
from opd.prompts import Prompt
from opd.trajectories import Trajectories
from opd.watches import Findings, LiveWatch, Rows, Watch

SEGMENT = 32
"""Tokens between two looks, unless the recipe says otherwise."""


class Watching(Looker):
    """One rollout under a watch.

    Args:
        settings, context: of the step, as `Rows` has them.
        segment: tokens between two looks.
        prompts, contexts, begun: of each of the B rows, as `Rows` has them.
    """

    def __init__(
        self,
        watch: LiveWatch,
        settings: Watch,
        context: Context,
        segment: int,
        prompts: Sequence[Prompt],
        contexts: Sequence[EncodedPrompt],
        begun: Sequence[torch.Tensor],
    ):
        self.watch, self.settings, self.context, self.segment = watch, settings, context, segment
        self.prompts, self.contexts, self.begun = prompts, contexts, begun
        self.candidates = watch.candidates
        self.found: list[tuple[Sequence[int], Findings]] = []

    def begin(self, written: Written) -> Look:
        watch = copy.copy(self.watch)
        watch.begin(self.rows(written))
        return WatchedBatch(self, watch)

    def kept(self, trajectories: Trajectories) -> Trajectories:
        """The rollout's trajectories with all that was found."""
        owned = torch.split(torch.arange(trajectories.positions), trajectories.lengths.tolist())
        # A batch's rows stand in the order in which they were written, which is that of their prompts' lengths.
        places = [torch.cat([owned[row] for row in rows]) for rows, _ in self.found]
        order = torch.cat(places).argsort()
        columns: dict[str, torch.Tensor] = {}
        for name in self.found[0][1].columns:
            column = torch.cat([findings.columns[name] for _, findings in self.found])
            columns[name] = column[order.to(column.device)]
        said = [
            [target.select(mine.argsort()) for target in findings.answers or ()]
            for mine, (_, findings) in zip(places, self.found, strict=True)
        ]
        sorted_places = [mine.sort().values for mine in places]
        answers = tuple(joined_targets(list(of_one), sorted_places) for of_one in zip(*said, strict=True))
        return replace(trajectories, columns={**trajectories.columns, **columns}, answers=answers or None)

    def rows(self, written: Written) -> Rows:
        """A batch as a watch sees it."""
        own = written.rows
        return Rows(
            settings=self.settings,
            context=self.context,
            prompts=[self.prompts[row] for row in own],
            contexts=[self.contexts[row] for row in own],
            begun=[self.begun[row] for row in own],
            actions=written.actions,
            log_probs=written.log_probs,
            going=written.going,
            candidates=written.candidates,
        )


class WatchedBatch(Look):
    """One batch, under a copy of the watch that is its own."""

    def __init__(self, watching: Watching, watch: LiveWatch):
        self.watching, self.watch = watching, watch

    def look(self, written: Written) -> Mapping[int, str]:
        return self.watch.look(self.watching.rows(written))

    def end(self, written: Written) -> None:
        findings = self.watch.end(self.watching.rows(written))
        positions = sum(len(actions) for actions in written.actions)
        held = {name: len(column) for name, column in findings.columns.items()}
        held |= {f"answer of teacher {t.teacher!r}": len(t.distribution) for t in findings.answers or ()}
        wrong = next((name for name, count in held.items() if count != positions), None)
        if wrong is not None:
            kind = self.watching.settings.model_dump()["kind"]
            raise RunError(
                f"rollout.watch {kind!r} keeps {held[wrong]} entries of {wrong} for {positions} positions; it has to "
                "keep one for each"
            )
        self.watching.found.append((written.rows, findings))
