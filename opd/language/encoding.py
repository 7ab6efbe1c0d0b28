"""From a prompt's row to the ids that a model reads: through its chat template, or as plain text."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from opd.errors import DataError, nearest
from opd.prompts.base import Prompt
from opd.prompts.messages import Messages, check_view, has_picture, of_picture, text_of

if TYPE_CHECKING:
    from opd.language.engines.base import Engine

QUESTION, ANSWER = "Is this the question?", "This is the answer."
"""What a template is asked to write, to see what it makes of it."""
OURS = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)
"""Arguments of `apply_chat_template` that are no variables of a template, or have a column of their own."""
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of what an assistant wrote, which transformers adds to the language of templates."""
WRITTEN = "ids"
"""Key of a message with the ids of a reply as they were written."""
PLACE = "(here the reply stood)"
"""What a template writes in the place of such a reply."""
TOOLS = "a list of objects that describe a tool each"


def encode(language: Engine, prompt: Prompt, column: str | None = None) -> list[int]:
    """Ids of a prompt's view, up to where the completion starts.

    Chat templates get the row's `tools`, and its `chat_template_kwargs` over the model's `template_options`. Plain text
    gets the begin token that its tokenizer adds, once, and no end token.

    Raises:
        DataError: the view is no text and no list of messages, or the template cannot write it.
    """
    view = prompt.view(column)
    if not isinstance(view, str) and any(has_picture(message.get("content")) for message in view):
        parts = [part for message in view for part in _listed(message.get("content"))]
        kind = "video" if all(of_picture(part) is None for part in parts) else "picture"
        raise DataError(
            f"{prompt.where}: the messages in column {column or prompt.column!r} hold a {kind}, and {language.owner} "
            "reads text alone; take a model of kind image_text"
        )
    if language.template == "chat":
        view = check_view(view, prompt.where, column or prompt.column)
        messages = [{"role": "user", "content": view}] if isinstance(view, str) else view
        ids = conversation(language, prompt, messages)
    else:
        ids = _plain(language, prompt, view)
    if not ids:
        raise DataError(f"{prompt.where}: the tokenizer of {language.owner} makes no token of this prompt")
    return ids


def conversation(language: Engine, prompt: Prompt, messages: Messages) -> list[int]:
    """Ids of messages, up to where the next reply begins. Of replies that bring the ids that were written (the key
    `WRITTEN`) these stand there, and of the rest what the template adds behind them at that time: nothing that was
    written is split into tokens anew, and what the model read in an earlier turn is a beginning of what it reads now.

    Raises:
        DataError: the template cannot write the messages, or leaves a reply out.
    """
    replies = [i for i, message in enumerate(messages) if message.get(WRITTEN) is not None]
    formed = [
        {**{k: v for k, v in message.items() if k not in (WRITTEN, "tool_calls")}, "content": PLACE}
        if i in replies
        else message
        for i, message in enumerate(messages)
    ]
    ids: list[int] = []
    for before, stop in zip([None, *replies], [*replies, len(messages)], strict=True):
        text = render(language, prompt, formed[:stop])
        if before is not None:
            _, found, text = text.rpartition(PLACE)
            if not found:
                raise DataError(
                    f"{prompt.where}: the chat template of {language.owner} leaves out the reply in message {before}"
                )
            written = [int(i) for i in messages[before][WRITTEN]]
            ids += written
        added = list(language.tokenizer(text, add_special_tokens=False)["input_ids"])
        # A reply that ended has the token that ends its turn already; one that was cut gets it from the template.
        ids += added[1:] if ids and added and before is not None and written[-1:] == added[:1] else added
    return ids


def rewritten(language: Engine, prompt: Prompt, opening: Messages, answer: Messages) -> str | None:
    """How a template writes an earlier turn otherwise than it stood when it was written; None where it stays.

    Args:
        opening: what an episode begins with.
        answer: what an environment may say to a reply.
    """
    for reply in (PLACE, f"<think>\n{QUESTION}\n</think>\n\n{PLACE}"):
        turn: Messages = [{"role": "assistant", "content": reply}, *answer]
        for rounds in (0, 1):
            begun = render(language, prompt, [*opening, *turn * rounds])
            later = render(language, prompt, [*opening, *turn * (rounds + 1)])
            if later.startswith(begun + reply):
                continue
            if reply != PLACE and QUESTION not in later[len(begun) :]:
                return "what a reply thinks between <think> and </think> is dropped from earlier turns"
            stood = begun + reply
            same = next((i for i, (a, b) in enumerate(zip(stood, later, strict=False)) if a != b), len(later))
            return f"{stood[same : same + 40]!r} becomes {later[same : same + 40]!r} once a turn is over"
    return None


def _listed(content: object) -> list[object]:
    return content if isinstance(content, list) else []


def render(language: Engine, prompt: Prompt, messages: Messages) -> str:
    """A conversation as the chat template writes it, up to where the answer begins."""
    tokenizer, options = language.tokenizer, _arguments(language, prompt)
    try:
        return str(
            tokenizer.apply_chat_template(
                contents(tokenizer, messages), tokenize=False, add_generation_prompt=True, **options
            )
        )
    except Exception as error:
        # A template is the model's own program and may raise anything about a message.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(
            f"{prompt.where}: the chat template of {language.owner} cannot write this prompt ({reason})"
        ) from None


