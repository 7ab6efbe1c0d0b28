"""Completions by a server: the same as in this process, from weights that are the student's, whatever happens to it."""

from __future__ import annotations

import json
import threading

import httpx2
import pytest
import torch
from pydantic import ValidationError

import opd
from opd.api import execute
from opd.engines.following import Follower
from opd.engines.served import LOST, ServedEngine
from opd.errors import IncompatibleError, ModelError, RecipeError, RunError, SelfTestError
from opd.plan import make_plan
from opd.recipe import load_recipe, parse_recipe
from opd.rollouts.student import StudentRollout
from opd.server.serving import application
from tests.conftest import save_tiny
from tests.processes import together
from tests.serving import served_model, serving
from tests.test_served import TEXTS, losses, run, weights_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "student", vocabulary=47, seed=1), save_tiny(root / "teacher", vocabulary=47, seed=7)


class Seen:
    """In front of an application: counts what is asked, and may do something with it."""

    def __init__(self, app, before=None):
        self.app, self.before, self.paths = app, before, []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        if self.before is not None and self.before(scope["path"], self.paths):
            return await refuse(send)
        await self.app(scope, receive, send)


async def refuse(send, status=500):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"error": {"message": "broken"}}'})


@pytest.fixture
def engine():
    """A server of other weights than the student's, which follows."""
    served = served_model(seed=3, follows=True)
    seen = Seen(application(served))
    with serving(seen) as running:
        seen.url, seen.served = running.url, served
        yield seen
    served.batcher.close()


def by(url, **settings):
    return {
        "kind": "student",
        "max_new_tokens": 10,
        "engine": {"kind": "served", "url": url, "retries": 2, "backoff": 0.01, **settings},
    }


def measured(result, name):
    return [row[f"train/{name}"] for row in result.history if f"train/{name}" in row]


def same(a, b):
    mine, theirs = weights_of(a), weights_of(b)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_is_what_it_is_in_this_process(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    here = run(tmp_path / "here", student, teacher)
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url))
    assert losses(here) == losses(there)
    assert same(tmp_path / "here", tmp_path / "there")
    # Weights are sent when they have moved: before the first step, and after each for what comes then.
    assert engine.paths.count("/collective_rpc") == 4
    assert measured(there, "engine/score_gap")[0] < 1e-4
    assert measured(there, "rollout_gap") == pytest.approx(measured(here, "rollout_gap"), abs=1e-6)


def test_groups_and_cuts_are_those_of_this_process(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"batch": {"prompts": 2, "group": 3, "micro": 6}, "temperature": 0.8, "steps": 2}
    cuts = {"top_p": 0.9, "top_k": 20}
    here = run(tmp_path / "here", student, teacher, rollout={"max_new_tokens": 10, **cuts}, **changes)
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url) | cuts, **changes)
    assert losses(here) == losses(there)


def test_a_student_with_an_adapter_is_sent_merged_where_asked(folders, engine, tmp_path):
    student, teacher = folders
    lora = {"model": student, "template": "plain", "lora": {"rank": 2}}
    changes = {"rollout": by(engine.url, weights="folder"), "update": {"learning_rate": 1e-2}}
    there = run_of(tmp_path / "there", lora, teacher, **changes)
    here = run_of(tmp_path / "here", lora, teacher, update={"learning_rate": 1e-2})
    assert losses(there) == pytest.approx(losses(here), rel=1e-4)
    with pytest.raises(RunError, match=r"takes up no adapters.*enable-lora.*rank 2.*weights: folder"):
        run_of(tmp_path / "no", lora, teacher, rollout=by(engine.url))


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


@pytest.mark.parametrize("when", [0, 2], ids=["before the probe", "while it writes"])
def test_rows_that_other_weights_wrote_are_written_anew(when, folders, engine, tmp_path):
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


def test_weights_that_somebody_else_sends_again_and_again_are_an_error(folders, engine, tmp_path):
    student, teacher = folders

    def disturb(path, paths):
        if path == "/weight_info" and len(paths) > 8:
            engine.served.version = "opd-other-1"
        return False

    engine.before = disturb
    with pytest.raises(RunError, match=r"weights that wrote are not those that were sent.*another run"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url))


