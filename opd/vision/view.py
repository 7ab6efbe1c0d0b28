"""What a student or a teacher sees of a prompt: messages with places for pictures and videos, and these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from opd.errors import DataError, nearest
from opd.language.encoding import render
from opd.language.engines.base import EncodedPrompt, PromptInputs
from opd.prompts import Prompt
from opd.prompts.messages import Messages, check_view, of_picture, of_video, part_text
from opd.prompts.pictures import is_picture, opened, pictures_in
from opd.prompts.videos import Clip, is_video
from opd.vision.identity import pixels_hash
from opd.vision.videos import Family, VideoSettings, clip_of

if TYPE_CHECKING:
    from opd.vision.engine import ImageTextModel

MARKS = {"image": "<image>", "video": "<video>"}
"""What stands in a text for the next picture or video."""
NAMES = {"image": "picture", "video": "video"}
OF = {"image": of_picture, "video": of_video}


@dataclass(frozen=True)
class View:
    """Attributes:
    messages: every content a list of parts, `{"type": "text", "text": ...}`, `{"type": "image"}` or `{"type":
        "video"}`.
    pictures: one for each part that is a picture, in order.
    videos: one for each part that is a video, in order.
    """

    messages: Messages
    pictures: Sequence[Image.Image]
    videos: Sequence[Clip] = ()


def view_of(model: ImageTextModel, prompt: Prompt, column: str | None) -> View:
    """A view of a prompt: `column` names another text (or messages), or other pictures or videos under the same text;
    without one it is the student's.

    Raises:
        DataError: a picture or a video is missing, cannot be opened, or has no place; a text holds a token that stands
            for one.
    """
    named = prompt.fields.get(column) if column is not None else None
    other = "video" if is_video(named) else "image" if is_picture(named) else None
    view = prompt.view(column if other is None else None)
    told = prompt.column if other is not None or column is None else column
    view = check_view(view, prompt.where, told)
    messages = [{"role": "user", "content": view}] if isinstance(view, str) else view
    videos = model.pictures.videos
    sources = {"image": model.pictures.column, "video": None if videos is None else videos.column}
    if other is not None:
        sources[other] = column
    waiting = _waiting(messages, prompt, sources)
    parts = [_parts(message.get("content"), waiting) for message in messages]
    for kind, values in waiting.items():
        places = sum(1 for content in parts for part in content or () if part["type"] == kind and part["of"] is None)
        if values and not places:
            # Nothing says where they stand: before the text of whoever asks first.
            first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), 0)
            parts[first] = [{"type": kind, "of": None} for _ in values] + (parts[first] or [])
            places = len(values)
        if places != len(values):
            raise DataError(
                f"{prompt.where}: the prompt has places for {places} {NAMES[kind]}s of column {sources[kind]!r}, which "
                f"holds {len(values)}; give one for each place, or no place at all"
            )
    found: dict[str, list[Any]] = {"image": [], "video": []}
    formed = []
    left = {kind: iter(values) for kind, values in waiting.items()}
    for message, content in zip(messages, parts, strict=True):
        for part in content or ():
            if part["type"] == "text":
                _check_text(model, prompt, part["text"])
                continue
            kind, own = part["type"], part.pop("of")
            value, where = (next(left[kind]), str(sources[kind])) if own is None else (own, told)
            if kind == "image":
                found[kind].append(opened(value, prompt, where, model.pictures.limits))
            else:
                found[kind].append(clip_of(value, prompt, where, *_reads_videos(model, prompt)))
        formed.append(message if content is None else {**message, "content": content})
    return View(formed, found["image"], found["video"])


def inputs_of(model: ImageTextModel, prompt: Prompt, view: View) -> EncodedPrompt:
    """What the processor makes of a view: ids alone where there is nothing but text.

    Raises:
        DataError: template or processor cannot write it.
    """
    text = render(model, prompt, view.messages)
    processor: Any = model.processor
    for kind, shown in (("image", view.pictures), ("video", view.videos)):
        marker = getattr(processor, f"{kind}_token", None)
        if isinstance(marker, str) and text.count(marker) != len(shown):
            raise DataError(
                f"{prompt.where}: the chat template of {model.owner} writes {text.count(marker)} places for "
                f"{len(shown)} {NAMES[kind]}s; it may take none where they stand, as in a system message"
            )
    if view.videos:
        return _with_videos(model, view, text)
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


def _with_videos(model: ImageTextModel, view: View, text: str) -> PromptInputs:
    """The ids and tensors of a text with videos, and perhaps pictures: what a processor that reads videos makes."""
    processor: Any = model.processor
    family = Family.of(processor)
    inputs: dict[str, torch.Tensor] = {}
    if view.pictures:
        read = processor.image_processor(list(view.pictures), return_tensors="pt")
        inputs |= {name: read[name] for name in ("pixel_values", "image_grid_thw")}
        written, rest = "", text
        for grid in inputs["image_grid_thw"]:
            before, mark, rest = rest.partition(processor.image_token)
            written += before + mark * int(grid.prod() // family.merge**2)
        text = written + rest
    patches, grids = zip(*(family.patches(clip) for clip in view.videos), strict=True)
    inputs |= {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.cat(grids)}
    if family.times == "positions":
        inputs["second_per_grid_ts"] = torch.tensor([family.step / clip.rate for clip in view.videos])
    text = family.written(text, list(zip(view.videos, grids, strict=True)))
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    types = (ids == processor.image_token_id).long() + 2 * (ids == processor.video_token_id).long()
    return PromptInputs(ids, {**inputs, "mm_token_type_ids": types[None]})


def _reads_videos(model: ImageTextModel, prompt: Prompt) -> tuple[VideoSettings, Family]:
    if model.pictures.videos is None:
        raise DataError(
            f"{prompt.where}: the messages hold a video, and nothing says how {model.owner} reads videos; set "
            "student.videos, e.g. {fps: 2}"
        )
    return model.pictures.videos, Family.of(model.processor)


def _waiting(messages: Messages, prompt: Prompt, sources: dict[str, str | None]) -> dict[str, list[object]]:
    """The pictures and videos of the columns. A row with neither of them, nor in its messages, is refused: it would be
    text alone under a misspelt column."""
    found: dict[str, list[object]] = {"image": [], "video": []}
    wanted = {kind: column for kind, column in sources.items() if column is not None}
    here = {kind: column for kind, column in wanted.items() if column in prompt.fields}
    for kind, column in here.items():
        found[kind] = pictures_in(prompt.fields[column])
    if wanted and not here:
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        if not any(of(part) is not None for of in OF.values() for part in parts):
            kind, column = next((each for each in wanted.items() if each[0] == "video"), next(iter(wanted.items())))
            key, out = "images", "leave it empty (null)"
            if kind == "video":
                key, out = "videos.column", "leave student.videos out"
            raise DataError(
                f"{prompt.where}: no column {column!r} with its {NAMES[kind]}s{nearest(column, prompt.fields)}; name "
                f"the right one with student.{key}, or {out} in rows of text alone"
            )
    return found


def _parts(content: object, waiting: dict[str, list[object]]) -> list[dict[str, Any]] | None:
    """A message's content as parts; None where it has none."""
    if content is None:
        return None
    marks = {MARKS[kind]: kind for kind, values in waiting.items() if values}
    cut = re.compile(f"({'|'.join(marks)})") if marks else None
    found: list[dict[str, Any]] = []
    for part in [content] if isinstance(content, str) else list(content) if isinstance(content, list) else []:
        kind = next((name for name, of in OF.items() if of(part) is not None), None)
        if kind is not None:
            value = OF[kind](part)
            found.append({"type": kind, "of": None if value is True else value})
            continue
        text = part_text(part) or ""
        pieces = cut.split(text) if cut is not None else [text]
        for piece in pieces:
            if piece in marks:
                found.append({"type": marks[piece], "of": None})
                continue
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
                f"{model.owner}; take it out, or write {MARKS['image']} where a picture of the row's column is to stand"
            )
