"""Teachers by a server that fails: what is lost, what is not, and that the rest is as if the lost had never been."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import torch
import yaml

from opd.api import execute
from opd.cli import main
from opd.distributions import Categorical
from opd.errors import DataError, RunError
from opd.language.engines.base import ids_of
from opd.prompts import Prompt
from opd.remote.exact import SCORE
from opd.rollouts.base import OneSource, PrefixSource
from opd.rollouts.student import StudentRollout
from opd.server.serving import application
from opd.teachers.served import LiveServedTeacher
from opd.verifiers import Scorer, Verifier
from tests.conftest import character_tokenizer, said, trajectories_of
from tests.processes import together
from tests.serving import LASTING, PASSING, Faulty, RowByRow, fault_of, is_lost, served_model, serving
from tests.test_loop import recipe_for
from tests.test_served import CONTEXT, TEXTS, folders, losses, run, teacher_at, weights_of  # noqa: F401
from tests.test_sharding import FSDP2, assert_close, states

TOP_K = {"kind": "served", "dialect": "vllm", "answers": "top_k", "top_k": 5, "retries": 3, "backoff": 0.01}
EXACT = {"kind": "served", "batch": 3, "retries": 3, "backoff": 0.01}
LOSSY = {"failures": {"max_invalid": 1.0}, "self_test": False}


class Designed(LiveServedTeacher):
    """Answers all, and says of some trajectories that it has not."""

    def answer(self, trajectories, settings, context):
        (target,) = super().answer(trajectories, settings, context)
        asked = [
            self.reader.encode(prompt).tolist() + actions.tolist()
            for prompt, actions in zip(trajectories.prompts, trajectories.completions(), strict=True)
        ]
        lost = torch.tensor([is_lost(ids) for ids in asked])
        missing = lost.repeat_interleave(trajectories.lengths)
        self.failed.update({"by design": int(lost.sum())})
        said = target.distribution
        (said.hidden if isinstance(said, Categorical) else said.log_probs)[missing] = torch.nan
        return [replace(target, missing=missing)]


class Surviving(PrefixSource):
    """The student's rollout without those that a faulty server would not answer."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, request):
        made = self.inner(request.to(request.settings.inner))
        texts = zip(made.contexts, made.completions(), strict=True)
        left = [i for i, (prompt, c) in enumerate(texts) if not is_lost(ids_of(prompt).tolist() + c.tolist())]
        return made.pick(left)[0]


class SurvivingRollout(OneSource):
    kind: Literal["surviving"] = "surviving"

    @property
    def inner(self):
        return StudentRollout(max_new_tokens=self.max_new_tokens)

    def build(self, context, student, teachers):
        return Surviving(self.inner.build(context, student, teachers))


class Graded(Scorer):
    """Rewards of several sizes, and sometimes no verdict, by the tokens that were written."""

    def score(self, trajectories, outcomes):
        sums = torch.stack([actions.sum() for actions in trajectories.completions()])
        return torch.where(sums % 7 == 0, torch.nan, (sums % 3).float() / 2)


class GradedVerifier(Verifier):
    kind: Literal["graded_by_tokens"] = "graded_by_tokens"

    def build(self, context):
        return Graded(self)


def same_run(one, other, tmp_path, names):
    assert losses(one) == losses(other)
    mine, theirs = (weights_of(tmp_path / name) for name in names)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def invalid(result):
    return [row.get("train/invalid", 0.0) for row in result.history if "train/loss" in row]


@pytest.mark.parametrize("teacher", [TOP_K, EXACT], ids=["top_k", "exact"])
def test_a_rollout_whose_request_failed_is_in_nothing(teacher, folders, tmp_path, monkeypatch):  # noqa: F811
    """30 % of all texts meet a fault; the run is the one in which those that no retry mends are invalid by design."""
    student, _ = folders
    changes = {"objective": "reverse_kl", "batch": {"prompts": 4, "micro": 4, "group": 4}, **LOSSY}
    model, teacher = served_model(kind=RowByRow), {**teacher, "timeout": 0.5}
    faulty = Faulty(application(model))
    with serving(faulty) as running:
        broken = run(tmp_path / "broken", student, {**teacher, "url": running.url}, **changes)
    with serving(application(model)) as running:
        monkeypatch.setattr("opd.teachers.served.LiveServedTeacher", Designed)
        designed = run(tmp_path / "designed", student, {**teacher, "url": running.url}, **changes)
    assert invalid(broken) == invalid(designed)
    assert any(invalid(broken))
    same_run(broken, designed, tmp_path, ("broken", "designed"))
    met = Counter(faulty.met)
    assert sum(round(share * 16) for share in invalid(broken)) <= sum(met[fault] for fault in sum(LASTING.values(), ()))
    assert len(met) >= 5, met


