"""Imports of `opd` go down one list, so that what a file rests on can be read without what rests on it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
AXES = (
    "prompts",
    "curricula",
    "rollouts",
    "teachers",
    "policies",
    "shaping",
    "updates",
    "verifiers",
    "watches",
    "compatibility",
    "engines",
    "environments",
)

ORDER = (
    ("what a user calls", "__main__ cli reproductions"),
    ("from Python", "__init__ api"),
    ("what works through a recipe", "plan jobs server loop saving model_card truth_table report catalogue"),
    ("building a run", "assembly"),
    ("what looks after a run", "monitor evaluation failures stopping self_test same_view checkpoints asking callbacks"),
    ("a run", "run measurement rounding now kept_weights"),
    ("the recipe", "recipe"),
    ("the choices of the axes", " ".join(AXES)),
    (
        "what choices of one modality share",
        "language flow vision acting drafting drawings procedural merging store sandbox remote privacy",
    ),
    (
        "what an axis asks of its choices",
        " ".join(f"{axis}.base {axis}.__init__" for axis in AXES if axis != "prompts")
        + " policies.evaluation policies.held_out rollouts.request"
        + " language.engines.base language.engines.__init__ language.identity",
    ),
    ("objectives, divergences among them", "objectives divergences"),
    ("projection, divergence and gradient, chunk by chunk", "operator scenes"),
    ("what the axes trade in", "distributions trajectories reduction context"),
    ("prompts", "prompts.base prompts.messages prompts.pictures prompts.videos prompts.__init__"),
    ("facts about files, weights and machines", "files weights sharding provenance randomness pictures planning hub"),
    ("settings and errors", "choice schedules errors hardware progress trackers"),
)
"""From what a user calls down to the ground, as docs/design.md has it: a name stands for the file or for all that its
folder holds and no longer name says otherwise. A file may import from its own line and from those below."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("policies.base", "teachers.__init__"): "types: a student says what teacher it makes, and teachers follow students",
    ("policies.base", "teachers.self_teacher"): "types: the settings of the teacher that is a copy of the student",
    ("policies.held_out", "teachers.__init__"): "types: the same, where a student is measured against a teacher",
    ("policies.base", "rollouts.__init__"): "types: a policy makes the sampler of held-out prompts",
    ("rollouts.base", "policies.__init__"): "types: where others write, the student's own sampler is asked for",
    ("rollouts.base", "teachers.__init__"): "types: a rollout is built of the student and its teachers",
}
"""Imports that go up, or close a circle, with the reason why they are still there."""


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name, without `opd.`; a folder's own is `FOLDER.__init__`."""
    return {
        ".".join(path.relative_to(ROOT / "opd").with_suffix("").parts): path
        for path in sorted((ROOT / "opd").rglob("*.py"))
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Files of the package that one imports, also for its types alone or inside a function."""

    def file_of(dotted: str) -> str | None:
        name = dotted.removeprefix("opd").lstrip(".")
        inside = f"{name}.__init__".lstrip(".")
        return name if name in known else inside if inside in known else None

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            targets = [
                f"{node.module}.{alias.name}" if file_of(f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            ]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "opd" and (found := file_of(target)) is not None:
                yield found


def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def line_of(module: str) -> int:
    """Its line in `ORDER`, counted from the ground."""
    fits = [
        (len(name.split(".")), len(ORDER) - line)
        for line, (_, names) in enumerate(ORDER)
        for name in names.split()
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"opd/{module.replace('.', '/')}.py has no place in the order of imports; give it one"
    return max(fits)[1]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of which each member reaches each other one."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in graph.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        reach[start] = seen
    found = {frozenset({a} | {b for b in reach[a] if a in reach[b]}) for a in graph if a in reach[a]}
    return [set(group) for group in found]


def room(module: str) -> str:
    """The folder of a file, where it has one; what lies lower in the order than the rest of a folder, as what an axis
    asks of its choices, is a room beside it."""
    folder, _, rest = module.partition(".")
    if not rest:
        return folder
    return folder if line_of(module) == line_of(f"{folder}.any_choice") else f"{folder} (base)"


def kept() -> dict[str, set[str]]:
    """All imports but the exceptions."""
    return {name: {to for to in found if (name, to) not in EXCEPTIONS} for name, found in imports().items()}


def test_imports_go_down():
    up = [(a, b) for a, found in kept().items() for b in sorted(found) if line_of(b) > line_of(a)]
    assert not up


def test_rooms_make_no_circle():
    rooms: dict[str, set[str]] = {}
    for name, found in kept().items():
        rooms.setdefault(room(name), set()).update(room(to) for to in found if room(to) != room(name))
    assert not circles(rooms)


def test_files_make_no_circle_but_within_one_room():
    for group in circles(kept()):
        assert len({room(name) for name in group}) == 1, sorted(group)


def test_exceptions_are_still_there():
    gone = [(a, b) for a, b in EXCEPTIONS if b not in imports().get(a, ())]
    assert not gone, "these need no exception any more; take them out of the list"


def test_a_file_that_goes_up_is_found(tmp_path):
    (tmp_path / "file.py").write_text("def f():\n    from opd.run import Run\n    import opd.cli.main\n")
    assert sorted(imported(tmp_path / "file.py", modules())) == ["cli.main", "run"]
    assert line_of("run") > line_of("recipe.tree") > line_of("teachers.local") > line_of("teachers.base")


def test_the_page_on_design_has_the_same_order():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## Layout")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+) \| (.+) \|$", page, re.M)
    rows = [(what, set(re.findall(r"`([^`]+)`", where))) for what, where in rows if where != "where in `opd/`"]
    assert [what.split(":")[0] for what, _ in rows] == [what for what, _ in ORDER]
    for (what, shown), (_, names) in zip(rows, ORDER, strict=True):
        plain = {name for name in names.split() if "." not in name and not name.startswith("__")}
        assert plain <= shown, (what, sorted(plain - shown))


def test_the_page_on_design_names_files_that_are_there():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:opd/)?([a-z_/]+\.py)`", page)) - {"tests/test_imports.py"}
    assert named
    assert [name for name in sorted(named) if not (ROOT / "opd" / name).is_file()] == []
    tests = re.findall(r"`((?:seams/)?test_\w+)`", page)
    assert tests
    assert [name for name in tests if not (ROOT / "tests" / f"{name}.py").is_file()] == []


def test_benchmarks_make_no_circle():
    files = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = {
            target
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for target in (
                [alias.name.split(".")[-1] for alias in node.names] + [(node.module or "").split(".")[-1]]
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks"
                else [alias.name.split(".")[-1] for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if target in files and target != name
        }
    assert not circles(graph)
