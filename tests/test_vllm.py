"""Against a real vLLM: `make test-engines` installs its build for CPUs. Skipped where OPD_VLLM names no Python."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time

import httpx2
import pytest
import torch

import opd
from benchmarks.engines import ENVIRONMENT, PORTS, SERVING, models, run, serving, start
from opd.context import Context
from opd.language.engines.base import ids_of
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings
from opd.policies.draft import Draft
from opd.prompts import Prompt
from opd.remote.launch import _running, servers_of, started
from opd.teachers.served import ServedTeacher
from tests.drafters import drafted

PYTHON = os.environ.get("OPD_VLLM")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="OPD_VLLM names no Python with vLLM: make test-engines"),
    # A server takes minutes to start where others want the cores too.
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def folders():
    return models()


@pytest.fixture(scope="module")
def rounding(folders, tmp_path_factory):
    """Nats by which a server in bfloat16 may be off, on average over the tokens of a step: twice what a copy in
    bfloat16 in this process is, where that is worst. Not before weights have moved: those that were published are
    exact in bfloat16, while steps of an optimiser are less than it resolves, so that copies lag behind."""
    history = short(tmp_path_factory.mktemp("rounding") / "run", folders, rollout={"dtype": "bfloat16"})
    return 2 * max(metrics(history, "rollout_gap"))


def short(folder, folders, student=None, rollout=None, **changes):
    """Three steps of four prompts; the log's rows."""
    return opd.distill(
        {"model": str(folders["student"]), **(student or {"freeze": ["embed_tokens"]})},
        {"model": str(folders["teacher"])},
        ["Name a colour.", "What is tea?", "Where is Rome?", "Who wrote Hamlet?", "Count to five.", "Say no."],
        quiet=True,
        overwrite=True,
        steps=3,
        rollout={"kind": "student", "max_new_tokens": 16, **(rollout or {})},
        batch={"prompts": 4, "micro": 4},
        evaluation={"held_out": 2, "samples": 0},
        tracking={"trackers": []},
        hardware={"device": "cpu", "precision": "fp32"},
        output=str(folder),
        **changes,
    ).history


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    """A server of the student and one of the teacher."""
    with serving(PYTHON, folders, ["student", "teacher"], tmp_path_factory.mktemp("logs")):
        yield


def metrics(history, name):
    return [row[f"train/{name}"] for row in history if f"train/{name}" in row]


def test_the_student_learns_with_both_behind_vllm(both, rounding, folders, tmp_path):
    history = run(tmp_path / "run", folders, 0, True, steps=4, batch={"prompts": 8, "micro": 8})
    assert all(gap < rounding for gap in metrics(history, "rollout_gap"))
    # The weights that moved are those that write: had they stayed, the gap would have grown with every step.
    assert all(gap < rounding for gap in metrics(history, "engine/score_gap"))
    assert sum(metrics(history, "engine/pushes")) >= 4
    assert "train/invalid" not in {name for row in history for name in row}
    first, *_, last = metrics(history, "divergence")
    assert last < first


def test_what_is_written_ahead_is_one_step_old(both, folders, tmp_path):
    engine = {"kind": "served", "url": f"http://127.0.0.1:{PORTS['student']}", "overlap": True}
    history = run(
        tmp_path / "run",
        folders,
        0,
        True,
        steps=3,
        batch={"prompts": 4, "micro": 4},
        rollout={"max_new_tokens": 16, "engine": engine},
    )
    assert metrics(history, "engine/staleness") == [0.0, 1.0, 1.0]


def test_cuts_temperature_and_a_watch(both, rounding, folders, tmp_path):
    rollout = {"max_new_tokens": 16, "watch": {"kind": "repetition"}, "segment": 8, "top_p": 0.9}
    history = run(
        tmp_path / "run",
        folders,
        0,
        True,
        steps=1,
        temperature=1.0,
        batch={"prompts": 4, "micro": 4},
        rollout=rollout,
    )
    assert metrics(history, "length")[0] > 1


