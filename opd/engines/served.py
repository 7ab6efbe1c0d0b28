"""A server writes: the student's ids go out, completions come back, and after each step its weights follow."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from accelerate.utils import gather_object
from pydantic import Field, model_validator
from safetensors import SafetensorError

from opd import sharding
from opd.choice import Choice, nested
from opd.context import Context
from opd.distributions import TopK
from opd.engines.base import Pending, RolloutEngine, Writer
from opd.errors import RESUME, IncompatibleError, ModelError, OpdError, RunError
from opd.files.whole import told as in_a_line
from opd.language.engines.base import Drawing, EncodedPrompt, Ended, Engine, Looker, Row, Written, ids_of, same_prompt
from opd.language.engines.in_process import InProcess
from opd.language.identity import PROBE
from opd.language.own_outputs import TOLERANCE
from opd.language.saving import is_adapted, merged, write_weights
from opd.language.tokens import tokens_of
from opd.planning import Shape, bytes_text
from opd.prompts import Prompt
from opd.remote.client import Job, RequestError
from opd.remote.settings import Reached, same_server
from opd.remote.start import look, refused
from opd.remote.writing import (
    Drawn,
    Draws,
    label_job,
    labelled_job,
    load_job,
    names_job,
    reload_job,
    reset_job,
    sleep_job,
    unload_job,
    wake_job,
    write_job,
)
from opd.weights import contents, present

PLACE = "rollout.engine"

PROBED = 32
"""Tokens that are written behind a known text, to see what writes."""

AGAIN = 2
"""How often rows are written anew when the weights that wrote them were not those that were sent."""

NOT_OURS = (
    f"the weights that wrote are not those that were sent, {AGAIN + 1} times: the server is started anew again and "
    "again, or another run sends it weights; give each run its own"
)

UNKNOWN = "opd-none"
"""Name of weights that are on their way."""

LAST = 10.0
"""Seconds for which a server is waited for when a run is over."""

SEED = 2**63
"""Seeds are below it."""

T = TypeVar("T")


class OtherWeightsError(Exception):
    """A server has lost what was sent to it a moment ago."""


class ServedEngine(Reached, RolloutEngine):
    """vLLM or `opd serve` writes the completions, over HTTP: ids out, ids and their log-probabilities back. Before each
    rollout the server takes up the student's weights, from a folder or as an adapter, forgets what it had cached, and
    must then score a known text as the student does. Completions that it does not write are in nothing of their step.
    """

    kind: Literal["served"] = "served"
    modality: ClassVar[str | None] = "language"
    place: ClassVar[str] = PLACE
    weights: Literal["auto", "folder", "adapter"] = Field(
        "auto",
        description="What the server is sent after a step: all weights, or a LoRA adapter; auto: the adapter where the "
        "student has one",
    )
    folder: Path | None = Field(
        None, description="Where weights are written for the server to read; default a temporary folder of this machine"
    )
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
        self.settings, self.language = settings, language
        self.stale, self.ahead = settings.behind, settings.overlap
        self.client = settings.client(context.seed)
        self.notes = settings.told_of_key()
        self.failed: Counter[str] = Counter()
        self.measured: dict[str, float] = {}
        # Who cannot be used keeps no thread.
        with ExitStack() as opened:
            opened.callback(self.client.close)
            self.adapter = self._sends_adapter()
            self.found = [look(self.client, url, "auto", settings.model, PLACE) for url in settings.url]
            self._labels = self._can_label()
            opened.pop_all()
        lengths = [each.longest for each in self.found if each.longest is not None]
        self.longest = min(lengths, default=None)
        self.base = self.found[0].model
        self._made = tempfile.TemporaryDirectory(prefix="opd-weights-") if settings.folder is None else None
        self.folder = Path(self._made.name) if self._made is not None else self._own_folder()
        self._mark: str | None = None
        self._sent: str | None = None
        self._loaded: str | None = None
        self._processed: bool | None = None
        self._thread = ThreadPoolExecutor(1, "opd-ahead")
        self._begun: tuple[Pending, str | None, Future[Wrote]] | None = None
        # A run that was killed may have left it asleep; one that is awake takes no harm.
        self._asleep = settings.sleep

    # -- at the start ----------------------------------------------------------------------------------------------

    def _sends_adapter(self) -> bool:
        adapted = is_adapted(self.language.model)
        if self.settings.weights == "adapter" and not adapted:
            raise ModelError(f"{PLACE}.weights is adapter, and the student has none: set student.lora, or take folder")
        if self.settings.weights == "folder" and adapted and sharding.plugin() is not None:
            raise ModelError(
                f"{PLACE}.weights is folder: with FSDP2 adapters are not merged while they train; leave it out"
            )
        return adapted and self.settings.weights != "folder"

    def _own_folder(self) -> Path:
        assert self.settings.folder is not None
        folder = self.settings.folder.resolve() / f"opd-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"{PLACE}.folder {self.settings.folder}: {error.strerror}; name one to write to") from None
        return folder

    def _can_label(self) -> bool:
        """Whether every replica names its weights; that of an adapter is its name."""
        if self.adapter:
            return True
        if not all(self._has_label(url) for url in self.settings.url):
            self.notes = [
                *self.notes,
                f"{PLACE}: the server does not name its weights (/weight_info), so one that is started anew is told by "
                "its scores alone; start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1",
            ]
            return False
        return True

    def _has_label(self, url: str, label: str | None = None) -> bool:
        """Whether a replica says how its weights are named, and that they are named so."""
        found: str | RequestError = self._asked(labelled_job(), url)
        return not isinstance(found, RequestError) and label in (None, found)

    def _has_adapter(self, url: str) -> bool:
        names: list[str] | RequestError = self._asked(names_job(), url)
        return not isinstance(names, RequestError) and self.label in names

    def check_teachers(self, teachers: Sequence[Choice]) -> None:
        for part in nested(list(teachers)):
            if self.adapter or not isinstance(part, Reached):
                continue
            own = {same_server(url) for url in self.settings.url}
            if shared := [url for url in part.url if same_server(url) in own]:
                raise IncompatibleError(
                    f"{PLACE} and a teacher are at one server, {shared[0]}: it takes up the student's weights, so "
                    "the teacher would be the student; serve the teacher at another port"
                )

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> None:
        for prompt in prompts:
            length = len(self.language.encode(prompt))
            if self.longest is not None and length + budget > self.longest:
                raise ModelError(
                    f"{PLACE}: the server takes texts of {self.longest} tokens, and {prompt.where} has {length} with a "
                    f"completion up to {budget}: start it with --max-model-len {length + budget}, or shorten "
                    "rollout.max_new_tokens (and evaluation.max_new_tokens)"
                )

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Of the weights that were sent last, made of what they are: other runs may send theirs to a server that this
        one thinks is its own, and workers that send the same may share one."""
        return f"opd-{(self._mark or '')[:16]}"

    def _marked(self) -> str:
        """What the student's weights are now."""
        return contents(present(self.language).items())

    @property
    def model(self) -> str:
        """What requests ask for."""
        return self.label if self.adapter else self.base

    def renew(self, anew: bool = False) -> None:
        """Bring every replica to the student's weights as they are now, unless it has them; `anew`: in any case."""
        self._wait()
        self._wake()
        going_on, self._mark = self._mark is not None, self._marked()
        # What a step changes is less than rounding, so of a server that names nothing only what was sent is known.
        known = self._labels or self._sent == self._mark
        if not anew and known and self._agreed(_is_first() and self._holds()):
            return
        begun = time.perf_counter()
        problem: Exception | None = None
        if _is_first():
            try:
                self._push_until_held()
            except (OSError, SafetensorError) as error:
                problem = RunError(
                    f"{PLACE}: the weights cannot be written to {self.folder} ({in_a_line(error)}); free some space, "
                    f"or name another place in {PLACE}.folder"
                )
            except Exception as error:
                # The others wait to hear how it went.
                problem = error
        said = None if problem is None else str(problem) if isinstance(problem, OpdError) else in_a_line(problem)
        problems = [each for each in gather_object([said]) if each is not None]
        if problem is not None and not isinstance(problem, OpdError):
            raise problem
        if problems:
            raise RunError(f"{problems[0]}. What was trained goes on with {RESUME}" if going_on else problems[0])
        self._sent = self._mark
        self._add("engine/push_seconds", time.perf_counter() - begun)
        self._add("engine/pushes", 1)

    def _holds(self) -> bool:
        """Whether every replica has what was sent last, as far as it says so."""
        if self.adapter:
            return all(self._has_adapter(url) for url in self.settings.url)
        if self._labels:
            return all(self._has_label(url, self.label) for url in self.settings.url)
        # Weights of the step before score alike too, up to rounding.
        return self._sent == self._mark and self._scores_alike()

    def _push_until_held(self) -> None:
        for _ in range(AGAIN + 1):
            try:
                return self._push()
            except OtherWeightsError:
                continue
        raise RunError(f"{PLACE}: {NOT_OURS}")

    def _push(self) -> None:
        """Write the weights, have every replica read them, and compare scores of a text."""
        # A server that reads files elsewhere must find the same path.
        folder = self.folder / self.label
        model = self.language.model
        if self.adapter:
            model.save_pretrained(str(folder), state_dict=present(model))
        elif is_adapted(model):
            write_weights(folder, merged(model))
        else:
            write_weights(folder, self.language.base, present(self.language.base))
        for url in self.settings.url:
            if self.adapter:
                if not self._has_adapter(url):
                    found = self._asked(load_job(self.label, str(folder)), url)
                    # A second try after one that was answered too late is refused, since the name is there.
                    if isinstance(found, RequestError) and not self._has_adapter(url):
                        raise self._refusal(found, url)
                if self._loaded not in (None, self.label):
                    self._asked(unload_job(str(self._loaded)), url)
            else:
                if self._labels:
                    # The name of weights that are being replaced stays with vLLM, and whoever comes after an end in
                    # between would believe it.
                    self._must(label_job(UNKNOWN), url)
                self._must(reload_job(str(folder)), url)
                self._must(reset_job(), url)
                if self._labels:
                    self._must(label_job(self.label), url)
        if not self._scores_alike():
            if not self._holds():
                # It was started anew meanwhile, or somebody else sent it weights.
                raise OtherWeightsError
            raise ModelError(
                f"{PLACE}: after it took up the student's weights the server draws from something else, by "
                f"{self.measured['engine/score_gap']:.2g} nats at half of the tokens: it serves another model "
                f"({self.base}), or quantised; serve the student's own"
            )
        self._loaded, self._sent = self.label, self._mark
        # An adapter is read again where a server drops and loads it.
        for old in self.folder.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def _scores_alike(self) -> bool:
        """Whether every replica draws from what the student computes, up to rounding: it writes a few tokens behind a
        known text, and says how likely they were."""
        ids, worst = self._probe(), 0.0
        count = PROBED if self.longest is None else max(1, min(PROBED, self.longest - len(ids)))
        for url in self.settings.url:
            found = self._must(write_job(self.model, ids, count, 0, Draws(1.0, 1.0, 0, ())), url)
            with torch.no_grad(), self.language.quiet():
                hidden = self.language([torch.tensor(ids)], [found.actions])
                log_probs = torch.log_softmax(self.language.head(1.0).detach().logits(hidden), -1).cpu()
            own = log_probs.gather(1, found.actions[:, None]).squeeze(1)
            # Rounding may be far off at a single token, another model at most of them.
            gap = float((found.log_probs - own).abs().median())
            worst = max(worst, gap if gap == gap else math.inf)
        self.measured["engine/score_gap"] = worst
        return worst <= TOLERANCE[self.dtype]

    def _probe(self) -> list[int]:
        return list(self.language.tokenizer(PROBE, add_special_tokens=False)["input_ids"])

    def _must(self, job: Job[T], url: str) -> T:
        found = self._asked(job, url)
        if not isinstance(found, RequestError):
            return found
        raise self._refusal(found, url)

    def _refusal(self, found: RequestError, url: str) -> ModelError:
        """What is said of a server that cannot be used, with the way out."""
        if found.status in (404, 405) and self.adapter:
            rank = getattr(self.language.model.peft_config.get("default"), "r", 16)
            return ModelError(
                f"{PLACE}: {url} takes up no adapters ({found}): start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
                f"and --enable-lora --max-lora-rank {rank}, or set weights: folder"
            )
        if found.status in (404, 405):
            return ModelError(
                f"{PLACE}: {url} takes up no weights ({found}): start vLLM with VLLM_SERVER_DEV_MODE=1, or opd serve "
                "with --follow"
            )
        if found.again:
            return refused(url, found, place=PLACE)
        return ModelError(
            f"{PLACE}: {url} did not take up the student's weights ({found}): it must serve the student's own model "
            f"and see {self.folder} (folder sets another place)"
        )

    def _asked(self, job: Job[T], url: str) -> T | RequestError:
        try:
            return self.client.ask(job, url)
        except RequestError as error:
            return error

    def _agreed(self, yes: bool) -> bool:
        """What the first process found, in all of them."""
        return bool(gather_object([yes])[0])

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, asked: Pending) -> None:
        self.renew()
        self._begun = (asked, self._mark, self._thread.submit(self._written, asked))

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
        moved = self._marked() != mark
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
                rows[place] = self._row(found, asked.drawing)
                if asked.ended is not None and not rows[place].lost:
                    asked.ended(place, rows[place])

            self._ask_for(starts, [asked.budget] * len(starts), asked.seeds, asked.drawing, 0, told)
        else:
            rows = Segments(self, asked, starts, looker).rows()
            if asked.ended is not None:
                for place in (i for i, row in enumerate(rows) if not row.lost):
                    asked.ended(place, rows[place])
        return Wrote(rows, not self._still())

    def _still(self) -> bool:
        """Whether the server has what was sent to it; one that does not say so was asked for scores before."""
        return not self._labels or self._holds()

    def _ask_for(
        self,
        texts: Sequence[list[int]],
        budgets: Sequence[int],
        seeds: Sequence[int],
        drawing: Drawing,
        k: int,
        told: Callable[[int, Drawn | RequestError], None] | None = None,
    ) -> list[Drawn | RequestError]:
        ends = tokens_of(drawing.context).end_ids
        draws = Draws(drawing.context.temperature, drawing.top_p, drawing.top_k, tuple(ends))
        return self.client.ask_all(
            [
                write_job(self.model, ids, budget, seed % SEED, draws, k)
                for ids, budget, seed in zip(texts, budgets, seeds, strict=True)
            ],
            told,
        )

    def _row(self, found: Drawn | RequestError, drawing: Drawing) -> Row:
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
            self._processed = self._agreed(self._says_what_it_draws_from())
            self._sleep()
        if not self._processed:
            raise RunError(
                f"{PLACE}: the server says log-probabilities of temperature 1 without cuts, and temperature, top_p or "
                "top_k are set: start vLLM with --logprobs-mode processed_logprobs"
            )

    def _says_what_it_draws_from(self) -> bool:
        ids = self._probe()
        # Of one id alone everything is 1; the first token of a text is never as sure as that.
        draws = Draws(1.0, 1.0, 1, ())
        said = [self._must(write_job(self.model, ids[:1], 1, 0, draws), url).log_probs for url in self.settings.url]
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
        for url in self.settings.url if _is_first() else ():
            found = self._asked(job, url)
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
        loaded, self._loaded = self._loaded, None
        for url in self.settings.url if _is_first() else ():
            if self._asleep:
                self._asked(wake_job(), url)
            if loaded is not None and self.adapter:
                self._asked(unload_job(loaded), url)
        self._asleep = False
        self.client.close()
        if self._made is not None:
            self._made.cleanup()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


