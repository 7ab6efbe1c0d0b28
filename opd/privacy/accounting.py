"""What steps of Poisson draws with Gaussian noise cost: epsilon of given noise, and noise of a given epsilon.

Neighbours differ by one record that is there or not. A step draws each record with probability `rate` by itself, adds
up what was clipped to a norm, and adds normal noise of `noise` times that norm (Abadi et al. 2016). The accountants
are those of Opacus (`rdp`, `prv`) and of dp-accounting (`pld`), imported when they are first asked.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

from opd.errors import RecipeError

Accountant = Literal["prv", "pld", "rdp"]
"""`prv` and `pld` compose the distribution of the privacy loss numerically and are nearly exact; `rdp` composes Rényi
divergences (Mironov 2017), is quick, and bounds epsilon from above by some tenths more."""

PACKAGES: dict[Accountant, tuple[str, str]] = {
    "prv": ("opacus", "opacus"),
    "pld": ("dp_accounting", "dp-accounting"),
    "rdp": ("opacus", "opacus"),
}
"""What each accountant is imported from, and how that is installed."""

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
"""Orders of the Rényi divergences that `rdp` takes the best of."""

DECIMALS, CLOSE = 4, 5e-4
"""Of noise multipliers that are solved for: rounded up, so that a recipe and a log can hold them whole; and by which
share they may be larger than need be."""


class Part(NamedTuple):
    """Steps that were alike: `noise` in units of the clipping norm, `rate` the probability of each record."""

    noise: float
    rate: float
    steps: int


def check_accountant(accountant: Accountant) -> None:
    """Raise `RecipeError` for one whose package is not there."""
    module, package = PACKAGES[accountant]
    if importlib.util.find_spec(module) is None:
        others = [name for name in get_args(Accountant) if importlib.util.find_spec(PACKAGES[name][0]) is not None]
        also = f", or set update.accountant={others[0]}" if others else ""
        raise RecipeError(f"update.accountant is {accountant!r}, which is not installed: pip install {package}{also}")


def epsilon_of(parts: Sequence[Part], delta: float, accountant: Accountant) -> float:
    """Epsilon at `delta` of all parts together, bounded from above; infinite where some step had no noise."""
    taken = tuple(Part(*part) for part in parts if part.steps)
    if not taken:
        return 0.0
    if any(part.noise <= 0 for part in taken):
        return math.inf
    check_accountant(accountant)
    return {"prv": _prv, "pld": _pld, "rdp": _rdp}[accountant](taken, delta)


@lru_cache(maxsize=256)
def _rdp(parts: tuple[Part, ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant

    made = RDPAccountant()
    made.history = [tuple(part) for part in parts]
    with warnings.catch_warnings():
        # The best order at an end of the list makes the bound looser, not wrong.
        warnings.simplefilter("ignore")
        return float(made.get_epsilon(delta, alphas=list(ORDERS)))


@lru_cache(maxsize=256)
def _prv(parts: tuple[Part, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    made = PRVAccountant()
    made.history = [tuple(part) for part in parts]
    rough = _rdp(parts, delta)
    # The bound is above by at most this; a hundredth of what is looked for, so that a small epsilon is not all error.
    error = min(0.01, max(rough / 100, 1e-4))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(made.get_epsilon(delta, eps_error=error))
    except (RuntimeError, ValueError, MemoryError, OverflowError):
        # Where there is next to no noise its grid has no end; the other bound holds there too.
        return rough
    return found if math.isfinite(found) and 0 <= found <= rough else rough


@lru_cache(maxsize=256)
def _pld(parts: tuple[Part, ...], delta: float) -> float:
    import dp_accounting
    from dp_accounting import pld

    made = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for part in parts:
        event = dp_accounting.GaussianDpEvent(part.noise)
        drawn = event if part.rate == 1 else dp_accounting.PoissonSampledDpEvent(part.rate, event)
        made.compose(drawn, part.steps)
    return float(made.get_epsilon(delta))


def noise_for(epsilon: float, delta: float, rate: float, steps: int, accountant: Accountant) -> float:
    """The least noise multiplier, up to `CLOSE`, with which `steps` steps cost at most `epsilon` at `delta`.

    Raises:
        RecipeError: no noise up to a million keeps it.
    """

    def cost(noise: float) -> float:
        return epsilon_of([Part(noise, rate, steps)], delta, accountant)

    low, high = (0.0, 1.0) if accountant == "rdp" else _around(noise_for(epsilon, delta, rate, steps, "rdp"))
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise RecipeError(
                f"update.epsilon is {epsilon:g}, which no noise keeps at delta {delta:g} over {steps} steps; raise it, "
                "or take fewer steps"
            )
    while low and cost(low) <= epsilon:
        low, high = low / 2, low
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        if cost(middle) > epsilon:
            low = middle
        else:
            high = middle
    return math.ceil(high * 10**DECIMALS) / 10**DECIMALS


def _around(noise: float) -> tuple[float, float]:
    """Where to look for what the nearly exact accountants find: somewhat below the noise that `rdp` asks for."""
    return 0.8 * noise, noise


def steps_within(
    epsilon: float, delta: float, spent: Sequence[Part], noise: float, rate: float, most: int, accountant: Accountant
) -> int:
    """How many more steps, up to `most`, keep all together within `epsilon`."""

    def fits(more: int) -> bool:
        return epsilon_of([*spent, Part(noise, rate, more)], delta, accountant) <= epsilon

    if fits(most):
        return most
    # Not even what was spent: nothing more.
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