def test_a_store_is_written_and_scored(both, folders, tmp_path):
    from opd.jobs.sampling import sample
    from opd.jobs.scoring import score
    from opd.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "name": "store",
            "steps": 1,
            "student": {"model": str(folders["student"])},
            "teacher": {
                "kind": "served",
                "url": f"http://127.0.0.1:{PORTS['teacher']}",
                "tokenizer": str(folders["teacher"]),
                "answers": "top_k",
            },
            "prompts": {"kind": "inline", "prompts": ["Name a colour.", "What is tea?"]},
            "rollout": {
                "kind": "student",
                "max_new_tokens": 12,
                "engine": {"kind": "served", "url": f"http://127.0.0.1:{PORTS['student']}"},
            },
            "objective": "reverse_kl",
            "hardware": {"device": "cpu"},
        }
    )
    sample(recipe, tmp_path / "store", quiet=True)
    targets = score(recipe, tmp_path / "store", "top_k", top_k=8, quiet=True)
    assert not targets.missing()


def test_a_server_that_is_killed_and_comes_back(rounding, folders, tmp_path):
    """The engine is killed while it writes, and started again from the weights that it began with."""
    block = start(PYTHON, folders["student"], "student") | {"url": "http://127.0.0.1:18775"}
    command = [word.replace("{port}", "18775") for word in block["start"]["command"]]

    def serve(log):
        return subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log, start_new_session=True
        )

    import threading

    with (tmp_path / "server.log").open("wb") as log:
        process = [serve(log)]
        url = "http://127.0.0.1:18775"

        def answers():
            try:
                return httpx2.get(f"{url}/health", timeout=5).status_code == 200
            except httpx2.HTTPError:
                return False

        try:
            until = time.monotonic() + 600
            while not answers():
                assert time.monotonic() < until
                time.sleep(1)

            def disturb():
                path = tmp_path / "run" / "metrics.jsonl"
                while not (path.exists() and '"step": 1' in path.read_text()):
                    time.sleep(0.2)
                os.killpg(process[0].pid, signal.SIGKILL)
                process[0].wait()
                process[0] = serve(log)

            thread = threading.Thread(target=disturb, daemon=True)
            thread.start()
            engine = {"kind": "served", "url": url, "retries": 40, "backoff": 2.0, "timeout": 300}
            history = short(tmp_path / "run", folders, rollout={"engine": engine})
            thread.join(5)
            assert not thread.is_alive()
        finally:
            os.killpg(process[0].pid, signal.SIGKILL)
            process[0].wait()
    assert len(metrics(history, "loss")) == 3
    assert all(gap < rounding for gap in metrics(history, "rollout_gap"))
    assert "train/invalid" not in {name for row in history for name in row}


