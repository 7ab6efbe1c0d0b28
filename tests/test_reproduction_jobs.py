"""Jobs of reproductions: what counts as done, what a failure or a kill leaves, how jobs start, and real training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.errors import RunError
from opd.policies.held_out import by_prompt
from opd.reproductions import Claim, Reproduction, Stage
from opd.reproductions.catalogue import find
from opd.reproductions.fork_server import MODULES, ONE_THREAD, fork_server
from opd.reproductions.jobs import Job, graph
from opd.reproductions.runner import Worker
from opd.reproductions.training import filled
from tests.conftest import trajectories_of
from tests.reproductions import TOY, cli, finished, run, run_anew, toy  # noqa: F401


def test_a_second_call_runs_only_what_is_missing_and_writes_the_same(toy):  # noqa: F811
    code, out, err = cli(str(toy))
    assert code == 0, err
    assert "reproduced" in out
    entry = find(str(toy))
    before, results = finished(toy), entry.results.read_text()
    assert len(before) == 7
    assert run(toy).results is not None
    assert finished(toy) == before
    assert entry.results.read_text() == results
    toy.write_text(TOY.replace('"gain": 2', '"gain": 3'))
    assert run_anew(toy).results["arms"]["more"]["score"] == [8, 9, 10]
    after = finished(toy)
    assert before.items() <= after.items()
    assert len(after) == 10


def test_a_key_depends_on_function_version_params_and_inputs_alone():
    def job(name="n", function="m:f", version=1, params=None, inputs=None):
        return Job(name, function, version, {"a": 1, "b": [0.1, "x"]} if params is None else params, inputs or {})

    # Written out: a change of the rule would make every finished job of every user look missing.
    assert job().key == "f-8d283cbaaade646b50e0"
    assert job(name="other", params={"b": [0.1, "x"], "a": 1}).key == job().key
    child = job(inputs={"data": job()}).key
    others = [
        job(function="m:g"),
        job(function="other:f"),
        job(version=2),
        job(params={"a": 2, "b": [0.1, "x"]}),
        job(params={}),
        job(inputs={"data": job()}),
        job(inputs={"data": job(version=2)}),
        job(inputs={"more": job()}),
    ]
    assert len({job().key, child, *(other.key for other in others)}) == len(others) + 1


def test_stages_per_seed_are_taken_by_the_arm_of_the_same_seed():
    stages = {"init": Stage(os.path.join, per_seed=True), "data": Stage(os.path.join)}
    arms = {"a": Stage(os.path.join, {}, ["data", "init"])}
    claims = [Claim("main", "?", testable=False, note="a test")]
    made = graph(Reproduction("", "", "", stages, arms, [3, 4], [], claims))
    assert [job.inputs["init"].params["seed"] for job in made.arms["a"]] == [3, 4]
    assert made.arms["a"][0].inputs["data"] is made.arms["a"][1].inputs["data"]
    assert len(made.jobs()) == 5


def test_one_arm_alone_says_what_is_missing(toy):  # noqa: F811
    done = run(toy, arm="more")
    assert done.results is None
    assert done.problems == []
    assert done.missing == ["less (seed 0)", "less (seed 1)", "less (seed 2)"]
    assert run(toy, arm="less").results is not None


def test_a_file_that_changed_since_its_jobs_ran_is_named(toy):  # noqa: F811
    """They are found again by name, version, params and inputs, which is meant; but not in silence."""
    code, *said = cli(str(toy))
    assert code == 0, said
    assert "has changed since" not in "".join(said)
    toy.write_text(toy.read_text() + "\n# Another thought.\n")
    said = "".join(cli(str(toy))[1:])
    assert "reproductions.toy_one has changed since 7 finished jobs ran" in said
    assert "raise its version" in said


def test_a_killed_worker_leaves_nothing_that_counts_and_a_rerun_goes_on(toy, tmp_path):  # noqa: F811
    (tmp_path / "die").touch()
    done = run(toy)
    assert done.results is None
    assert "data: killed by SIGKILL" in done.problems[0]
    assert done.missing == ["data", *(f"{arm} (seed {seed})" for arm in ("more", "less") for seed in range(3))]
    (job,) = graph(find(str(toy)).reproduction).stages["data"]
    folder = find(str(toy)).cache / job.key
    assert (folder / "half").exists()
    assert finished(toy) == {}
    (tmp_path / "die").unlink()
    (folder / "stale").touch()
    assert run(toy).results is not None
    assert not (folder / "stale").exists()
    assert json.loads((folder / "job.json").read_text())["figures"] == {"size": 5}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda x: str(int(x))
)
def test_a_stopped_command_ends_its_workers(number, code, toy, tmp_path):  # noqa: F811
    (tmp_path / "wait").touch()
    command = subprocess.Popen([sys.executable, "-m", "opd", "reproduce", str(toy)], stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert command.poll() is None
            time.sleep(0.05)
        with pytest.raises(RunError, match="another process runs jobs"):
            run(toy)
        command.send_signal(number)
        assert command.wait(20) == code
    finally:
        command.kill()
    worker = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(worker)
    assert finished(toy) == {}


def test_without_the_process_that_starts_them_jobs_end_and_the_command_says_so(toy, tmp_path):  # noqa: F811
    (tmp_path / "wait").touch()
    words = [sys.executable, "-m", "opd", "reproduce", str(toy)]
    command = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert command.poll() is None
            time.sleep(0.05)
        worker = int((tmp_path / "pid").read_text())
        server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        assert server != command.pid
        os.kill(server, signal.SIGKILL)
        _, err = command.communicate(timeout=20)
    finally:
        command.kill()
    assert command.returncode == 2
    assert "the process that starts jobs is gone: it was killed" in err
    assert not alive(worker)
    assert finished(toy) == {}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_job_stops_only_what_depends_on_it(toy, tmp_path):  # noqa: F811
    (tmp_path / "fail-1").touch()
    code, _, err = cli(str(toy))
    assert code == 1
    assert err.count("no luck today") == 2
    assert "missing: more (seed 1), less (seed 1)" in err
    assert "Traceback" not in err
    assert len(finished(toy)) == 5
    assert not find(str(toy)).results.exists()
    outputs = [file.read_text() for file in find(str(toy)).cache.glob("*/output.txt")]
    assert sorted("Traceback" in output for output in outputs) == [False] * 5 + [True] * 2
    (tmp_path / "fail-1").unlink()
    assert run(toy).results is not None


STARTED = """
import os, random, sys
imported, threads = "torch" in sys.modules, len(os.listdir("/proc/self/task"))
from pathlib import Path
import numpy, torch
from opd.reproductions import Claim, Reproduction, Stage, train