def test_completions_that_were_not_written_are_in_nothing(folders, engine, tmp_path, monkeypatch):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"failures": {"max_invalid": 0.9}, "steps": 4}
    lost_ones = []

    # By design: every completion whose first token is even is thrown away after it was drawn.
    from opd.language.engines.in_process import InProcess

    drawn = InProcess.sample

    def designed(self, *args, **kwargs):
        rows = drawn(self, *args, **kwargs)
        return [LOST if int(row.actions[0]) % 3 == 0 and len(row.actions) > 1 else row for row in rows]

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "sample", designed)
        here = run(tmp_path / "here", student, teacher, self_test=False, **changes)

    class Breaking:
        """Breaks the same ones on their way: the answer is one of five that no client may believe."""

        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope.get("path") != "/v1/completions":
                return await self.app(scope, receive, send)
            found, start = [], []

            async def keep(message):
                (start if message["type"] == "http.response.start" else found).append(message)

            await self.app(scope, receive, keep)
            data = json.loads(b"".join(m.get("body", b"") for m in found))
            choice = data.get("choices", [{}])[0]
            ids = choice.get("token_ids")
            if ids and ids[0] % 3 == 0 and len(ids) > 1 and len(choice["logprobs"]["tokens"]) <= 10:
                lost_ones.append(ids)
                way = len(lost_ones) % 5
                if way == 0:
                    return await refuse(send, 400)
                if way == 1:
                    choice["token_ids"] = ids[:-1]
                if way == 2:
                    choice["logprobs"]["token_logprobs"][0] = float("nan")
                if way == 3:
                    choice["logprobs"]["token_logprobs"].pop()
                if way == 4:
                    choice["logprobs"]["tokens"][0] = "token_id:46"
            body = json.dumps(data).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    served = served_model(seed=3, follows=True)
    with serving(Breaking(application(served))) as running:
        there = run(tmp_path / "there", student, teacher, rollout=by(running.url), self_test=False, **changes)
    served.batcher.close()
    assert lost_ones
    assert measured(here, "invalid") == measured(there, "invalid")
    assert losses(here) == losses(there)
    assert same(tmp_path / "here", tmp_path / "there")


def test_the_next_step_is_written_while_this_one_trains(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    ahead = run(tmp_path / "ahead", student, teacher, rollout=by(engine.url, overlap=True), steps=4)
    assert measured(ahead, "engine/staleness") == [0.0, 1.0, 1.0, 1.0]
    # The first step has nothing to be ahead of.
    here = run(tmp_path / "here", student, teacher, steps=4)
    assert losses(ahead)[0] == losses(here)[0]
    assert losses(ahead)[1:] != losses(here)[1:]
    # Nothing is written beyond the last step, and what was written ahead was used: prompts and their probes alone.
    assert measured(ahead, "rollout_gap")[1] > 10 * measured(here, "rollout_gap")[1]


def test_what_was_written_ahead_for_another_draw_is_not_used(folders, engine, tmp_path, monkeypatch):
    from opd.curricula import Draw, NobodyToAsk
    from opd.curricula.shuffled import ShuffledCourse

    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    plain = ShuffledCourse.next

    def otherwise(self, step, signals, asker):
        draw = plain(self, step, signals, asker)
        return Draw(draw.prompts[::-1]) if isinstance(asker, NobodyToAsk) else draw

    monkeypatch.setattr(ShuffledCourse, "next", otherwise)
    ahead = run(tmp_path / "ahead", student, teacher, rollout=by(engine.url, overlap=True))
    here = run(tmp_path / "here", student, teacher)
    assert measured(ahead, "engine/staleness") == [0.0, 0.0, 0.0]
    assert losses(ahead) == losses(here)


def test_older_weights_need_a_correction_where_the_objective_takes_the_students_own_samples(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"rollout": by(engine.url, overlap=True), "objective": "reverse_kl_sampled"}
    with pytest.raises(IncompatibleError, match="one step old: add shaping truncated_importance"):
        run(tmp_path / "no", student, teacher, **changes)
    found = run(tmp_path / "yes", student, teacher, shaping="truncated_importance", **changes)
    assert all(0.5 < value < 1.5 for value in measured(found, "importance"))
    assert measured(found, "importance")[0] == pytest.approx(1.0, abs=1e-4)


def test_rows_may_be_looked_at_while_a_server_writes_them(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    watch = {"watch": {"kind": "drift"}, "segment": 3}
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url) | watch, shaping="drift")
    assert len(losses(there)) == 3
    assert measured(there, "rollout_gap")[0] < 1e-4