def test_a_run_stops_when_too_many_rollouts_go_without_an_answer(folders, tmp_path):  # noqa: F811
    class Dying(Faulty):
        async def __call__(self, scope, receive, send):
            if scope["type"] == "http" and scope["path"] == "/v1/completions":
                self.spared -= 1
                if self.spared < 0:
                    scope = {**scope, "path": "/gone"}
            return await self.app(scope, receive, send)

    teacher = {"kind": "served", "dialect": "vllm", "answers": "top_k", "top_k": 5, "retries": 0}
    with serving(Dying(application(served_model()), 1 + 4)) as running, pytest.raises(RunError) as told:
        run(
            tmp_path / "run",
            folders[0],
            {**teacher, "url": running.url},
            self_test=False,
            steps=8,
        )
    assert "rollouts were lost" in str(told.value)
    assert "HTTP 404" in str(told.value)


REASONS = {"infinite": "NaN", "always cut off": "not safetensors"}


def test_of_a_request_of_several_rollouts_only_those_are_lost_that_fail_alone():
    lengths = [3 + i % 5 for i in range(60)]
    prompts = [Prompt(f"p{i}", {"prompt": "a"}) for i in range(60)]
    trajectories = trajectories_of(lengths, prompts=prompts)
    model = served_model(kind=RowByRow)
    with serving(application(model)) as running:
        whole = said(teacher_at(running.url), trajectories).hidden
    faulty = Faulty(application(model))
    with serving(faulty) as running:
        teacher = teacher_at(running.url, batch=6, retries=4, timeout=0.5)
        (target,) = teacher.answer(trajectories, teacher.settings, CONTEXT)
    context = teacher.reader.encode(prompts[0]).tolist()
    faults = [fault_of(context + actions.tolist(), SCORE) for actions in trajectories.completions()]
    lost = torch.tensor([fault in LASTING[SCORE] for fault in faults])
    assert 5 < int(lost.sum()) < 20
    assert set(PASSING) & set(faulty.met)
    assert torch.equal(target.missing, lost.repeat_interleave(trajectories.lengths))
    assert torch.equal(target.distribution.hidden[~target.missing], whole[~target.missing])
    assert bool(target.distribution.hidden[target.missing].isnan().all())
    assert teacher.failures() == Counter(REASONS.get(f, f) for f in faults if f in LASTING[SCORE])


def test_where_nobody_answers_rollouts_are_not_asked_about_one_by_one():
    trajectories = trajectories_of([3] * 9, prompts=[Prompt(f"p{i}", {"prompt": "a"}) for i in range(9)])
    with serving(application(served_model())) as running:
        teacher = teacher_at(running.url, batch=4, retries=2)
    (target,) = teacher.answer(trajectories, teacher.settings, CONTEXT)
    assert bool(target.missing.all())
    assert teacher.failures() == {"connection": 9}
    assert teacher.client.retried == 3 * 2


def test_an_answer_that_always_comes_too_late_is_none():
    trajectories = trajectories_of([3, 4, 5], prompts=[Prompt(f"p{i}", {"prompt": "a"}) for i in range(3)])
    late = trajectories.completions()[1].tolist()

    class Late(Faulty):
        async def __call__(self, scope, receive, send):
            self.seen.clear()
            await super().__call__(scope, receive, send)

    server = Late(application(served_model()), fault=lambda ids, path: "too late" if ids[-4:] == late else None)
    with serving(server) as running:
        teacher = teacher_at(running.url, dialect="vllm", answers="top_k", top_k=4, timeout=0.5, retries=2)
        (target,) = teacher.answer(trajectories, teacher.settings, CONTEXT)
    assert target.missing.tolist() == [False] * 3 + [True] * 4 + [False] * 5
    assert teacher.failures() == {"timeout": 1}
    assert server.met == ["too late"] * 3