def look(folder, inputs, *, seed):
    return {
        "imported": imported,
        "threads": threads,
        "parent": os.getppid(),
        "environment": [os.environ["OMP_NUM_THREADS"], torch.get_num_threads()],
        "python": random.random(),
        "numpy": float(numpy.random.rand()),
        "torch": float(torch.rand(())),
        "file": FILE,
    }

FILE = 1
claims = [Claim("main", "?", testable=False, note="a test")]
arms = {"look": Stage(look), "train": Stage(train, {"recipe": {}})}
reproduction = Reproduction("", "", "", {}, arms, [0, 1], [], claims)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_jobs_start_warm_and_each_with_its_own_random_state_and_file(toy):  # noqa: F811
    path = toy.with_name("started.py")
    path.write_text(STARTED)
    # The recipe is empty, so the ready-made job fails; that there is one makes the modules be imported.
    assert len(run(path, workers=1).problems) == 2
    jobs = graph(find(str(path)).reproduction).arms["look"]
    one, two = (job.figures(find(str(path)).cache) for job in jobs)
    # The job's own thread, and the one that watches its parent.
    assert [(f["imported"], f["threads"], f["environment"], f["file"]) for f in (one, two)] == [
        (True, 2, ["1", 1], 1)
    ] * 2
    assert one["parent"] == two["parent"] != os.getpid()
    for generator in ("python", "numpy", "torch"):
        assert one[generator] != two[generator]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_where_a_fork_is_not_safe_a_job_is_a_fresh_process(toy, tmp_path):  # noqa: F811
    (tmp_path / "calm.py").touch()
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
    )
    toy.with_name("seen.py").write_text(
        "import sys\nseen = sorted({'calm', 'threaded'} & sys.modules.keys())\n"
        "def look(folder, inputs):\n    return {'seen': seen}\n"
    )
    for modules, seen in ((["calm"], ["calm"]), (["calm", "threaded"], [])):
        job = Job("look", "reproductions.seen:look", len(modules), {}, {})
        worker = Worker(job, tmp_path, toy.parent)
        with (tmp_path / "lock").open("w") as lock, fork_server(tmp_path / "log", lock.fileno(), modules) as server:
            server.send(str(worker.folder))
            assert server.poll(60)
            assert server.recv() == (str(worker.folder), 0)
        assert job.figures(tmp_path) == {"seen": seen}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="jobs are forked on Linux only")
