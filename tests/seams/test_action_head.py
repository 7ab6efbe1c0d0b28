"""A policy that acts by tokens: an environment, a rollout in it and an expert over a slice of ids, defined here, train
through the one loop."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.distributions import Categorical, Target, Vocabulary
from opd.language.engines.base import Row
from opd.language.engines.sampler import Sampler
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.language.rollout import pack_rows
from opd.language.tokens import tokens_of
from opd.prompts import Prompt
from opd.rollouts.base import OneSource, PrefixSource, row_seed
from opd.teachers.base import LiveTeacher, Teacher
from tests.conftest import tiny_model
from tests.tiny import saved, short_run, turn_tokenizer

MOVES = {"l": -1, "r": 1, ".": 0}
TOKENS = turn_tokenizer().convert_tokens_to_ids(list(MOVES))
SLICE = Vocabulary.of(TOKENS)
STOP = TOKENS[-1]


class Line:
    """Seven places in a row; the episode ends at the goal, by stopping, or after four steps."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        g = torch.Generator().manual_seed(seed)
        self.place, self.goal = torch.randint(7, (2,), generator=g).tolist()
        self.steps = 0
        return self._text(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.place = min(6, max(0, self.place + MOVES[action]))
        self.steps += 1
        there = self.place == self.goal
        return self._text(), float(there), there or action == ".", self.steps == 4, {}

    def _text(self) -> str:
        return f"at {self.place} go {self.goal}:"


class Acts(OneSource):
    """One action token at each state; every state is a trajectory whose prompt is the observation."""

    kind: Literal["acts_on_a_line"] = "acts_on_a_line"
    modality: ClassVar[str | None] = "language"

    def build(self, context, student, teachers):
        return Acting(student.language)


class Acting(PrefixSource):
    seen: ClassVar[list[Any]] = []

    def __init__(self, language):
        self.language = language

    @torch.no_grad()
    def __call__(self, request):
        context = request.context
        self.language.eval()
        head = self.language.head(context.temperature, tokens_of(context).vocabulary)
        sampler = Sampler(self.language, head, tokens_of(context).end_ids)
        states, contexts, rows = [], [], []
        for prompt in request.prompts:
            for member in range(request.group):
                seed = row_seed(context.seed, request.stream, prompt, request.group, member)
                line, done, step = Line(), False, 0
                text, _ = line.reset(seed % 2**31)
                while not done:
                    state = Prompt(f"{prompt.id}/{member}/{step}", {"prompt": text}, where=prompt.where)
                    drawing = sampler.start([self.language.encode(state)], 1, 1, [seed + step])
                    (row,) = sampler.extend(drawing, 1).rows()
                    token = self.language.tokenizer.convert_ids_to_tokens(int(row[0][0]))
                    text, _, ended, cut, _ = line.step(token)
                    done, step = ended or cut, step + 1
                    states.append(state)
                    contexts.append(self.language.encode(state))
                    rows.append(Row(*row))
        self.language.train()
        found = pack_rows(states, contexts, 1, rows, "student")
        self.seen.append(found)
        return found


class Expert(ModelSettings, Teacher):
    """A model that has something to say of the moves alone."""

    kind: Literal["expert_on_a_line"] = "expert_on_a_line"
    modality: ClassVar[str | None] = "language"

    def build(self, context, student):
        return Answering(self, context)


class Answering(LiveTeacher):
    answers = Categorical
    vocabulary = SLICE

    def __init__(self, settings, context):
        self.settings = settings
        self.language = LanguageModel.load(settings, context.device).requires_grad_(False).eval()

    @torch.no_grad()
    def answer(self, trajectories, settings, context):
        contexts = [self.language.encode(prompt) for prompt in trajectories.prompts]
        hidden = self.language(contexts, trajectories.completions())
        head = self.language.head(context.temperature, tokens_of(context).vocabulary)
        return [Target(Categorical(hidden, head), teacher=settings.name)]


@pytest.mark.parametrize("objective", ["reverse_kl", "reverse_kl_sampled"])
def test_a_student_learns_to_act_by_a_slice_of_its_ids(tmp_path, objective):
    Acting.seen.clear()
    tokenizer = turn_tokenizer()
    models = [saved(tmp_path / n, tiny_model(vocabulary=98, seed=i), tokenizer) for i, n in enumerate("st")]
    student, expert = ({"model": model, "template": "plain"} for model in models)
    result = short_run(
        tmp_path / "run",
        student,
        {"kind": "expert_on_a_line", **expert},
        rollout={"kind": "acts_on_a_line", "max_new_tokens": 1},
        objective=objective,
        end_tokens=[STOP],
        update={"learning_rate": 1e-2},
        batch={"prompts": 2, "group": 2, "micro": 3},
    )
    drawn = torch.cat([each.actions for each in Acting.seen])
    assert len(Acting.seen) >= 2  # two steps, besides the test before them
    assert set(drawn.tolist()) <= set(TOKENS)
    assert len(set(drawn.tolist())) > 1
    before = AutoModelForCausalLM.from_pretrained(models[0]).lm_head.weight
    moved = (result.student.lm_head.weight - before).abs().sum(1)
    assert (moved[TOKENS] > 0).all()
    assert not moved[[i for i in range(98) if i not in TOKENS]].any()
