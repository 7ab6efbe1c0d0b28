"""The weights that write completions are the student's: when they are sent, and what happens where others wrote."""

from __future__ import annotations

import threading

import pytest

import opd
from opd.engines.following import Follower
from opd.errors import RunError
from opd.server.serving import application
from tests.conftest import save_tiny
from tests.engines import by, engine, folders, measured, refuse, same  # noqa: F401
from tests.serving import served_model, serving
from tests.test_served import TEXTS, losses, run


def run_of(folder, student, teacher, **changes):
    settings = {
        "steps": 3,
        "batch": {"prompts": 4, "micro": 4},
        "rollout": {"max_new_tokens": 10},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(folder),
        **changes,
    }
    teacher = {"model": teacher, "template": "plain"} if isinstance(teacher, str) else teacher
    return opd.distill(student, teacher, TEXTS * 2, quiet=True, overwrite=True, **settings)


def test_a_student_with_an_adapter_is_sent_merged_where_asked(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    lora = {"model": student, "template": "plain", "lora": {"rank": 2}}
    changes = {"rollout": by(engine.url, weights="folder"), "update": {"learning_rate": 1e-2}}
    there = run_of(tmp_path / "there", lora, teacher, **changes)
    here = run_of(tmp_path / "here", lora, teacher, update={"learning_rate": 1e-2})
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    with pytest.raises(RunError, match=r"takes up no adapters.*enable-lora.*rank 2.*weights: folder"):
        run_of(tmp_path / "no", lora, teacher, rollout=by(engine.url))


@pytest.mark.parametrize("when", [0, 2], ids=["before the probe", "while it writes"])
def test_rows_that_other_weights_wrote_are_written_anew(when, folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    other = save_tiny(tmp_path / "other", vocabulary=47, seed=9)
    done = threading.Event()

    def disturb(path, paths):
        # As if the server had been started anew between the weights and the rollout of the second step.
        if path == "/v1/completions" and paths.count("/collective_rpc") == 2 and not done.is_set():
            if paths[::-1].index("/update_weight_version") <= when:
                return False
            done.set()
            from safetensors.torch import load_file

            engine.served.language.base.load_state_dict(load_file(f"{other}/model.safetensors"), strict=False)
            engine.served.version = "default"
        return False

    here = run(tmp_path / "here", student, teacher)
    engine.before = disturb
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url))
    assert done.is_set()
    assert losses(here) == losses(there)
    assert same(tmp_path / "here", tmp_path / "there")
    assert (sum(measured(there, "engine/rewritten")) > 0) == (when > 0)


def test_weights_that_somebody_else_sends_again_and_again_are_an_error(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders

    def disturb(path, paths):
        if path == "/weight_info" and len(paths) > 8:
            engine.served.version = "opd-other-1"
        return False

    engine.before = disturb
    with pytest.raises(RunError, match=r"weights that wrote are not those that were sent.*another run"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url))


def test_a_server_that_names_no_weights_is_sent_them_after_each_step(folders, engine, tmp_path):  # noqa: F811
    """However little a step changes: less than the scores of a text would show."""
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    engine.before = lambda path, paths: path == "/weight_info"
    small = {"update": {"learning_rate": 1e-6}}
    here = run(tmp_path / "here", student, teacher, **small)
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url, retries=0), **small)
    assert engine.paths.count("/collective_rpc") == 4
    assert losses(here) == losses(there)


def test_a_server_that_does_not_name_its_weights_is_sent_them_all_the_same(folders, tmp_path):  # noqa: F811
    """As older versions of vLLM do not: whether it has the newest cannot be asked, so it is sent them."""
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    served = served_model(seed=3, follows=True)
    app = application(served)
    sent = []

    async def nameless(scope, receive, send):
        if scope["path"] in ("/weight_info", "/update_weight_version"):
            return await refuse(send, 404)
        sent.append(scope["path"])
        await app(scope, receive, send)

    with serving(nameless) as running:
        there = run(tmp_path / "there", student, teacher, rollout=by(running.url))
    served.batcher.close()
    here = run(tmp_path / "here", student, teacher)
    assert losses(there) == losses(here)
    assert sent.count("/collective_rpc") == 4


def test_another_model_is_found_out_by_what_it_writes(folders, engine, tmp_path, monkeypatch):  # noqa: F811
    student, teacher = folders
    monkeypatch.setattr("opd.server.serving.copy_into", lambda *args: None)
    with pytest.raises(RunError, match=r"draws from something else, by .* nats at half of the tokens"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url))


def test_nothing_is_left_of_the_weights_that_were_sent(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    own = tmp_path / "shared"
    own.mkdir()
    (own / "mine.txt").write_text("kept")
    run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url, folder=str(own)))
    assert [path.name for path in own.iterdir()] == ["mine.txt"]


def test_what_lay_in_a_folder_of_weights_stays_there(folders, engine, tmp_path, monkeypatch):  # noqa: F811
    student, teacher = folders
    push, theirs = Follower._push, []

    def pushed(self):
        place = self.folder / self.label
        place.mkdir(parents=True, exist_ok=True)
        theirs.append(place / "theirs.txt")
        theirs[-1].write_text("kept")
        push(self)

    monkeypatch.setattr(Follower, "_push", pushed)
    own = tmp_path / "shared"
    run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url, folder=str(own)))
    assert len(theirs) > 1
    assert sorted(path for path in own.rglob("*") if path.is_file()) == sorted(theirs)