def test_what_jobs_import_lets_them_be_forked():
    code = (
        f"import os, importlib\nfor module in {MODULES!r}:\n    importlib.import_module(module)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["1"]


def test_inputs_fill_a_recipes_texts():
    folders = {"teacher": Path("/t"), "data": Path("/d")}
    recipe = {"teacher": [{"model": "{teacher}/run", "n": 1}], "prompts": ["{data}/a", "{other}"], "x": None}
    assert filled(recipe, folders) == {
        "teacher": [{"model": "/t/run", "n": 1}],
        "prompts": ["/d/a", "{other}"],
        "x": None,
    }


def test_verdicts_of_a_prompt_are_averaged():
    rewards = torch.tensor([1.0, 0.0, float("nan"), float("nan"), 1.0, 1.0])
    measured = replace(trajectories_of([1, 2, 1, 1, 3, 1]), rewards=rewards, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert by_prompt(measured) == {"t0": 0.5, "t4": 1.0}
    assert by_prompt(trajectories_of([1])) == {}


DISTILLED = """
from opd.reproductions import Claim, Reproduction, Stage, train
from tests.conftest import save_tiny

def tiny(folder, inputs):
    save_tiny(folder / "student", seed=1)
    save_tiny(folder / "teacher", seed=2)
    return {}

def recipe(**changes):
    return {
        "steps": 2,
        "student": {"model": "{models}/student", "template": "plain"},
        "teacher": {"model": "{models}/teacher", "template": "plain"},
        "prompts": {"kind": "inline", "prompts": [{"prompt": f"{a}+1=", "answer": str(a)} for a in range(8)]},
        "rollout": {"max_new_tokens": 4},
        "verifier": "exact_match",
        "batch": {"prompts": 4, "group": 2},
        "evaluation": {"held_out": 3, "every": 1, "k": 2, "greedy": True},
        "update": {"learning_rate": 1e-2},
        "hardware": {"device": "cpu"},
        **changes,
    }

reproduction = Reproduction(
    title="Distilled", introduction="", discussion="",
    stages={"models": Stage(tiny)},
    arms={
        "long": Stage(train, {"recipe": recipe(steps=3)}, ["models"]),
        "short": Stage(train, {"recipe": recipe()}, ["models"]),
    },
    seeds=[0, 1],
    metrics=["reverse_kl", "accuracy"],
    claims=[Claim("main", "Longer is closer.", "reverse_kl", "lower", "long", "short")],
)
"""


def figures_without_times(folder):
    figures = json.loads((folder / "job.json").read_text())["figures"]
    for point in figures["curve"]:
        del point["cpu_seconds"]
    return {name: value for name, value in figures.items() if "seconds" not in name}


def test_two_arms_and_two_seeds_of_real_training(toy):  # noqa: F811
    path = toy.with_name("distilled.py")
    path.write_text(DISTILLED)
    done = run(path)
    assert done.problems == []
    assert done.results is not None
    entry = find(str(path))
    for arm, steps in (("long", 3), ("short", 2)):
        cost = done.results["cost"][arm]
        for i, job in enumerate(graph(entry.reproduction).arms[arm]):
            folder = entry.cache / job.key
            figures = json.loads((folder / "job.json").read_text())["figures"]
            summary = json.loads((folder / "run" / "summary.json").read_text())
            assert figures["reverse_kl"] == summary["after"]["reverse_kl"]
            assert done.results["arms"][arm]["reverse_kl"][i] == pytest.approx(figures["reverse_kl"], rel=1e-5)
            assert [point["step"] for point in figures["curve"]] == list(range(steps + 1))
            assert figures["curve"][0]["sampled_tokens"] == 0
            # At most eight rollouts of four tokens a step, each scored by the one teacher.
            assert steps * 8 <= cost["sampled_tokens"][i] <= steps * 8 * 4
            assert cost["teacher_tokens"][i] == cost["sampled_tokens"][i]
            assert 0 < cost["cpu_seconds"][i] < 60
            for metric in ("accuracy", "greedy_accuracy"):
                rewards = figures["items"][metric]
                assert len(rewards) == 3
                assert sum(rewards.values()) / 3 == pytest.approx(figures[metric])
            assert (folder / "run" / "student" / "model.safetensors").exists()
    main_claim = done.results["claims"][0]
    assert main_claim["difference"] == pytest.approx(
        np.mean(main_claim["arms"]["short"]) - np.mean(main_claim["arms"]["long"])
    )
    assert main_claim["verdict"] in ("reproduced", "contradicted", "undecided")
    assert "reverse KL (nats a token)" in entry.page.read_text()
    # A job that was forked of a warm process has what a fresh one has, to the last bit.
    forked, weights = figures_without_times(folder), (folder / "run" / "student" / "model.safetensors").read_bytes()
    (folder / "job.json").unlink()
    shutil.rmtree(folder / "run")
    code = "import sys, pathlib; from opd.reproductions.worker import work; work(pathlib.Path(sys.argv[1]).resolve())"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=os.environ | ONE_THREAD)
    assert figures_without_times(folder) == forked
    assert (folder / "run" / "student" / "model.safetensors").read_bytes() == weights
