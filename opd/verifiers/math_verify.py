"""Mathematical answers: equal when they mean the same, however they are written."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from opd.context import Context
from opd.errors import RunError
from opd.prompts import Prompt
from opd.verifiers.base import OneByOne, Verifier, as_text

START = 120.0
"""Seconds that the comparing process may take to import sympy on a busy machine."""


class MathVerify(Verifier):
    r"""1 when the completion's last answer equals the row's `answer` (LaTeX or plain) in `math-verify`: `\frac{1}{2}`,
    `0.5` and `2/4` are one number, `(x+1)^2` and `x^2+2x+1` one expression. `\boxed{}` goes before "the answer is",
    that before formulas, those before bare numbers.

    Rows without an answer, or with one that cannot be read, have no verdict. A comparison that takes too long, or too
    much memory, is wrong.

    Nothing that a model wrote is executed. LaTeX is read by a grammar. Plain expressions go through sympy's
    `parse_expr`, which does evaluate Python, but only what a pattern found to consist of digits, blanks and
    `+ - * / ^ ( ) .`, so no name and no call can be in it. All of it happens in one process of its own, limited in
    time and memory: the package's time-outs are alarms, which only a main thread may set, and no alarm interrupts a
    power of large integers.
    """

    kind: Literal["math_verify"] = "math_verify"
    modality: ClassVar[str | None] = "language"
    reads: ClassVar[str | None] = "answer"
    boxed: bool = Field(False, description=r"Only an answer in \boxed{} counts")
    seconds: int = Field(5, ge=1, le=3600, description="Longest time for reading a completion, and for comparing it")

    @model_validator(mode="after")
    def _installed(self) -> MathVerify:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("needs the package math-verify: pip install 'opd[tasks]'")
        return self

    @property
    def needs(self) -> str:
        return "the column 'answer' with an answer that can be read"

    def build(self, context: Context) -> MathScorer:
        return MathScorer(self)


class MathScorer(OneByOne):
    """The built verifier, with its comparing process."""

    settings: MathVerify

    def __init__(self, settings: MathVerify):
        super().__init__(settings)
        self.judge = Judge()

    def judges(self, prompt: Prompt) -> bool:
        # Whether an answer can be read, the process that reads them knows.
        return self.verdict(prompt, "") is not None

    def verdict(self, prompt: Prompt, completion: str) -> float | None:
        answer, settings = prompt.fields.get("answer"), self.settings
        if answer is None or answer == "":
            return None
        request = {
            "answer": as_text(answer),
            "completion": completion,
            "boxed": settings.boxed,
            "seconds": settings.seconds,
        }
        # Reading the answer, reading the completion and comparing them each have their own alarm.
        verdict = self.judge.ask(json.dumps(request), 3 * settings.seconds + 2)
        return None if verdict is None else float(verdict)


class Judge:
    """The comparing process; started at the first question, and again after it had to be ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def ask(self, request: str, seconds: float) -> bool | None:
        """The verdict of a request; False when none came in time."""
        with self.lock:
            reply, late = self._exchange(request, seconds)
            if not reply and not late:
                # It had ended before, or somebody ended it; what ends it twice is the completion.
                reply, late = self._exchange(request, seconds)
            return json.loads(reply) if reply else False

    def _running(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        worker = Path(__file__).with_name("math_verify_worker.py")
        # -P: the worker's folder holds this file, whose name is that of the package.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if _line(self.process, START)[0].strip() != "ready":
            raise RunError(f"verifier 'math_verify': {sys.executable} could not import math_verify; reinstall it")
        return self.process

    def _exchange(self, request: str, seconds: float) -> tuple[str, bool]:
        process = self._running()
        assert process.stdin is not None
        try:
            print(request, file=process.stdin, flush=True)
        except BrokenPipeError:
            process.wait()
            return "", False
        return _line(process, seconds)


def _line(process: subprocess.Popen[str], seconds: float) -> tuple[str, bool]:
    """The next line of a process, or an empty one when it ended; and whether it was ended here, for being late."""
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    deadline = threading.Timer(seconds, end)
    deadline.start()
    reply = process.stdout.readline()
    deadline.cancel()
    if not reply:
        process.kill()
        process.wait()
    return reply, late.is_set()