def test_an_adapter_follows(rounding, folders, tmp_path):
    """Started and ended by the run itself."""
    command = [PYTHON, *SERVING, "--model", str(folders["student"]), "--port", "{port}"]
    command += ["--enable-lora", "--max-lora-rank", "8"]
    environment = {**ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    engine = {
        "kind": "served",
        "url": "http://127.0.0.1:18773",
        "start": {"command": command, "environment": environment},
    }
    history = short(
        tmp_path / "run",
        folders,
        {"lora": {"rank": 8}},
        rollout={"engine": engine},
        update={"learning_rate": 1e-3},
    )
    assert all(gap < rounding for gap in metrics(history, "rollout_gap"))
    assert sum(metrics(history, "engine/pushes")) >= 3
    assert engine["url"] not in _running
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["steps"] == 3


PROMPTS = [
    "Write a long story about a fox and a crow.",
    "Explain at length how bread is baked.",
    "Describe the sea in many sentences.",
    "Tell me about the moon.",
    "Give advice to somebody who moves to a big city.",
]
WRITTEN = 48
FORMS = {
    # Some ids, whose offsets are not all alike; all ids, and taps that a server does not take by itself.
    "some ids": ("eagle3", {"kind": "chain", "proposals": 3, "vocabulary": [0, *range(17, 8192)]}),
    "other taps": ("eagle3", {"kind": "chain", "proposals": 3, "taps": [2, 12, 20, 27]}),
    "block": ("dflash", {"kind": "block", "block": 4, "layers": 2, "mask_token": 16}),
}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """From a form to the folder of a drafter that has learnt something: answers to a few prompts, nearly by heart."""

    @functools.cache
    def of(form):
        folder = tmp_path_factory.mktemp("drafter") / "run"
        opd.distill(
            {"kind": "draft", "target": {"model": str(folders["teacher"])}, "drafter": FORMS[form][1]},
            {"kind": "target"},
            PROMPTS,
            quiet=True,
            overwrite=True,
            steps=24,
            rollout={"kind": "speculative", "max_new_tokens": WRITTEN},
            objective=[
                {"kind": "accepted", "weight": 0.5, "correction": True},
                {"kind": "rejected", "weight": 0.5, "kl": "forward_kl"},
            ],
            update={"learning_rate": 1e-3},
            batch={"prompts": 4, "micro": 4},
            evaluation={"held_out": 1, "samples": 0},
            checkpoint={"every": 0},
            tracking={"trackers": []},
            hardware={"device": "cpu", "precision": "fp32"},
            output=str(folder),
        )
        return folder / "student"

    return of


def written_by_server(model, prompts, logs, drafting=None):
    """Greedy tokens of a server in float32, and how many proposals of how many blocks it accepted, by place."""
    url = "http://127.0.0.1:18781"
    command = [PYTHON, *SERVING, "--dtype", "float32", "--model", str(model), "--port", "{port}"]
    command += ["--served-model-name", "target"]
    if drafting is not None:
        command += ["--speculative-config", json.dumps(drafting)]
    server = ServedTeacher(name="target", url=url, start={"command": command, "environment": ENVIRONMENT})
    found = []
    with started(servers_of([server], logs), lambda text: contextlib.nullcontext()):
        for prompt in prompts:
            asked = {"model": "target", "prompt": [prompt], "max_tokens": WRITTEN, "temperature": 0}
            answer = httpx2.post(f"{url}/v1/completions", json=asked | {"return_token_ids": True}, timeout=300)
            found.append(answer.json()["choices"][0]["token_ids"])
        counted = re.findall(
            r'^vllm:spec_decode_num_(drafts|accepted_tokens_per_pos)_total\{.*?(?:position="(\d+)")?\} (\S+)$',
            httpx2.get(f"{url}/metrics", timeout=60).text,
            re.M,
        )
    counts = {int(place) if place else name: int(float(value)) for name, place, value in counted}
    return found, counts.pop("drafts", 0), [counts[k] for k in sorted(counts)]


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """What the target's server writes without a drafter."""
    language = LanguageModel.load(ModelSettings(model=str(folders["teacher"])), torch.device("cpu"))
    prompts = [ids_of(language.encode(Prompt(text, {"prompt": text}))).tolist() for text in PROMPTS]
    written, blocks, _ = written_by_server(folders["teacher"], prompts, tmp_path_factory.mktemp("alone"))
    assert blocks == 0
    return {tuple(prompt): tokens for prompt, tokens in zip(prompts, written, strict=True)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("as_", ["native", "speculators"])
@pytest.mark.parametrize("form", FORMS)
def test_a_drafter_helps_a_server_as_much_as_it_helps_here(form, as_, alone, trained, folders, tmp_path):
    target, folder, method = folders["teacher"], trained(form), FORMS[form][0]
    context = Context(torch.device("cpu"))
    student = Draft(target={"model": str(target)}, model=str(folder), servers=["vllm"]).build(context)
    student.context = student.agree(context, [], None)
    count = student.drafter.proposals
    # Longer than what the server writes: it counts a whole block that its text's end cuts.
    records = drafted(student, PROMPTS, budget=WRITTEN + count + 1, taught=False).contexts
    records = [record for record in records if len(record.response) > WRITTEN]
    assert len(records) >= 3
    prompts = [record.prompt.tolist() for record in records]
    plain = [alone[tuple(prompt)] for prompt in prompts]
    assert plain == [record.response[:WRITTEN].tolist() for record in records]
    if as_ == "native":
        drafting = {"method": method, "model": str(folder), "num_speculative_tokens": count}
        helped, blocks, accepted = written_by_server(target, prompts, tmp_path / "helped", drafting)
    else:
        # The folder alone: it names its target, and says how many tokens are proposed.
        student.written_as("speculators").save(tmp_path / "exported", "")
        helped, blocks, accepted = written_by_server(tmp_path / "exported", prompts, tmp_path / "helped")
    assert helped == plain
    ours = [
        int(stood)
        for record in records
        for anchor, stood in zip(record.anchors, record.accepted, strict=True)
        if anchor < len(record.prompt) + WRITTEN - 1
    ]
    assert blocks == pytest.approx(len(ours), rel=0.05)
    assert sum(accepted) >= 5, "the drafter has learnt nothing: its proposals say nothing of how they were made"
    assert 1 + sum(accepted) / blocks == pytest.approx(1 + sum(ours) / len(ours), rel=0.05)
    for place, theirs in enumerate(accepted):
        here = sum(stood > place for stood in ours)
        assert theirs == pytest.approx(here, abs=2 + 0.05 * here), (accepted, ours)
