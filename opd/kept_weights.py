"""The student's weights as they once were: kept and restored when a curriculum asks for it."""

from __future__ import annotations

from typing import Any

import torch

from opd.policies import Student
from opd.sharding import like


class KeptWeights:
    """One copy of what training moves, made on request; it is in checkpoints."""

    def __init__(self, student: Student):
        self.student = student
        self.kept: dict[str, torch.Tensor] | None = None

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.student.module.named_parameters() if p.requires_grad]

    def keep(self) -> None:
        """Copy the weights as they are now, in place of those kept before."""
        self.kept = {name: p.detach().clone() for name, p in self._trained()}

    @torch.no_grad()
    def restore(self) -> bool:
        """Copy the kept weights back; False when none were kept. What an optimiser knows of the others stays."""
        if self.kept is None:
            return False
        for name, parameter in self._trained():
            parameter.copy_(like(self.kept[name], parameter))
        return True

    def state_dict(self) -> dict[str, Any]:
        return {} if self.kept is None else {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state.get("kept")
