"""Programs that a model wrote stay in their sandbox, whatever they try."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time

import pytest

from benchmarks import pages
from opd.errors import RecipeError, RunError
from opd.sandbox import Limits, Sandbox, detection, filters, sandbox, why_not
from opd.sandbox.detection import BEST_FIRST, BY_KIND
from opd.sandbox.running import remove
from tests.hostile import HOSTILE
from tests.hostile.outside import Outside
from tests.hostile.processes import adopt_orphans, left_behind, processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement needs Linux")
KINDS = [each.kind for each in BEST_FIRST]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    made, before = Outside(folder), tempfile.tempdir
    tempfile.tempdir = str(made.temp)
    yield made
    tempfile.tempdir = before
    made.close()


def confined(kind):
    lacking = why_not(kind)
    if lacking is not None:
        pytest.skip(f"{kind}: {lacking}")
    return Sandbox(BY_KIND[kind]())


def test_linux_has_a_confinement():
    assert any(why_not(kind) is None for kind in KINDS), [why_not(kind) for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_a_hostile_program_is_contained(outside, hostile, kind):
    ran, damage = outside.run(confined(kind), hostile)
    assert not damage, (ran, ran.stderr)
    if hostile.ends and not (kind == "seccomp" and "ModuleNotFound" in ran.stderr):
        assert ran.ended in hostile.ends, (ran, ran.stderr)


@pytest.mark.parametrize("hostile", [each for each in HOSTILE if each.control], ids=lambda hostile: hostile.name)
def test_without_confinement_it_does_the_damage(outside, hostile):
    ran, damage = outside.run(Sandbox(BY_KIND["none"]()), hostile)
    assert any(hostile.control in each for each in damage), (damage, ran, ran.stderr)


@pytest.mark.parametrize("kind", KINDS)
def test_what_programs_need_works(kind):
    text = """
