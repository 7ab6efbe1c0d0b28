"""The process in which mathematical answers are compared: started by its path, it needs math-verify alone.

Reads JSON lines `{"answer", "completion", "boxed", "seconds"}` and answers each with `true`, `false`, or `null` when
the answer holds nothing to compare with. Ends with its input.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any, TextIO

MEMORY = 2 << 30
"""Bytes of address space; sympy takes a tenth. `9^(9^(9^9))` would take any amount."""


def last_boxed(text: str) -> str:
    r"""The last `\boxed{...}` with its braces matched, or an empty string."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            return text[start : place + 1]
    return ""


def judge(answer: str, completion: str, boxed: bool, seconds: int) -> bool | None:
    """Whether the completion's answer is the reference answer; None when the latter cannot be read."""
    from math_verify import parse, verify

    marked = any(mark in answer for mark in ("\\boxed", "$", "\\(", "\\["))
    gold = parse(answer if marked else f"\\boxed{{{answer}}}", parsing_timeout=seconds) if answer.strip() else []
    if not gold:
        return None
    given = parse(last_boxed(completion) if boxed else completion, parsing_timeout=seconds)
    return bool(verify(gold, given, timeout_seconds=seconds))


def limit_memory() -> None:
    """Where the system has such a limit; the deadline that the asking process keeps stands everywhere."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        return


def serve(requests: TextIO, replies: TextIO) -> None:
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        try:
            verdict = judge(**request)
        except Exception:
            # Whatever a completion makes the parser do, it is not the right answer.
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    # An interrupt of the terminal asks the training process to finish its step, which needs this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_memory()
    import math_verify  # noqa: F401

    # Replies have the standard output to themselves.
    channel, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=channel, flush=True)
    serve(sys.stdin, channel)
