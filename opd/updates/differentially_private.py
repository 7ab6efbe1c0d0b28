"""DP-SGD and its kin: what one record adds is bounded, and noise hides the rest."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator

from opd.distributions import Distribution
from opd.errors import IncompatibleError, RecipeError, RunError
from opd.objectives import Loss
from opd.policies.base import Student
from opd.privacy import Accountant, Part, Spending, epsilon_of, noise_for, steps_within
from opd.privacy.accounting import check_accountant
from opd.privacy.spending import FILE
from opd.schedules import OverSteps
from opd.updates.base import Optimiser, Planned, Update
from opd.updates.optimizers import make_optimizer
from opd.updates.per_example import Batched, Cut, NotApartError, OneByOne, cut

Beta = Annotated[float, Field(ge=0, lt=1)]

LOGGED = 20
"""How often in a run epsilon is computed and logged, where the accountant takes its time."""


class DifferentiallyPrivate(Update):
    """One step of an optimiser a draw, of clipped gradients with noise (DP-SGD, Abadi et al. 2016).

    Each trajectory's gradient over all trained weights together is scaled down to the norm `clip_norm`. Their sum gets
    normal noise of `noise_multiplier` times that norm, once a step, and is divided by the prompts that a step has in
    expectation. A draw without prompts is a step like the others. `epsilon` and `delta` say which noise that takes, for
    records that are added or removed one at a time, and no step is taken that would exceed them.

    Logged: `scaled_down`, the share of trajectories whose gradient was scaled down, and `gradient_median`, the median
    of the norms before; both are of records and not private. `gradient_norm` is that of the noisy mean.
    """

    kind: Literal["differentially_private"] = "differentially_private"
    modality: ClassVar[str | None] = "language"
    private: ClassVar[bool] = True
    shown: ClassVar[tuple[str, ...]] = ("epsilon",)
    epsilon: float | None = Field(None, gt=0, description="What the whole run may spend; it ends before it spends more")
    delta: float | None = Field(None, gt=0, lt=1, description="Default one over the number of training prompts")
    noise_multiplier: float | None = Field(
        None, ge=0, le=1e6, description="Of the noise, in units of clip_norm; default what epsilon takes. 0: no privacy"
    )
    accountant: Accountant = Field("prv", description="prv, pld: nearly exact. rdp: quick, and a looser bound")
    clip_norm: float = Field(1.0, gt=0, description="Most that one trajectory's gradient may measure")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="What makes a step of the noisy mean")
    learning_rate: Annotated[float, OverSteps(ge=0)] = Field(1e-4, description="Of the optimiser")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled from the gradient, except with sgd")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Of adamw")
    momentum: Beta | None = Field(None, description="Of sgd; default 0")
    gradients: Literal["auto", "batched", "one_by_one"] = Field(
        "auto",
        description="How each trajectory's gradient is bounded: one_by_one has a backward pass for each, batched "
        "two for all; auto: batched where model and dtype allow it",
    )
    seed: int | None = Field(
        None, ge=0, description="Makes the noise repeatable, and no secret to whoever knows it; default drawn in secret"
    )
    reveals: list[Literal["servers", "trackers", "held_out", "rollouts"]] = Field(
        [],
        description="Where records may show all the same: servers (elsewhere), trackers (that send), held_out (records "
        "that are measured and shown), rollouts (written to the disk)",
    )

    @model_validator(mode="after")
    def _says_how_much(self) -> DifferentiallyPrivate:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give epsilon, which the noise is solved for, or noise_multiplier")
        if self.epsilon is not None and self.noise_multiplier == 0:
            raise ValueError("noise_multiplier is 0, with which no epsilon holds; remove one of them")
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError("momentum is a setting of sgd; adamw has betas")
        if self.optimizer == "sgd" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError("sgd has no betas; set momentum")
        return self

    @property
    def revealed(self) -> Sequence[str]:
        return self.reveals

    def solved(self, planned: Planned) -> tuple[float, float]:
        """`(noise multiplier, delta)` of a run.

        Raises:
            RecipeError: the accountant is not installed, or no noise is enough.
        """
        delta = 1 / planned.records if self.delta is None else self.delta
        if not delta < 1:
            raise RecipeError(
                f"update.delta is by default 1/{planned.records}, which promises nothing; set update.delta"
            )
        if self.noise_multiplier != 0:
            check_accountant(self.accountant)
        if self.noise_multiplier is not None:
            return self.noise_multiplier, delta
        assert self.epsilon is not None
        rate = planned.expected / planned.records
        return noise_for(self.epsilon, delta, rate, planned.steps, self.accountant), delta

    def told(self, planned: Planned) -> list[tuple[str, str]]:
        noise, delta = self.solved(planned)
        rate = planned.expected / planned.records
        spent = epsilon_of([Part(noise, rate, planned.steps)], delta, self.accountant)
        rows = [
            ("records", str(planned.records)),
            ("probability of a record in a step", f"{rate:.4g}"),
            ("noise multiplier (sigma)", f"{noise:g}"),
            (
                "standard deviation of the noise in a step's gradient",
                f"{noise * self.clip_norm / planned.expected:.3g}",
            ),
            (f"epsilon at delta {delta:.3g} ({self.accountant})", f"{spent:.4g}"),
        ]
        strict = 1e-6
        if delta > strict and noise > 0:
            also = epsilon_of([Part(noise, rate, planned.steps)], strict, self.accountant)
            rows.append((f"epsilon at delta {strict:g}", f"{also:.4g}"))
        return rows

    def build(self, student: Student, accelerator: Accelerator) -> PrivateOptimiser:
        return PrivateOptimiser(self, student, accelerator)


class PrivateOptimiser(Optimiser):
    """The built update. What it adds up between two steps holds gradients of records and is in no checkpoint."""

    per_example = True
    expected = True
    takes_empty = True

    def __init__(self, settings: DifferentiallyPrivate, student: Student, accelerator: Accelerator):
        self.settings, self.student = settings, student
        self.cut: Cut | None = None
        self.writes_rollouts = "rollouts" in settings.reveals
        if accelerator.num_processes > 1:
            raise IncompatibleError(
                f"update 'differentially_private' runs in one process, and there are {accelerator.num_processes}: "
                "draws and noise would have to be shared; start one"
            )
        if getattr(student, "noisy", False):
            raise RecipeError(
                "update 'differentially_private' takes no dropout, whose draws tie trajectories together; set "
                "student.dropout=off and student.lora.dropout=0"
            )
        named = [(name, p) for name, p in student.module.named_parameters() if p.requires_grad]
        self.names, self.weights = [name for name, _ in named], [p for _, p in named]
        norms = [
            type(part).__name__
            for part in student.module.modules()
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        ]
        if norms:
            raise IncompatibleError(
                f"update 'differentially_private' bounds what one record adds, and {norms[0]} mixes all of a batch; "
                "take another student"
            )
        stretched = [
            kind
            for part in student.module.modules()
            if (kind := getattr(part, "rope_type", None)) in ("dynamic", "longrope")
        ]
        if stretched:
            raise IncompatibleError(
                f"update 'differentially_private' bounds what one record adds, and rotary embeddings of type "
                f"{stretched[0]!r} turn all rows of a batch by the length of the longest; take another student"
            )
        self.way = self._way(accelerator)
        optimizer = make_optimizer(
            settings.optimizer,
            student.module,
            rate=float(settings.learning_rate),
            decay=settings.weight_decay,
            betas=settings.betas,
            momentum=settings.momentum or 0.0,
        )
        student.module, self.optimizer = accelerator.prepare(student.module, optimizer)
        self.checked = False
        self.taken = 0
        self.discard()

    def _way(self, accelerator: Accelerator) -> Batched | OneByOne:
        """How gradients are bounded.

        Raises:
            RecipeError: batched was asked for, where its norms would not be those of the gradients.
        """
        wanted = self.settings.gradients
        # What a sum in bfloat16 rounds is no longer bounded by norms that were made beside it.
        whole = accelerator.mixed_precision == "no" and all(p.dtype == torch.float32 for p in self.weights)
        again = any(getattr(part, "gradient_checkpointing", False) for part in self.student.module.modules())
        why = None if whole else "computes in float32 alone (hardware.precision, student.dtype)"
        why = "does not go with student.gradient_checkpointing" if again else why
        why = why if hasattr(self.student, "layout") else "needs a causal_lm"
        if wanted == "batched" and why is not None:
            raise RecipeError(f"update.gradients is 'batched', which {why}; set update.gradients=one_by_one")
        if wanted == "one_by_one" or why is not None:
            return OneByOne(self.weights)
        self.student.layout = "right"  # type: ignore[attr-defined]  # that of causal_lm, as was just asked
        return Batched(self.student.module, self.weights)

    def begin(self, planned: Planned) -> list[str]:
        self.planned = planned
        self.noise, self.delta = self.settings.solved(planned)
        self.rate = planned.expected / planned.records
        self.spending = Spending(self.delta, self.settings.accountant)
        notes = []
        if self.noise == 0:
            notes.append(
                "update.noise_multiplier is 0: gradients are clipped and not hidden, and this run is not private"
            )
        elif self.settings.seed is not None:
            notes.append("update.seed is set: who knows it can take the noise away again; the epsilon holds for others")
        if self.noise and planned.draws_known:
            notes.append(
                "curriculum.seed is set: who knows it knows which steps a record is in, and needs less than this "
                "epsilon to find it; the epsilon holds for others"
            )
        self._look_ahead()
        return notes

    def recall(self) -> list[str]:
        known = self.spending.total
        found = self.spending.read(self.planned.folder)
        self._look_ahead()
        if found or not known:
            return []
        return [
            f"{self.planned.folder / FILE} is gone: {known} steps are counted as the checkpoint has them, and those "
            "that were taken after it are not; put the file back where there were some"
        ]

    def _look_ahead(self) -> None:
        """Find out whether the budget ends before the run does."""
        self.left = left = max(0, self.planned.steps - self.taken)
        budget = self.settings.epsilon
        if budget is not None and left:
            spent, kind = self.spending.parts, self.settings.accountant
            self.left = steps_within(budget, self.delta, spent, self.noise, self.rate, left, kind)
        self._end()

    def _end(self) -> None:
        if self.left <= 0 and self.taken < self.planned.steps:
            self.ended_by = (
                f"the budget is spent: {self.spending.total} steps cost epsilon {self.spending.epsilon():.4g} at delta "
                f"{self.delta:.3g}, and one more would exceed update.epsilon={self.settings.epsilon:g}"
            )

    def opened(self, student: Distribution, lengths: torch.Tensor) -> Distribution:
        opened, self.cut = cut(student, lengths)
        return opened

    def accumulate(self, losses: Sequence[Loss], last: bool) -> None:
        where, self.cut = self.cut, None
        assert where is not None
        apart = torch.stack([loss.per_example for loss in losses if loss.per_example is not None]).sum(0)
        if not self.checked:
            self.checked = where.check_apart(apart)
        try:
            norms = self.way.add(apart, where, self._factors, self.totals)
        except NotApartError as error:
            if self.settings.gradients == "batched":
                raise RecipeError(
                    f"update.gradients is 'batched', and {error}; set update.gradients=one_by_one"
                ) from None
            assert isinstance(self.way, Batched)
            self.way.close()
            self.way = OneByOne(self.weights)
            self.student.layout = "auto"  # type: ignore[attr-defined]  # of causal_lm, where it was set
            norms = self.way.add(apart, where, self._factors, self.totals)
        self.norms.append(norms.detach().cpu() * self.planned.expected)

    def _factors(self, norms: torch.Tensor) -> torch.Tensor:
        """What B gradients are multiplied with; they come divided by the expected number, and so is the bound."""
        if not bool(norms.isfinite().all()):
            raise RunError(
                f"step {self.taken + 1}: a trajectory's gradient is not finite, and a private step cannot leave it "
                "out; nothing of the step was used. Lower update.learning_rate"
            )
        bound = self.settings.clip_norm / self.planned.expected
        return (bound / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)

    def discard(self) -> None:
        self.totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.weights]
        self.norms: list[torch.Tensor] = []
        self.cut = None
        if isinstance(self.way, Batched):
            self.way.forget()

    @torch.no_grad()
    def apply(self, settings: Update, finite: bool = True) -> dict[str, float]:
        """As `Optimiser.apply`; a step is never skipped, since who sees that it was learns something of the records."""
        assert isinstance(settings, DifferentiallyPrivate)
        if self.left <= 0:
            raise RunError(str(self.ended_by))
        # Before the step, so that no kill makes the run forget it.
        self.spending.add(self.noise, self.rate)
        self.spending.write(self.planned.folder)
        deviation = self.noise * self.settings.clip_norm / self.planned.expected
        random = self._generator()
        square = 0.0
        for weight, total in zip(self.weights, self.totals, strict=True):
            if deviation:
                total += deviation * torch.randn(total.shape, generator=random, device=total.device)
            square += float(total.square().sum())
            weight.grad = total.to(weight.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        norms = torch.cat(self.norms) if self.norms else torch.zeros(0)
        self.discard()
        self.taken += 1
        self.left -= 1
        self._end()
        signals = {
            "gradient_norm": math.sqrt(square),
            "learning_rate": float(settings.learning_rate),
            "examples": float(len(norms)),
            "one_by_one": float(isinstance(self.way, OneByOne)),
        }
        if len(norms):
            signals["scaled_down"] = float((norms > self.settings.clip_norm).float().mean())
            signals["gradient_median"] = float(norms.median())
        if self.noise and self._logs_epsilon() and math.isfinite(spent := self.spending.epsilon()):
            signals["epsilon"] = spent
        return signals

    def _generator(self) -> torch.Generator:
        """Of one step's noise: seeded by the operating system, or by the settings' seed and the step."""
        seed = secrets.randbits(63)
        if self.settings.seed is not None:
            digest = hashlib.sha256(f"noise/{self.settings.seed}/{self.taken}".encode()).digest()
            seed = int.from_bytes(digest[:8]) >> 1
        return torch.Generator(self.weights[0].device).manual_seed(seed)

    def _logs_epsilon(self) -> bool:
        every = 1 if self.settings.accountant == "rdp" else max(1, self.planned.steps // LOGGED)
        return self.taken % every == 0 or self.taken == self.planned.steps or self.ended_by is not None

    def facts(self) -> dict[str, Any]:
        spent = self.spending.epsilon() if self.noise or self.spending.total else 0.0
        return {
            "privacy": {
                "epsilon": spent if math.isfinite(spent) else None,
                "delta": self.delta,
                "accountant": self.settings.accountant,
                "noise_multiplier": self.noise,
                "clip_norm": self.settings.clip_norm,
                "sampling_rate": self.rate,
                "records": self.planned.records,
                "steps": self.spending.total,
                "spent": self.spending.state(),
                "seed_known": self.settings.seed is not None or self.planned.draws_known,
            }
        }

    def state_dict(self) -> dict[str, Any]:
        """The moments, and what was spent. No noise can be made again from it, unless a seed was given."""
        names = self._order()
        return {
            "optimizer": self.settings.optimizer,
            "shapes": {name: list(p.shape) for name, p in zip(self.names, self.weights, strict=True)},
            "moments": {names[i]: of for i, of in self.optimizer.state_dict()["state"].items()},
            "taken": self.taken,
            "spent": self.spending.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["optimizer"] != self.settings.optimizer:
            raise RunError(
                f"update.optimizer is {self.settings.optimizer!r}, and the checkpoint holds what "
                f"{state['optimizer']!r} kept; set update.optimizer={state['optimizer']}"
            )
        here = {name: list(p.shape) for name, p in zip(self.names, self.weights, strict=True)}
        if here != state["shapes"]:
            raise RunError("the checkpoint does not fit the update: other weights were trained")
        numbers = {name: i for i, name in enumerate(self._order())}
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {numbers[name]: of for name, of in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.taken = state["taken"]
        self.spending.at_least(state["spent"])
        self._look_ahead()

    def _order(self) -> list[str]:
        """Names of the weights in the order of the optimiser's groups."""
        names = {id(p): name for name, p in zip(self.names, self.weights, strict=True)}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
