"""What a student or a teacher sees of a prompt: messages with places for pictures, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from opd.errors import DataError, nearest
from opd.language.encoding import render
from opd.language.engines.base import EncodedPrompt, PromptInputs
from opd.prompts import Prompt
from opd.prompts.messages import Messages, check_view, of_picture, part_text
from opd.prompts.pictures import is_picture, opened, pictures_in
from opd.vision.identity import pixels_hash

if TYPE_CHECKING:
    from opd.vision.engine import ImageTextModel

MARK = "<image>"
"""Stands in a text for the next picture."""


@dataclass(frozen=True)
class View:
    """Attributes:
    messages: every content a list of parts, `{"type": "text", "text": ...}` or `{"type": "image"}`.
    pictures: one for each part that is a picture, in order.
    """

    messages: Messages
    pictures: Sequence[Image.Image]


def view_of(model: ImageTextModel, prompt: Prompt, column: str | None) -> View:
    """A view of a prompt: `column` names another text (or messages), or other pictures under the same text; without one
    it is the student's.

    Raises:
        DataError: a picture is missing, cannot be opened, or has no place; a text holds a token that stands for one.
    """
    named = prompt.fields.get(column) if column is not None else None
    others = is_picture(named)
    view = prompt.view(None if others else column)
    told = prompt.column if others or column is None else column
    view = check_view(view, prompt.where, told)
    messages = [{"role": "user", "content": view}] if isinstance(view, str) else view
    source = column if others else model.pictures.column
    waiting, given = _waiting(messages, prompt, source)
    parts = [_parts(message.get("content"), given) for message in messages]
    places = sum(1 for content in parts for part in content or () if part["type"] == "image" and part["of"] is None)
    if given and not places:
        # Nothing says where they stand: before the text of whoever asks first.
        first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
        parts[first] = [{"type": "image", "of": None} for _ in waiting] + (parts[first] or [])
        places = len(waiting)
    if places != len(waiting):
        raise DataError(
            f"{prompt.where}: the prompt has places for {places} pictures of column {source!r}, which holds "
            f"{len(waiting)}; give one for each place, or no place at all"
        )
    found, formed = [], []
    left = iter(waiting)
    for message, content in zip(messages, parts, strict=True):
        for part in content or ():
            if part["type"] == "image":
                own = part.pop("of")
                value, where = (next(left), str(source)) if own is None else (own, told)
                found.append(opened(value, prompt, where, model.pictures.limits))
            else:
                _check_text(model, prompt, part["text"])
        formed.append(message if content is None else {**message, "content": content})
    return View(formed, found)


def inputs_of(model: ImageTextModel, prompt: Prompt, view: View) -> EncodedPrompt:
    """What the processor makes of a view: ids alone where there is no picture.

    Raises:
        DataError: template or processor cannot write it.
    """
    text = render(model, prompt, view.messages)
    processor: Any = model.processor
    marker = getattr(processor, "image_token", None)
    if isinstance(marker, str) and text.count(marker) != len(view.pictures):
        raise DataError(
            f"{prompt.where}: the chat template of {model.owner} writes {text.count(marker)} places for "
            f"{len(view.pictures)} pictures; it may take none where they stand, as in a system message"
        )
    if not view.pictures:
        return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    try:
        made = processor(text=[text], images=[list(view.pictures)], add_special_tokens=False, return_tensors="pt")
    except Exception as error:
        # A processor is the model's own program and may raise anything about a picture.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{prompt.where}: the processor of {model.owner} cannot read this prompt ({reason})") from None
    ids = made["input_ids"][0]
    others = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    del others["input_ids"]
    others.pop("attention_mask", None)
    return PromptInputs(ids, others, tuple(pixels_hash(picture) for picture in view.pictures))


def _waiting(messages: Messages, prompt: Prompt, source: str | None) -> tuple[list[object], bool]:
    """The pictures of the column, and whether there are any."""
    if source is None:
        return [], False
    if source not in prompt.fields:
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if any(of_picture(part) is not None for part in parts):
            return [], False
        raise DataError(
            f"{prompt.where}: no column {source!r} with its pictures{nearest(source, prompt.fields)}; name the right "
            "one with student.images, or leave it empty (null) in rows of text alone"
        )
    waiting = pictures_in(prompt.fields[source])
    return waiting, bool(waiting)


def _parts(content: object, given: bool) -> list[dict[str, Any]] | None:
    """A message's content as parts; None where it has none."""
    if content is None:
        return None
    found: list[dict[str, Any]] = []
    for part in [content] if isinstance(content, str) else list(content) if isinstance(content, list) else []:
        picture = of_picture(part)
        if picture is not None:
            found.append({"type": "image", "of": None if picture is True else picture})
            continue
        text = part_text(part) or ""
        pieces = text.split(MARK) if given else [text]
        for i, piece in enumerate(pieces):
            if i:
                found.append({"type": "image", "of": None})
            # Line breaks round a mark are the template's business.
            piece = piece.strip("\n") if len(pieces) > 1 else piece
            if piece:
                found.append({"type": "text", "text": piece})
    return found


def _check_text(model: ImageTextModel, prompt: Prompt, text: str) -> None:
    for token in model.marks:
        if token in text:
            raise DataError(
                f"{prompt.where}: the text holds {token!r}, which stands for a picture in the tokenizer of "
                f"{model.owner}; take it out, or write {MARK} where a picture of the row's column is to stand"
            )
