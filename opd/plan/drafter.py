"""What a recipe that trains a drafter will take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.assembly import written_alike
from opd.choice import kind_of, nested
from opd.distributions import Head
from opd.drafting.base import Drafter, Outline
from opd.drafting.layers import SCORES, scores_of
from opd.drafting.proposer import OWN, blocks_for, foreseen_proposer
from opd.drafting.proposing import Tree
from opd.drafting.servers import SERVERS
from opd.drafting.texts import LOGITS
from opd.errors import IncompatibleError, ModelError
from opd.language.engines.transformers import LanguageModel
from opd.language.model import load_tokenizer
from opd.language.shape import model_shape
from opd.operator import chunk_rows
from opd.plan.at_hand import stores_not_here
from opd.plan.language import check_answers, home_of, prompt_tokens, quick_in_bf16
from opd.planning import Shape, bytes_text, count_text, saved_bytes
from opd.policies.draft import Draft
from opd.provenance import peak_memory_bytes
from opd.recipe import Recipe
from opd.rollouts import Rollout
from opd.rollouts.anchored import AnchoredRollout
from opd.rollouts.data import DataRollout
from opd.rollouts.speculative import SpeculativeRollout
from opd.rollouts.stored import StoredRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.teacher import TeacherRollout

LENGTHS = (1, 2, 4)
"""Acceptance lengths for which a plan says what a step takes."""


@dataclass(frozen=True)
class DrafterPlan:
    """The plan of a recipe whose student is a drafter.

    Attributes:
        blocks: of one answer, as if no proposal stood.
        proposals: of a block, those of one line where they are a tree.
        written: whether the texts are written during the run; else they are there already.
        memory: in bytes by part, at that many blocks; `peak` their sum at the worst moment of a step.
        peaks: the peak by acceptance length.
        teraflops: matrix products of a step, attention left out.
    """

    recipe: str
    drafter: Shape
    target: Shape
    trajectories: int
    prompt_tokens: int
    completion_tokens: int
    blocks: int
    proposals: int
    written: bool
    memory: dict[str, int]
    peaks: dict[int, int]
    teraflops: dict[str, float]
    steps: int
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def _verb(self) -> str:
        return "written" if self.written else "read"

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "student": self.drafter.as_dict(),
            "target": self.target.as_dict(),
            "tokens_per_step": {self._verb: self.trajectories * self.completion_tokens},
            "slots_per_step": self.trajectories * self.blocks * self.proposals,
            "memory_bytes": self.memory,
            "peak_memory_bytes": self.peak,
            "peak_memory_bytes_by_acceptance_length": {str(k): v for k, v in self.peaks.items()},
            "teraflops_per_step": self.teraflops,
            "notes": list(self.notes),
        }

    def sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        drafter, target = self.drafter, self.target
        yield (
            "models",
            [
                (f"student: {drafter.name}", f"{count_text(drafter.parameters)} parameters, all trained"),
                (f"target: {target.name}", f"{count_text(target.parameters)} parameters, 0 trained"),
            ],
        )
        yield (
            "a step, at most: as if no proposal stood",
            [
                ("trajectories", str(self.trajectories)),
                ("prompt tokens of a trajectory", str(self.prompt_tokens)),
                (f"{self._verb} tokens", str(self.trajectories * self.completion_tokens)),
                ("slots of blocks", str(self.trajectories * self.blocks * self.proposals)),
                *((f"{part}, TFLOP", f"{value:.3g}") for part, value in self.teraflops.items()),
                (
                    f"whole run, {self._verb} tokens",
                    count_text(self.steps * self.trajectories * self.completion_tokens),
                ),
            ],
        )
        yield (
            "memory at the peak of a step",
            [
                *((part, bytes_text(value)) for part, value in self.memory.items()),
                ("sum", bytes_text(self.peak)),
                *(
                    (f"sum at an acceptance length of {k}", bytes_text(v))
                    for k, v in self.peaks.items()
                    if v < self.peak
                ),
            ],
        )


def plan_drafter(recipe: Recipe, home: str | None = None) -> DrafterPlan:
    """The plan of a recipe that trains a drafter; no weights are read. `home` as in `make_plan`.

    Raises:
        OpdError: what a run would refuse too, in so far as configurations show it.
    """
    student, notes = recipe.student, written_alike(recipe)
    assert isinstance(student, Draft)
    _check_sources(recipe.rollout)
    target = model_shape(student.target, notes)
    own = student.shape(notes)
    drafter = own.model
    assert isinstance(drafter, Drafter)
    drafting = SpeculativeRollout | AnchoredRollout
    settings = next((part for part in nested(recipe.rollout) if isinstance(part, drafting)), None)
    count = drafter.proposals
    if settings is not None:
        proposer = _proposer(settings, drafter, target, notes)
        settings.check(proposer)
        count = settings.proposals or proposer.proposals
        blocks_for(settings.proposer, count, drafter)
    student.check_servers(drafter, target.model)
    served = student.served(drafter, target.model)
    notes += [f"{name}: {SERVERS[name].launch(served)}" for name in student.servers]
    check_answers(recipe)
    if unknown := [i for i in recipe.end_tokens or () if i >= target.vocabulary]:
        raise ModelError(f"end_tokens names {unknown[0]}; the target's ids end at {target.vocabulary - 1}")
    asked = student.target

    def reader(local_only: bool) -> LanguageModel:
        return LanguageModel(None, load_tokenizer(asked, local_only), asked.template, asked.template_options)

    prompt, _, _ = prompt_tokens(recipe, reader, notes)
    notes += stores_not_here(recipe)
    completion = max(recipe.rollout.budget, recipe.curriculum.longest or 0)
    batch = settings.batch if settings is not None else recipe.batch.prompts
    tree = settings.tree if isinstance(settings, SpeculativeRollout) else None
    texts = settings if isinstance(settings, AnchoredRollout) else None
    counted = _Counted(
        recipe, home or home_of(recipe), own, target, drafter, count, prompt, completion, batch, tree, texts
    )
    if not counted.on_cpu:
        notes.append("device memory of the CUDA context itself is not counted")
    by_length = {length: counted.memory(counted.blocks(length)) for length in LENGTHS}
    trajectories = recipe.batch.prompts * recipe.batch.group
    return DrafterPlan(
        recipe=recipe.name,
        drafter=own,
        target=target,
        trajectories=trajectories,
        prompt_tokens=prompt,
        completion_tokens=completion,
        blocks=counted.blocks(1),
        proposals=count,
        written=texts is None,
        memory=by_length[1],
        peaks={length: sum(parts.values()) for length, parts in by_length.items()},
        teraflops=_operations(counted, trajectories),
        steps=recipe.steps,
        notes=tuple(dict.fromkeys(notes)),
    )


def _proposer(
    settings: SpeculativeRollout | AnchoredRollout, drafter: Drafter, target: Shape, notes: list[str]
) -> Drafter:
    """Who proposes; where its folder is not at hand a note says so, and it is taken for the one that is trained."""
    wanted = settings.proposer
    if wanted not in OWN and not Path(wanted).expanduser().exists():
        notes.append(f"rollout.proposer {wanted} is not at hand: it is taken to be like the drafter that is trained")
        return drafter
    outline = Outline.of(target.model.config, "student.target")
    head = Head(torch.empty(outline.vocabulary, outline.width, device="meta"))
    return foreseen_proposer(wanted, drafter, outline, head)


def _check_sources(rollout: Rollout) -> None:
    """Raise `IncompatibleError` where a source of the rollout gives texts without blocks."""
    if isinstance(rollout, StudentRollout | TeacherRollout | StoredRollout | DataRollout):
        raise IncompatibleError(
            f"rollout {kind_of(rollout)!r} proposes no blocks, and a drafter learns from nothing else: take "
            "speculative, or anchored with the texts of stored or data"
        )
    for part in () if isinstance(rollout, AnchoredRollout) else rollout.parts:
        _check_sources(part)


@dataclass(frozen=True)
class _Counted:
    """What the memory of a step is counted from."""

    recipe: Recipe
    home: str
    own: Shape
    target: Shape
    drafter: Drafter
    proposals: int
    prompt: int
    completion: int
    batch: int
    tree: Tree | None
    texts: AnchoredRollout | None

    def blocks(self, acceptance: int) -> int:
        """Of one answer, at a whole acceptance length."""
        if self.texts is not None:
            return self.texts.blocks(self.completion, acceptance)
        return -(-self.completion // acceptance)

    @property
    def on_cpu(self) -> bool:
        return self.home == "cpu"

    def memory(self, blocks: int) -> dict[str, int]:
        """Bytes by part, with so many blocks in each answer."""
        recipe, own, target = self.recipe, self.own, self.target
        answers = recipe.batch.prompts * recipe.batch.group
        micro = min(recipe.batch.micro, answers)
        longest = max(self.completion, recipe.evaluation.longest or 0)
        # Held-out answers are kept whole too while they are measured.
        tested = recipe.evaluation.held_out * recipe.evaluation.k
        kept = max(answers * self.completion, tested * longest)
        texts = max(answers, tested) * self.prompt + kept
        width, slots = target.width * target.size, self.proposals * blocks
        parts = {
            "target weights": target.weight_bytes,
            "drafter weights": own.weight_bytes,
            "gradients": own.weight_bytes,
            "optimiser state": 2 * own.weight_bytes,
            "features of the answers": texts * len(self.drafter.taps) * width,
            "target's hidden states at the slots": self.proposals * -(-kept * blocks // self.completion) * width,
        }
        precision = recipe.hardware.precision
        if precision == "bf16" or (precision == "auto" and quick_in_bf16(self.home)):
            parts["bfloat16 casts of weights"] = 2 * own.parameters
        training = {
            "activations of a micro-batch": self._activations(micro, blocks),
            "loss operator: chunks": 4 * 4 * chunk_rows(own.vocabulary) * own.vocabulary,
            "loss operator: gradients": 4 * own.width * micro * slots
            + (4 * own.vocabulary * own.width if self.drafter.own_head() is not None else 0),
        }
        # Until one line is kept of a tree its nodes have keys and values, hidden states and features.
        nodes = 0 if self.tree is None else self.tree.nodes
        rows, length = min(self.batch, max(answers, tested)), self.prompt + longest + nodes
        rollout = rows * (
            # Both keep a quarter more room than they need.
            5 * length * (target.kv_bytes_per_token + self._kept_bytes()) // 4
            # A block's logits, their probabilities and a copy to cut them by; the drafter's of a tree's depth, twice.
            + 3 * 4 * (self.proposals + 1) * target.vocabulary
            + (0 if self.tree is None else 2 * 4 * self.tree.width * own.vocabulary)
            + nodes * width * (1 + len(self.drafter.taps))
        )
        if self.texts is not None:
            # The texts are read at once, under a mask, and what is as wide as the vocabulary a part at a time.
            rollout = rows * length * (target.kv_bytes_per_token + self._kept_bytes() + target.size * length)
            rollout += 3 * 4 * LOGITS
        if rollout > sum(training.values()):
            training = {"rollout: keys, values, logits": rollout}
        if self.on_cpu:
            training["Python and libraries"] = peak_memory_bytes()
        return parts | training

    def _kept_bytes(self) -> int:
        """Bytes that the drafter keeps of a token while an answer is written."""
        one = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        pairs = self.drafter.read(self._features(1, 1), one, one, self._embed)
        return 4 * sum(keys.numel() + values.numel() for keys, values in pairs)

    def _features(self, *sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, len(self.drafter.taps) * self.target.width, device="meta")

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.empty(*ids.shape, self.target.width, device="meta")

    def _activations(self, micro: int, blocks: int) -> int:
        """Bytes that autograd keeps of a micro-batch's blocks, counted on the meta device, and one part of the
        attention's scores."""
        length = self.prompt + self.completion
        at = torch.zeros(micro, blocks, dtype=torch.int64, device="meta")
        positions = torch.zeros(micro, length, dtype=torch.int64, device="meta")

        def forward() -> None:
            pairs = self.drafter.read(self._features(micro, length), positions, positions, self._embed)
            before = self._features(micro, blocks)
            self.drafter.propose(pairs, before, at, at, self.proposals, lambda k, hidden: at, self._embed)

        # The largest there can be of what is not kept: scores, as many weights, and the gradients of both.
        keys = length + self.proposals + 1
        heads = Outline.of(self.target.model.config, "student.target").heads
        scores = scores_of(torch.Size((micro, heads, blocks, self.proposals + 1)), keys)
        return saved_bytes(self.drafter, forward) + 4 * 4 * min(scores, SCORES)


