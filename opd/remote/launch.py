"""Servers that `opd` starts for a run and ends with it."""

from __future__ import annotations

import fcntl
import http.client
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from opd.choice import Settings
from opd.errors import ModelError, RecipeError, RunError
from opd.files.whole import local_main_process
from opd.remote import keeper
from opd.remote.client import LOOPBACK

FOLDER = "servers"
"""Where logs lie, in the directory of a run or of a store."""

SHELL = ("|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>")
"""Words of a command that mean something to a shell alone."""

SECRET = re.compile(r"(?i)(key|token|secret|password|passwd|credentials?)$")
"""How a word of a name ends that stands for a secret."""

LAUNCHERS = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP)_.*)"
)
"""Variables by which a launcher of several processes tells one of them its place; a server is none of them."""

SHOWN = 6
"""Lines of a log in a message."""


def _words(value: object) -> object:
    """A command in one text as the words that a shell would make of it."""
    if not isinstance(value, str):
        return value
    words = shlex.split(value)
    special = [word for word in words if word in SHELL]
    if special:
        raise ValueError(
            f"it is run without a shell, and {special[0]!r} is for one: write [bash, -c, '...'], or leave it out (what "
            "the command prints goes into its log)"
        )
    if words and re.match(r"\w+=", words[0]):
        raise ValueError(f"it is run without a shell: put {words[0].split('=')[0]} into 'environment'")
    return words


def _texts(value: object) -> object:
    """Whole numbers as texts, as in CUDA_VISIBLE_DEVICES: 1."""
    if not isinstance(value, dict):
        return value
    return {k: str(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in value.items()}


class ServerStart(Settings):
    """A server that is started for a run, or for `opd score`, and ended with it, however that ends.

    Its command gets the environment of `opd`, without what a launcher of several processes put there.
    """

    command: Annotated[list[str], BeforeValidator(_words, json_schema_input_type=str | list[str])] = Field(
        min_length=1,
        description="What is run, without a shell: a text or a list of words; {port} stands for the port of `url`",
    )
    environment: Annotated[dict[str, str], BeforeValidator(_texts, json_schema_input_type=dict[str, str | int])] = (
        Field(
            default={}, description="Variables beside those that are exported; no secrets, the recipe is written down"
        )
    )
    wait: float = Field(900.0, gt=0, description="Seconds until it must answer")
    health: str = Field("/health", pattern="^/", description="Path that answers when it is ready")
    log: str | None = Field(None, description="What it prints; default servers/NAME.log in the run directory")

    @model_validator(mode="after")
    def _nothing_secret(self) -> ServerStart:
        # Here, so that the message shows no value.
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name) or "\0" in value:
                raise ValueError(f"environment: {name!r} is no name of a variable, or its value has a zero byte")
            if _is_secret(name):
                raise ValueError(
                    f"environment has {name}, which looks like a secret, and the recipe is written into the run "
                    "directory: export it instead, the command inherits what is exported"
                )
        for word in self.command:
            name, assigned, _ = word.partition("=")
            if (word.startswith("-") or (assigned and re.fullmatch(r"\w+", name))) and _is_secret(name):
                raise ValueError(
                    f"command has {name}, which looks like a secret, and the recipe is written into the run directory: "
                    "export it as the variable that the server reads (vLLM: VLLM_API_KEY)"
                )
        return self

    def check_address(self, urls: Sequence[str]) -> None:
        """Raise `ValueError` unless the block that holds this names one address of this machine."""
        if len(urls) != 1:
            raise ValueError(
                f"start is for one address, and url lists {len(urls)}: start the replicas yourself, and remove start"
            )
        parts = urlsplit(urls[0])
        if parts.hostname not in LOOPBACK or parts.scheme != "http":
            raise ValueError(
                f"start is for a server on this machine, and url is {urls[0]}: write http://127.0.0.1:PORT, or start "
                "the server there and remove start"
            )
        if not parts.port:
            raise ValueError(f"start needs the port in url, and {urls[0]} has none: write http://127.0.0.1:PORT")


