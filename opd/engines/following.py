"""Weights on a server that follow a student's: how they are sent and named, and how it is known that they are there."""

from __future__ import annotations

import math
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from accelerate.utils import gather_object
from pydantic import Field
from safetensors import SafetensorError

from opd import sharding
from opd.errors import RESUME, ModelError, OpdError, RunError
from opd.files.ours import entries
from opd.files.whole import told as in_a_line
from opd.language.engines.in_process import InProcess
from opd.language.identity import PROBE
from opd.language.own_outputs import ELSEWHERE, TOLERANCE
from opd.language.saving import is_adapted, merged, write_weights
from opd.remote.client import Client, Job, RequestError
from opd.remote.settings import Reached
from opd.remote.start import Found, refused
from opd.remote.writing import (
    Draws,
    label_job,
    labelled_job,
    load_job,
    names_job,
    reload_job,
    reset_job,
    unload_job,
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

T = TypeVar("T")


class OtherWeightsError(Exception):
    """A server has lost what was sent to it a moment ago."""


class Follows(Reached):
    """A server that takes up a student's weights."""

    place: ClassVar[str] = PLACE
    weights: Literal["auto", "folder", "adapter"] = Field(
        "auto",
        description="What the server is sent after a step: all weights, or a LoRA adapter; auto: the adapter where the "
        "student has one",
    )
    folder: Path | None = Field(
        None, description="Where weights are written for the server to read; default a temporary folder of this machine"
    )


class Follower:
    """The replicas of a server, whose weights follow those of `language`.

    Args:
        dtype: what they are taken to compute in.
        measure: adds to what is measured, by name.

    Attributes:
        adapter: whether an adapter is sent; else all weights.
        labels: whether every replica says how its weights are named.
        longest: tokens of a text, where replicas say so.
        score_gap: median distance in nats of the last text that was written behind a known one.

    Raises:
        ModelError: the student has not what the settings want sent.
    """

    def __init__(
        self,
        settings: Follows,
        language: InProcess,
        client: Client,
        dtype: torch.dtype,
        measure: Callable[[str, float], None],
    ):
        self.settings, self.language, self.client = settings, language, client
        self.dtype, self.measure = dtype, measure
        self.notes: list[str] = []
        self.score_gap = math.nan
        self.adapter = self._sends_adapter()
        self.found: Sequence[Found] = ()
        self.labels = False
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._mark: str | None = None
        self._sent: str | None = None
        self._loaded: str | None = None
        self._written: dict[Path, set[str]] = {}
        """Folders of weights, and what was written into each."""

    def meet(self, found: Sequence[Found]) -> None:
        """Find out what the replicas can do, each as it was looked at, and make a place for weights.

        Raises:
            ModelError: nothing can be written there.
        """
        self.found, self.base = found, found[0].model
        self.longest = min((each.longest for each in found if each.longest is not None), default=None)
        self.labels = self._can_label()
        self._made = tempfile.TemporaryDirectory(prefix="opd-weights-") if self.settings.folder is None else None
        self.folder = Path(self._made.name) if self._made is not None else self._own_folder()

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
            folder.mkdir(parents=True)
        except OSError as error:
            raise ModelError(f"{PLACE}.folder {self.settings.folder}: {error.strerror}; name one to write to") from None
        return folder

    def _can_label(self) -> bool:
        """Whether every replica names its weights; that of an adapter is its name."""
        if self.adapter:
            return True
        if not all(self._has_label(url) for url in self.settings.url):
            self.notes = [
                f"{PLACE}: the server does not name its weights (/weight_info), so one that is started anew is told by "
                "its scores alone; start vLLM 0.32 or newer with VLLM_SERVER_DEV_MODE=1",
            ]
            return False
        return True

    def _has_label(self, url: str, label: str | None = None) -> bool:
        """Whether a replica says how its weights are named, and that they are named so."""
        found: str | RequestError = self.asked(labelled_job(), url)
        return not isinstance(found, RequestError) and label in (None, found)

    def _has_adapter(self, url: str) -> bool:
        names: list[str] | RequestError = self.asked(names_job(), url)
        return not isinstance(names, RequestError) and self.label in names

    @property
    def label(self) -> str:
        """Of the weights that were sent last, made of what they are: other runs may send theirs to a server that this
        one thinks is its own, and workers that send the same may share one."""
        return f"opd-{(self._mark or '')[:16]}"

    def marked(self) -> str:
        """What the student's weights are now."""
        return contents(present(self.language).items())

    @property
    def model(self) -> str:
        """What requests ask for."""
        return self.label if self.adapter else self.base

    def renew(self, anew: bool = False) -> None:
        """Bring every replica to the student's weights as they are now, unless it has them; `anew`: in any case."""
        going_on, self._mark = self._mark is not None, self.marked()
        # What a step changes is less than rounding, so of a server that names nothing only what was sent is known.
        known = self.labels or self._sent == self._mark
        if not anew and known and self.agreed(is_first() and self.holds()):
            return
        begun = time.perf_counter()
        problem: Exception | None = None
        if is_first():
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
        self.measure("engine/push_seconds", time.perf_counter() - begun)
        self.measure("engine/pushes", 1.0)

    def holds(self) -> bool:
        """Whether every replica has what was sent last, as far as it says so."""
        if self.adapter:
            return all(self._has_adapter(url) for url in self.settings.url)
        if self.labels:
            return all(self._has_label(url, self.label) for url in self.settings.url)
        # Weights of the step before score alike too, up to rounding.
        return self._sent == self._mark and self._scores_alike()

    def still(self) -> bool:
        """Whether the server has what was sent to it; one that does not say so was asked for scores before."""
        return not self.labels or self.holds()

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
        with self._writing(folder):
            self._write(folder)
        for url in self.settings.url:
            if self.adapter:
                if not self._has_adapter(url):
                    found = self.asked(load_job(self.label, str(folder)), url)
                    # A second try after one that was answered too late is refused, since the name is there.
                    if isinstance(found, RequestError) and not self._has_adapter(url):
                        raise self._refusal(found, url)
                if self._loaded not in (None, self.label):
                    self.asked(unload_job(str(self._loaded)), url)
            else:
                if self.labels:
                    # The name of weights that are being replaced stays with vLLM, and whoever comes after an end in
                    # between would believe it.
                    self.must(label_job(UNKNOWN), url)
                self.must(reload_job(str(folder)), url)
                self.must(reset_job(), url)
                if self.labels:
                    self.must(label_job(self.label), url)
        if not self._scores_alike():
            if not self.holds():
                # It was started anew meanwhile, or somebody else sent it weights.
                raise OtherWeightsError
            raise ModelError(
                f"{PLACE}: after it took up the student's weights the server draws from something else, by "
                f"{self.score_gap:.2g} nats at half of the tokens: it serves another model "
                f"({self.base}), or quantised; serve the student's own"
            )
        self._loaded, self._sent = self.label, self._mark
        # An adapter is read again where a server drops and loads it.
        self._remove([old for old in self._written if old != folder])

    def _write(self, folder: Path) -> None:
        model = self.language.model
        if self.adapter:
            model.save_pretrained(str(folder), state_dict=present(model))
        elif is_adapted(model):
            write_weights(folder, merged(model))
        else:
            write_weights(folder, self.language.base, present(self.language.base))

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        """What is new in a folder behind this, or was changed, was written here, also where it breaks off."""
        before = _changed(folder)
        try:
            yield
        finally:
            own = {name for name, changed in _changed(folder).items() if before.get(name) != changed}
            self._written.setdefault(folder, set()).update(own)

    def _remove(self, folders: Sequence[Path]) -> None:
        """Delete what was written here; whatever else lies in a folder or beside it stays."""
        for old in folders:
            for name in self._written.pop(old):
                with suppress(OSError):
                    (old / name).unlink()
            with suppress(OSError):
                old.rmdir()

    def _scores_alike(self) -> bool:
        """Whether every replica draws from what the student computes, up to rounding: it writes a few tokens behind a
        known text, and says how likely they were."""
        ids, worst = self.probe(), 0.0
        count = PROBED if self.longest is None else max(1, min(PROBED, self.longest - len(ids)))
        for url in self.settings.url:
            found = self.must(write_job(self.model, ids, count, 0, Draws(1.0, 1.0, 0, ())), url)
            with torch.no_grad(), self.language.quiet():
                hidden = self.language([torch.tensor(ids)], [found.actions])
                log_probs = torch.log_softmax(self.language.head(1.0).detach().logits(hidden), -1).cpu()
            own = log_probs.gather(1, found.actions[:, None]).squeeze(1)
            # Rounding may be far off at a single token, another model at most of them.
            gap = float((found.log_probs - own).abs().median())
            worst = max(worst, gap if gap == gap else math.inf)
        self.score_gap = worst
        return worst <= ELSEWHERE * TOLERANCE[self.dtype]

    def probe(self) -> list[int]:
        return list(self.language.tokenizer(PROBE, add_special_tokens=False)["input_ids"])

    def must(self, job: Job[T], url: str) -> T:
        found = self.asked(job, url)
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

    def asked(self, job: Job[T], url: str) -> T | RequestError:
        try:
            return self.client.ask(job, url)
        except RequestError as error:
            return error

    def agreed(self, yes: bool) -> bool:
        """What the first process found, in all of them."""
        return bool(gather_object([yes])[0])

    def close(self) -> None:
        """Remove what was written; the last adapter leaves the server."""
        loaded, self._loaded = self._loaded, None
        for url in self.settings.url if is_first() and loaded is not None and self.adapter else ():
            self.asked(unload_job(str(loaded)), url)
        self._remove(list(self._written))
        if self._made is not None:
            self._made.cleanup()
        else:
            with suppress(OSError):
                self.folder.rmdir()


def is_first() -> bool:
    """Whether this is the process that sends weights for all."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _changed(folder: Path) -> dict[str, int]:
    """When each entry below a folder was changed last, in nanoseconds."""
    return {name: (folder / name).lstat().st_mtime_ns for name in entries(folder)}
