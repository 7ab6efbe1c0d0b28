"""Whether what `opd` computes with a model is what the model itself computes: its logits, and the draws from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from opd.context import Context
from opd.distributions import Sampled
from opd.errors import OpdError, SelfTestError
from opd.language.attention import attention_of, check_dtype
from opd.language.engines.base import Drawing, EncodedPrompt, Row, ids_of
from opd.language.engines.in_process import InProcess
from opd.language.engines.layouts import Layout, usual_layout
from opd.language.engines.sampler import Sampler

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest mean difference in nats between log-probabilities of the same actions, and largest mean difference of logits
as a share of the largest, by compute dtype."""

ELSEWHERE = 3.0
"""Times the above that log-probabilities of another engine may be off at half of the tokens: its kernels round in other
places, and where a model is unsure (one that has just lost layers) bfloat16 alone is off by 0.1. Another model is off
by more than this."""

DRAWN = 8
"""Tokens that a probe of a sampler draws."""


def compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """What a module computes in now: its weights' dtype, or autocast's."""
    parameter = next(module.parameters())
    kind = parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype


@torch.no_grad()
def check_logits(
    language: InProcess, contexts: Sequence[EncodedPrompt], completions: Sequence[torch.Tensor], which: str
) -> None:
    """Raise `SelfTestError` when hidden states times head, of rows that share a batch and in the mode in which the
    model is, are not the model's own logits of each row alone. `which` names the model."""
    first, last = (contexts[0], completions[0]), (contexts[-1], completions[-1])
    # A group with one prompt, and rows of unequal length.
    rows = [first, (first[0], first[1].flip(0)), *zip(contexts[1:], completions[1:], strict=True)]
    rows.append((_half(last[0]), last[1]))
    check_dtype(attention_of(language.base), compute_dtype(language), which)
    tolerance = max(TOLERANCE[compute_dtype(language)], 1e-3)
    with _runs(language, which):
        own = [language.own_logits(*row) for row in rows]
        begun = language.own_logits(first[0], first[1][: (len(first[1]) + 1) // 2])
        ahead = float((begun - own[0][: len(begun)]).abs().max() / own[0].abs().max().clamp(min=1e-6))
        if ahead > tolerance:
            raise SelfTestError(
                f"{which}: {language.family} lets a position see the tokens behind it, so it is no causal language "
                "model as its config stands (is_decoder); take another model"
            )
        together = _apart(language, rows, own)
        if together <= tolerance:
            return
        if language.training:
            language.eval()
            quiet = _apart(language, rows, own)
            language.train()
            if quiet <= tolerance:
                raise SelfTestError(
                    f"{which} computes other logits in training than in sampling, by {together:.1%}: "
                    f"{language.family} has noise in its config that opd cannot turn off; student.dropout=config "
                    "trains with it"
                )
        alone = sum(_apart(language, [r], [logits], "right") for r, logits in zip(rows, own, strict=True)) / len(rows)
    if alone > tolerance:
        raise SelfTestError(
            f"{which}: the model's own logits and its hidden states times its head differ by {alone:.1%}: "
            f"{language.family} changes its logits in a way that opd does not know; take another model"
        )
    instead = {"packed": "eager", "varlen": "sdpa"}.get(usual_layout(language.base, language.device.type))
    way = f"attention: {instead} pads rows instead" if instead else "take another model"
    raise SelfTestError(
        f"{which}: rows that share a batch get other logits than each alone, by {together:.1%}: {language.family} "
        f"lets one row or its padding reach another; {way}"
    )


def _apart(
    language: InProcess,
    rows: Sequence[Any],
    own: Sequence[torch.Tensor],
    layout: Layout = "auto",
) -> float:
    """Mean over positions of the largest difference of a logit, as a share of the largest logit."""
    hidden = language([context for context, _ in rows], [completion for _, completion in rows], layout)
    ours = language.head(1.0).logits(hidden)
    theirs = torch.cat(list(own))
    width = min(ours.shape[1], theirs.shape[1])
    apart = (ours[:, :width] - theirs[:, :width]).abs().amax(1).mean()
    off = float(apart / theirs.abs().max().clamp(min=1e-6))
    return off if off == off else float("inf")


@torch.no_grad()
def check_draws(
    sampler: Sampler, contexts: Sequence[EncodedPrompt], language: InProcess, which: str, tolerance: float
) -> None:
    """Raise `SelfTestError` when a sampler's log-probabilities are not those of the model's own forward pass.

    Args:
        sampler: without a cut of its distribution.
        contexts: ids of some prompts; groups of unequal length are drawn from them, and rows leave on the way.
        language: the model that the sampler samples from, or of which it has a copy.
        which: names the model.
        tolerance: in nats, on average.
    """
    contexts = [*contexts, _half(contexts[0])]
    check_dtype(attention_of(sampler.model.base), compute_dtype(sampler.model), f"{which} as a writer")
    with _runs(language, f"{which} as a writer"):
        gap = _gap(sampler, contexts, language)
    if not gap <= tolerance:
        # What is wrong with its logits is wrong with its draws, and is the better message.
        check_logits(language, contexts, [ids_of(context)[-DRAWN:] for context in contexts], which)
        raise SelfTestError(
            f"{which}: rollout log-probabilities and those of the model's own forward pass differ by {gap:.2g} nats on "
            f"average (tolerance {tolerance:g}): opd does not sample from what {language.family} computes; it can "
            "only be a teacher that scores"
        )


def _gap(sampler: Sampler, contexts: Sequence[EncodedPrompt], language: InProcess) -> float:
    state = sampler.start(contexts, 2, DRAWN, range(2 * len(contexts)))
    sampler.extend(state, 2)
    state.drop(torch.tensor([0, 3]))
    sampler.extend(state, DRAWN)
    gaps, head = [], sampler.head
    for i, (actions, log_probs, _) in enumerate(state.rows()):
        logits = language.own_logits(contexts[i // 2], actions) / head.temperature
        logits = logits[:, : head.size] if head.vocabulary.ids is None else logits[:, list(head.vocabulary.ids)]
        logits = logits if head.excluded is None else logits.index_fill(1, head.excluded, float("-inf"))
        own = torch.log_softmax(logits, -1).gather(1, head.vocabulary.columns(actions)[:, None]).squeeze(1)
        gaps.append((own - log_probs).abs())
    return float(torch.cat(gaps).mean())


Sample = Callable[[Sequence[EncodedPrompt], int, int, Sequence[int], Drawing], Sequence[Row]]


@torch.no_grad()
def check_written(
    sample: Sample,
    failures: Callable[[], Mapping[str, int]],
    contexts: Sequence[EncodedPrompt],
    language: InProcess,
    context: Context,
    tolerance: float,
) -> None:
    """Raise `SelfTestError` when the log-probabilities of somebody who writes with the model's weights elsewhere
    (`sample`, as `Engine.sample`; `failures` says by reason how many rows it did not bring) are not those of the model
    here."""
    rows = sample(contexts, 2, DRAWN, range(2 * len(contexts)), Drawing(context))
    of_rows = [each for each in contexts for _ in range(2)]
    pairs = [(prompt, row) for prompt, row in zip(of_rows, rows, strict=True) if not row.lost]
    if not pairs:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in failures().items())
        raise SelfTestError(f"rollout.engine: none of {len(rows)} short completions can be used ({reasons})")
    scored = language.score([prompt for prompt, _ in pairs], [row.actions for _, row in pairs], context)
    own = Sampled.of(scored, torch.cat([row.actions for _, row in pairs]).to(language.device)).log_probs.cpu()
    # A server in bfloat16 may be far off at a single token, another model at most of them.
    gap = float((own - torch.cat([row.log_probs for _, row in pairs])).abs().median())
    if not gap <= tolerance:
        raise SelfTestError(
            f"rollout.engine: its log-probabilities and those of the student's own forward pass differ by {gap:.2g} "
            f"nats at half of the tokens (tolerance {tolerance:g}): what writes is not the student's model"
        )


def _half(context: EncodedPrompt) -> EncodedPrompt:
    """The first half of a text's ids. Of a prompt with other inputs all: those belong to places in it."""
    return context[: (len(context) + 1) // 2] if isinstance(context, torch.Tensor) else context


@contextmanager
def _runs(language: InProcess, which: str) -> Iterator[None]:
    """What another library raises about a model that it or `opd` cannot run becomes one line."""
    try:
        yield
    except OpdError:
        raise
    except (TypeError, AttributeError, IndexError, KeyError, ValueError, NotImplementedError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise
        reason = (str(error).splitlines() or [""])[0][:160]
    else:
        return
    raise SelfTestError(f"{which}: opd cannot run {language.family} ({reason}); take another model")
