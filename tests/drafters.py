"""Drafters of tiny targets for tests: new ones of each form, one that is its target, and one that keeps to a script."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd.context import Context
from opd.distributions import Head, Vocabulary
from opd.drafting.base import Drafter, Outline
from opd.drafting.block import Block
from opd.drafting.chain import Chain
from opd.drafting.target import Target
from opd.language.engines.transformers import LanguageModel
from opd.policies.draft import DraftStudent
from opd.prompts import Prompt
from opd.rollouts import Request
from opd.rollouts.speculative import SpeculativeRollout
from opd.teachers.target import TargetTeacher
from tests.conftest import character_tokenizer, tiny_model

FORMS = {
    "chain": Chain(proposals=4),
    "chain of some ids": Chain(proposals=4, vocabulary=list(range(3, 40)), mlp=48),
    "block": Block(mask_token=2, layers=2, block=5),
}
LAYERS = 7
"""The fewest of a target from which the chain's default taps are three."""


def language(**options) -> LanguageModel:
    return LanguageModel(tiny_model(**{"layers": LAYERS, **options}), character_tokenizer(), "plain")


def drafter_of(form, model: LanguageModel, seed: int = 3) -> Drafter:
    torch.manual_seed(seed)
    return form.build(Outline.of(model.base.config, "the target"), model.head(1.0).detach())


def student_of(drafter: Drafter, model: LanguageModel, end_tokens=None, **facts) -> DraftStudent:
    """A built student that has agreed with itself."""
    context = Context(torch.device("cpu"), **facts)
    student = DraftStudent(Target(model), drafter, context)
    student.context = student.agree(context, [], end_tokens)
    return student


def drafted(student: DraftStudent, texts, budget=16, group=1, taught=True, stream=0, **settings):
    """What a rollout of a student writes to plain texts."""
    settings = SpeculativeRollout(**settings)
    teachers = [TargetTeacher().build(student.context, student)] if taught else []
    source = settings.build(student.context, student, teachers)
    prompts = [Prompt(f"p{i}", {"prompt": text}) for i, text in enumerate(texts)]
    return source(Request(prompts, group, budget, stream, settings, student.context))


class Knowing(Drafter):
    """Sees the text itself, by the tokens that it is handed behind each position; all texts begin with `first`. What it
    proposes at a slot is its target's likeliest or drawn token there, unless `wrong` says otherwise of an anchor.

    Args:
        wrong: from an anchor's position to the slot at which it proposes something else; no such slot at 0.
    """

    def __init__(self, model: LanguageModel, first: int, proposals: int, wrong: Callable[[int], int] = lambda a: 0):
        super().__init__()
        self.model = [model]
        self.first, self.proposals, self.taps, self.wrong = first, proposals, (), wrong
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def own_head(self):
        return None

    def read(self, features, following, positions, embed):
        ids = following[:, None, :, None].double()
        return [(ids, ids)]

    def propose(self, kept, before, tokens, anchors, proposals, follow, embed):
        (model,), ((ids, _),) = self.model, kept
        rows, blocks = anchors.shape
        texts = [
            [self.first, *ids[b, 0, : int(anchors[b, m]) - 1, 0].long().tolist(), int(tokens[b, m])]
            for b in range(rows)
            for m in range(blocks)
        ]
        found = []
        for k in range(1, proposals + 1):
            contexts = [torch.tensor(text) for text in texts]
            hidden = model(contexts, [torch.zeros(1, dtype=torch.int64)] * len(texts), "right").clone()
            slots = [self.wrong(int(a)) for a in anchors.flatten()]
            for i, slot in enumerate(slots):
                if slot == k:
                    hidden[i] = -hidden[i]
            found.append(hidden.view(rows, blocks, -1))
            new = follow(k, found[-1]).flatten().tolist()
            texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        return torch.stack(found, 2)

    def config(self):
        return {}


def head_of(drafter: Drafter, model: LanguageModel, temperature: float = 1.0) -> Head:
    own = drafter.own_head()
    if own is None:
        return model.head(temperature)
    return Head(
        own.detach(), temperature=temperature, vocabulary=Vocabulary.of(drafter.ids) if drafter.ids else Vocabulary()
    )
