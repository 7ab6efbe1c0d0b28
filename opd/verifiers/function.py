"""A function from Python as the verifier."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, WithJsonSchema, field_serializer, field_validator

from opd.errors import DataError
from opd.prompts import Prompt
from opd.verifiers.base import CompletionVerifier

Verdict = Callable[[Mapping[str, Any], Any], float | bool | None]
"""`verdict(row, completion)`: the row's columns and what the student made of them, a text or of an image model float32
`[H, W, 3]` in 0..1; a number in [0, 1], or None for a prompt that has no verdict."""


@dataclass(frozen=True)
class Recorded:
    """In the place of a function that a run was given: what its recipe says of it."""

    text: str

    def __call__(self, row: Mapping[str, Any], completion: object) -> None:
        raise LookupError("a recipe on a disk has its name alone")


class FunctionVerifier(CompletionVerifier):
    """What a function of yours returns for the row's columns and the completion: `opd.distill(verifier=my_function)`,
    or in the place of any other verifier. A number in [0, 1], true or false, or None where there is no verdict.

    Recipes on a disk name none: to train or measure by it again, pass it again.
    """

    kind: Literal["function"] = "function"
    # No text that a file holds is one.
    call: Annotated[Verdict, WithJsonSchema({"not": {}})] = Field(description="The function, from Python alone")

    @field_validator("call", mode="before")
    @classmethod
    def _from_python(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and (info.context or {}).get("recorded"):
            return Recorded(value)
        if not callable(value):
            raise ValueError(
                "a function is passed from Python alone, opd.distill(verifier=my_function); in a recipe name a "
                "verifier that a package of yours defines (docs: Extending), or take one of opd's: "
                "verifier=exact_match measures a run whose verifier was a function"
            )
        return value

    @field_serializer("call")
    def _named(self, value: Verdict) -> str:
        return self._name if isinstance(value, Recorded) else f"({self._name} passed from Python)"

    @property
    def _name(self) -> str:
        if isinstance(self.call, Recorded):
            return self.call.text
        name = getattr(self.call, "__qualname__", type(self.call).__name__)
        return f"{getattr(self.call, '__module__', None) or '__main__'}.{name}"

    def score(self, prompt: Prompt, completion: object) -> float | None:
        try:
            found = self.call(prompt.fields, completion)
        except Exception as error:
            # Whatever somebody's function raises; where it was, the cause tells.
            raise DataError(
                f"{prompt.where or prompt.id}: the verifier {self._name} failed ({type(error).__name__}: {error})"
            ) from error
        if found is None:
            return None
        number = float(found) if isinstance(found, numbers.Real) or hasattr(found, "__float__") else float("nan")
        if not 0 <= number <= 1:
            raise DataError(
                f"{prompt.where or prompt.id}: the verifier {self._name} returned {found!r}; it must be a number from "
                "0 to 1, true or false, or None where there is no verdict"
            )
        return number