def test_a_server_sleeps_while_the_student_trains(folders, tmp_path):
    student, teacher = folders
    served, asleep, refused, slept = served_model(seed=3, follows=True), [False], [], []
    app = application(served)

    async def with_sleep(scope, receive, send):
        path = scope["path"]
        if path in ("/sleep", "/wake_up"):
            asleep[0] = path == "/sleep"
            slept.append(path)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            return await send({"type": "http.response.body", "body": b"{}"})
        if asleep[0]:
            refused.append(path)
            return await refuse(send, 503)
        return await app(scope, receive, send)

    with serving(Seen(with_sleep)) as running:
        found = run(
            tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url, sleep=True)
        )
    served.batcher.close()
    assert len(losses(found)) == 3
    assert not refused
    # After each of three rollouts and of two measurements, and never beyond the run.
    assert slept.count("/sleep") >= 5
    assert not asleep[0]


def test_a_server_that_cannot_sleep_is_refused(folders, engine, tmp_path):
    student, teacher = folders
    with pytest.raises(RunError, match=r"sleep.*enable-sleep-mode, or leave sleep out"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url, sleep=True))


def test_a_server_that_takes_up_no_weights_is_refused(folders, tmp_path):
    student, teacher = folders
    served = served_model(seed=3)
    with serving(application(served)) as running, pytest.raises(RunError, match=r"takes up no weights.*--follow"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()


def test_a_server_of_the_very_student_that_takes_up_no_weights_is_refused_before_a_step(folders, tmp_path):
    student, teacher = folders
    served = served_model(seed=1)
    with serving(application(served)) as running, pytest.raises(RunError, match=r"takes up no weights.*--follow"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_server_that_names_no_weights_is_sent_them_after_each_step(folders, engine, tmp_path):
    """However little a step changes: less than the scores of a text would show."""
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    engine.before = lambda path, paths: path == "/weight_info"
    small = {"update": {"learning_rate": 1e-6}}
    here = run(tmp_path / "here", student, teacher, **small)
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url, retries=0), **small)
    assert engine.paths.count("/collective_rpc") == 4
    assert losses(here) == losses(there)


def test_a_server_of_which_no_completion_can_be_used_is_refused_with_the_reason(folders, tmp_path):
    """Of a model with rows for ids that its tokenizer does not have, and draws them."""
    student = save_tiny(tmp_path / "wide", vocabulary=2000, seed=1)
    served = served_model(seed=1, vocabulary=2000, follows=True)
    with serving(application(served)) as running, pytest.raises(SelfTestError, match=r"can be used \(.* x writing"):
        run(tmp_path / "run", student, {"model": folders[1], "template": "plain"}, rollout=by(running.url))
    served.batcher.close()


def test_another_model_is_found_out_by_what_it_writes(folders, engine, tmp_path, monkeypatch):
    student, teacher = folders
    monkeypatch.setattr("opd.server.serving.copy_into", lambda *args: None)
    with pytest.raises(RunError, match=r"draws from something else, by .* nats at half of the tokens"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url))


def test_a_teacher_at_the_same_server_is_refused(folders, engine, tmp_path):
    student, _ = folders
    with pytest.raises(IncompatibleError, match=r"at one server.*the teacher would be the student.*another port"):
        run(tmp_path / "run", student, {"kind": "served", "url": engine.url}, rollout=by(engine.url))


