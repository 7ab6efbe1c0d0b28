"""Completions by a server are those of this process: groups, what is lost, what is written ahead, several processes."""

from __future__ import annotations

import json

import pytest

import opd
from opd.api import execute
from opd.engines.served import LOST
from opd.errors import IncompatibleError
from opd.plan import make_plan
from opd.recipe import load_recipe, parse_recipe
from opd.rollouts.student import StudentRollout
from opd.server.serving import application
from tests.engines import Seen, by, engine, folders, measured, refuse, same  # noqa: F401
from tests.processes import together
from tests.serving import served_model, serving
from tests.test_served import TEXTS, losses, run


def test_a_run_is_what_it_is_in_this_process(folders, engine, tmp_path):  # noqa: F811
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


def test_groups_and_cuts_are_those_of_this_process(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"batch": {"prompts": 2, "group": 3, "micro": 6}, "temperature": 0.8, "steps": 2}
    cuts = {"top_p": 0.9, "top_k": 20}
    here = run(tmp_path / "here", student, teacher, rollout={"max_new_tokens": 10, **cuts}, **changes)
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url) | cuts, **changes)
    assert losses(here) == losses(there)


def test_completions_that_were_not_written_are_in_nothing(folders, engine, tmp_path, monkeypatch):  # noqa: F811
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


def test_rows_may_be_looked_at_while_a_server_writes_them(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    watch = {"watch": {"kind": "drift"}, "segment": 3}
    there = run(tmp_path / "there", student, teacher, rollout=by(engine.url) | watch, shaping="drift")
    assert len(losses(there)) == 3
    assert measured(there, "rollout_gap")[0] < 1e-4


def test_a_server_sleeps_while_the_student_trains(folders, tmp_path):  # noqa: F811
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


def test_a_served_teacher_hears_of_rows_as_they_are_written(folders, engine, tmp_path):  # noqa: F811
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
def test_two_processes_have_their_rows_written_by_one_server(sharded, folders, engine, tmp_path):  # noqa: F811
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


def test_a_plan_counts_no_sampler_and_says_what_is_sent(folders):  # noqa: F811
    found = make_plan(load_recipe("qwen3_8b_vllm_to_1p7b"))
    assert found.teraflops["rollout"] == 0
    assert not [part for part in found.memory if part.startswith("rollout")]
    assert any("the server reads 3.20 GiB of weights" in note for note in found.notes)


# -- written ahead ----------------------------------------------------------------------------------------------------


def test_the_next_step_is_written_while_this_one_trains(folders, engine, tmp_path):  # noqa: F811
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


def test_what_was_written_ahead_for_another_draw_is_not_used(folders, engine, tmp_path, monkeypatch):  # noqa: F811
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


def test_older_weights_need_a_correction_where_the_objective_takes_the_students_own_samples(folders, engine, tmp_path):  # noqa: F811
    student, teacher = folders
    teacher = {"model": teacher, "template": "plain"}
    changes = {"rollout": by(engine.url, overlap=True), "objective": "reverse_kl_sampled"}
    with pytest.raises(IncompatibleError, match="one step old: add shaping truncated_importance"):
        run(tmp_path / "no", student, teacher, **changes)
    found = run(tmp_path / "yes", student, teacher, shaping="truncated_importance", **changes)
    assert all(0.5 < value < 1.5 for value in measured(found, "importance"))
    assert measured(found, "importance")[0] == pytest.approx(1.0, abs=1e-4)


def test_older_weights_are_refused_before_anything_is_started(folders, tmp_path):  # noqa: F811
    """By a plan too, and without a server."""
    student, teacher = folders
    settings = {"rollout": by("http://127.0.0.1:9", overlap=True), "objective": "reverse_kl_sampled"}
    with pytest.raises(IncompatibleError, match="one step old"):
        run(tmp_path / "run", student, {"model": teacher, "template": "plain"}, **settings)
    recipe = load_recipe("qwen3_8b_vllm_to_1p7b", ["objective=reverse_kl_sampled", "shaping=uniform"])
    with pytest.raises(IncompatibleError, match="one step old"):
        make_plan(recipe)


def test_a_run_goes_on_with_rows_written_anew(folders, engine, tmp_path):  # noqa: F811
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