OUTCOMES = {
    "grpo": {
        "objective": [{"kind": "grpo"}, {"kind": "grpo", "spread": "batch"}, {"kind": "reverse_kl", "weight": 0.1}],
    },
    "shaping": {
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_mean",
        "shaping": [
            {"kind": "outcome_balance", "denominator": "kept"},
            {"kind": "margin_shift", "delta": 3.0},
            {"kind": "outcome_bonus", "form": "normalised"},
        ],
    },
}
MEASURED = {
    "grpo": {"train/reward"},
    "shaping": {"train/reward", "train/balance/kept", "train/margin/calibrated", "train/bonus/mixed"},
}
SEEN = ("train/reward", "train/margin/", "train/balance/", "train/bonus/", "train/return", "train/positions")


@pytest.mark.parametrize("way", list(OUTCOMES))
def test_rollouts_are_compared_as_if_the_lost_had_never_been_written(way, folders, tmp_path):  # noqa: F811
    student, _ = folders
    changes = {
        **OUTCOMES[way],
        "verifier": "graded_by_tokens",
        "batch": {"prompts": 4, "micro": 5, "group": 4},
        "steps": 2,
        **LOSSY,
    }
    model = served_model(kind=RowByRow)
    teacher = {**EXACT, "batch": 4}
    steady = Faulty(application(model), fault=lambda ids, path: "HTTP 400" if is_lost(ids) else None)
    with serving(steady) as running:
        broken = run(tmp_path / "broken", student, {**teacher, "url": running.url}, **changes)
    with serving(application(model)) as running:
        written = {"kind": "surviving", "max_new_tokens": 10}
        never = run(tmp_path / "never", student, {**teacher, "url": running.url}, **changes, rollout=written)
    assert any(invalid(broken))
    assert not any(invalid(never))
    same_run(broken, never, tmp_path, ("broken", "never"))
    mine, theirs = (
        [{k: v for k, v in row.items() if k.startswith(SEEN)} for row in result.history] for result in (broken, never)
    )
    assert mine == theirs
    shown = {name for row in mine for name, value in row.items() if value}
    assert shown >= MEASURED[way]


def of_prompt(text):
    """Whether ids are those of a prompt and what was written behind it."""
    first = character_tokenizer()(text)["input_ids"]
    return lambda ids: list(ids[: len(first)]) == first


def shared_recipe(folders, tmp_path, name, url, **changes):  # noqa: F811
    teacher = [{**EXACT, "url": url}]
    settings = {"output": str(tmp_path / name), "teacher": teacher, "update": {"learning_rate": 1e-3}, **LOSSY}
    return recipe_for(folders, tmp_path, **{**settings, **changes})