def test_log_probabilities_of_something_else_than_what_is_drawn_from_are_refused(folders, engine, tmp_path):
    """As vLLM's are without --logprobs-mode processed_logprobs."""
    student, teacher = folders

    class Raw(Seen):
        async def __call__(self, scope, receive, send):
            if scope["path"] != "/v1/completions":
                return await self.app(scope, receive, send)
            body = b""
            more = True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            asked = json.loads(body) | {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

            async def again():
                return {"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}

            return await self.app(scope, again, send)

    with serving(Raw(engine)) as running, pytest.raises(RunError, match="--logprobs-mode processed_logprobs"):
        run(
            tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url), temperature=0.7
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"sleep": True, "overlap": True}}, "cannot write; set one"),
        ({"engine": {"overlap": True}, "watch": "drift"}, "nobody looks at what is written ahead"),
        ({"dtype": "bfloat16"}, "with an engine the server decides"),
        ({"batch": 8}, "with an engine the server decides"),
        ({"engine": {"url": "127.0.0.1:1"}}, "is no address"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    engine = {"kind": "served", "url": "http://127.0.0.1:1", **changes.pop("engine", {})}
    rollout = {"kind": "student", "engine": engine, **changes}
    prompts = {"kind": "inline", "prompts": ["a"]}
    recipe = {"name": "x", "student": {"model": "m"}, "teacher": {"model": "t"}, "prompts": prompts, "rollout": rollout}
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**recipe, "objective": "reverse_kl", "steps": 1})


def test_an_adapter_needs_a_student_that_has_one(folders, engine, tmp_path):
    student, teacher = folders
    with pytest.raises(ModelError, match="weights is adapter, and the student has none"):
        run(
            tmp_path / "run",
            student,
            {"model": teacher, "template": "plain"},
            rollout=by(engine.url, weights="adapter"),
        )


def test_a_text_longer_than_the_server_takes_is_refused(folders, tmp_path):
    from opd.server import Limits

    student, teacher = folders
    served = served_model(seed=3, follows=True, limits=Limits(12))
    with serving(application(served)) as running, pytest.raises(ModelError, match="--max-model-len"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()


def test_nothing_is_left_of_the_weights_that_were_sent(folders, engine, tmp_path):
    student, teacher = folders
    own = tmp_path / "shared"
    own.mkdir()
    (own / "mine.txt").write_text("kept")
    run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url, folder=str(own)))
    assert [path.name for path in own.iterdir()] == ["mine.txt"]


def test_what_lay_in_a_folder_of_weights_stays_there(folders, engine, tmp_path, monkeypatch):
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


# -- opd serve as a writer --------------------------------------------------------------------------------------------


def ask(url, **body):
    answer = httpx2.post(f"{url}/v1/completions", json=body)
    return answer.status_code, answer.json()


def test_what_is_written_depends_on_its_seed_alone(engine):
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "return_token_ids": True}
    first, again, other = (ask(engine.url, seed=seed, **body)[1]["choices"][0] for seed in (1, 1, 2))
    assert first["token_ids"] == again["token_ids"]
    assert first["token_ids"] != other["token_ids"]
    assert len(first["logprobs"]["top_logprobs"][0]) in (2, 3)
    greedy = [ask(engine.url, temperature=0, seed=seed, **body)[1]["choices"][0]["token_ids"] for seed in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n=2 is not done here"),
        ({"stop": ["a"]}, "stop="),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"stream": True}, "stream"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 100_000}, "--max-model-len"),
        ({"prompt": [[1], [2]]}, "2 prompts"),
        ({"prompt": [1, 470]}, "id 470"),
    ],
)
def test_what_is_not_done_is_refused(body, message, engine):
    status, answer = ask(engine.url, **{"prompt": [5, 6], "max_tokens": 4, **body})
    assert status == 400
    assert message in answer["error"]["message"]


