"""What the token view can show of a row. A layer is an entry here and, if it draws in a new way, a JavaScript file.

A row is a line of samples.jsonl or rollouts.jsonl. The page knows no key of it by name besides the tokens: it looks up
the layers that read the row's keys. Keys without a layer still show, values with an automatic colour scale and
everything else as plain fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ASSETS = Path(__file__).parent / "assets"

Place = Literal["colour", "token", "row"]


@dataclass(frozen=True)
class Layer:
    """One thing to show of a row.

    Attributes:
        reads: key of the row; values by token are `values.NAME`.
        title: what the page calls it.
        place: `colour` paints the tokens with one number each; `token` adds a block to the panel of the token under
            the pointer; `row` adds a block under the row's tokens.
        renderer: name of a colour scale (`opd.scales` in scales.js), of a token renderer (`opd.tokenRenderers`) or of
            a row renderer (`opd.rowRenderers`), as `place` says.
        unit: of the numbers, for legends.
        about: one sentence for a reader who does not know the name.
        hue: of the colour scale: `orange`, `blue` or `green`.
    """

    reads: str
    title: str
    place: Place
    renderer: str
    unit: str = ""
    about: str = ""
    hue: Literal["orange", "blue", "green"] = "orange"


_layers: dict[str, Layer] = {}
_scripts: list[Path] = []


def register(layer: Layer, script: Path | None = None) -> Layer:
    """Make the report show `layer`; `script` is a JavaScript file that adds its renderer, when the renderer is new.

    Files in `assets/layers` are part of every report and need no `script`.

    Raises:
        ValueError: when another layer reads the same key already.
    """
    if _layers.setdefault(layer.reads, layer) != layer:
        raise ValueError(f"a report layer for {layer.reads!r} is registered already: {_layers[layer.reads].title!r}")
    if script is not None and script not in _scripts:
        _scripts.append(script)
    return layer


def registered() -> list[dict[str, Any]]:
    """Every layer as plain data, in order of registration, which is the order in the page."""
    return [asdict(layer) for layer in _layers.values()]


def scripts() -> Iterator[str]:
    """Source of every file that adds a renderer."""
    for path in [*sorted((ASSETS / "layers").glob("*.js")), *_scripts]:
        yield path.read_text(encoding="utf-8")


for _layer in (
    Layer(
        "values.reverse_kl",
        "reverse KL",
        "colour",
        "amount",
        "nats",
        "KL(student || teacher) at this state: what the student would do that the teacher would not",
    ),
    Layer(
        "values.forward_kl",
        "forward KL",
        "colour",
        "amount",
        "nats",
        "KL(teacher || student) at this state: what the teacher would do that the student would not",
    ),
    Layer(
        "values.student_entropy",
        "student's entropy",
        "colour",
        "amount",
        "nats",
        "how undecided the student is at this state",
        "blue",
    ),
    Layer(
        "values.teacher_entropy",
        "teacher's entropy",
        "colour",
        "amount",
        "nats",
        "how undecided the teacher is at this state",
        "blue",
    ),
    Layer(
        "values.log_q",
        "log q, student",
        "colour",
        "log_probability",
        "nats",
        "log-probability of this token under the student; strong colour = surprising",
    ),
    Layer(
        "values.log_p",
        "log p, teacher",
        "colour",
        "log_probability",
        "nats",
        "log-probability of this token under the teacher; strong colour = surprising",
    ),
    Layer(
        "values.divergence",
        "divergence",
        "colour",
        "automatic",
        "nats",
        "the training divergence at this state, as the recipe names it",
    ),
    Layer(
        "values.weight",
        "weight",
        "colour",
        "amount",
        "",
        "how much this state counted in the loss, relative to the others",
        "green",
    ),
    Layer(
        "values.overlap",
        "overlap",
        "colour",
        "share",
        "",
        "share of student's and teacher's likeliest tokens that both have",
        "green",
    ),
    Layer(
        "values.weighted_overlap",
        "overlap by probability",
        "colour",
        "share",
        "",
        "share of the student's probability on its likeliest tokens that lies on the teacher's",
        "green",
    ),
    Layer(
        "values.accepted",
        "accepted",
        "colour",
        "share",
        "",
        "1 where the token is among the teacher's likeliest of a given mass; of a drafter's proposals, where it stood",
        "green",
    ),
    Layer(
        "values.drifted",
        "drift event",
        "colour",
        "share",
        "",
        "1 where student and teacher part; each event lowers the weight of all that follows",
    ),
    Layer(
        "values.reliable",
        "reliable",
        "colour",
        "share",
        "",
        "1 up to the drift event that uses the weight up; their number is the effective length",
        "blue",
    ),
    Layer(
        "values.offset",
        "offset",
        "colour",
        "signed",
        "nats a token",
        "what shapings added to the teacher's log-probability of this token",
    ),
    Layer(
        "values.return",
        "return",
        "colour",
        "signed",
        "nats a token",
        "mean log p(token) - log q(token) of the whole answer, before anything was moved",
        "blue",
    ),
    Layer(
        "values.group_margin",
        "margin",
        "colour",
        "signed",
        "nats a token",
        "return of the right less that of the wrong answers to this prompt",
        "blue",
    ),
    Layer(
        "values.group_margin_after",
        "margin after",
        "colour",
        "signed",
        "nats a token",
        "the same after calibration",
        "blue",
    ),
    Layer(
        "values.inverted",
        "inverted",
        "colour",
        "share",
        "",
        "1 of a right answer with less return than a wrong one, and of a wrong one with more than a right one",
    ),
    Layer("values.margin_kept", "kept by the mask", "colour", "share", "", "0 of an answer that was left out", "green"),
    Layer("values.outcome_kept", "kept by the balancer", "colour", "share", "", "0 of an answer it dropped", "green"),
    Layer("values.gated", "gated", "colour", "share", "", "1 where the token was left out for its log-ratio"),
    Layer("values.slot", "slot", "colour", "amount", "", "place of the proposal in its block, from 1", "blue"),
    Layer("blocks", "blocks that were verified", "row", "blocks"),
    Layer("shaped", "what was done to it", "row", "words"),
    Layer("debate", "debate of the teachers", "row", "debate"),
    Layer("turns", "what was said, turn by turn", "row", "turns"),
    Layer("alternatives", "most likely tokens", "token", "alternatives"),
    Layer("authors", "written by", "token", "author"),
    Layer("stopped", "ended by the watch", "row", "stopped"),
    Layer("episode", "episode", "row", "episode"),
    Layer("image", "picture", "row", "picture"),
    Layer("images", "pictures of the prompt, as the student sees them", "row", "pictures"),
    Layer("interval", "when it happens", "row", "timeline"),
    Layer("frames", "frames of the prompt's video, as the student sees them", "row", "frames"),
):
    register(_layer)
