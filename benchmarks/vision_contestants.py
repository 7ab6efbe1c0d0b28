"""Who trains an image-text model in the step benchmark: `opd`, a bare loop over the same models, and TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import DynamicCache

from benchmarks.contestants import OpdSession, TrlSession
from benchmarks.pictured import PLACES, Pictured
from benchmarks.session import LEARNING_RATE, AfterStep, Job, Score, Session


class OpdPictures(OpdSession):
    """`opd` through its own loop; the teacher is another model that sees its own picture of each prompt."""

    def settings(self) -> dict[str, Any]:
        size = _pictured(self.job)
        found = super().settings()
        for name in ("student", "teacher"):
            del found[name]["template"]
            found[name]["kind"] = "image_text"
        found["teacher"]["sees"] = size.sees
        found["prompts"] = {"kind": "file", "path": str(size.rows)}
        found["evaluation"]["prompts"] = {**found["prompts"], "limit": 1}
        return found

    def train(self, after_step: AfterStep) -> None:
        # What start-up has read of prompts would be read in the steps of a larger set.
        for language in (self.run.student.language, self.run.teachers[0].language):
            for memory in (language.encoded, language.looked):
                memory.__init__(memory.room)
        super().train(after_step)


class BarePictures(Session):
    """A step without a framework: the models' own forward passes, one of the rows' prompts for all that share it."""

    def __init__(self, job: Job):
        super().__init__(job)
        size = _pictured(job)
        self.processor = size.processor()
        self.student, self.teacher = size.load("student"), size.load("teacher").requires_grad_(False)
        self.trained = list(self.student.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def train(self, after_step: AfterStep) -> None:
        size, number = _pictured(self.job), 0
        self.phases.restart()
        while True:
            first = number * size.batch % len(self.prompts)
            with self.phases("rollout"):
                given = self.read(first, size.batch, "image")
                completions = self.sample(given, size.group)
            self.sampled += completions.numel()
            self.descend(given, self.read_other(first, size.batch), completions, size.group)
            with self.phases("optimizer"):
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            number += 1
            if not after_step():
                return

    def read(self, first: int, count: int, column: str) -> dict[str, torch.Tensor]:
        size = _pictured(self.job)
        pictures = [size.picture(column, i) for i in range(first, first + count)]
        return size.read(self.processor, self.prompts[first : first + count], pictures)

    def read_other(self, first: int, count: int) -> dict[str, torch.Tensor]:
        with self.phases("teacher"):
            return self.read(first, count, _pictured(self.job).sees)

    def head(self, model: Any) -> torch.Tensor:
        """The head's rows of text."""
        size = _pictured(self.job)
        weight: torch.Tensor = model.lm_head.weight
        return weight[: len(weight) - PLACES[size.family]]

    @torch.no_grad()
    def sample(self, given: dict[str, torch.Tensor], group: int) -> torch.Tensor:
        """int64 `[B * G, T]`: `group` completions of each prompt."""
        wanted = self.forced.wanted(given["input_ids"]).repeat_interleave(group)
        hidden, cache = _begun(self.student, given, group)
        head, drawn = self.head(self.student), []
        for t in range(int(wanted[0])):
            cdf = torch.softmax(self.forced.apply(linear(hidden, head), wanted, t), -1).cumsum(-1)
            token = torch.searchsorted(cdf, torch.rand(len(cdf), 1) * cdf[:, -1:])
            drawn.append(token)
            if t + 1 < int(wanted[0]):
                hidden = self.student.model(input_ids=token, cache=cache, use_cache=True).last_hidden_state[:, -1]
        return torch.cat(drawn, 1)

    def descend(
        self, given: dict[str, torch.Tensor], other: dict[str, torch.Tensor], completions: torch.Tensor, group: int
    ) -> float:
        """Reverse KL, a mean over tokens, and its gradients."""
        with self.phases("teacher"), torch.no_grad():
            theirs = _states(self.teacher, other, completions, group)
        with self.phases("student"):
            own = _states(self.student, given, completions, group)
        with self.phases("loss"):
            log_q = torch.log_softmax(linear(own, self.head(self.student)), -1)
            log_p = torch.log_softmax(linear(theirs, self.head(self.teacher)), -1)
            loss = torch.linalg.vecdot(log_q.exp(), log_q - log_p).mean()
        with self.phases("backward"):
            loss.backward()
        return float(loss.detach())

    def score(self, completions: Sequence[Sequence[int]]) -> Score:
        given, other = self.read(0, len(completions), "image"), self.read_other(0, len(completions))
        score = Score.of(self.descend(given, other, torch.tensor(completions), 1), self.trained)
        self.optimizer.zero_grad()
        return score


class TrlPictures(TrlSession):
    """TRL's `DistillationTrainer`, whose teacher sees what the student sees."""

    def load(self, name: str) -> Any:
        return _pictured(self.job).load(name)

    def reader(self) -> Any:
        processor: Any = _pictured(self.job).processor()
        processor.tokenizer.padding_side = "left"
        return processor

    def row(self, number: int) -> dict[str, Any]:
        picture = str(_pictured(self.job).picture("image", number))
        return {"prompt": [{"role": "user", "content": self.prompts[number]}], "image": picture}

    def rows(self) -> Any:
        import datasets

        return super().rows().cast_column("image", datasets.Image())


def _pictured(job: Job) -> Pictured:
    assert isinstance(job.size, Pictured)
    return job.size


def _begun(model: Any, given: dict[str, torch.Tensor], group: int) -> tuple[torch.Tensor, DynamicCache]:
    """States `[B * G, D]` behind the prompts, and what tokens behind them look back at."""
    cache = DynamicCache(config=model.config.text_config)
    hidden = model.model(**given, cache=cache, use_cache=True).last_hidden_state[:, -1]
    if group > 1:
        cache.batch_repeat_interleave(group)
        hidden = hidden.repeat_interleave(group, 0)
    return hidden, cache


def _states(model: Any, given: dict[str, torch.Tensor], completions: torch.Tensor, group: int) -> torch.Tensor:
    """States `[B * G, T, D]` that predict the completions."""
    fed = completions[:, :-1]
    if group > 1:
        first, cache = _begun(model, given, group)
        rest = model.model(input_ids=fed, cache=cache, use_cache=True).last_hidden_state
        return torch.cat([first[:, None], rest], 1)
    prompt = given["input_ids"].shape[1]
    whole = {**given, "input_ids": torch.cat([given["input_ids"], fed], 1)}
    if "mm_token_type_ids" in given:
        kinds = given["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(fed.shape)], 1)
    states: torch.Tensor = model.model(**whole, use_cache=False).last_hidden_state[:, prompt - 1 :]
    return states