def test_weights_are_read_from_safetensors_alone(engine, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    answer = httpx2.post(f"{engine.url}/collective_rpc", json=body)
    assert answer.status_code == 400
    assert "safetensors" in answer.text
    answer = httpx2.post(f"{engine.url}/collective_rpc", json={"method": "eval", "kwargs": {"weights_path": "/"}})
    assert answer.status_code == 400


def test_the_settings_of_an_engine_say_where_they_stand():
    with pytest.raises(ValidationError, match="listed twice"):
        ServedEngine(url=["http://127.0.0.1:1", "http://127.0.0.1:1/v1"])


# -- with others ------------------------------------------------------------------------------------------------------


def test_a_served_teacher_hears_of_rows_as_they_are_written(folders, engine, tmp_path):
    student, _ = folders
    served = served_model(seed=7)
    teacher = Seen(application(served))
    # A row that is written hears an answer before the last one is.
    order = []
    engine.before = lambda path, paths: order.append(("wrote", path)) if path == "/v1/completions" else None
    teacher.before = lambda path, paths: order.append(("scored", path)) if path == "/v1/completions" else None
    with serving(teacher) as running:
        asked = {"kind": "served", "url": running.url, "answers": "top_k", "top_k": 8}
        found = run(tmp_path / "there", student, asked, rollout=by(engine.url, concurrency=1))
        scored = sum(what == "scored" for what, _ in order)
        plain = run(tmp_path / "here", student, asked)
    served.batcher.close()
    # Requests of one server share passes as they come.
    assert losses(found) == pytest.approx(losses(plain), abs=1e-5)
    between = [what for what, _ in order]
    assert "wrote" in between[between.index("scored") :]
    # Nobody is asked about what is not trained on, nor twice: three steps of four rows, held-out rows twice, probes.
    assert scored <= 3 * 4 + 2 * 2 + 6


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_have_their_rows_written_by_one_server(sharded, folders, engine, tmp_path):
    student, teacher = folders
    prompts = {"kind": "inline", "prompts": [f"{i} + {i}=" for i in range(8)]}
    recipe = parse_recipe(
        {
            "name": "two",
            "steps": 3,
            "student": {"model": student, "template": "plain"},
            "teacher": {"model": teacher, "template": "plain"},
            "prompts": prompts,
            "rollout": by(engine.url),
            "objective": "reverse_kl",
            "batch": {"prompts": 4, "micro": 2},
            "evaluation": {"held_out": 2, "samples": 0},
            "checkpoint": {"every": 0},
            "tracking": {"trackers": []},
            "hardware": {"device": "cpu", "threads": 1},
            "output": str(tmp_path / "run"),
        }
    )
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    answers = together(recipe, environment)
    assert all(isinstance(answer, dict) for answer in answers), answers
    here = execute(
        recipe.model_copy(update={"output": str(tmp_path / "here"), "rollout": StudentRollout(max_new_tokens=10)}),
        quiet=True,
    )
    for answer in answers:
        found = [row["train/loss"] for row in answer["history"] if "train/loss" in row]
        assert found == pytest.approx(losses(here), rel=1e-4)
    # One of them sends weights, for both.
    assert engine.paths.count("/collective_rpc") == 4


def test_a_run_goes_on_with_rows_written_anew(folders, engine, tmp_path):
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"rollout": by(engine.url, overlap=True), "checkpoint": {"every": 1}, "steps": 4}
    run(tmp_path / "run", student, teacher, **changes | {"steps": 2})
    going_on = opd.distill(
        {"model": student, "template": "plain"},
        teacher,
        TEXTS * 2,
        quiet=True,
        resume=True,
        force_changed=True,
        batch={"prompts": 4, "micro": 4},
        evaluation={"held_out": 2, "samples": 1},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        update={"learning_rate": 1e-3},
        output=str(tmp_path / "run"),
        **changes,
    )
    # What was begun before the end is not kept: the first step after it is not ahead.
    assert measured(going_on, "engine/staleness")[-2:] == [0.0, 1.0]


def test_a_plan_counts_no_sampler_and_says_what_is_sent(folders):
    found = make_plan(load_recipe("qwen3_8b_vllm_to_1p7b"))
    assert found.teraflops["rollout"] == 0
    assert not [part for part in found.memory if part.startswith("rollout")]
    assert any("the server reads 3.20 GiB of weights" in note for note in found.notes)


def test_a_server_that_does_not_name_its_weights_is_sent_them_all_the_same(folders, tmp_path):
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


def test_older_weights_are_refused_before_anything_is_started(folders, tmp_path):
    """By a plan too, and without a server."""
    student, teacher = folders
    settings = {"rollout": by("http://127.0.0.1:9", overlap=True), "objective": "reverse_kl_sampled"}
    with pytest.raises(IncompatibleError, match="one step old"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, **settings)
    recipe = load_recipe("qwen3_8b_vllm_to_1p7b", ["objective=reverse_kl_sampled", "shaping=uniform"])
    with pytest.raises(IncompatibleError, match="one step old"):
        make_plan(recipe)