LOST = Row(torch.zeros(0, dtype=torch.int64), torch.zeros(0), finished=False, lost=True)
"""A row that nobody wrote."""


class Segments:
    """Rows that are written a segment at a time, so that somebody may look at them in between and end some: each
    segment is a request that goes on from what was written, of which the server has kept the keys and values."""

    def __init__(self, writer: ServedWriter, asked: Pending, starts: Sequence[list[int]], looker: Looker):
        self.writer, self.asked, self.starts, self.looker = writer, asked, starts, looker
        count = len(starts)
        self.actions = [torch.zeros(0, dtype=torch.int64)] * count
        self.log_probs = [torch.zeros(0)] * count
        k = looker.candidates
        self.ids = [torch.zeros(0, k, dtype=torch.int64)] * count
        self.top = [torch.zeros(0, k)] * count
        self.finished, self.lost = [False] * count, [False] * count
        self.stopped: dict[int, str] = {}

    def rows(self) -> list[Row]:
        look, turn = self.looker.begin(self._seen()), 0
        while going := self._going():
            length = min(self.looker.segment, self.asked.budget - len(self.actions[going[0]]))
            texts = [self.starts[i] + self.actions[i].tolist() for i in going]
            # A row's segments have seeds of their own that follow from the row's.
            seeds = [(self.asked.seeds[i] + turn * 0x9E3779B97F4A7C15) % SEED for i in going]
            k = self.looker.candidates
            answers = self.writer._ask_for(texts, [length] * len(going), seeds, self.asked.drawing, k)
            for i, found in zip(going, answers, strict=True):
                self._take(i, found)
            turn += 1
            if self._going():
                self.stopped |= look.look(self._seen())
        look.end(self._seen())
        return [
            Row(actions, log_probs, finished, self.stopped.get(i), lost)
            for i, (actions, log_probs, finished, lost) in enumerate(
                zip(self.actions, self.log_probs, self.finished, self.lost, strict=True)
            )
        ]

    def _take(self, i: int, found: Drawn | RequestError) -> None:
        row = self.writer._row(found, self.asked.drawing)
        if row.lost:
            self.lost[i] = True
            return
        assert isinstance(found, Drawn)
        self.actions[i] = torch.cat([self.actions[i], found.actions])
        self.log_probs[i] = torch.cat([self.log_probs[i], found.log_probs])
        self.ids[i], self.top[i] = torch.cat([self.ids[i], found.ids]), torch.cat([self.top[i], found.top])
        self.finished[i] = found.finished

    def _going(self) -> list[int]:
        return [
            i
            for i in range(len(self.starts))
            if not (self.finished[i] or self.lost[i] or i in self.stopped) and len(self.actions[i]) < self.asked.budget
        ]

    def _seen(self) -> Written:
        candidates = [TopK(top, ids) for top, ids in zip(self.top, self.ids, strict=True)]
        rows = list(range(len(self.starts)))
        return Written(rows, self.actions, self.log_probs, self._going(), candidates if self.looker.candidates else ())


def _same(a: Pending, b: Pending) -> bool:
    """Whether the same is asked for."""
    if (a.group, a.budget, list(a.seeds), len(a.contexts)) != (b.group, b.budget, list(b.seeds), len(b.contexts)):
        return False
    ways = [(d.context.temperature, d.top_p, d.top_k, tokens_of(d.context)) for d in (a.drawing, b.drawing)]
    return ways[0] == ways[1] and all(same_prompt(x, y) for x, y in zip(a.contexts, b.contexts, strict=True))


def _is_first() -> bool:
    """Whether this is the process that sends weights for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
