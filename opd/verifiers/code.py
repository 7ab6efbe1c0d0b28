"""Programs that the student wrote, run in a sandbox against the tests of their row."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from opd.context import Context
from opd.errors import DataError
from opd.prompts import Prompt
from opd.sandbox import Ended, Limits, Sandbox, sandbox
from opd.trajectories import Outcome, Trajectories
from opd.verifiers.base import Scorer, Verifier

BLOCK = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\2|\Z)", re.MULTILINE | re.DOTALL)
"""A fenced block of code with its margin and its fence; the last one may have been cut before its end."""

SHARES: dict[str, tuple[Ended, ...]] = {
    "timed_out": ("time", "cpu"),
    "out_of_memory": ("memory",),
    "stopped": ("output", "files", "threads", "killed"),
}
"""What a step logs, as shares of the programs that it ran."""


class Code(Verifier):
    """1 when a program passes all tests of its row's column `tests`, else 0; rows without that column have no verdict.

    The program is the completion's last fenced block of code, or the whole completion; a row's column `starts` stands
    before it. `tests` holds Python text that runs after the program (with a column `entry_point`, `check` of that text
    is called with that name), a list of such texts, or inputs with the outputs that are right for them: a list of
    `{input, output}`, or `{inputs, outputs}`, which may be JSON in a text. Outputs are compared line by line without
    the blanks around them.

    Each program is a process of its own under `confinement`, with the standard library of this Python. One that is
    wrong, crashes or meets a limit is worth 0; where the sandbox itself fails, the run ends with that error.
    """

    kind: Literal["code"] = "code"
    modality: ClassVar[str | None] = "language"
    reads: ClassVar[str | None] = "tests"
    confinement: Literal["best", "bubblewrap", "landlock", "seccomp", "none"] = Field(
        "best", description="What keeps programs in; best is the first of the others that works here, and never none"
    )
    seconds: float = Field(10.0, gt=0, le=3600, description="Wall clock of one run of a program")
    cpu_seconds: int = Field(10, ge=1, le=3600, description="CPU time of one run, of all of its threads")
    memory: int = Field(512, ge=128, le=1 << 20, description="MiB of address space of one run")
    output: int = Field(1 << 20, ge=1, le=1 << 30, description="Bytes that one run may write to its output")
    workers: int = Field(4, ge=1, le=1024, description="Programs at once")
    program: Literal["last_block", "whole"] = Field(
        "last_block", description="The last fenced block, where there is one, or always the whole completion"
    )
    partial: bool = Field(False, description="The share of tests that pass, instead of 1 for all and 0")

    def check_machine(self) -> None:
        sandbox(self.confinement)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if self.judges(prompt):
                read_tests(prompt, self.output)

    def build(self, context: Context) -> CodeScorer:
        return CodeScorer(self)

    @property
    def limits(self) -> Limits:
        return Limits(self.seconds, self.cpu_seconds, self.memory, self.output)


@dataclass(frozen=True)
class Tests:
    """Of one row: Python texts, or inputs with outputs, never both."""

    texts: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


class CodeScorer(Scorer):
    """The built verifier: the verdicts of a batch are made by several threads, each waiting for a program."""

    settings: Code

    def __init__(self, settings: Code):
        super().__init__(settings)
        self.sandbox, self._notes = sandbox(settings.confinement)
        self.ended: list[Ended] = []

    @property
    def notes(self) -> Sequence[str]:
        return self._notes

    def score(self, trajectories: Trajectories, outcomes: Sequence[Outcome]) -> torch.Tensor:
        wanted = list(zip(trajectories.prompts, outcomes, strict=True))
        # Groups often hold one program several times, and a program is judged once.
        jobs = {
            (p.id, program): (p, program)
            for p, text in wanted
            if self.judges(p)
            for program in [program_of(p, str(text), self.settings.program)]
        }
        with ThreadPoolExecutor(self.settings.workers) as pool:
            made = list(pool.map(lambda job: verdict(self.sandbox, self.settings, *job), jobs.values()))
        self.ended = [ended for _, runs in made for ended in runs]
        rewards = {key: reward for key, (reward, _) in zip(jobs, made, strict=True)}
        found = [
            rewards[p.id, program_of(p, str(text), self.settings.program)] if self.judges(p) else float("nan")
            for p, text in wanted
        ]
        return torch.tensor(found, dtype=torch.float32)

    def own_signals(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        counts = [sum(ended in which for ended in self.ended) for which in SHARES.values()]
        total = sum_over_processes(torch.tensor([len(self.ended), *counts], dtype=torch.float64)).tolist()
        return {f"code/{name}": n / total[0] for name, n in zip(SHARES, total[1:], strict=True)} if total[0] else {}


def program_of(prompt: Prompt, completion: str, part: str = "last_block") -> str:
    """The program that a completion is, or that its row's `starts` becomes with it.

    A block stands on lines of its own behind `starts`, without the margin of its fence; where `starts` ends with the
    head of a function, that function is then empty, as the block holds it whole. A completion without a block goes on
    where `starts` ends, up to the first of the row's `stops`.
    """
    starts = prompt.fields.get("starts") or ""
    blocks = BLOCK.findall(completion) if part == "last_block" else []
    if blocks:
        margin, _, block = blocks[-1]
        if margin:
            block = re.sub(f"^[ \t]{{1,{len(margin)}}}", "", block, flags=re.MULTILINE)
        if not starts:
            return str(block)
        head = f"{starts.rstrip()} pass"
        return f"{starts if _parsed(starts) else head if _parsed(head) else starts}\n{block}"
    places = [place for stop in prompt.fields.get("stops") or () if (place := completion.find(stop)) >= 0]
    return starts + completion[: min(places, default=len(completion))]


def verdict(box: Sandbox, settings: Code, prompt: Prompt, program: str) -> tuple[float, list[Ended]]:
    """The reward of a program, and how each of its runs ended.

    Raises:
        RunError: the sandbox could not run it.
    """
    tests, limits = read_tests(prompt, settings.output), settings.limits
    if tests.texts:
        ran = box.run(program, tests=tests.texts, every_test=settings.partial, limits=limits)
        passed, count, runs = len(ran.passed & set(range(len(tests.texts)))), len(tests.texts), [ran.ended]
    else:
        passed, count, runs = 0, len(tests.pairs), []
        for given, right in tests.pairs:
            ran = box.run(program, stdin=given, limits=limits)
            runs.append(ran.ended)
            good = ran.ended == "finished" and _lines(ran.stdout) == _lines(right)
            passed += good
            if not good and not settings.partial:
                break
    return (passed / count if settings.partial else float(passed == count)), runs


def _parsed(text: str) -> ast.Module | None:
    """Python text; None where it is none, or nested more deeply than Python reads."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def read_tests(prompt: Prompt, output: int) -> Tests:
    """What the column `tests` of a row asks for.

    Raises:
        DataError: it holds nothing that could be run, or an output longer than `output` bytes.
    """
    where, value = prompt.where or prompt.id, prompt.fields["tests"]
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        # Python text may begin so, too.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    for name, kinds in (("starts", str), ("stops", list), ("entry_point", str)):
        found = prompt.fields.get(name)
        if found is not None and not (isinstance(found, kinds) and all(isinstance(part, str) for part in found)):
            raise DataError(f"{where}: column {name!r} holds {type(found).__name__}; 'code' reads {_READS[name]} there")
    if isinstance(value, dict):
        return Tests(pairs=_pairs(value, where, output))
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(each, dict) for each in texts):
        for each in texts:
            if not {"input", "output"} <= each.keys():
                raise DataError(f"{where}: a test in column 'tests' has {sorted(each)}; it needs input and output")
        both = {"inputs": [each["input"] for each in texts], "outputs": [each["output"] for each in texts]}
        return Tests(pairs=_pairs(both, where, output))
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise DataError(
            f"{where}: column 'tests' holds {_shown(value)}; it takes Python text, a list of such texts, a list of "
            "{input, output}, or {inputs, outputs}"
        )
    trees = []
    for text in texts:
        try:
            trees.append(ast.parse(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            told = str(error) or "nested too deeply"
            raise DataError(f"{where}: column 'tests' holds a text that is no Python ({told}); mend it") from None
    entry = prompt.fields.get("entry_point")
    if len(texts) == 1 and re.search(r"^def check\(", texts[0], re.MULTILINE):
        if entry:
            texts = [f"{texts[0]}\n\ncheck({entry})\n"]
            if _parsed(texts[0]) is None:
                raise DataError(
                    f"{where}: column 'entry_point' holds {entry!r}; 'code' reads the name of a function there"
                )
        elif not re.search(r"^check\(", texts[0], re.MULTILINE):
            raise DataError(
                f"{where}: column 'tests' defines check and calls it nowhere, so every program would pass; give it "
                "the column 'entry_point' with the name of the function"
            )
    elif all(_tests_nothing(step) for tree in trees for step in tree.body):
        raise DataError(
            f"{where}: column 'tests' holds nothing that could fail ({_shown_text(texts)}), so every program would "
            "pass; write assertions, or calls of the functions that hold them"
        )
    return Tests(texts=tuple(texts))


def _tests_nothing(step: ast.stmt) -> bool:
    """Whether a statement of a module passes whatever the program was: it only defines, or compares and drops what it
    found, or waits for a name that the module does not have there."""
    if getattr(step, "decorator_list", None):
        return False
    match step:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Import() | ast.ImportFrom() | ast.Pass():
            return True
        case ast.Assign(value=value) | ast.AnnAssign(value=value) | ast.Expr(value=value):
            compares = isinstance(step, ast.Expr) and isinstance(value, ast.Compare | ast.BoolOp | ast.UnaryOp)
            return compares or not any(isinstance(part, ast.Call) for part in ast.walk(value or step))
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
    return False


_READS = {"starts": "a text", "stops": "a list of texts", "entry_point": "a name"}


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"an empty {kind}" if isinstance(value, list | str) and not value else kind


def _shown_text(texts: Sequence[str]) -> str:
    line = next((line for text in texts for line in text.strip().splitlines()), "")
    return repr(line[:60]) if line else "it is empty"


def _pairs(value: dict[str, Any], where: str, output: int) -> tuple[tuple[str, str], ...]:
    if value.get("fn_name"):
        raise DataError(
            f"{where}: column 'tests' calls a function, {value['fn_name']!r}; write its tests as a list of assertions"
        )
    inputs, outputs = value.get("inputs"), value.get("outputs")
    for name, texts in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{where}: column 'tests' needs {name!r}, a list of one text or more; it has {sorted(value)}"
            )
    assert inputs is not None
    assert outputs is not None
    for text in (*inputs, *outputs):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: column 'tests' holds a text that is no Unicode ({error}); mend it") from None
    if len(inputs) != len(outputs):
        raise DataError(
            f"{where}: column 'tests' has {len(inputs)} inputs and {len(outputs)} outputs; it needs as many"
        )
    longest = max(len(text.encode()) for text in outputs)
    if longest > output:
        raise DataError(f"{where}: an output in column 'tests' has {longest} bytes; set verifier.output to as many")
    return tuple(zip(inputs, outputs, strict=True))