def _arguments(language: Engine, prompt: Prompt) -> dict[str, Any]:
    """What the template is called with besides the messages."""
    own = _given(prompt, "chat_template_kwargs", dict, "an object, e.g. {'enable_thinking': false}") or {}
    tools = _given(prompt, "tools", list, TOOLS)
    template = str(language.tokenizer.chat_template)
    options = {**language.template_options, **own}
    taken = sorted(OURS & options.keys())
    if taken:
        raise DataError(
            f"{prompt.where}: {taken[0]!r} among the arguments of the chat template (chat_template_kwargs, "
            "template_options) is set by opd or is the template itself; give what the template's own text reads"
        )
    read = read_by(template)
    for name in options:
        found = name in read if read is not None else re.search(rf"\b{re.escape(name)}\b", template)
        if not found:
            close = nearest(name, read or ())
            language.say(f"the chat template of {language.owner} reads no {name!r}{close}; it changes nothing there")
    if tools:
        if not all(isinstance(tool, dict) for tool in tools):
            raise DataError(
                f"{prompt.where}: column 'tools' holds something else than objects that describe a tool each"
            )
        if "tools" not in template:
            raise DataError(
                f"{prompt.where}: the row has tools, and the chat template of {language.owner} writes none; take a "
                "model whose template does, or remove the column"
            )
        options["tools"] = tools
    return options


def _given(prompt: Prompt, column: str, kind: type, what: str) -> Any:
    """A column that is handed to templates; JSON in a text, which tables hold such columns as, is read."""
    value = prompt.fields.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{prompt.where}: column {column!r} holds a text that is not JSON; give {what}") from None
    if not value:
        return None
    if not isinstance(value, kind):
        raise DataError(f"{prompt.where}: column {column!r} holds {type(value).__name__}; give {what}")
    return value


def _plain(language: Engine, prompt: Prompt, view: object) -> list[int]:
    if not isinstance(view, str):
        held = "a list of messages" if isinstance(view, list) else f"of type {type(view).__name__}"
        raise DataError(f"{prompt.where}: the prompt is {held}; template 'plain' of {language.owner} takes a string")
    for column in ("tools", "chat_template_kwargs"):
        if prompt.fields.get(column):
            raise DataError(
                f"{prompt.where}: the row has {column!r}, which only a chat template writes, and {language.owner} has "
                "template: plain; set template: chat or remove the column"
            )
    tokenizer = language.tokenizer
    ids = list(tokenizer(view)["input_ids"])
    if not tokenizer.num_special_tokens_to_add():
        return ids
    begin, end = _added(ids, list(tokenizer(view, add_special_tokens=False)["input_ids"]))
    if end:
        ids = ids[: -len(end)]
        told = tokenizer.decode(end)
        language.say(
            f"the tokenizer puts {told!r} behind every text; prompts go without, since the answer follows them"
        )
    if begin and ids[len(begin) : 2 * len(begin)] == begin:
        ids = ids[len(begin) :]
        told = tokenizer.decode(begin)
        language.say(f"prompts begin with {told!r} already; the tokenizer adds no other one")
    return ids


def _added(whole: list[int], bare: list[int]) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer put before and behind a text's own ids."""
    for start in range(len(whole) - len(bare) + 1) if bare else ():
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def contents(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """The messages with contents of the form that the template reads: texts, or lists of parts."""
    parts = _reads_parts_alone(tokenizer, str(tokenizer.chat_template))
    formed = []
    for message in messages:
        # Tables give every message all keys that one of them has, and templates ask whether a key is there.
        message = {key: value for key, value in message.items() if value is not None or key == "content"}
        content = message.get("content")
        if isinstance(content, list) and not parts and not has_picture(content):
            content = text_of(content)
        elif isinstance(content, str) and parts:
            content = [{"type": "text", "text": content}]
        formed.append({**message, "content": content} if "content" in message else message)
    return formed


@functools.lru_cache(maxsize=32)
def read_by(template: str) -> frozenset[str] | None:
    """The variables that a template reads and somebody may give; None where it cannot be parsed here."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", template))
        return frozenset(meta.find_undeclared_variables(parsed)) - OURS
    except TemplateError:
        return None


@functools.lru_cache(maxsize=32)
def _reads_parts_alone(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template drops contents that are texts and writes lists of parts."""

    def writes(content: str | list[dict[str, str]]) -> bool:
        messages: Any = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            return False
        return QUESTION in str(text)

    return not writes(QUESTION) and writes([{"type": "text", "text": QUESTION}])


def turn_end(language: Engine) -> int | None:
    """The special token behind an answer that the chat template writes; None where there is no such token."""
    if language.template != "chat":
        return None
    tokenizer = language.tokenizer
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(
            tokenizer.apply_chat_template(contents(tokenizer, turns), tokenize=False, **language.template_options)
        )
    except Exception:
        return None
    _, found, rest = text.rpartition(ANSWER)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    # Some tokenizers name the end token as the unknown one.
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        special.discard(tokenizer.unk_token_id)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in special), None)
