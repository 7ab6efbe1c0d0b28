"""Completions by a server where something goes wrong: nothing is stale, lost, left behind or waited for in silence."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.errors import IncompatibleError, ModelError, RecipeError, RunError
from opd.recipe import parse_recipe
from opd.remote.client import Client, Job, read_json
from opd.remote.settings import same_server
from opd.server import Limits
from opd.server.serving import application
from opd.weights import contents, fingerprint
from tests.conftest import save_tiny
from tests.engines import Seen, by, engine, folders, measured, refuse  # noqa: F401
from tests.processes import together
from tests.serving import served_model, serving
from tests.test_served import losses, run


def at(teacher):
    return {"model": teacher, "template": "plain"}


def written(path, paths, weights):
    """How many completions were asked for of the weights that came as number `weights`, with this request; 0 where it
    is none."""
    if path != "/v1/completions" or paths.count("/collective_rpc") != weights:
        return 0
    return paths[len(paths) - paths[::-1].index("/collective_rpc") :].count(path)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_follow_to_a_server_that_does_not_name_them(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    here = run(tmp_path / "here", student, at(teacher), steps=2)
    engine.before = lambda path, paths: path in ("/weight_info", "/update_weight_version")
    there = run(tmp_path / "there", student, at(teacher), rollout=by(engine.url), steps=2)
    assert engine.paths.count("/collective_rpc") == 3
    assert losses(there) == losses(here)


def test_a_name_tells_weights_apart_whose_bits_have_one_sum(monkeypatch):
    one = torch.arange(1.0, 9.0, dtype=torch.bfloat16)
    up = one.clone().view(torch.int16)
    up[0] += 1
    up[5] -= 1
    other = up.view(torch.bfloat16)
    assert fingerprint([("w", one)]) == fingerprint([("w", other)])
    assert contents([("w", one)]) != contents([("w", other)])
    assert contents([("w", one)]) != contents([("w", one.flip(0))])
    assert contents([("w", one)]) == contents([("w", one.clone())])
    monkeypatch.setattr("opd.weights.PART", 8)
    large, moved = torch.zeros(2, 11, dtype=torch.int8)
    large[1], moved[9] = 1, 1
    assert contents([("w", large)]) != contents([("w", moved)])


def test_a_server_that_was_left_between_weights_and_their_name_is_not_believed(folders, tmp_path):  # noqa: F811
    """vLLM keeps the name that it was told last when it reads other weights."""
    student, teacher = folders
    served = served_model(seed=3, follows=True)
    plain, stop = served.reload, []
    app = Seen(application(served))

    def keeping(asked):
        task, name = plain(asked), served.version
        return type(task)(lambda: (task.work(), setattr(served, "version", name if name != "default" else "x"))[0])

    served.reload = keeping
    app.app = application(served)
    # The second weights arrive, and the run ends before they have a name.
    app.before = lambda path, paths: path == "/reset_prefix_cache" and paths.count("/collective_rpc") == 2 and not stop
    with serving(app) as running:
        with pytest.raises(RunError, match="does not answer as it must"):
            run(tmp_path / "cut", student, at(teacher), rollout=by(running.url), self_test=False)
        stop.append(True)
        there = run(tmp_path / "there", student, at(teacher), rollout=by(running.url), self_test=False, steps=1)
    served.batcher.close()
    assert measured(there, "rollout_gap")[0] < 1e-4


def test_a_disk_that_is_full_is_named(folders, engine, tmp_path, monkeypatch):  # noqa: F811
    from safetensors import SafetensorError

    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    student, teacher = folders
    monkeypatch.setattr("opd.engines.following.write_weights", full)
    folder = tmp_path / "shared"
    with pytest.raises(RunError, match=r"cannot be written to .*No space left.*engine\.folder") as error:
        run(tmp_path / "run", student, at(teacher), rollout=by(engine.url, folder=str(folder)))
    assert len(str(error.value).splitlines()) == 1
    # Nothing is left of a run that did not come about.
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("a", "b", "alike"),
    [
        ("http://localhost:8000", "http://127.0.0.1:8000/", True),
        ("http://127.0.0.1:80", "http://[::1]", True),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001", False),
        ("http://a:8000", "http://b:8000", False),
    ],
)
def test_names_of_one_server(a, b, alike):
    assert (same_server(a) == same_server(b)) is alike


def test_a_teacher_at_the_same_server_under_another_name_is_refused(folders, engine, tmp_path):  # noqa: F811
    student, _ = folders
    other = engine.url.replace("127.0.0.1", "localhost")
    with pytest.raises(IncompatibleError, match=r"at one server.*the teacher would be the student"):
        run(tmp_path / "run", student, {"kind": "served", "url": other}, rollout=by(engine.url))


# -- rows that are lost -----------------------------------------------------------------------------------------------


def test_a_watch_meets_rows_of_which_nothing_was_written(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    # Of the second step's four rows, behind the probe of its weights, which nothing moves then.
    engine.before = lambda path, paths: 1 < written(path, paths, 2) < 6
    watch = {"watch": {"kind": "drift"}, "segment": 3}
    changes = {"shaping": "drift", "failures": {"max_invalid": 1.0}, "self_test": False}
    found = run(tmp_path / "run", student, at(teacher), rollout=by(engine.url, retries=0) | watch, **changes)
    assert measured(found, "invalid") == [1.0]
    assert measured(found, "empty") == [1.0]


def test_held_out_rows_that_were_not_written_are_spoken_of(folders, engine, tmp_path, capsys):  # noqa: F811
    student, teacher = folders
    # One row of the measurement at the end, behind the probe of the third weights.
    engine.before = lambda path, paths: written(path, paths, 3) == 2
    run(tmp_path / "run", student, at(teacher), rollout=by(engine.url, retries=0, concurrency=1), steps=2)
    assert "leaves out 1 of 2 rollouts, which could not be written (writing: HTTP 500: 1)" in capsys.readouterr().err


def test_a_measurement_longer_than_the_server_takes_is_refused(folders, tmp_path):  # noqa: F811
    student, teacher = folders
    served = served_model(seed=3, follows=True, limits=Limits(60))
    evaluation = {"held_out": 2, "samples": 1, "max_new_tokens": 80}
    with serving(application(served)) as running, pytest.raises(ModelError, match=r"--max-model-len.*evaluation"):
        run(tmp_path / "run", student, at(teacher), rollout=by(running.url), evaluation=evaluation)
    served.batcher.close()


def test_a_row_that_was_lost_at_its_beginning_goes_on_nowhere(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    starts = []
    first = {**by(engine.url, retries=0, concurrency=1), "max_new_tokens": 4}
    rollout = {"kind": "switch", "first": first, "then": {"kind": "teacher", "max_new_tokens": 4}, "position": 3}
    engine.before = lambda path, paths: written(path, paths, 2) == 3

    from opd.language.engines.in_process import InProcess

    plain = InProcess.sample

    def counting(self, contexts, *args, **kwargs):
        starts.append(len(contexts))
        return plain(self, contexts, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "sample", counting)
        found = run(
            tmp_path / "run", student, at(teacher), rollout=rollout, self_test=False, failures={"max_invalid": 0.9},
            objective="forward_kl", steps=2,
        )  # fmt: skip
    assert measured(found, "invalid") == [0.25]
    # The others of that step, but for those that ended by themselves.
    assert starts[1] <= 3


# -- what is begun ahead ----------------------------------------------------------------------------------------------


def test_a_draw_that_a_measurement_decides_is_not_begun(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    ladder = {"kind": "length_ladder", "lengths": [4, 8], "steps_per_rung": 2, "minimum_entropy": 0.1}
    changes = {"steps": 4, "curriculum": ladder}
    ahead = run(tmp_path / "ahead", student, at(teacher), rollout=by(engine.url, overlap=True), **changes)
    assert measured(ahead, "engine/staleness") == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["mixture", "switch"])
def test_a_part_of_a_rollout_writes_nothing_ahead(kind):
    parts = {"mixture": ("first", "second"), "switch": ("first", "then")}[kind]
    engine = {"kind": "served", "url": "http://127.0.0.1:1", "overlap": True}  # noqa: F811
    rollout = {"kind": kind, parts[0]: {"kind": "teacher"}, parts[1]: {"kind": "student", "engine": engine}}
    prompts = {"kind": "inline", "prompts": ["a"]}
    recipe = {"name": "x", "student": {"model": "m"}, "teacher": {"model": "t"}, "prompts": prompts, "steps": 1}
    with pytest.raises(RecipeError, match="leave overlap out"):
        parse_recipe({**recipe, "rollout": rollout, "objective": "reverse_kl"})


def test_processes_whose_parts_get_unequal_shares_are_refused(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    recipe = parse_recipe(
        {
            "name": "two",
            "steps": 2,
            "student": at(student),
            "teacher": at(teacher),
            "prompts": {"kind": "inline", "prompts": [f"{i} + {i}=" for i in range(8)]},
            "rollout": {"kind": "mixture", "first": by(engine.url), "second": {"kind": "teacher"}},
            "objective": "forward_kl",
            "batch": {"prompts": 2, "micro": 2},
            "evaluation": {"held_out": 2, "samples": 0},
            "checkpoint": {"every": 0},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
            "output": str(tmp_path / "run"),
        }
    )
    answers = together(recipe, {})
    assert all("parts get unequal shares in the 2 processes" in str(answer) for answer in answers), answers


# -- what is left behind ----------------------------------------------------------------------------------------------


def ours():
    return [thread.name for thread in threading.enumerate() if thread.name in ("opd-client", "opd-ahead_0")]


def test_whoever_waits_for_an_answer_hears_that_the_client_was_closed():
    arrived = threading.Event()

    async def silent(scope, receive, send):
        arrived.set()
        while (await receive())["type"] != "http.disconnect":
            continue

    before = len(os.listdir("/proc/self/fd"))
    with serving(silent) as running:
        # Long waits between tries: nobody may be left in one.
        client = Client([running.url], retries=5, backoff=60.0)
        pending = client.submit(Job("/x", {}, read_json))
        assert arrived.wait(20)
        client.close()
        with pytest.raises(CancelledError):
            pending.result(20)
    assert not ours()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_run_closes_what_it_asked(folders, engine, tmp_path):  # noqa: F811
    student, _ = folders
    served = served_model(seed=7)
    with serving(application(served)) as running:
        asked = {"kind": "served", "url": running.url, "answers": "top_k", "top_k": 8}
        run(tmp_path / "run", student, asked, rollout=by(engine.url, overlap=True), steps=2)
        assert not ours()
        # One that does not come about, too.
        longer = {**by(engine.url), "max_new_tokens": 100_000}
        with pytest.raises(ModelError, match="--max-model-len"):
            run(tmp_path / "no", student, asked, rollout=longer)
        assert not ours()
    served.batcher.close()


def test_a_server_is_awake_when_a_run_is_over(folders, tmp_path):  # noqa: F811
    student, teacher = folders
    served, asleep = served_model(seed=3, follows=True), [True]
    app = application(served)

    async def with_sleep(scope, receive, send):
        if scope["path"] in ("/sleep", "/wake_up"):
            asleep[0] = scope["path"] == "/sleep"
            return await refuse(send, 200)
        if asleep[0] and scope["path"] == "/v1/completions":
            return await refuse(send, 503)
        return await app(scope, receive, send)

    # Another run was killed while it slept.
    with serving(with_sleep) as running:
        found = run(tmp_path / "run", student, at(teacher), rollout=by(running.url, sleep=True), steps=1)
    served.batcher.close()
    assert len(losses(found)) == 1
    assert not asleep[0]


# -- opd serve --------------------------------------------------------------------------------------------------------


def reload(url, folder):
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    return httpx2.post(f"{url}/collective_rpc", json=body)


@pytest.mark.parametrize("fault", ["lacking", "unknown", "shape", "cut off", "adapter"])
def test_weights_that_are_not_the_models_are_refused_whole(fault, engine, tmp_path):  # noqa: F811
    folder = Path(save_tiny(tmp_path / "model", vocabulary=47, seed=5))
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "mlp" in name)
    if fault == "lacking":
        del weights[name]
    elif fault == "unknown":
        weights["model.other.weight"] = torch.zeros(2)
    elif fault == "shape":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    if fault == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    before = contents(engine.served.language.model.state_dict().items())
    answer = reload(engine.url, folder)
    assert answer.status_code == 400, answer.text
    assert contents(engine.served.language.model.state_dict().items()) == before


def test_a_configuration_beside_weights_is_not_read(engine, tmp_path):  # noqa: F811
    folder = Path(save_tiny(tmp_path / "model", vocabulary=47, seed=5))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": 2**20,
        "attn_implementation": "somebody/else",
        "quantization_config": {"quant_method": "x"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert reload(engine.url, folder).status_code == 200


def test_a_page_that_had_its_name_resolved_to_this_machine_is_refused(engine):  # noqa: F811
    for name, status in (("pages.example", 403), ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:1", 200)):
        assert httpx2.get(f"{engine.url}/v1/models", headers={"host": name}).status_code == status
    with serving(application(engine.served, "key")) as running:
        # Behind a proxy the name is another one, and a token says who asks.
        headers = {"host": "pages.example", "authorization": "Bearer key"}
        assert httpx2.get(f"{running.url}/v1/models", headers=headers).status_code == 200