def _operations(counted: _Counted, answers: int) -> dict[str, float]:
    """2 per parameter and token forward, 4 backward; as many blocks as at an acceptance length of 1."""
    own, target, proposals, texts = counted.own, counted.target, counted.proposals, counted.texts
    tree = counted.tree
    head = target.vocabulary * target.width
    body = target.parameters - head
    blocks, written = answers * counted.blocks(1), answers * counted.completion
    # The drafter's parameters of a head are among its own, or they are the target's.
    of_drafter = own.parameters + (head if own.vocabulary == target.vocabulary else 0)
    asked = proposals if tree is None else 1 + (proposals - 1) * tree.width
    if texts is None:
        projected, proposed = blocks * (1 + (proposals if tree is None else tree.nodes)), blocks
        read = answers * counted.prompt + projected
    else:
        projected, read = 0, answers * counted.prompt + written
        read += blocks * (proposals - 1) if texts.slots == "drafter" else 0
        walks = texts.anchors in ("verified", "random")
        proposed = written if walks else blocks if texts.proposes else 0
    return {
        "rollout": (2 * (body * read + head * projected) + 2 * of_drafter * asked * proposed) / 1e12,
        "drafter forward and backward": 6 * own.parameters * proposals * blocks / 1e12,
        "loss operator": 8 * own.vocabulary * own.width * proposals * blocks / 1e12,
    }
