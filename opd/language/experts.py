"""Mixtures of experts: which experts the routers chose, and the loss by which a family keeps their load even."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from opd.language.layers import decoder_of


@dataclass
class Choices:
    """What the routers of one forward pass said, layer by layer: `logits` `[tokens, E]` with their graph and `chosen`
    int64 `[tokens, k]`, padding included."""

    logits: list[torch.Tensor] = field(default_factory=list)
    chosen: list[torch.Tensor] = field(default_factory=list)


class Experts:
    """The routers of a transformers causal model.

    Attributes:
        routers: by name; empty for a dense model.
        coefficient: of the router's auxiliary loss, where the model's config asks for that loss (`output_router_logits`)
            and its family has one; else 0.
        note: what a person should know about that loss, or None.
    """

    def __init__(self, model: Any):
        self.model = model
        body = decoder_of(model)
        recorded = (getattr(body, "_can_record_outputs", None) or {}).get("router_logits", [])
        kinds = {}
        for recorder in recorded if isinstance(recorded, list | tuple) else [recorded]:
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                kinds[kind] = getattr(recorder, "index", 0)
        self.routers = {name: part for name, part in model.named_modules() if type(part) in kinds}
        self.index = {name: kinds[type(part)] for name, part in self.routers.items()}
        config = model.config.get_text_config(decoder=True)
        self.top_k = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1)
        self.coefficient, self.note = self._loss(config) if self.routers else (0.0, None)

    def _loss(self, config: Any) -> tuple[float, str | None]:
        weight = next((getattr(config, n) for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(config, n)), None)
        balance = getattr(sys.modules[type(self.model).__module__], "load_balancing_loss_func", None)
        known = balance is not None and list(inspect.signature(balance).parameters)[1:3] == ["num_experts", "top_k"]
        if not known or not hasattr(self.model, "num_experts"):
            return 0.0, f"the student's routers learn without an auxiliary loss: opd knows none of {config.model_type!r}"
        if not getattr(config, "output_router_logits", False) or not weight:
            return 0.0, (
                "the student's routers learn without their auxiliary loss, as its config says (output_router_logits: "
                f"{str(getattr(config, 'output_router_logits', False)).lower()}, coefficient {weight})"
            )
        self._balance = balance
        return float(weight), f"the routers' auxiliary loss is added, times {weight:g}, as the student's config says"

    @contextmanager
    def watched(self) -> Iterator[Choices]:
        """What the routers say in the forward passes inside; a second pass of gradient checkpointing is not seen."""
        seen = Choices()

        def note(name: str) -> Any:
            def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                logits = outputs[self.index[name] if len(outputs) > 1 else 0]
                logits = logits.reshape(-1, logits.shape[-1])
                chosen = next((x for x in outputs if _lists_choices(x, len(logits))), None)
                seen.logits.append(logits)
                seen.chosen.append(logits.detach().topk(self.top_k, -1).indices if chosen is None else chosen.detach())

            return hook

        handles = [part.register_forward_hook(note(name)) for name, part in self.routers.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, seen: Choices, present: torch.Tensor | None) -> torch.Tensor:
        """The family's own auxiliary loss of one pass, before its coefficient; `present` int64 `[B, L]` masks padding."""
        found: torch.Tensor = self._balance(
            tuple(seen.logits), self.model.num_experts, self.model.num_experts_per_tok, present
        )
        return found

    def loads(self, seen: Choices, present: torch.Tensor | None) -> torch.Tensor:
        """float64 `[layers, E]`: how many tokens each expert of each layer got, on the CPU."""
        real = None if present is None else present.reshape(-1).bool()
        return torch.stack([
            torch.bincount((chosen if real is None else chosen[real]).reshape(-1), minlength=logits.shape[-1]).double().cpu()
            for logits, chosen in zip(seen.logits, seen.chosen, strict=True)
        ])


def busiest(loads: torch.Tensor) -> float:
    """The busiest expert's share of a layer's choices times the number of experts, mean over layers: 1 is even, E is one
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


def router_names(model: Any) -> Sequence[str]:
    """Names of the routers, and of what lies inside them."""
    names = Experts(model).routers
    return [name for name, _ in model.named_modules() if any(name == r or name.startswith(f"{r}.") for r in names)]
