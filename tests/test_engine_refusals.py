"""Servers and settings that cannot write a student's completions, refused with the reason and the fix."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from opd.engines.served import ServedEngine
from opd.errors import IncompatibleError, ModelError, RecipeError, RunError, SelfTestError
from opd.recipe import parse_recipe
from opd.server.serving import application
from tests.conftest import save_tiny
from tests.engines import Seen, by, engine, folders  # noqa: F401
from tests.serving import served_model, serving
from tests.test_served import run


def test_a_server_that_cannot_sleep_is_refused(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    with pytest.raises(RunError, match=r"sleep.*enable-sleep-mode, or leave sleep out"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(engine.url, sleep=True))


def test_a_server_that_takes_up_no_weights_is_refused(folders, tmp_path):  # noqa: F811
    student, teacher = folders
    served = served_model(seed=3)
    with serving(application(served)) as running, pytest.raises(RunError, match=r"takes up no weights.*--follow"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()


def test_a_server_of_the_very_student_that_takes_up_no_weights_is_refused_before_a_step(folders, tmp_path):  # noqa: F811
    student, teacher = folders
    served = served_model(seed=1)
    with serving(application(served)) as running, pytest.raises(RunError, match=r"takes up no weights.*--follow"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_server_of_which_no_completion_can_be_used_is_refused_with_the_reason(folders, tmp_path):  # noqa: F811
    """Of a model with rows for ids that its tokenizer does not have, and draws them."""
    student = save_tiny(tmp_path / "wide", vocabulary=2000, seed=1)
    served = served_model(seed=1, vocabulary=2000, follows=True)
    with serving(application(served)) as running, pytest.raises(SelfTestError, match=r"can be used \(.* x writing"):
        run(tmp_path / "run", student, {"model": folders[1], "template": "plain"}, rollout=by(running.url))
    served.batcher.close()


def test_a_teacher_at_the_same_server_is_refused(folders, engine, tmp_path):  # noqa: F811
    student, _ = folders
    with pytest.raises(IncompatibleError, match=r"at one server.*the teacher would be the student.*another port"):
        run(tmp_path / "run", student, {"kind": "served", "url": engine.url}, rollout=by(engine.url))


def test_log_probabilities_of_something_else_than_what_is_drawn_from_are_refused(folders, engine, tmp_path):  # noqa: F811
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
    engine = {"kind": "served", "url": "http://127.0.0.1:1", **changes.pop("engine", {})}  # noqa: F811
    rollout = {"kind": "student", "engine": engine, **changes}
    prompts = {"kind": "inline", "prompts": ["a"]}
    recipe = {"name": "x", "student": {"model": "m"}, "teacher": {"model": "t"}, "prompts": prompts, "rollout": rollout}
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**recipe, "objective": "reverse_kl", "steps": 1})


def test_the_settings_of_an_engine_say_where_they_stand():
    with pytest.raises(ValidationError, match="listed twice"):
        ServedEngine(url=["http://127.0.0.1:1", "http://127.0.0.1:1/v1"])


def test_an_adapter_needs_a_student_that_has_one(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    with pytest.raises(ModelError, match="weights is adapter, and the student has none"):
        run(
            tmp_path / "run",
            student,
            {"model": teacher, "template": "plain"},
            rollout=by(engine.url, weights="adapter"),
        )


def test_a_text_longer_than_the_server_takes_is_refused(folders, tmp_path):  # noqa: F811
    from opd.server import Limits

    student, teacher = folders
    served = served_model(seed=3, follows=True, limits=Limits(12))
    with serving(application(served)) as running, pytest.raises(ModelError, match="--max-model-len"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, rollout=by(running.url))
    served.batcher.close()
