"""`opd serve` in a process of its own, with runs that ask it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import yaml

from opd.cli import main
from opd.teachers.served import LiveServedTeacher
from tests.test_served import TEXTS, folders, losses, run  # noqa: F401


class Serving:
    """The command, at one port however often it is started."""

    def __init__(self, model):
        self.model, self.port, self.started = model, 0, 0
        self.start()
        self.url, port = re.search(r"at (http://127\.0\.0\.1:(\d+)) ", self.process.stdout.readline()).groups()
        self.port = int(port)

    def start(self):
        command = [sys.executable, "-m", "opd", "serve", self.model, "--port", str(self.port), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.started += 1

    def kill(self):
        self.process.kill()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(folders):  # noqa: F811
    found = Serving(folders[1])
    yield found
    found.kill()


def test_both_commands_work_together(server, folders, tmp_path, monkeypatch):  # noqa: F811
    """`opd train` with a recipe in YAML."""
    recipe = {
        "student": {"model": folders[0], "template": "plain"},
        "teacher": {"kind": "served", "url": server.url},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "steps": 2,
        "rollout": {"max_new_tokens": 6},
        "batch": {"prompts": 2, "micro": 2},
        "hardware": {"device": "cpu", "threads": 1},
        "evaluation": {"held_out": 2, "samples": 1},
        "tracking": {"trackers": []},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["opd", "train", str(tmp_path / "recipe.yaml"), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_a_server_that_is_killed_and_started_again_is_waited_for(server, folders, tmp_path, monkeypatch):  # noqa: F811
    """Killed while it has requests, which it has taken and does not answer."""
    calls, begun, own = [], server.started, LiveServedTeacher.answer
    again = threading.Timer(0.3, lambda: (server.kill(), server.start()))

    def answer(self, trajectories, settings, context):
        calls.append(len(trajectories))
        if len(calls) == 2:
            server.process.send_signal(signal.SIGSTOP)
            again.start()
        return own(self, trajectories, settings, context)

    monkeypatch.setattr(LiveServedTeacher, "answer", answer)
    teacher = {"kind": "served", "url": server.url, "backoff": 0.1, "retries": 14}
    try:
        result = run(tmp_path / "run", folders[0], teacher, self_test=False)
    finally:
        again.join()
    assert server.started == begun + 1
    assert len(calls) > 2
    assert len(losses(result)) == 3
    assert not any("train/invalid" in row for row in result.history)
