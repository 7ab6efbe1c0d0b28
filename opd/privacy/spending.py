"""What a run has spent: every noisy step that it took, also those that a kill made it take again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.files.whole import write_whole
from opd.privacy.accounting import Accountant, Part, epsilon_of

FILE = "privacy.json"
"""In the run directory; written before each step is taken, so that no kill makes a run forget one."""


class Spending:
    """Steps by noise and rate; the number of each only grows.

    A step that was taken after the last checkpoint, and is taken again by the process that goes on, counts twice: its
    noise was another.
    """

    def __init__(self, delta: float, accountant: Accountant):
        self.delta, self.accountant = delta, accountant
        self.steps: dict[tuple[float, float], int] = {}

    @property
    def parts(self) -> list[Part]:
        return [Part(noise, rate, steps) for (noise, rate), steps in self.steps.items()]

    @property
    def total(self) -> int:
        return sum(self.steps.values())

    def add(self, noise: float, rate: float) -> None:
        """One step more."""
        self.steps[noise, rate] = self.steps.get((noise, rate), 0) + 1

    def epsilon(self) -> float:
        """Of all steps so far."""
        return epsilon_of(self.parts, self.delta, self.accountant)

    def state(self) -> list[dict[str, float]]:
        return [{"noise_multiplier": p.noise, "sampling_rate": p.rate, "steps": p.steps} for p in self.parts]

    def at_least(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up what another record knows of this run; of each kind of step the larger number counts."""
        for entry in state:
            key = float(entry["noise_multiplier"]), float(entry["sampling_rate"])
            self.steps[key] = max(self.steps.get(key, 0), int(entry["steps"]))

    def write(self, folder: Path) -> None:
        """Write it whole.

        Raises:
            RunError: that is not possible; the step must not be taken then.
        """
        content = {"delta": self.delta, "accountant": self.accountant, "spent": self.state()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FILE, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise RunError(
                f"cannot write {folder / FILE} ({error.strerror or error}), and no step is taken that is not counted; "
                "mend that and go on with --resume"
            ) from None

    def read(self, folder: Path) -> bool:
        """Take up what an earlier process of the run wrote, and whether it did.

        Raises:
            RunError: the file cannot be read as what it is.
        """
        path = folder / FILE
        if not path.is_file():
            return False
        try:
            self.at_least(json.loads(path.read_text(encoding="utf-8"))["spent"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{path} says what this run has spent and cannot be read ({error}); put it back, or start another run "
                "with output=PATH"
            ) from None
        return True
