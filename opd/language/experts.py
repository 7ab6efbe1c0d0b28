"""Mixtures of experts: which experts the routers chose, and the loss by which a family keeps their load even."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from opd.errors import RunError
from opd.language.layers import decoder_of
from opd.objectives.base import Loss


class Experts:
    """The routers of a transformers causal model, what they chose and the family's auxiliary loss.

    Attributes:
        routers: by name; empty for a dense model.
        coefficient: of the routers' auxiliary loss, where the config asks for that loss (`output_router_logits`) and
            the family has one; else 0.
        note: what a person should know about that loss, or None.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        body = decoder_of(model)
        recorded = (getattr(body, "_can_record_outputs", None) or {}).get("router_logits", [])
        self.index: dict[type[torch.nn.Module], int] = {}
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                self.index[kind] = getattr(recorder, "index", 0)
        # An adapter on a router's weight makes its class another one.
        kinds = tuple(self.index)
        self.routers = {name: part for name, part in model.named_modules() if isinstance(part, kinds)}
        self.seen: tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None] | None = None
        self.sums: dict[str, torch.Tensor] = {}
        config = model.config.get_text_config(decoder=True)
        self.top_k = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1)
        self.balance: Callable[..., torch.Tensor] | None = None
        self.coefficient, self.note = self._loss(config) if self.routers else (0.0, None)

    def _loss(self, config: Any) -> tuple[float, str | None]:
        names = ("router_aux_loss_coef", "aux_loss_coef")
        weight = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        balance: Callable[..., torch.Tensor] | None = getattr(
            sys.modules[type(self.model).__module__], "load_balancing_loss_func", None
        )
        known = balance is not None and list(inspect.signature(balance).parameters)[1:3] == ["num_experts", "top_k"]
        if not known or not hasattr(self.model, "num_experts"):
            return 0.0, f"no auxiliary loss of routers is added: opd knows none of the family {config.model_type!r}"
        if not getattr(config, "output_router_logits", False) or not weight:
            return 0.0, (
                "no auxiliary loss of routers is added, as the student's config says (output_router_logits: "
                f"{str(getattr(config, 'output_router_logits', False)).lower()}, coefficient {weight})"
            )
        self.balance = balance
        return float(weight), f"the auxiliary loss of routers is added, times {weight:g}, as the student's config says"

    @contextmanager
    def watched(self, present: torch.Tensor | None) -> Iterator[None]:
        """Keep what the routers say in the forward pass inside, where it has a gradient; the second pass of gradient
        checkpointing is not seen. `present` `[B, L]` masks padding."""
        if not self.routers or not torch.is_grad_enabled():
            yield
            return
        logits: list[torch.Tensor] = []
        chosen: list[torch.Tensor] = []

        def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            index = next(i for kind, i in self.index.items() if isinstance(module, kind))
            found = outputs[index if len(outputs) > 1 else 0]
            logits.append(found.reshape(-1, found.shape[-1]))
            listed = next((x for x in outputs if _lists_choices(x, len(logits[-1]))), None)
            # A router that returns scores alone takes the highest.
            chosen.append(logits[-1].detach().topk(self.top_k, -1).indices if listed is None else listed.detach())

        handles = [part.register_forward_hook(note) for part in self.routers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not logits:
            raise RunError("the routers of the student were not asked in its forward pass; their load is not known")
        self.seen = logits, chosen, present

    def losses(self, share: float) -> list[Loss]:
        """The auxiliary loss of the pass that was watched last, times its coefficient and `share`; counts the load."""
        if self.seen is None:
            return []
        (logits, chosen, present), self.seen = self.seen, None
        real = None if present is None else present.reshape(-1).bool()
        loads = torch.stack(
            [
                torch.bincount((of if real is None else of[real]).reshape(-1), minlength=scores.shape[-1])
                .double()
                .cpu()
                for scores, of in zip(logits, chosen, strict=True)
            ]
        )
        self.sums["loads"] = self.sums.get("loads", torch.zeros_like(loads)) + loads
        if self.balance is None:
            return []
        total = self.balance(tuple(logits), self.model.num_experts, self.model.num_experts_per_tok, present)
        sums = torch.tensor([float(total.detach()) * share, share], dtype=torch.float64)
        self.sums["loss"] = self.sums.get("loss", torch.zeros_like(sums)) + sums
        nothing = torch.zeros(0, device=total.device)
        return [Loss(self.coefficient * share * total, nothing, nothing)]

    def signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`expert_load_max` and `router_loss` since they were asked for last."""
        found = {name: sum_over_processes(value) for name, value in self.sums.items()}
        self.sums = {}
        signals = {"expert_load_max": busiest(found["loads"])} if "loads" in found else {}
        return signals | ({"router_loss": float(found["loss"][0] / found["loss"][1])} if "loss" in found else {})


def busiest(loads: torch.Tensor) -> float:
    """The busiest expert's share of a layer's choices times the number of experts, mean over layers: 1 is even, E one
    expert for everything. `loads` is `[layers, E]`."""
    shares = loads / loads.sum(1, keepdim=True).clamp(min=1)
    return float((shares.amax(1) * loads.shape[1]).mean())


def fused(model: torch.nn.Module) -> list[str]:
    """Names of modules that hold their experts' weights in one tensor each, which adapters of linear layers pass by."""
    return [
        name
        for name, part in model.named_modules()
        if "expert" in name.rpartition(".")[2].lower()
        and any(weight.dim() == 3 for weight in part.parameters(recurse=False))
    ]


def _lists_choices(output: Any, tokens: int) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and output.dtype in (torch.int64, torch.int32)
        and output.dim() == 2
        and len(output) == tokens
    )
