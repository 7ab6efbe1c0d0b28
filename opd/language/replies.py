"""Reading what an agent says: the calls of tools in its reply, in the form that its own template writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from opd.errors import IncompatibleError
from opd.language.calls import Call, Reply
from opd.language.encoding import contents
from opd.language.engines.base import Engine

NAME, ARGUMENT, VALUE = "probe_tool", "probe_argument", "probe value"
"""A call that a template is asked to write, to see how it writes one."""


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls of tools: JSON objects with a name and arguments, alone or between two marks.

    Attributes:
        begin, end: the marks. Without `begin` a reply that is an object is a call; without `end` a call goes on to the
            end of the reply.
        name, arguments: keys of the object.
    """

    begin: str
    end: str
    name: str
    arguments: str

    def read(self, text: str) -> Reply:
        """The calls in a reply; behind one that cannot be read no other is looked for."""
        calls: list[Call] = []
        for inside in self._objects(text):
            if inside is None:
                return Reply(text, tuple(calls), f"the call is not closed by {self.end}")
            try:
                found = json.loads(inside)
            except (ValueError, RecursionError):
                return Reply(text, tuple(calls), "the call is not JSON")
            for each in found if isinstance(found, list) else [found]:
                if not isinstance(each, dict) or not isinstance(each.get(self.name), str):
                    return Reply(text, tuple(calls), f"the call has no text under the key {self.name!r}")
                arguments = each.get(self.arguments, {})
                if not isinstance(arguments, dict):
                    return Reply(text, tuple(calls), f"{self.arguments!r} of the call is no object")
                calls.append(Call(each[self.name], arguments))
        return Reply(text, tuple(calls))

    def _objects(self, text: str) -> list[str | None]:
        """What stands where a call would; None for one that is not closed."""
        if not self.begin:
            return [text] if text.lstrip().startswith("{") else []
        found: list[str | None] = []
        for behind in text.split(self.begin)[1:]:
            inside, closed, _ = behind.partition(self.end) if self.end else (behind, "all", "")
            found.append(inside if closed else None)
        return found

    def write(self, call: Call) -> str:
        """A call as the model would write it."""
        inside = json.dumps({self.name: call.name, self.arguments: dict(call.arguments)})
        return "\n".join(part for part in (self.begin, inside, self.end) if part)


def call_format(language: Engine) -> CallFormat:
    """The form in which a model's chat template writes calls, found by having it write one.

    Raises:
        IncompatibleError: it writes none, or none that is a JSON object.
    """
    tokenizer = language.tokenizer
    properties = {ARGUMENT: {"type": "string", "description": "anything"}}
    parameters = {"type": "object", "properties": properties, "required": [ARGUMENT]}
    tool = {"type": "function", "function": {"name": NAME, "description": "a tool", "parameters": parameters}}
    call = {"id": "call00000", "type": "function", "function": {"name": NAME, "arguments": {ARGUMENT: VALUE}}}
    question: dict[str, Any] = {"role": "user", "content": "Call the tool."}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}

    def written(messages: list[dict[str, Any]], begins: bool) -> str:
        options = {**language.template_options, "tools": [tool], "add_generation_prompt": begins}
        return str(tokenizer.apply_chat_template(contents(tokenizer, messages), tokenize=False, **options))

    try:
        before, after = written([question], True), written([question, answer], False)
    except Exception as error:
        # A template is the model's own program and may raise anything about a message.
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise _no_form(language, f"it cannot write one: {reason}") from None
    found = _object(after)
    if found is None:
        raise _no_form(language, "it writes no JSON object for one")
    start, stop, value = found
    name = next(key for key, each in value.items() if each == NAME)
    arguments = next(key for key, each in value.items() if each == {ARGUMENT: VALUE})
    # Where a turn is begun otherwise than it stands afterwards, the mark is a line of its own.
    begin = after[len(before) : start] if after.startswith(before.rstrip()) else after[:start].rstrip()
    begin, end = _last_line(begin), after[stop:].strip()
    if begin.endswith("["):
        begin, end = begin[:-1].strip(), end.removeprefix("]").strip()
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        if end.endswith(token) and token != begin:
            end = end.removesuffix(token).strip()
    return CallFormat(begin, end.splitlines()[0].strip() if end else "", name, arguments)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip() if text.strip() else ""


def _no_form(language: Engine, why: str) -> IncompatibleError:
    return IncompatibleError(
        f"the chat template of {language.owner} has no form of a tool's call that is known here ({why}); take an "
        "environment that describes its tools in words (of tool_machine style: words)"
    )


def _object(text: str) -> tuple[int, int, dict[str, Any]] | None:
    """`(first character, first behind it, value)` of the JSON object that calls the probe."""
    decoder = json.JSONDecoder()
    for place in (i for i, letter in enumerate(text) if letter == "{"):
        try:
            value, stop = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        # The description of the tool has its name too, and no arguments.
        if isinstance(value, dict) and NAME in value.values() and {ARGUMENT: VALUE} in value.values():
            return place, stop, value
    return None


def said(language: Engine, actions: torch.Tensor, ends: tuple[int, ...], form: CallFormat | None) -> Reply:
    """A reply's int64 `[T]` ids as its reader reads them. The marks of calls may be special tokens, so where calls are
    looked for (`form`) those stay."""
    ids = actions.tolist()
    if ids and ids[-1] in ends:
        ids = ids[:-1]
    text = str(language.tokenizer.decode(ids, skip_special_tokens=form is None)).strip()
    return Reply(text) if form is None else form.read(text)
