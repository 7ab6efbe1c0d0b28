"""What a prompt may be: a text, or chat messages that end where the model answers."""

from __future__ import annotations

from typing import Any

from opd.errors import DataError

Messages = list[dict[str, Any]]

ANSWERING = ("assistant", "model")
"""Roles under which the model itself speaks."""
DEEPEST = 100
"""Levels of lists and objects in a row, beyond which libraries end in a recursion error."""


def check_view(value: object, where: str, column: str) -> str | Messages:
    """A column's text or messages, as they are.

    Raises:
        DataError: it is neither, says nothing, or ends with the answer, behind which a template would begin another.
    """
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: the prompt in column {column!r} is empty; remove the row or fill it")
        return value
    messages = check_messages(value, where, column)
    if not any(text_of(m.get("content")).strip() or has_picture(m.get("content")) for m in messages):
        raise DataError(f"{where}: the prompt in column {column!r} is empty; remove the row or fill it")
    if answers(messages):
        raise DataError(
            f"{where}: the messages in column {column!r} end with the answer of {messages[-1]['role']!r}, and a second "
            "one would be written behind it; remove it, or of the student's column leave prompts.last_answer at cut "
            "(the column 'response' gets it)"
        )
    return messages


def check_messages(value: object, where: str, column: str) -> Messages:
    """A list of messages, each with a role and a content that is a text, a list of parts, which are texts, pictures
    or videos, or absent beside `tool_calls`. Other keys are the template's business."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(
            f"{where}: column {column!r} holds {type(value).__name__}; "
            "a prompt is a string or a list of messages with 'role' and 'content'"
        )
    check_turns(value, where, column)
    for i, message in enumerate(value):
        content = message.get("content")
        silent = content is None and bool(message.get("tool_calls"))
        if not isinstance(message.get("role"), str) or not (silent or isinstance(content, str | list)):
            raise DataError(
                f"{where}: message {i} in column {column!r} has the keys {sorted(message)}; a message has 'role' and "
                "'content', both texts"
            )
        parts = content if isinstance(content, list) else []
        other = next((p for p in parts if part_text(p) is None and of_picture(p) is None and of_video(p) is None), None)
        if other is not None:
            kind = other.get("type") if isinstance(other, dict) else type(other).__name__
            raise DataError(
                f"{where}: message {i} in column {column!r} has a part {kind!r}; only texts, pictures and "
                "videos are read"
            )
    return value


def check_turns(value: object, where: str, column: str) -> None:
    """Raise `DataError` for turns that are written in another way than messages are."""
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn:
            raise DataError(
                f"{where}: column {column!r} holds turns with 'from' and 'value' (ShareGPT); write each as {{'role': "
                "'system', 'user' or 'assistant', 'content': text} in a column 'messages'"
            )


def answers(messages: Messages) -> bool:
    """Whether the last message is the model's own."""
    return bool(messages) and messages[-1].get("role") in ANSWERING


def text_of(content: object) -> str:
    """A message's text; parts follow each other as they are."""
    if isinstance(content, list):
        return "".join(part_text(part) or "" for part in content)
    return content if isinstance(content, str) else ""


def of_picture(part: object) -> object:
    """The picture that a part of a content is; True where it stands for one of the row's column; None for others."""
    if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
        return None
    found = next((part[k] for k in ("image", "path", "url", "bytes", "image_url") if part.get(k) is not None), True)
    return found["url"] if isinstance(found, dict) and isinstance(found.get("url"), str) else found


def of_video(part: object) -> object:
    """The video that a part of a content is; True where it stands for one of the row's column; None for others."""
    if not isinstance(part, dict) or part.get("type") not in ("video", "video_url"):
        return None
    found = next((part[k] for k in ("video", "path", "url", "bytes", "video_url") if part.get(k) is not None), True)
    return found["url"] if isinstance(found, dict) and isinstance(found.get("url"), str) else found


def has_picture(content: object) -> bool:
    """Whether a message's content has a part that is a picture or a video."""
    if not isinstance(content, list):
        return False
    return any(of_picture(part) is not None or of_video(part) is not None for part in content)


def part_text(part: object) -> str | None:
    """The text that a part of a content is; None for others."""
    if isinstance(part, dict):
        part = part.get("text") if part.get("type", "text") == "text" else None
    return part if isinstance(part, str) else None


def check_fields(fields: dict[str, Any], where: str) -> None:
    """Raise `DataError` for what no tokenizer and no log can take: a lone surrogate, or levels without end."""
    for name, value in fields.items():
        _check(value, f"{where}: column {name!r}", 0)


def _check(value: object, what: str, level: int) -> None:
    if level > DEEPEST:
        raise DataError(f"{what} is nested deeper than {DEEPEST} levels; make it flatter")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} holds half a character ({value[error.start]!a}, a lone surrogate, at {error.start}); "
                "write the whole character or remove it"
            ) from None
    elif isinstance(value, dict):
        for key, part in value.items():
            _check(key, what, level + 1)
            _check(part, what, level + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part, what, level + 1)