def _is_secret(name: str) -> bool:
    return bool(SECRET.search(re.split(r"[_-]", name)[-1]))


class Server:
    """A command that is to answer at an address, and its process where this one started it.

    Args:
        key: of the block that holds `start`, as messages name it.
        name: of the log.
        folder: where that lies by default.
    """

    def __init__(self, key: str, name: str, url: str, start: ServerStart, folder: Path):
        self.key, self.url, self.start = key, url, start
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port, self._path = parts.hostname, parts.port, parts.path.rstrip("/") + start.health
        self.command = [word.replace("{port}", str(parts.port)) for word in start.command]
        own = folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '-', name)}.log"
        self.log = own if start.log is None else Path(start.log).expanduser()
        self._process: subprocess.Popen[bytes] | None = None
        self._claim: IO[str] | None = None
        self._from = 0
        self._said = "nothing answered"

    def __str__(self) -> str:
        text = shlex.join(self.command)
        return f"`{text if len(text) <= 160 else text[:157] + '...'}`"

    def told(self) -> str:
        """What a run will do, in a line."""
        lacking = "" if self.found() else f" (there is no {self.command[0]!r} on this machine)"
        return (
            f"{self.key}: a run starts {self}{lacking}, waits up to {self.start.wait:g} s for "
            f"{self.url}{self.start.health}, and ends it with itself; log: {self.log}"
        )

    def found(self) -> str | None:
        """The command's file; None where there is none."""
        return shutil.which(self.command[0], path=self._environment().get("PATH"))

    def begin(self) -> None:
        """Start the command, on the local main process of several.

        Raises:
            RunError: the address is another server's, or the log cannot be written.
            ModelError: there is no such command.
        """
        if not local_main_process():
            return
        if self.found() is None:
            raise ModelError(
                f"{self.key}.start.command: there is no {self.command[0]!r} here; install it, or correct it"
            )
        self._claim = self._claimed()
        if self._taken():
            raise RunError(
                f"{self.key}.start: something answers at {self.url} already; remove {self.key}.start to use it, or "
                f"choose another port in {self.key}.url"
            )
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        except OSError as error:
            raise RunError(
                f"{self.key}.start: cannot write {self.log} ({error.strerror}); set {self.key}.start.log"
            ) from None
        with log:
            log.write(f"opd: {time.strftime('%F %T')} {shlex.join(self.command)}\n".encode())
            log.flush()
            self._from = log.tell()
            # A session of its own: an interrupt at the terminal is for the run, which needs the server until it ends.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(keeper.__file__).resolve()), str(os.getpid()), *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
                pass_fds=[self._claim.fileno()],
            )

    def ready(self, stopping: Callable[[], None]) -> None:
        """Return when it answers; `stopping` is called meanwhile and raises where a person wants an end.

        Raises:
            ModelError: it ended before, or did not answer in time.
        """
        until = time.monotonic() + self.start.wait
        while True:
            stopping()
            answers = self._answers()
            code = None if self._process is None else self._process.poll()
            if code is not None:
                raise ModelError(f"{self.key}.start: {self} {_ended(code)} before it answered{self._printed()}")
            if answers:
                return
            if time.monotonic() >= until:
                raise ModelError(
                    f"{self.key}.start: {self._said} at {self.url}{self.start.health} in {self.start.wait:g} s "
                    f"({self.key}.start.wait, .health; the command must listen on port {self.port}){self._printed()}"
                )
            self._pause()

    def end(self) -> None:
        """End the command with all that it started."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            # A process that was forked meanwhile may hold the pipe too.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(keeper.GRACE + 5)
        if self._claim is not None:
            self._claim.close()

    def ended(self) -> str | None:
        """With which code the command ended by itself; None while it runs, and where another process started it."""
        if self._process is None:
            return None
        # A connection breaks some milliseconds before the process is gone.
        with suppress(subprocess.TimeoutExpired):
            return f"the server that was started {_ended(self._process.wait(2.0))}, its log: {self.log}"
        return None

    def _claimed(self) -> IO[str]:
        """A file that is locked until the command has ended, so that two runs that start at once do not take one port,
        where each would take the other's server for its own."""
        name = f"opd-{os.getuid()}-port-{self.port}.lock"
        try:
            file = (Path(tempfile.gettempdir()) / name).open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.key}.start: cannot write a temporary file {name} ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RunError(
                f"{self.key}.start: another run starts, keeps or ends a server on port {self.port}; choose another "
                f"port in {self.key}.url"
            ) from None
        return file

    def _taken(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except TimeoutError:
            return True
        except OSError:
            return False
        return True

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", self._path)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            self._said = "nothing answered"
            return False
        finally:
            connection.close()
        self._said = f"there was nothing but HTTP {status}"
        # One that asks for a key is there.
        return status < 300 or status in (401, 403)

    def _pause(self) -> None:
        if self._process is None:
            time.sleep(0.2)
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)

    def _environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
        return {**ours, **self.start.environment}

    def _printed(self) -> str:
        """The log's place and its last lines."""
        if self._process is None:
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._from, size - 20_000))
            text = file.read().decode("utf-8", "replace")
        lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip()][-SHOWN:]
        return f"; its log is {self.log}" + (", which ends:\n" + "\n".join(lines) if lines else ", and empty")


