"""Charts that show several logged names together. A name that is in no chart here has one of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        reads: the logged name.
        title: in the legend.
        low, high: logged names between which the chart is shaded, if any.
        dashed: of a bound or a setting.
    """

    reads: str
    title: str
    low: str = ""
    high: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Curves:
    """Several names over the steps. It shows where a run logged the first line's."""

    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    about: str = ""


@dataclass(frozen=True)
class Bars:
    """Names that end in a whole number, as bars over that number: `FAMILY/3`, or `FAMILY/TAG/3` with one chart a tag.
    Of a name that was logged at several steps the last value counts.

    Attributes:
        families: `(beginning of the names, title in the legend)`, bars beside each other.
        axis: what the number is.
        notes: beginning of the names whose values stand above the last family's bars, such as `train/repeats/`.
    """

    title: str
    families: tuple[tuple[str, str], ...]
    axis: str
    notes: str = ""
    unit: str = ""
    about: str = ""


_charts: list[Curves | Bars] = []


def register_chart(chart: Curves | Bars) -> Curves | Bars:
    """Make the report show `chart`, above the charts of single names."""
    if chart not in _charts:
        _charts.append(chart)
    return chart


def registered_charts() -> list[dict[str, Any]]:
    """Every chart as plain data, in order of registration, which is the order in the page."""
    return [{"kind": type(chart).__name__.lower(), **asdict(chart)} for chart in _charts]


def _share(name: str, title: str) -> Line:
    return Line(f"train/{name}", title)


for _chart in (
    Curves(
        "margins of prompts",
        (
            Line("train/margin/before_p50", "before", "train/margin/before_p10", "train/margin/before_p90"),
            Line("train/margin/after_p50", "after", "train/margin/after_p10", "train/margin/after_p90"),
            Line("train/margin/delta", "delta", dashed=True),
        ),
        "nats a token",
        "return of right less that of wrong answers to one prompt, before and after calibration: median and the middle "
        "80 % of the prompts with both",
    ),
    Curves(
        "returns against outcomes",
        (
            _share("margin/inverted", "mixed prompts with a pair the wrong way round"),
            _share("margin/inverted_pairs", "pairs the wrong way round"),
            _share("margin/calibrated", "mixed prompts below delta"),
            _share("margin/mixed", "prompts with right and wrong answers (mixed)"),
        ),
        "share",
        "the wrong way round: the teacher would rather have the wrong answer. 0.5 of the pairs is what chance gives",
    ),
    Curves(
        "answers that were moved",
        (
            _share("margin/raised", "raised"),
            _share("margin/lowered", "lowered"),
            _share("margin/masked", "left out by the mask"),
        ),
        "share of answers",
    ),
    Curves(
        "answers that the balancer keeps",
        (
            _share("balance/right", "right, of all"),
            _share("balance/kept", "kept, of all"),
            _share("balance/right_kept", "right, of those kept"),
        ),
        "share of answers",
    ),
    Curves(
        "acceptance length",
        (
            Line("train/acceptance_length", "of the step's answers"),
            Line("train/engine/acceptance_length", "of the step's answers"),
            Line("held_out/acceptance_length", "held out"),
        ),
        "tokens",
        "that a pass of the target adds while it verifies a block",
    ),
    Curves(
        "passes saved by a drafter",
        (_share("passes_saved", "of the target"), _share("engine/passes_saved", "of the student")),
        "share",
        "of those that writing the same tokens takes without one",
    ),
    Bars(
        "proposals that stood, by slot",
        (("train/accepted_at/", "of the last step's answers"), ("held_out/accepted_at/", "held out")),
        "slot of the block",
        unit="share of blocks",
        about="a slot stands where all before it do",
    ),
    Bars(
        "prompts by right answers before training",
        (("train/curriculum/prompts/", "as given"), ("train/curriculum/balanced/", "in the balanced set")),
        "right answers",
        "train/curriculum/repeats/",
        "prompts",
        "above the bars: how often a prompt stands in the balanced set",
    ),
):
    register_chart(_chart)
