"""A control of the reproduction of Vision-OPD: the teacher sees a crop that says nothing about the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from opd.errors import DataError
from opd.prompts.base import Prompts
from opd.prompts.boxed import BoxedPrompts


class OtherCrops(Prompts):
    """Rows of a boxed source with the crop of another row in the column `crop`: that of the row behind, and of the last
    the first's. The student's own view stays as it is."""

    kind: Literal["other_crops"] = "other_crops"
    of: BoxedPrompts = Field(description="Whose crops change places")

    def rows(self) -> Sequence[tuple[str, dict[str, Any] | DataError]]:
        found = list(self.of.rows())
        crops = [fields["crop"] for _, fields in found if not isinstance(fields, DataError)]
        crops = [*crops[1:], *crops[:1]]
        return [
            (where, fields if isinstance(fields, DataError) else {**fields, "crop": crops.pop(0)})
            for where, fields in found
        ]