import collections, datetime, decimal, fractions, itertools, json, math, random, re, statistics, string, sys, threading
out = []
threads = [threading.Thread(target=lambda i=i: out.append(i)) for i in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
n, *rest = [int(line) for line in sys.stdin]
print(sum(rest) * n, sorted(out), decimal.Decimal(1) / 3, json.dumps({"a": [1.5]}), re.sub("a", "b", "aa"))
print(datetime.datetime.strptime("2020-02-03", "%Y-%m-%d").date(), "grüße 漢", random.Random(1).randint(0, 0))
"""
    ran = confined(kind).run(text, stdin="3\n4\n5\n")
    lines = ['27 [0, 1, 2, 3] 0.3333333333333333333333333333 {"a": [1.5]} bb', "2020-02-03 grüße 漢 0"]
    assert (ran.ended, ran.stdout.splitlines()) == ("finished", lines), ran.stderr


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize(
    "text",
    [
        "print('right')\nexit()\nprint('wrong')",
        "print('right')\nquit(0)",
        "import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.getrlimit(r.RLIMIT_STACK)[1],) * 2)\nprint('right')",
    ],
)
def test_what_scripts_often_do_at_their_ends_and_starts_works(kind, text):
    ran = confined(kind).run(text)
    assert (ran.ended, ran.stdout) == ("finished", "right\n"), ran.stderr


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_a_program_has_a_folder_of_its_own_and_the_whole_standard_library(outside, kind):
    text = "import os, sqlite3, zoneinfo, ctypes\nopen('a', 'w').write('b')\nprint(os.listdir('.'), open('a').read())"
    assert confined(kind).run(text).stdout == "['a'] b\n"
    assert os.listdir(outside.temp) == []


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_why_a_program_ended_is_told(kind):
    box = confined(kind)

    def ended(text, **limits):
        ran = box.run(text, limits=Limits(**{"seconds": 8.0, **limits}))
        return ran.ended, ran.exit

    assert ended("print(1)") == ("finished", 0)
    assert ended("import sys\nsys.exit(3)") == ("error", 3)
    assert ended("1 / 0") == ("error", 1)
    assert ended("def") == ("error", 1)
    assert ended("import os\nos.abort()") == ("killed", -6)
    assert ended("x = bytearray(1 << 33)", memory=256) == ("memory", 1)
    assert ended("while True: print('x' * 99)", output=999) == ("output", -9)
    assert ended("import time\ntime.sleep(9)", seconds=0.1) == ("time", -9)


def test_cpu_time_counts_the_work_alone():
    ran = sandbox()[0].run("while True: pass", limits=Limits(seconds=120, cpu_seconds=1))
    assert ran.ended == "cpu"


@pytest.mark.parametrize("kind", KINDS)
def test_tests_run_behind_the_program_in_its_names(kind):
    box, tests = confined(kind), ["assert f(1) == 2", "assert f(1) == 3", "g = f(4)", "assert g == 5"]
    text = "print('hello')\ndef f(x):\n    return x + 1\nif __name__ == '__main__':\n    1 / 0\n"
    assert box.run(text, tests=tests).passed == {0}
    ran = box.run(text, tests=tests, every_test=True)
    assert (ran.passed, ran.ended, ran.stdout) == ({0, 2, 3}, "finished", "hello\n")
    assert box.run("import time\n1 / 0", tests=tests).passed == frozenset()
    # What stood in a test that never ends is not what stood before it.
    slow = box.run(
        "def f(x):\n    while x:\n        pass\n    return 0", tests=["assert f(0) == 0", "f(1)"], limits=Limits(0.5)
    )
    assert (slow.passed, slow.ended) == ({0}, "time")
    # Long texts go through a pipe that takes less at once.
    long = "#" + "x" * 300_000
    assert box.run(f"def f(x):\n    return x\n{long}", tests=[f"assert f(1) == 1\n{long}"]).passed == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_ends_with_the_process_that_asked_for_it(kind, tmp_path):
    confined(kind)
    adopt_orphans()
    text = (
        f"from opd.sandbox import Sandbox\nfrom opd.sandbox.detection import BY_KIND\n"
        f"print('go', flush=True)\nSandbox(BY_KIND[{kind!r}]()).run('print(1, flush=True)\\nwhile True: pass')"
    )
    before = processes()
    asking = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert asking.stdout is not None
    asking.stdout.readline()
    until = time.monotonic() + 20
    while not processes() - before - {asking.pid} and time.monotonic() < until:
        time.sleep(0.05)
    assert processes() - before - {asking.pid}
    asking.kill()
    asking.wait()
    assert not left_behind(before, 20)


def test_a_failure_of_the_sandbox_is_an_error(monkeypatch):
    box = sandbox()[0]
    monkeypatch.setattr("opd.sandbox.running.interpreter", lambda: "/usr/bin/nothing-of-this-name")
    with pytest.raises(RunError, match="could not be started"):
        box.run("print(1)")
    seccomp = confined("seccomp")
    monkeypatch.undo()
    monkeypatch.setattr(type(seccomp.confinement), "filter", b"\0" * 8)
    with pytest.raises(RunError, match=r"'seccomp'.*seccomp: Invalid argument"):
        seccomp.run("print(1)")


def test_a_confinement_that_does_not_hold_is_not_taken(monkeypatch):
    confined("landlock")
    why_not.cache_clear()
    monkeypatch.setattr(detection.Landlock, "landlock", lambda self, scratch: None)
    reason = why_not("landlock")
    why_not.cache_clear()
    assert reason == "a program can read a file, write a file, list a folder"


def test_the_best_is_taken_and_it_says_why_no_better(monkeypatch):
    monkeypatch.setattr(detection, "why_not", lambda kind: {"bubblewrap": "bwrap is not installed"}.get(kind))
    box, notes = sandbox()
    assert box.confinement.kind == "landlock"
    assert notes == ["programs are confined by landlock; not bubblewrap: bwrap is not installed"]
    monkeypatch.setattr(detection, "why_not", lambda kind: None if kind == "none" else "needs Linux")
    for kind in ("best", "seccomp"):
        with pytest.raises(RecipeError, match=r"needs Linux.*confinement: none for programs that you trust") as error:
            sandbox(kind)
        assert error.value.exit_code == 2
    box, notes = sandbox("none")
    assert not box.confinement.confines
    assert "your own rights" in notes[0]


def test_the_filter_lets_through_what_is_listed(monkeypatch):
    """Run as the kernel runs it, on the numbers of both architectures."""

    def decide(machine, number, *arguments, arch=None, files=True):
        code = filters.compiled(files, machine)
        steps = [struct.unpack_from("=HBBI", code, i) for i in range(0, len(code), 8)]
        arch = filters.ARCHITECTURES[machine][0] if arch is None else arch
        data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
        place, value = 0, 0
        while True:
            operation, yes, no, k = steps[place]
            place += 1
            if operation == filters.RETURN:
                return k
            if operation == filters.LOAD:
                (value,) = struct.unpack_from("=I", data, k)
                continue
            true = {filters.EQUAL: value == k, filters.AT_LEAST: value >= k, filters.ANY_BIT: bool(value & k)}
            place += yes if true[operation] else no

    allow, deny, kill = filters.ALLOW, filters.ERRNO | filters.EPERM, filters.KILL_PROCESS
    own, missing = filters.OWN_PID, filters.ERRNO | filters.ENOSYS
    for machine, clone, fcntl, tgkill, prlimit, openat, socket in (
        ("x86_64", 56, 72, 234, 302, 257, 41),
        ("aarch64", 220, 25, 131, 261, 56, 198),
    ):
        assert decide(machine, clone, 0x3D0F00) == allow
        assert {decide(machine, clone, flags) for flags in (17, 0, 0x3D0F00 | 1 << 29, 0x4100 | 17)} == {deny}
        assert [decide(machine, fcntl, 5, command) for command in (3, 8, 10, 1031)] == [allow, deny, deny, deny]
        assert [decide(machine, tgkill, pid, pid, 9) for pid in (own, 1, 2**32 - 1)] == [allow, deny, deny]
        assert [decide(machine, prlimit, 0, 7, new) for new in (0, 1, 1 << 32)] == [allow, deny, deny]
        assert [decide(machine, prlimit, pid, 3, 1) for pid in (0, own, 1)] == [allow, allow, deny]
        assert [decide(machine, openat, 0, 0, flags) for flags in (0, 0x410000)] == [allow, deny]
        assert decide(machine, openat, files=False) == deny
        assert [decide(machine, number) for number in (socket, 435, 437, 460)] == [deny, missing, missing, missing]
        assert decide(machine, 0, arch=0x40000003) == kill
    assert decide("x86_64", 0x40000000) == kill
    both = [
        {name: numbers[column] for name, numbers in (filters.COMPUTING | filters.FILES).items()} for column in (0, 1)
    ]
    assert all(
        len({n for n in each.values() if n is not None}) == sum(n is not None for n in each.values()) for each in both
    )


def test_a_folder_of_any_depth_is_deleted(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").touch()
    here = os.getcwd()
    os.chdir(folder)
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")
    os.symlink(keep, "link")
    os.chdir(here)
    (folder / "closed").mkdir(mode=0)
    remove(folder)
    assert os.listdir(tmp_path) == ["keep"]
    assert os.listdir(keep) == ["file"]


def test_what_is_made_while_it_is_deleted_is_deleted_too(tmp_path, monkeypatch):
    folder, rmdir, late = tmp_path / "scratch", os.rmdir, ["a", "b"]
    folder.mkdir()

    def slow(path):
        if late:
            (folder / late.pop()).mkdir()
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", slow)
    remove(folder)
    assert not late
    assert not folder.exists()


def test_without_descriptors_nothing_is_left(monkeypatch):
    box, count, before = sandbox()[0], len(os.listdir("/proc/self/fd")), processes()

    def none_left(file):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", none_left)
    with pytest.raises(RunError, match="Too many open files"):
        box.run("print(1)")
    assert len(os.listdir("/proc/self/fd")) == count
    assert processes() == before


def test_without_a_folder_for_temporary_files_it_is_told(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(detection, "why_not", why_not.__wrapped__)
    with pytest.raises(RecipeError, match=r"seccomp: no folder for temporary files.*set TMPDIR"):
        sandbox("seccomp")


def test_the_page_has_every_hostile_program_and_all_were_contained():
    data = json.loads((pages.ROOT / "benchmarks/results/sandbox.json").read_text(encoding="utf-8"))
    assert [row["program"] for row in data["hostile"]] == [hostile.name for hostile in HOSTILE]
    assert not [row for row in data["hostile"] for kind in KINDS if row[kind]["damage"]]
    text = pages.sandbox(pages.ROOT / "benchmarks/results/sandbox.json")
    assert text.strip() in (pages.ROOT / "docs/sandbox.md").read_text(encoding="utf-8")


def test_the_page_says_the_limits():
    page = (pages.ROOT / "docs/sandbox.md").read_text(encoding="utf-8")
    limits = Limits()
    assert f"| wall clock | {limits.seconds:g} s" in page
    assert f"| CPU time | {limits.cpu_seconds} s" in page
    assert f"| memory | {limits.memory} MiB" in page
    assert f"| output | {limits.output >> 20} MiB" in page
    assert f"| files | {limits.files} MiB, and {limits.entries} files" in page
    assert f"| threads | {limits.threads} |" in page
    assert [*KINDS, "none"] == re.findall(r"^\| `(\w+)` \| Linux", page, re.M)
