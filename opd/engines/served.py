"""A server writes: the student's ids go out, completions come back, and after each step its weights follow."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from accelerate.utils import gather_object
from pydantic import Field, model_validator

from opd.choice import Choice, nested
from opd.context import Context
from opd.engines.base import Pending, RolloutEngine, Writer
from opd.engines.following import AGAIN, NOT_OURS, PLACE, Follower, Follows, is_first
from opd.engines.segments import SEED, Segments
from opd.errors import RESUME, IncompatibleError, ModelError, RunError
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Engine, Looker, Row, ids_of, same_prompt
from opd.language.engines.in_process import InProcess
from opd.language.tokens import tokens_of
from opd.planning import Shape, bytes_text
from opd.prompts import Prompt
from opd.remote.client import Job, RequestError
from opd.remote.settings import Reached, same_server
from opd.remote.start import look
from opd.remote.writing import (
    Drawn,
    Draws,
    sleep_job,
    wake_job,
    write_job,
)

LAST = 10.0
"""Seconds for which a server is waited for when a run is over."""

T = TypeVar("T")


class ServedEngine(Follows, RolloutEngine):
    """vLLM or `opd serve` writes the completions, over HTTP: ids out, ids and their log-probabilities back. Before each
    rollout the server takes up the student's weights, from a folder or as an adapter, forgets what it had cached, and
    must then score a known text as the student does. Completions that it does not write are in nothing of their step.
    """

    kind: Literal["served"] = "served"
    modality: ClassVar[str | None] = "language"
    overlap: bool = Field(
        False,
        description="Write the next step's completions while this one trains: they are drawn from weights one step old "
        "(train/engine/staleness). shaping truncated_importance corrects for it",
    )
    sleep: bool = Field(
        False,
        description="Have the server give back its memory while the student trains, for one GPU that both share "
        "(vllm serve --enable-sleep-mode)",
    )

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        if self.sleep and self.overlap:
            raise ValueError("sleep and overlap: a server that sleeps while the student trains cannot write; set one")
        return self

    @property
    def behind(self) -> int:
        return int(self.overlap)

    def told(self, student: Shape) -> str:
        adapter = self.weights == "adapter" or (self.weights == "auto" and student.trainable < student.parameters / 10)
        size = student.trainable * student.size if adapter else student.weight_bytes
        return (
            f"{', '.join(self.url)}: completions are asked for over HTTP and take no memory here; after a step the "
            f"server reads {bytes_text(size)} of weights from {self.folder or 'a temporary folder'}"
        )

    def build(self, language: Engine, context: Context) -> ServedWriter:
        if not isinstance(language, InProcess):
            raise ModelError(f"{PLACE}: the student is no model in this process, so there are no weights to send")
        return ServedWriter(self, language, context)


class Wrote(NamedTuple):
    """Rows, and whether the weights that wrote them were others than those that were sent."""

    rows: list[Row]
    other: bool


class ServedWriter(Writer):
    """The built engine.

    Raises:
        ModelError: a server cannot be reached, or cannot take up weights.
    """

    def __init__(self, settings: ServedEngine, language: InProcess, context: Context):
        if language.reads_pictures:
            raise IncompatibleError(
                f"{PLACE}: a server is sent the ids of prompts, and {language.owner} reads pictures too; leave out "
                f"{PLACE}: it writes in this process then"
            )
        self.settings, self.language = settings, language
        self.stale, self.ahead = settings.behind, settings.overlap
        self.client = settings.client(context.seed)
        self.failed: Counter[str] = Counter()
        self.measured: dict[str, float] = {}
        # Who cannot be used keeps no thread.
        with ExitStack() as opened:
            opened.callback(self.client.close)
            self.follower = Follower(settings, language, self.client, self.dtype, self._add)
            self.follower.meet([look(self.client, url, "auto", settings.model, PLACE) for url in settings.url])
            opened.pop_all()
        self.notes = [*settings.told_of_key(), *self.follower.notes]
        self._processed: bool | None = None
        self._thread = ThreadPoolExecutor(1, "opd-ahead")
        self._begun: tuple[Pending, str | None, Future[Wrote]] | None = None
        # A run that was killed may have left it asleep; one that is awake takes no harm.
        self._asleep = settings.sleep

    # -- at the start ----------------------------------------------------------------------------------------------

    def check_teachers(self, teachers: Sequence[Choice]) -> None:
        for part in nested(list(teachers)):
            if self.follower.adapter or not isinstance(part, Reached):
                continue
            own = {same_server(url) for url in self.settings.url}
            if shared := [url for url in part.url if same_server(url) in own]:
                raise IncompatibleError(
                    f"{PLACE} and a teacher are at one server, {shared[0]}: it takes up the student's weights, so "
                    "the teacher would be the student; serve the teacher at another port"
                )

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        for prompt in prompts:
            length, longest = len(self.language.encode(prompt)), self.follower.longest
            if longest is not None and length + budget > longest:
                raise ModelError(
                    f"{PLACE}: the server takes texts of {longest} tokens, and {prompt.where} has {length} with a "
                    f"completion up to {budget}: start it with --max-model-len {length + budget}, or shorten "
                    "rollout.max_new_tokens (and evaluation.max_new_tokens)"
                )

    # -- writing ---------------------------------------------------------------------------------------------------

    def renew(self, anew: bool = False) -> None:
        """Bring every replica to the student's weights as they are now, when nothing is written any more."""
        self._wait()
        self._wake()
        self.follower.renew(anew)

    def begin(self, asked: Pending) -> None:
        self.renew()
        self._begun = (asked, self.follower.marked(), self._thread.submit(self._written, asked))

    def sample(
        self,
        contexts: Sequence[EncodedPrompt],
        group: int,
        budget: int,
        seeds: Sequence[int],
        drawing: Drawing,
        looker: Looker | None = None,
        ended: Ended | None = None,
    ) -> list[Row]:
        asked = Pending(contexts, group, budget, seeds, drawing, ended)
        self._check_cuts(drawing)
        found = self._taken(asked) if looker is None else None
        for _ in range(AGAIN + 1):
            if found is None:
                self.renew()
                found = self._written(asked, looker)
            if not any(gather_object([found.other])):
                break
            self._add("engine/rewritten", len(seeds))
            found = None
            self.renew(anew=True)
        else:
            raise RunError(f"{PLACE}: {NOT_OURS} and go on with {RESUME}")
        assert found is not None
        self._sleep()
        self._add("engine/retried", self.client.retried)
        self.client.retried = 0
        return found.rows

    def _taken(self, asked: Pending) -> Wrote | None:
        """What was begun before, if it is this."""
        if self._begun is None or not _same(self._begun[0], asked):
            # Weights may follow only when nothing is written any more; a held-out rollout leaves it in its place.
            return None
        (_, mark, future), self._begun = self._begun, None
        begun = time.perf_counter()
        found = future.result()
        self._add("engine/waited", time.perf_counter() - begun)
        moved = self.follower.marked() != mark
        self._add("engine/staleness", int(moved))
        return found

    def _wait(self) -> None:
        """Until nothing is written any more."""
        if self._begun is not None:
            self._begun[2].exception()

    def _written(self, asked: Pending, looker: Looker | None = None) -> Wrote:
        """All rows, from whatever weights the server has; reads the student in no way, so a thread may do it."""
        starts = [ids_of(context).tolist() for context in asked.contexts for _ in range(asked.group)]
        if looker is None:
            rows = [LOST] * len(starts)

            def told(place: int, found: Drawn | RequestError) -> None:
                rows[place] = self.row_of(found, asked.drawing)
                if asked.ended is not None and not rows[place].lost:
                    asked.ended(place, rows[place])

            self.ask_for(starts, [asked.budget] * len(starts), asked.seeds, asked.drawing, 0, told)
        else:
            rows = Segments(self, asked, starts, looker).rows()
            if asked.ended is not None:
                for place in (i for i, row in enumerate(rows) if not row.lost):
                    asked.ended(place, rows[place])
        return Wrote(rows, not self.follower.still())

    def ask_for(
        self,
        texts: Sequence[list[int]],
        budgets: Sequence[int],
        seeds: Sequence[int],
        drawing: Drawing,
        k: int,
        told: Callable[[int, Drawn | RequestError], None] | None = None,
    ) -> list[Drawn | RequestError]:
        """One completion of each text, and the `k` likeliest ids at its states; `told` hears of each as it comes."""
        ends = tokens_of(drawing.context).end_ids
        draws = Draws(drawing.context.temperature, drawing.top_p, drawing.top_k, tuple(ends))
        return self.client.ask_all(
            [
                write_job(self.follower.model, ids, budget, seed % SEED, draws, k)
                for ids, budget, seed in zip(texts, budgets, seeds, strict=True)
            ],
            told,
        )

    def row_of(self, found: Drawn | RequestError, drawing: Drawing) -> Row:
        """What was written as a row, `lost` where it cannot be used; why is counted."""
        problem = found if isinstance(found, RequestError) else self._outside(found, drawing)
        if problem is not None:
            self.failed[f"writing: {problem.reason}"] += 1
            return LOST
        assert isinstance(found, Drawn)
        return Row(found.actions, found.log_probs, found.finished)

    def _outside(self, found: Drawn, drawing: Drawing) -> RequestError | None:
        if bool(tokens_of(drawing.context).vocabulary.outside(found.actions).any()):
            return RequestError("ids that no teacher has", "among those that it drew")
        return None

    def _check_cuts(self, drawing: Drawing) -> None:
        """Refuse a server whose log-probabilities are not those of what it draws from."""
        if drawing.context.temperature == 1.0 and drawing.top_p == 1.0 and drawing.top_k == 0:
            return
        if self._processed is None:
            self.renew()
            self._processed = self.follower.agreed(self._says_what_it_draws_from())
            self._sleep()
        if not self._processed:
            raise RunError(
                f"{PLACE}: the server says log-probabilities of temperature 1 without cuts, and temperature, top_p or "
                "top_k are set: start vLLM with --logprobs-mode processed_logprobs"
            )

    def _says_what_it_draws_from(self) -> bool:
        ids = self.follower.probe()
        # Of one id alone everything is 1; the first token of a text is never as sure as that.
        draws = Draws(1.0, 1.0, 1, ())
        said = [
            self.follower.must(write_job(self.follower.model, ids[:1], 1, 0, draws), url).log_probs
            for url in self.settings.url
        ]
        return all(float(each[0]) > -1e-3 for each in said)

    # -- memory of one GPU -----------------------------------------------------------------------------------------

    def _sleep(self) -> None:
        if not self.settings.sleep or self._asleep:
            return
        self._of_all(sleep_job())
        self._asleep = True

    def _wake(self) -> None:
        if not self._asleep:
            return
        self._of_all(wake_job())
        self._asleep = False

    def _of_all(self, job: Job[None]) -> None:
        problem = None
        for url in self.settings.url if is_first() else ():
            found = self.follower.asked(job, url)
            if isinstance(found, RequestError):
                problem = (
                    f"{PLACE}.sleep: {url}{job.path} did not answer as it must ({found}): start vLLM with "
                    "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or leave sleep out"
                )
        problems = [each for each in gather_object([problem]) if each is not None]
        if problems:
            raise RunError(problems[0])

    # -- what is said of it ----------------------------------------------------------------------------------------

    def failures(self) -> Mapping[str, int]:
        return dict(self.failed)

    def own_signals(self) -> Mapping[str, float]:
        found, self.measured = self.measured, {}
        if found.get("engine/pushes"):
            found["engine/score_gap"] = self.follower.score_gap
        return {"engine/staleness": 0.0, **found} if self.settings.overlap else found

    def _add(self, name: str, value: float) -> None:
        self.measured[name] = self.measured.get(name, 0.0) + value

    def close(self) -> None:
        # What is being written ahead is wanted no more; whoever waits for it hears that.
        self.client.close()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._begun = None
        # A server that is gone is not waited for.
        self.client.retries, self.client.timeout = 0, min(self.client.timeout, LAST)
        for url in self.settings.url if is_first() and self._asleep else ():
            self.follower.asked(wake_job(), url)
        self._asleep = False
        self.follower.close()
        self.client.close()


LOST = Row(torch.zeros(0, dtype=torch.int64), torch.zeros(0), finished=False, lost=True)
"""A row that nobody wrote."""


def _same(a: Pending, b: Pending) -> bool:
    """Whether the same is asked for."""
    if (a.group, a.budget, list(a.seeds), len(a.contexts)) != (b.group, b.budget, list(b.seeds), len(b.contexts)):
        return False
    ways = [(d.context.temperature, d.top_p, d.top_k, tokens_of(d.context)) for d in (a.drawing, b.drawing)]
    return ways[0] == ways[1] and all(same_prompt(x, y) for x, y in zip(a.contexts, b.contexts, strict=True))
