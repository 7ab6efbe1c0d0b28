"""Runs of several processes that are started as the launcher of torch starts them, and the command line in a process of
its own: from interpreters that have imported the library already, which takes most of a short command's time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import socket
import sys
import traceback
from contextlib import closing

from torch.distributed.tensor import DTensor

from opd.api import execute
from opd.errors import RunError


def warm():
    """What starts processes that have imported the library."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opd.api", "tests.test_loop"])
    return context


class Program:
    """`opd WORDS` in a folder, where what it prints is kept too; no file that it writes may be larger than `limit`
    bytes."""

    def __init__(self, folder, *words, limit=None):
        number = len(list(folder.glob("*.printed")))
        self.printed = [folder / f"{number}-{name}.printed" for name in ("out", "err")]
        for file in self.printed:
            file.touch()
        self.process = warm().Process(target=_command, args=(folder, self.printed, [*map(str, words)], limit))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        """What it printed, when it has ended."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s"
        return tuple(file.read_text(encoding="utf-8") for file in self.printed)


def _command(folder, printed, words, limit):
    os.chdir(folder)
    for stream, file in zip((sys.stdout, sys.stderr), printed, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["opd", *words]
    from opd.cli.main import main

    main()


def together(recipe, environment, **options):
    """Run a recipe by two processes; returns what each of them says of it."""
    context = warm()
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        own |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, **environment}
        mine, theirs = context.Pipe()
        process = context.Process(target=_member, args=(theirs, own, recipe, options), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        answers = [pipe.recv() if pipe.poll(400) else "no answer in time" for pipe in pipes]
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
    return answers


def digest(module):
    """Hash of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _member(pipe, environment, recipe, options):
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        result = execute(recipe, quiet=True, **options)
        sharded = any(isinstance(parameter, DTensor) for parameter in result.student.parameters())
        weights = None if sharded else digest(result.student)
        pipe.send({"history": result.history, "sharded": sharded, "weights": weights})
    except BaseException as error:
        pipe.send(error if isinstance(error, RunError) else traceback.format_exc())