def _ended(code: int) -> str:
    return f"ended by signal {code - 128}" if code > 128 else f"ended with code {code}"


_running: dict[str, Server] = {}
"""By address, the servers that this process keeps."""


def ended_at(url: str) -> str | None:
    """What became of the server that was started at an address, where it ended by itself; else None."""
    server = _running.get(url)
    return None if server is None else server.ended()


def servers_of(value: object, folder: Path, key: str = "") -> list[Server]:
    """The servers that settings ask for: of every block with a `url` and a `start`.

    Args:
        value: a recipe, or a part of one.
        folder: for logs.
        key: of `value`.

    Raises:
        RecipeError: two are to listen on one port.
    """
    servers: dict[int, Server] = {}
    for where, block in _blocks(value, key):
        start, url = getattr(block, "start", None), getattr(block, "url", None)
        if not isinstance(start, ServerStart) or not url:
            continue
        name = getattr(block, "name", None) or where
        server = Server(where, name, url if isinstance(url, str) else url[0], start, folder)
        other = servers.setdefault(server.port, server)
        if other is not server:
            raise RecipeError(
                f"{other.key}.start and {where}.start start servers on one port, {server.port}: give each url its own, "
                "or remove one start to share the server"
            )
    return list(servers.values())


def _blocks(value: object, key: str) -> Iterator[tuple[str, Settings]]:
    """Every block in a value with its dotted key; a lone item of a list goes by the list's."""
    parts: list[tuple[str, object]] = []
    if isinstance(value, Settings):
        yield key, value
        parts = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        parts = [(str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [("" if len(value) == 1 else str(i), part) for i, part in enumerate(value)]
    for name, part in parts:
        yield from _blocks(part, f"{key}.{name}".strip("."))


@contextmanager
def started(
    servers: Sequence[Server],
    status: Callable[[str], AbstractContextManager[None]],
    stopping: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Around what needs servers: they answer when the block begins, and have ended when it is left.

    Args:
        status: shows a text as long as its block lasts.
        stopping: called while they are waited for; raises where that is to end.

    Raises:
        RunError, ModelError: one cannot be started, see `Server.begin` and `Server.ready`; none is left running.
    """
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.end)
            server.begin()
            _running[server.url] = server
            stack.callback(_running.pop, server.url)
        for server in servers:
            with status(f"waiting for {server} at {server.url} (log: {server.log})"):
                server.ready(stopping)
        yield
