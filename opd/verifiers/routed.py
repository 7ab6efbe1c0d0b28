"""Several verifiers of whom exactly one judges a prompt: the one that a column of the prompt names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from opd.choice import OneOf
from opd.context import Context
from opd.prompts import Prompt
from opd.trajectories import Outcome, Trajectories
from opd.verifiers.base import Scorer, Verifier


class RoutedVerifier(Verifier):
    """Each prompt has the verdicts of the route that its column `by` names; one that names none has no verdict."""

    kind: Literal["routed"] = "routed"
    by: str = Field(description="Column of the prompts that names the route")
    routes: dict[str, Annotated[Verifier, OneOf(Verifier)]] = Field(
        min_length=1, description="Verifiers by the column's value"
    )

    @model_validator(mode="after")
    def _fits(self) -> RoutedVerifier:
        for tag, route in self.routes.items():
            if isinstance(route, RoutedVerifier):
                raise ValueError(f"route {tag!r} is routed itself; list its routes here")
        return self

    def route(self, prompt: Prompt) -> str | None:
        """The tag of a prompt, where it is one of the routes; a number is its digits, as for a routed teacher."""
        tag = str(prompt.fields.get(self.by, ""))
        return tag if tag in self.routes else None

    def judges(self, prompt: Prompt) -> bool:
        tag = self.route(prompt)
        return tag is not None and self.routes[tag].judges(prompt)

    @property
    def needs(self) -> str:
        return f"the column {self.by!r} with one of {', '.join(self.routes)}, and what that route reads"

    @property
    def measured(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for route in self.routes.values() for name in route.measured))

    def check_machine(self) -> None:
        for route in self.routes.values():
            route.check_machine()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            tag = self.route(prompt)
            if tag is not None:
                self.routes[tag].check_prompts([prompt])

    def build(self, context: Context) -> RoutedVerdicts:
        return RoutedVerdicts(self, {tag: route.build(context) for tag, route in self.routes.items()})


class RoutedVerdicts(Scorer):
    """The built routes."""

    settings: RoutedVerifier

    def __init__(self, settings: RoutedVerifier, routes: Mapping[str, Scorer]):
        super().__init__(settings)
        self.routes = routes

    @property
    def notes(self) -> Sequence[str]:
        return [note for route in self.routes.values() for note in route.notes]

    def judges(self, prompt: Prompt) -> bool:
        tag = self.settings.route(prompt)
        return tag is not None and self.routes[tag].judges(prompt)

    def score(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> torch.Tensor:
        rewards = torch.full((len(trajectories),), float("nan"))
        tags = [self.settings.route(prompt) for prompt in trajectories.prompts]
        for tag, route in self.routes.items():
            mine = [i for i, own in enumerate(tags) if own == tag]
            # A route without a trajectory is asked too: what it says of its last batch is then of this one.
            rewards[mine] = route.score(trajectories.pick(mine)[0], [outcomes[i] for i in mine])
        return rewards

    def measure(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> dict[str, torch.Tensor]:
        found = {name: torch.full((len(trajectories),), float("nan")) for name in self.settings.measured}
        tags = [self.settings.route(prompt) for prompt in trajectories.prompts]
        for tag, route in self.routes.items():
            mine = [i for i, own in enumerate(tags) if own == tag]
            if mine:
                of_route = route.measure(trajectories.pick(mine)[0], [outcomes[i] for i in mine])
                for name, values in of_route.items():
                    found[name][mine] = values
        return found

    def shown(self, prompt: Prompt, row: Mapping[str, Any]) -> dict[str, Any]:
        tag = self.settings.route(prompt)
        return {} if tag is None else self.routes[tag].shown(prompt, row)

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        return {k: v for route in self.routes.values() for k, v in route.own_signals(sum_over_processes).items()}
