"""A student whose prompts and outcomes are texts, whatever of it is trained: what reads and names them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from opd.context import Context
from opd.errors import DataError, IncompatibleError
from opd.language import evaluation
from opd.language.agreement import (
    agree_on_end,
    check_tokenizers,
    common_vocabulary,
    notes_on_end,
    tokens_of_some,
)
from opd.language.engines.base import ids_of
from opd.language.engines.in_process import InProcess
from opd.language.episodes import as_episodes
from opd.language.positions import check_positions
from opd.language.tokens import Tokens
from opd.policies.base import Student
from opd.policies.evaluation import Evaluation
from opd.prompts import Prompt
from opd.trajectories import AUTHORS, Trajectories

if TYPE_CHECKING:
    from opd.rollouts import HeldOutSampler
    from opd.teachers import LiveTeacher


class LanguageStudent(Student):
    """Base of built policies of language."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        """What each id reads as, alone, as far as anyone has asked: measuring asks for every token and alternative."""

    @property
    @abstractmethod
    def reader(self) -> InProcess:
        """The model by whose tokenizer and template prompts become ids, and ids texts."""

    def agree(self, context: Context, teachers: Sequence[LiveTeacher], end_tokens: Sequence[int] | None) -> Context:
        members = [
            (
                (f"teacher {i}" if len(teachers) > 1 else "the teacher")
                + (f" of {t.member_role} {route!r}" if route else ""),
                member,
            )
            for i, t in enumerate(teachers)
            for route, member in t.members().items()
        ]
        read = [(which, getattr(member, "language", getattr(member, "reader", member))) for which, member in members]
        others = [(which, language) for which, language in read if isinstance(language, InProcess)]
        for which, other in others:
            check_tokenizers(self.reader, other, which)
        blind = [which for (which, model) in read if not getattr(model, "reads_pictures", False)]
        if self.reader.reads_pictures and blind:
            raise IncompatibleError(
                f"{blind[0]} reads text alone, and the student pictures too: take a teacher of kind image_text, or self"
            )
        models = [self.reader, *(other for _, other in others)]
        for _, other in others:
            other.read_like(self.reader)
        common = common_vocabulary(models, [m.vocabulary for _, m in members if m.vocabulary is not None])
        last = common.ids[-1] if common.ids is not None else (common.size or 0) - 1
        if unknown := [i for i in end_tokens or () if i > last]:
            raise IncompatibleError(
                f"end_tokens names {unknown[0]}, and no model has a token beyond {last}: no completion "
                "would end. Take ids of the student's tokenizer"
            )
        of_some = tokens_of_some(models)
        if of_some:
            named = ", ".join([repr(of_some[i]) for i in sorted(of_some)[:3]] + ["..."] * (len(of_some) > 3))
            self.notes.append(f"{len(of_some)} tokens that not every tokenizer has ({named}) are in no distribution")
        holes = [i for i in common.excluded if i not in of_some and i not in self.reader.placeholders]
        if holes:
            self.notes.append(f"{len(holes)} ids between tokens (the first: {holes[0]}) are in no distribution")
        ends = agree_on_end(self.reader, others, end_tokens)
        self.notes.extend(notes_on_end(self.reader, others, ends, end_tokens is not None, common))
        return context.with_(agreed=Tokens(common, ends))

    def check_prompts(self, prompts: Sequence[Prompt], limit: int) -> None:
        for prompt in prompts:
            ids = ids_of(self.reader.encode(prompt))
            length = len(ids)
            self.notes.extend(note for note in self.reader.notes if note not in self.notes)
            check_words(self.reader, prompt, ids)
            if length > limit:
                raise DataError(
                    f"{prompt.where}: the prompt has {length} tokens, more than max_prompt_tokens={limit}; "
                    "shorten it or raise the limit"
                )

    def check_lengths(self, prompts: Sequence[Prompt], budget: int) -> list[str]:
        longest = max((self.reader.length(prompt) for prompt in prompts), default=1)
        warning = check_positions(self.reader, longest, budget, "the student")
        return [] if warning is None else [warning]

    def prompt_length(self, prompt: Prompt) -> int | None:
        return self.reader.length(prompt)

    def decode(self, actions: torch.Tensor) -> str:
        """A completion as a person reads it."""
        return self.reader.decode(actions)

    def outcomes(self, trajectories: Trajectories) -> list[str]:
        return [self.decode(actions) for actions in trajectories.completions()]

    def rows(self, trajectories: Trajectories, values: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """`tokens` are the completion's; where a watch cut it `stopped` says why, and where the environment wrote some
        `authors` says who wrote each. Held-out rows add `alternatives` (`student` and `teacher`: for each token `[text,
        probability]` pairs)."""
        rows = []
        start = 0
        names = [AUTHORS[author] for author in trajectories.authors.tolist()]
        for i, actions in enumerate(trajectories.completions()):
            here = slice(start, start + len(actions))
            start = here.stop
            text, pictures = self.reader.shown(trajectories.prompts[i])
            row: dict[str, Any] = {
                "id": trajectories.prompts[i].id,
                "prompt": text,
                "completion": self.decode(actions),
                "finished": bool(trajectories.finished[i]),
                "reward": trajectories.reward(i),
                "tokens": self.tokens(actions),
                "values": {name: [round(v, 4) for v in value[here].tolist()] for name, value in values.items()},
            }
            clips = self.reader.clips(trajectories.prompts[i])
            if len(clips) == 1:
                row["frames"] = clips[0]
            elif clips:
                pictures = [*pictures, *(image for clip in clips for image in clip["images"])]
            if pictures:
                row["images"] = pictures
            if trajectories.stopped is not None and trajectories.stopped[i] is not None:
                row["stopped"] = trajectories.stopped[i]
            if "environment" in (authors := names[here]):
                row["authors"] = authors
            rows.append(row)
        return rows

    def joined(self, rows: list[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        return as_episodes(rows, prompts)

    def measured_by(self, sampler: HeldOutSampler, settings: Evaluation) -> HeldOutSampler:
        from opd.language.rollout import GREEDY

        assert isinstance(settings, evaluation.LanguageEvaluation)
        if settings.greedy:
            sampler.changed(**GREEDY)
        if settings.temperature is not None:
            sampler = replace(sampler, context=sampler.context.with_(temperature=settings.temperature))
        cuts = {"top_p": settings.top_p, "top_k": settings.top_k}
        return sampler.changed(**{name: value for name, value in cuts.items() if value is not None})

    def named(self, ids: torch.Tensor) -> list[str]:
        return self.tokens(ids)

    def tokens(self, actions: torch.Tensor) -> list[str]:
        """Each token as a person reads it, alone."""
        ids = actions.tolist()
        for i in set(ids) - self.texts.keys():
            self.texts[i] = str(self.reader.tokenizer.decode([i]))
        return [self.texts[i] for i in ids]


def check_words(reader: InProcess, prompt: Prompt, ids: torch.Tensor) -> None:
    """Raise `DataError` where a prompt, read as `ids`, has a part that its reader's tokenizer knows nothing of."""
    tokenizer = reader.tokenizer
    # Some tokenizers name the end token as the unknown one.
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    if unknown is not None and bool((ids == unknown).any()):
        raise DataError(
            f"{prompt.where}: the student's tokenizer has no token for a part of {str(prompt.view())[:60]!r}; "
            "take a student whose tokenizer was made for this data"
        )