def test_two_processes_that_lost_rollouts_train_as_one(folders, tmp_path):  # noqa: F811
    """Whole groups of one process among them, and numbers that are compared over both."""
    changes = {
        "objective": [{"kind": "grpo", "spread": "batch"}, {"kind": "reverse_kl_sampled"}],
        "shaping": {"kind": "outcome_balance", "scope": "global", "denominator": "kept"},
        "verifier": "graded_by_tokens",
        "batch": {"prompts": 8, "group": 3, "micro": 4},
        "evaluation": {"held_out": 1},
        "checkpoint": {"every": 1},
    }
    whole_group = of_prompt("3+2=")
    steady = Faulty(
        application(served_model(kind=RowByRow)),
        spared=0,
        fault=lambda ids, path: "HTTP 400" if whole_group(ids) or is_lost(ids) else None,
    )
    with serving(steady) as running:
        alone, both = (shared_recipe(folders, tmp_path, n, running.url, **changes) for n in ("alone", "both"))
        history = execute(alone, quiet=True).history
        answers = together(both, {})
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert answers[0]["weights"] == answers[1]["weights"]
    assert_close(states(alone), states(both))
    rows = list(zip(history, answers[0]["history"], strict=True))
    assert any(mine.get("train/invalid") for mine, _ in rows)
    for mine, theirs in rows:
        assert mine.get("train/invalid") == theirs.get("train/invalid")
        for name in ("train/reward", "train/positions", "train/sampled_tokens", "train/balance/kept", "train/loss"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "lost", "told"),
    [
        ({}, of_prompt("1+1="), "a process has none left"),
        (FSDP2, is_lost, "with FSDP2 every process needs equally many"),
    ],
)
def test_processes_that_cannot_go_on_stop_together(environment, lost, told, folders, tmp_path):  # noqa: F811
    server = Faulty(application(served_model()), spared=0, fault=lambda ids, path: "HTTP 400" if lost(ids) else None)
    changes = {
        "prompts": {"kind": "inline", "prompts": ["1+1=", "1+2=", "1+3="]},
        "batch": {"prompts": 2, "group": 6 if lost is is_lost else 2, "micro": 4},
        "evaluation": {"held_out": 1},
    }
    with serving(server) as running:
        answers = together(shared_recipe(folders, tmp_path, "both", running.url, **changes), environment)
    assert all(isinstance(answer, RunError) for answer in answers), answers
    assert str(answers[0]) == str(answers[1])
    assert told in str(answers[0])
    assert "HTTP 400" in str(answers[0])


def test_ids_that_the_served_model_lacks_lose_one_rollout():
    prompts = [Prompt(f"p{i}", {"prompt": "a"}) for i in range(4)]
    trajectories = trajectories_of([3, 4, 5, 2], prompts=prompts)
    trajectories.actions[4] = 60
    with serving(application(served_model())) as running:
        for answers in ({}, {"dialect": "vllm", "answers": "top_k", "top_k": 4}):
            teacher = teacher_at(running.url, batch=4, **answers)
            (target,) = teacher.answer(trajectories, teacher.settings, CONTEXT)
            assert target.missing.tolist() == [False] * 3 + [True] * 4 + [False] * 7
            assert teacher.failures() == {"HTTP 400": 1}


def test_prompts_with_ids_that_the_served_model_lacks_are_refused_at_the_start():
    with serving(application(served_model(vocabulary=46))) as running:
        teacher = teacher_at(running.url)
        teacher.check_prompts([Prompt("p", {"prompt": "ab"})])
        with pytest.raises(DataError, match=r"'p' has the id 46 for the teacher, .* ends at 45: .*teacher\.tokenizer"):
            teacher.check_prompts([Prompt("p", {"prompt": "a#"})])


def test_a_recipe_is_checked_without_its_server(folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = {
        "student": {"model": folders[0], "template": "plain"},
        "teacher": {"kind": "served", "url": "http://127.0.0.1:9"},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "evaluation": {"held_out": 2},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["opd", "check", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "asked over HTTP" in "".join(capsys.readouterr())


def test_what_was_lost_counts_after_a_run_is_resumed(folders, tmp_path):  # noqa: F811
    """Half of each step: 12 %, 25 % and 37 % of four steps, and 50 % at the fourth."""
    lost = of_prompt("1+1=")
    server = Faulty(application(served_model()), spared=0, fault=lambda ids, path: "HTTP 400" if lost(ids) else None)
    changes = {
        "prompts": {"kind": "inline", "prompts": ["1+1=", "1+2=", "1+3="]},
        "batch": {"prompts": 2, "group": 2, "micro": 4},
        "evaluation": {"held_out": 1},
        "checkpoint": {"every": 1},
        "failures": {"max_invalid": 0.4, "invalid_over": 4},
    }
    with serving(server) as running:
        first, rest = (shared_recipe(folders, tmp_path, "run", running.url, **changes, steps=n) for n in (2, 6))
        execute(first, quiet=True)
        with pytest.raises(RunError, match=r"step 4: 50% of its rollouts .*, and 50% of the last 4 steps'"):
            execute(rest, resume=True, quiet=True)
        server.fault = lambda ids, path: None
        assert execute(rest, resume=True, quiet=True).summary["steps"] == 6
