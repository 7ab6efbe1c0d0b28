"""Servers that a run starts: they answer when it needs them, and nothing of them is left when it is over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import opd
from opd.cli import main
from opd.errors import ModelError, OpdError, RecipeError, RunError
from opd.recipe import parse_recipe
from opd.remote import keeper
from opd.remote.launch import Server, ServerStart, ended_at, servers_of, started
from opd.teachers.served import LiveServedTeacher, ServedTeacher
from tests.conftest import save_tiny
from tests.processes import together
from tests.serving import serving_tiny
from tests.tiny import TEXTS

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="processes are not listed there")

TEXTS = [text for text in TEXTS if set(text) <= set("0123456789abcdefghijklmnopqrstuvwxyz +-=?.,#")]

FORWARDER = """
import http.server, sys, urllib.error, urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

class Forwarder(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.forward(None)

    def do_POST(self):
        self.forward(self.rfile.read(int(self.headers["content-length"])))

    def forward(self, body):
        request = urllib.request.Request(sys.argv[2] + self.path, body, {"content-type": "application/json"})
        try:
            answer = opener.open(request)
        except urllib.error.HTTPError as error:
            answer = error
        data = answer.read()
        self.send_response(answer.status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

print("forwarding", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Forwarder).serve_forever()
"""
"""A command that starts in no time and answers what the server at its second argument does."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "student", vocabulary=47, seed=1), save_tiny(root / "teacher", vocabulary=47, seed=7)


@pytest.fixture(scope="module")
def upstream():
    with serving_tiny() as url:
        yield url


@pytest.fixture
def forwarding(tmp_path, upstream):
    """A teacher's block whose command forwards to a real server."""
    (tmp_path / "forwarder.py").write_text(FORWARDER)
    command = [sys.executable, str(tmp_path / "forwarder.py"), "{port}", upstream]
    return {"kind": "served", "url": free_address(), "retries": 1, "backoff": 0.01, "start": {"command": command}}


def free_address():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def recipe_of(folder, student, teacher, **changes):
    return {
        "student": {"model": student, "template": "plain"},
        "teacher": teacher,
        "prompts": {"kind": "inline", "prompts": TEXTS * 2},
        "steps": 2,
        "batch": {"prompts": 4, "micro": 4},
        "rollout": {"max_new_tokens": 6},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-3},
        "output": str(folder),
        **changes,
    }


def run(folder, student, teacher, **changes):
    return opd.execute(parse_recipe(recipe_of(folder, student, teacher, **changes)), quiet=True)


def with_words(text):
    """Processes whose command line has a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def nothing_left(text, seconds=30):
    until = time.monotonic() + seconds
    while with_words(str(text)) and time.monotonic() < until:
        time.sleep(0.05)
    return not with_words(str(text))


def fails(start, url=None, **options):
    """What a start says that fails."""
    teacher = ServedTeacher(url=url or free_address(), start=start)
    with pytest.raises(OpdError) as told, started(servers_of(teacher, Path("unused"), "teacher"), status, **options):
        raise AssertionError("it has started")
    return told.value


@contextlib.contextmanager
def status(text):
    yield


def python(text, *words):
    return [sys.executable, "-c", text, *words]


def test_opd_train_starts_opd_serve_and_ends_it(folders, tmp_path, monkeypatch):
    student, teacher = folders
    mine = shutil.copytree(teacher, tmp_path / "served-model")
    block = {
        "kind": "served",
        "url": free_address(),
        "start": {
            "command": f"{sys.executable} -m opd serve {mine} --port {{port}} --device cpu",
            "environment": {"OMP_NUM_THREADS": 1},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "run", student, block)))
    monkeypatch.setattr("sys.argv", ["opd", "train", str(tmp_path / "recipe.yaml"), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/loss"] for row in rows if "train/loss" in row]
    assert not any("train/invalid" in row for row in rows)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    log = (tmp_path / "run" / "servers" / "teacher.log").read_text()
    assert "-m opd serve" in log.splitlines()[0]
    assert f"serving {mine}" in log
    assert nothing_left(mine, 0)


def test_nothing_is_left_when_opd_train_is_killed(folders, forwarding, tmp_path):
    student, _ = folders
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_of(tmp_path / "run", student, forwarding, steps=1_000_000))
    )
    command = [sys.executable, "-m", "opd", "train", str(tmp_path / "recipe.yaml"), "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.is_file() and "train/loss" in metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        # The keeper and the command.
        assert len(with_words(str(tmp_path / "forwarder.py"))) == 2
    finally:
        process.kill()
        process.wait()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_ends_the_waiting(number, folders, tmp_path):
    student, _ = folders
    text = "import os, sys, time; os.kill(int(sys.argv[1]), int(sys.argv[2])); time.sleep(600)"
    command = python(text, str(os.getpid()), str(int(number)), str(tmp_path))
    teacher = {"kind": "served", "url": free_address(), "start": {"command": command}}
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else RunError):
        run(tmp_path / "run", student, teacher)
    assert nothing_left(tmp_path, 0)


def test_a_group_that_does_not_listen_is_killed(tmp_path):
    """A command that ignores SIGTERM, and a process that it has started, which does too."""
    (tmp_path / "keeper.py").write_text(Path(keeper.__file__).read_text().replace("GRACE = 10.0", "GRACE = 0.2"))
    (tmp_path / "deaf.py").write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.Popen([sys.executable, __file__, 'second'])\n"
        "else:\n"
        "    print('both', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-I", str(tmp_path / "keeper.py"), str(os.getpid())]
    command += [sys.executable, str(tmp_path / "deaf.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"both\n"
        assert len(with_words(str(tmp_path))) == 3
        process.stdin.close()
        assert process.wait(20) == 128 + signal.SIGKILL
    assert nothing_left(tmp_path, 5)


def test_a_server_that_ends_in_the_middle_is_told(folders, forwarding, tmp_path, monkeypatch):
    student, _ = folders
    answer, calls = LiveServedTeacher.answer, []

    def killing(self, trajectories, settings, context):
        calls.append(1)
        if len(calls) == 5:
            for each in with_words(str(tmp_path / "forwarder.py")):
                if b"keeper.py" not in Path(f"/proc/{each}/cmdline").read_bytes():
                    os.kill(each, signal.SIGKILL)
        return answer(self, trajectories, settings, context)

    monkeypatch.setattr(LiveServedTeacher, "answer", killing)
    with pytest.raises(RunError) as told:
        run(tmp_path / "run", student, forwarding, steps=50)
    log = tmp_path / "run" / "servers" / "teacher.log"
    assert f"the server that was started ended by signal 9, its log: {log}" in str(told.value)
    assert nothing_left(tmp_path, 0)


def test_two_processes_share_one_server(folders, forwarding, tmp_path):
    student, _ = folders
    recipe = parse_recipe(recipe_of(tmp_path / "run", student, forwarding))
    answers = together(recipe, {})
    losses = [[row["train/loss"] for row in a["history"] if "train/loss" in row] for a in answers]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    log = (tmp_path / "run" / "servers" / "teacher.log").read_text()
    assert log.count("forwarding") == 1
    assert nothing_left(tmp_path / "forwarder.py", 0)


def test_opd_score_starts_it_too_and_goes_on_with_the_log(folders, forwarding, tmp_path):
    from opd.jobs.sampling import sample
    from opd.jobs.scoring import score

    student, _ = folders
    recipe = parse_recipe(recipe_of(tmp_path / "run", student, [{**forwarding, "name": "large one"}]))
    sample(recipe, tmp_path / "store", quiet=True)
    for kind in ("exact", "sampled"):
        assert not score(recipe, tmp_path / "store", kind, quiet=True).missing()
        assert nothing_left(tmp_path / "forwarder.py", 0)
    assert (tmp_path / "store" / "servers" / "large-one.log").read_text().count("forwarding") == 2
    # More draws go into the same folder.
    sample(recipe, tmp_path / "store", draws=2, quiet=True)


def test_a_run_that_ended_is_measured_and_gone_on_with(folders, forwarding, tmp_path):
    student, _ = folders
    changes = {"checkpoint": {"every": 1}}
    run(tmp_path / "run", student, forwarding, **changes)
    other = {**forwarding, "start": {**forwarding["start"], "wait": 60}}
    recipe = parse_recipe(recipe_of(tmp_path / "run", student, other, **changes, steps=3))
    assert len([r for r in opd.execute(recipe, resume=True, quiet=True).history if "train/loss" in r]) == 3
    from opd.api import measure

    assert measure(recipe, quiet=True).metrics
    assert nothing_left(tmp_path / "forwarder.py", 0)


def test_check_shows_what_would_be_started(folders, tmp_path, monkeypatch, capsys):
    student, _ = folders
    teacher = {"kind": "served", "url": "http://127.0.0.1:8123", "start": {"command": "no-such-command --port {port}"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "run", student, teacher)))
    monkeypatch.setattr("sys.argv", ["opd", "check", str(tmp_path / "recipe.yaml"), "--json"])
    with contextlib.suppress(SystemExit):
        main()
    (note,) = [n for n in json.loads(capsys.readouterr().out)["notes"] if "starts" in n]
    assert note == (
        "teacher: a run starts `no-such-command --port 8123` (there is no 'no-such-command' on this machine), waits up "
        f"to 900 s for http://127.0.0.1:8123/health, and ends it with itself; log: {tmp_path}/run/servers/teacher.log; "
        "it is not started here"
    )
    assert not (tmp_path / "run").exists()


def test_a_command_that_is_not_there_is_refused(folders, tmp_path, monkeypatch, capsys):
    student, _ = folders
    teacher = {"kind": "served", "url": free_address(), "start": {"command": "no-such-command --port {port}"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(tmp_path / "run", student, teacher)))
    monkeypatch.setattr("sys.argv", ["opd", "train", str(tmp_path / "recipe.yaml"), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told == "opd: teacher.start.command: there is no 'no-such-command' here; install it, or correct it\n"


def test_a_command_that_ends_at_once_is_told_with_its_code_and_its_last_words(tmp_path):
    log = tmp_path / "logs" / "a.log"
    text = "import sys; print('line\\n' * 30, flush=True); print('no memory', file=sys.stderr); sys.exit(3)"
    told = fails({"command": python(text), "log": str(log)})
    assert isinstance(told, ModelError)
    first, *rest = str(told).splitlines()
    assert first.startswith("teacher.start: `")
    assert f"` ended with code 3 before it answered; its log is {log}, which ends:" in first
    assert len(rest) == 6
    assert "no memory" in rest
    killed = fails({"command": python("import os; os.kill(os.getpid(), 9)"), "log": str(log)})
    assert "ended by signal 9 before it answered" in str(killed)
    # What an earlier command said is kept in the file, and not told again.
    assert "no memory" not in str(killed)
    assert log.read_text().count("no memory") == 2


def test_a_file_that_cannot_be_run_is_told(tmp_path):
    (tmp_path / "script").write_bytes(b"\x7fELF no program")
    (tmp_path / "script").chmod(0o755)
    told = str(fails({"command": [str(tmp_path / "script")], "log": str(tmp_path / "a.log")}))
    assert "ended with code 126 before it answered" in told
    assert "cannot be run: Exec format error" in told


def test_a_wait_that_is_too_short_is_told(tmp_path):
    url = free_address()
    command = python("import time; print('loading', flush=True); time.sleep(600)", str(tmp_path))
    told = str(fails({"command": command, "wait": 1, "log": str(tmp_path / "a.log")}, url))
    assert f"nothing answered at {url}/health in 1 s (teacher.start.wait, .health; the command must listen" in told
    assert nothing_left(tmp_path, 0)


def test_a_path_that_is_not_there_is_told(upstream):
    start = ServerStart(command="a", health="/no/such/path", wait=0.001)
    server = Server("teacher", "teacher", upstream, start, Path())
    with pytest.raises(ModelError, match=f"there was nothing but HTTP 404 at {upstream}/no/such/path in 0.001 s"):
        server.ready(lambda: None)


def test_an_address_where_something_answers_is_refused(forwarding, upstream, tmp_path):
    told = fails({**forwarding["start"], "log": str(tmp_path / "a.log")}, upstream)
    assert isinstance(told, RunError)
    assert str(told) == (
        f"teacher.start: something answers at {upstream} already; remove teacher.start to use it, or choose another "
        "port in teacher.url"
    )
    assert not (tmp_path / "a.log").exists()


def test_two_runs_do_not_take_one_port(tmp_path):
    """The second begins while the first one's server is loading."""
    url, told = free_address(), []

    def second():
        told.append(str(fails({"command": python("pass"), "log": str(tmp_path / "b.log")}, url)))
        raise RunError("enough")

    command = python("import time; time.sleep(600)", str(tmp_path))
    assert str(fails({"command": command, "log": str(tmp_path / "a.log")}, url, stopping=second)) == "enough"
    assert "another run starts, keeps or ends a server on port" in told[0]
    assert nothing_left(tmp_path, 0)


def test_a_server_ends_when_the_block_raises_and_its_environment_is_in_no_file(forwarding, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "sesame-123")
    monkeypatch.setenv("RANK", "0")
    says = "import os, sys; print(os.environ['SOME_TOKEN'] == 'sesame-123', os.environ['GPU'], os.environ.get('RANK'))"
    script = tmp_path / "forwarder.py"
    script.write_text(f"{says}\n{script.read_text()}")
    start = {**forwarding["start"], "environment": {"GPU": 1}}
    teacher = ServedTeacher(url=forwarding["url"], start=start, name="a/b")
    servers = servers_of([teacher], tmp_path / "logs", "teacher")
    seen = []

    def work():
        seen.extend(with_words(str(script)))
        assert ended_at(teacher.url[0]) is None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), started(servers, status):
        work()
    assert len(seen) == 2
    assert nothing_left(script, 0)
    log = (tmp_path / "logs" / "a-b.log").read_text()
    assert "True 1 None" in log
    assert "sesame" not in log


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://10.0.0.1:8000"}, "start is for a server on this machine, and url is http://10.0.0.1:8000"),
        ({"url": "https://127.0.0.1:8000"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://127.0.0.1"}, "start needs the port in url"),
        ({"url": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}, "start is for one address, and url lists 2"),
        ({"command": "vllm serve model > log"}, "it is run without a shell, and '>' is for one"),
        ({"command": "A=1 vllm serve model"}, "put A into 'environment'"),
        ({"command": "vllm serve 'model"}, "No closing quotation"),
        ({"command": "vllm serve m --api-key sesame"}, "command has --api-key, which looks like a secret"),
        ({"command": "vllm serve m --api-key=sesame"}, "command has --api-key, which looks like a secret"),
        ({"command": "env HF_TOKEN=sesame vllm serve m"}, "command has HF_TOKEN, which looks like a secret"),
        ({"environment": {"HF_TOKEN": "sesame"}}, "environment has HF_TOKEN, which looks like a secret"),
        ({"environment": {"OPENAI_API_KEY": "sesame"}}, "export it instead, the command inherits what is exported"),
        ({"environment": {"A B": "c"}}, "'A B' is no name of a variable"),
        ({"health": "health"}, "health"),
        ({"wait": 0}, "wait"),
    ],
)
def test_what_cannot_be_started_is_refused(changes, message):
    url = changes.pop("url", "http://127.0.0.1:8000")
    with pytest.raises(RecipeError) as told:
        parse_recipe(
            recipe_of("run", "model", {"kind": "served", "url": url, "start": {"command": "a", **changes}}), "recipe"
        )
    assert message.lower() in str(told.value).lower()
    assert str(told.value).startswith("recipe: teacher.start")
    assert "sesame" not in str(told.value)
    assert len(str(told.value).splitlines()) <= 2


def test_names_that_only_look_like_secrets_are_taken():
    start = ServerStart(
        command="opd serve m --tokenizer t --token-env NAME --max-logprobs 20",
        environment={"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "3", "CUDA_VISIBLE_DEVICES": 1},
    )
    assert start.environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert start.command[-1] == "20"
    with pytest.raises(ValidationError):
        ServerStart(command=[])


def test_two_servers_on_one_port_are_refused(folders):
    student, _ = folders
    block = {"kind": "served", "url": "http://127.0.0.1:8000", "start": {"command": "a"}}
    other = {**block, "url": "http://localhost:8000"}
    recipe = parse_recipe(recipe_of("run", student, [block, other]))
    with pytest.raises(RecipeError, match=r"teacher\.0\.start and teacher\.1\.start start servers on one port, 8000"):
        servers_of(recipe, Path())
    routed = {
        "kind": "routed",
        "by": "task",
        "routes": {"math": block, "code": {"kind": "served", "url": block["url"]}},
    }
    (server,) = servers_of(parse_recipe(recipe_of("run", student, routed)), Path("logs"))
    assert (server.key, server.log) == ("teacher.routes.math", Path("logs/teacher-routes-math.log"))
