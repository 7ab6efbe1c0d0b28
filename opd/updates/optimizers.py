"""The optimisers that an update may take: torch's own, and those of two other packages where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from opd.errors import RecipeError

Kind = Literal["adamw", "sgd", "muon", "adamw_8bit", "schedule_free"]

PACKAGES: dict[str, str] = {"adamw_8bit": "bitsandbytes", "schedule_free": "schedulefree"}
"""Which package has an optimiser that torch has not."""

MOMENTUM: dict[str, float] = {"sgd": 0.9, "muon": 0.95}
"""Of the optimisers that have one, unless the recipe says otherwise."""

SHARDED = ("adamw", "sgd")
"""Those that work number by number, and so on weights that processes hold together."""


def make_optimizer(
    kind: Kind,
    module: torch.nn.Module,
    *,
    rate: float,
    decay: float,
    betas: tuple[float, float],
    momentum: float | None,
) -> torch.optim.Optimizer:
    """An optimiser over the trainable parameters of `module`.

    `muon` orthogonalises the step of each weight matrix inside the model (torch.optim.Muon), scaled so that AdamW's
    learning rates fit; embeddings, the output head, vectors and kernels are AdamW's.

    Raises:
        RecipeError: a package that is not installed, or no matrix that Muon could move.
    """
    check_installed(kind)
    trained = [p for p in module.parameters() if p.requires_grad]

    def adamw(parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)

    if kind == "adamw":
        return adamw(trained)
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=rate, momentum=_momentum(kind, momentum), weight_decay=decay)
    if kind == "muon":
        outer = _embeddings_and_heads(module)
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in outer]
        inside = {id(p) for p in matrices}
        if not matrices:
            raise RecipeError("update.optimizer is 'muon' and the student trains no matrix inside; take adamw")
        muon = torch.optim.Muon(
            matrices,
            lr=rate,
            weight_decay=decay,
            momentum=_momentum(kind, momentum),
            adjust_lr_fn="match_rms_adamw",
        )
        rest = [p for p in trained if id(p) not in inside]
        return Together([muon, adamw(rest)] if rest else [muon])
    package: Any = importlib.import_module(PACKAGES[kind])
    make: Callable[..., torch.optim.Optimizer]
    make = package.optim.AdamW8bit if kind == "adamw_8bit" else package.AdamWScheduleFree
    return make(trained, lr=rate, betas=betas, weight_decay=decay)


def check_installed(kind: Kind) -> None:
    """Raise `RecipeError` for an optimiser whose package is not there."""
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise RecipeError(f"update.optimizer is {kind!r}, which is not installed: pip install {package}")
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        raise RecipeError(f"update.optimizer is 'muon', which torch {torch.__version__} has not; install torch>=2.9")


def _momentum(kind: Kind, given: float | None) -> float:
    return MOMENTUM[kind] if given is None else given


def _embeddings_and_heads(module: torch.nn.Module) -> set[int]:
    """Ids of the weights that look up or score the vocabulary; tied ones are one."""
    found: list[torch.nn.Module] = [part for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    for part in module.modules():
        output: Any = getattr(part, "get_output_embeddings", None)
        head = None if output is None else output()
        found += [head] if isinstance(head, torch.nn.Module) else []
    return {id(p) for part in found for p in part.parameters()}


class Together(torch.optim.Optimizer):
    """Several optimisers of different parameters as one: one state and one list of groups, in their order."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": list(group["params"])} for group in groups], {})
        self.param_groups = groups
        self._share()

    def _share(self) -> None:
        """Let the parts work on the state and the groups of the whole."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:stop]
            start = stop

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
