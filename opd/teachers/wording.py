"""What a debate says to its experts besides the prompt, how its texts are put together, and how sure a text says it is.

MAD-OPD (arXiv 2605.01347), in words of our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from opd.choice import Settings
from opd.prompts.messages import Messages, text_of

Domain = Literal["general", "tools", "code"]

ROLES: dict[Domain, str] = {
    "general": "You are an expert in many fields.",
    "tools": "You are an expert in solving tasks by calls of tools.",
    "code": "You are an expert in competitive programming.",
}
FOCUS: dict[Domain, str] = {
    "general": "Look at whether it is right and whether anything is missing.",
    "tools": "Look at the choice of the tool, its parameters, and the order of the calls.",
    "code": "Look at correctness, edge cases, complexity and brevity.",
}
"""What an expert is told by `domain`: who it is, and what to look at when it reconsiders."""

NUMBER = r"\s*([-+]?\d+(?:\.\d+)?)\s*%?\s*"


class Wording(Settings):
    """Texts of a debate. `{expert}` stands for the name of the expert who reads or wrote, `{round}` for the round from
    1, and `{tag}` for the tag with a number in it. An empty text is left out."""

    names_things: ClassVar[bool] = False

    role: str | None = Field(None, description="Before the prompt in round 1: who the expert is; default the domain's")
    confidence: str = Field(
        "End your reply with how sure you are that it is right, a whole number from 0 to 100 in the form {tag}, and "
        "write nothing behind it.",
        description="At the end of what an expert reads before it writes; it must say {tag}",
    )
    revise: str = Field(
        "You are expert {expert}. You need not agree with the others: reconsider your reply and improve it.",
        description="Behind the transcript, from round 2 on",
    )
    focus: str | None = Field(None, description="Behind `revise`: what to look at; default the domain's")
    label: str = Field("[expert {expert}, round {round}]\n", description="Before each text of a transcript")
    begin: str = Field("=== The debate begins ===", description="Before a transcript")
    end: str = Field("=== The debate ends ===", description="Behind a transcript")
    identity: str = Field(
        "You are expert {expert}, and this was debated about it:",
        description="Before the transcript where an expert scores a reply",
    )
    cue: str = Field(
        "Give the best reply to it now.", description="Behind the transcript where an expert scores a reply"
    )
    tag: str = Field(
        "<confidence>{number}</confidence>",
        description="How a text says how sure it is; {number} stands for the number",
    )
    gap: str = Field("\n\n", description="Between parts")

    @field_validator("tag")
    @classmethod
    def _holds_a_number(cls, value: str) -> str:
        if value.count("{number}") != 1 or not value.replace("{number}", "").strip():
            raise ValueError(f"{value!r} is no tag; write some text with {{number}} in it once, as in <sure>{{number}}")
        return value

    @field_validator("confidence")
    @classmethod
    def _says_the_tag(cls, value: str) -> str:
        # Experts that learnt to write tags need no words.
        if value and "{tag}" not in value:
            raise ValueError("it asks for no {tag}, so no text would say how sure it is; put {tag} into it")
        return value

    # -- what an expert reads --------------------------------------------------------------------------------------

    def first(self, view: str | Messages, expert: str, domain: Domain) -> str | Messages:
        """What an expert reads in round 1."""
        role = ROLES[domain] if self.role is None else self.role
        return framed(view, _said(role, expert), self._asked(), self.gap)

    def later(
        self, view: str | Messages, expert: str, domain: Domain, names: Sequence[str], rounds: Sequence[Sequence[str]]
    ) -> str | Messages:
        """What an expert reads in a later round: the prompt and all earlier texts of all experts."""
        focus = FOCUS[domain] if self.focus is None else self.focus
        revise = " ".join(_said(part, expert) for part in (self.revise, focus) if part)
        behind = (self.transcript(names, rounds), revise, self._asked())
        return framed(view, "", self.gap.join(part for part in behind if part), self.gap)

    def scoring(
        self, view: str | Messages, expert: str, names: Sequence[str], rounds: Sequence[Sequence[str]]
    ) -> str | Messages:
        """Under what an expert scores a reply: between experts `identity` alone differs."""
        behind = (_said(self.identity, expert), self.transcript(names, rounds), self.cue)
        return framed(view, "", self.gap.join(part for part in behind if part), self.gap)

    def transcript(self, names: Sequence[str], rounds: Sequence[Sequence[str]]) -> str:
        """The texts of all rounds, tags included, each under its label."""
        texts = [
            self.label.replace("{expert}", name).replace("{round}", str(i)) + text
            for i, of_round in enumerate(rounds, start=1)
            for name, text in zip(names, of_round, strict=True)
        ]
        return self.gap.join(part for part in (self.begin, *texts, self.end) if part)

    def _asked(self) -> str:
        return self.confidence.replace("{tag}", self.tag.replace("{number}", "NUMBER"))

    # -- what a text says of itself --------------------------------------------------------------------------------

    def sure(self, text: str) -> float | None:
        """The number of a text's last tag, held to 0..100; None without a tag."""
        before, behind = map(re.escape, self.tag.split("{number}"))
        found = re.findall(before + NUMBER + behind, text)
        return min(100.0, max(0.0, float(found[-1]))) if found else None

    def without_tag(self, text: str) -> str:
        """A text without its tags, as a verifier reads it."""
        before, behind = map(re.escape, self.tag.split("{number}"))
        return re.sub(before + NUMBER + behind, "", text).rstrip()


def _said(text: str, expert: str) -> str:
    return text.replace("{expert}", expert)


def framed(view: str | Messages, before: str, behind: str, gap: str) -> str | Messages:
    """A prompt with texts before and behind it, in the turn that it ends with: a text stays one text, and of messages
    the last one of the user has them; where another's message is last, one of the user follows."""
    if isinstance(view, str):
        return gap.join(part for part in (before, view, behind) if part)
    last = view[-1]
    if last.get("role") != "user":
        told = gap.join(part for part in (before, behind) if part)
        return [*view, {"role": "user", "content": told}] if told else view
    text = gap.join(part for part in (before, text_of(last.get("content")), behind) if part)
    return [*view[:-1], {**last, "content": text}]
