"""The state of every random generator that training may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Python's, NumPy's and torch's generators of this process, and the one of `device` where it has its own."""
    state: Any = numpy.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.tensor(keys.astype(numpy.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Inverse of `random_state`; a generator of a device that the state does not know is left as it is."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
