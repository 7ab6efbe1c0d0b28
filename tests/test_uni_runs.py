"""Uni-OPD in runs: the gradient of everything together by hand, checkpoints, mistakes, and several processes."""

from __future__ import annotations

import json
import math

import pytest
import torch

import opd
from opd.api import execute
from opd.asking import RunAsker
from opd.recipe import load_recipe, parse_recipe
from opd.shaping import looked
from tests.conftest import tiny_model
from tests.processes import together
from tests.tiny import saved, turn_tokenizer
from tests.uni import ROWS, TOGETHER, steps_of, trained


@pytest.fixture
def seen(monkeypatch):
    """The trajectories of each step, as the last shaping of `TOGETHER` left them."""
    found = []

    def keep(shapers, settings, *rest):
        found.append(looked(shapers, settings, *rest))
        return found[-1]

    monkeypatch.setattr("opd.loop.looked", keep)
    return found


@pytest.mark.parametrize("objective", ["reverse_kl_sampled", "lightning"])
def test_the_gradient_of_everything_is_that_by_hand_however_groups_are_cut(objective, seen, tmp_path):
    result, cut, before, teacher = trained(tmp_path / "cut", objective={"kind": objective, "clamp": None})
    _, whole, _, _ = trained(
        tmp_path / "whole", objective={"kind": objective, "clamp": None}, batch={"prompts": 3, "group": 6}
    )
    made = seen[0]
    assert torch.equal(made.actions, seen[1].actions)
    returns, rewards = [], made.rewards.tolist()
    student = tiny_model(seed=1)
    student.load_state_dict(before, strict=False)
    ratios, own = [], []
    for context, actions in zip(made.contexts, made.completions(), strict=True):
        ids = torch.cat([context, actions])[None]
        places = torch.arange(len(context) - 1, ids.shape[1] - 1)
        log_q = student(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        with torch.no_grad():
            log_p = teacher(ids).logits[0, places, :47].log_softmax(-1).gather(1, actions[:, None])[:, 0]
        ratios.append(log_p - log_q.detach())
        own.append(log_q)
        returns.append(float(ratios[-1].mean()))
    moved = [0.0] * len(rewards)
    for first in range(0, len(rewards), 6):
        group = range(first, first + 6)
        right, wrong = [i for i in group if rewards[i] == 1], [i for i in group if rewards[i] == 0]
        if not right or not wrong:
            continue
        margin = sum(returns[i] for i in right) / len(right) - sum(returns[i] for i in wrong) / len(wrong)
        for i in group if margin < 0.5 else ():
            moved[i] = (0.5 - margin) / 2 * (1 if i in right else -1)
    assert sum(offset != 0 for offset in moved) >= 6
    firsts = made.lengths.cumsum(0) - made.lengths
    kept = made.columns["outcome_kept"][firsts].tolist()
    assert 0 < sum(kept) < len(kept)
    total, closed = torch.zeros(()), 0
    for ratio, log_q, offset, stays in zip(ratios, own, moved, kept, strict=True):
        open_ = (ratio.abs() < 3.0).float()
        closed += int((open_ == 0).sum())
        total = total - stays * ((ratio + offset) * open_ * log_q).mean() / len(rewards)
    assert closed > 0
    total.backward()
    for name, p in student.named_parameters():
        torch.testing.assert_close(cut[name], p.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(cut[name], whole[name], atol=1e-6, rtol=1e-4)
    (step,) = steps_of(result)
    assert step["train/gated"] == pytest.approx(closed / made.positions)
    assert step["train/balance/kept"] == pytest.approx(sum(kept) / len(kept))
    assert {f"train/margin/{name}" for name in ("before", "after", "lam", "inverted", "mixed", "raised")} <= step.keys()


def test_a_shift_that_is_nothing_and_a_gate_that_is_open_change_nothing(tmp_path):
    harmless = [{"kind": "margin_shift", "delta": 0.0, "statistic": "mean", "scope": "global", "right_from": 9.0}]
    _, plain, _, _ = trained(tmp_path / "plain", shaping="uniform")
    _, shaped, _, _ = trained(tmp_path / "shaped", shaping=[*harmless, {"kind": "log_ratio_gate", "limit": 1e6}])
    assert all(torch.equal(plain[name], shaped[name]) for name in plain)


def test_states_of_balancers_survive_a_checkpoint(tmp_path, monkeypatch):
    asked = []
    roll_out = RunAsker.roll_out

    def counted(self, *arguments, **named):
        asked.append(self.run.step)
        return roll_out(self, *arguments, **named)

    monkeypatch.setattr(RunAsker, "roll_out", counted)
    changes = {
        "steps": 4,
        "curriculum": {"kind": "difficulty", "responses": 3, "by": "side"},
        "batch": {"prompts": 3, "group": 4, "micro": 5},
        "checkpoint": {"every": 2},
        "update": {"learning_rate": 1e-3},
    }
    whole, _, _, _ = trained(tmp_path / "whole", **changes)
    first, _, _, _ = trained(tmp_path / "parts", **{**changes, "steps": 2})
    rest, _, _, _ = trained(tmp_path / "parts", resume="auto", **changes)
    assert asked == [0, 0]
    names = (
        "train/loss",
        "train/reward",
        "train/balance/kept",
        "train/margin/before",
        "train/curriculum/solved_before",
    )
    for name in names:
        expected = [record.get(name) for record in steps_of(whole)]
        assert [r.get(name) for r in steps_of(first)][:2] + [r.get(name) for r in steps_of(rest)][-2:] == expected
    begun = steps_of(whole)[0]
    counts = [v for k, v in begun.items() if k.startswith("train/curriculum/prompts/")]
    assert sum(counts) == len(ROWS) - 2
    assert begun["train/curriculum/prompts_balanced"] >= len(ROWS) - 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verifier": None}, r"key 'verifier' is required: shaping 'margin_shift' goes by its verdicts"),
        ({"verifier": None, "shaping": "uniform", "curriculum": "difficulty"}, r"curriculum 'difficulty' goes by"),
        ({"batch": {"prompts": 3, "group": 1}}, r"batch.group is 1: shaping 'margin_shift' compares .* change nothing"),
        ({"objective": "reverse_kl"}, r"shaping 'margin_shift' moves .* objective 'reverse_kl' has no place"),
        ({"rollout": {"max_new_tokens": 8, "top_p": 0.9}}, r"shaping 'margin_shift' needs .* without top_p"),
        ({"rollout": {"max_new_tokens": 8, "top_k": [[0, 0], [1, 5]]}, "steps": 2}, r"without top_p"),
        ({"shaping": ["margin_shift", "margin_mask"]}, r"margin_shift and margin_mask both measure 'return'"),
        ({"shaping": {"kind": "margin_mask", "teacher": "x"}}, r"shaping 'margin_mask' compares .* 'x' names none"),
        ({"shaping": {"kind": "log_ratio_gate", "teacher": "x"}}, r"shaping 'log_ratio_gate' compares .* names none"),
        (
            {"shaping": {"kind": "outcome_balance", "ratio": -1}},
            r"shaping.ratio is -1: a ratio is a number from 0, or inf$",
        ),
        (
            {"curriculum": {"kind": "difficulty", "by": "domain"}},
            r"no column 'domain', which curriculum.by balances by",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused_at_the_start(changes, words, tmp_path):
    with pytest.raises(opd.OpdError, match=words) as error:
        trained(tmp_path, **changes)
    assert len(str(error.value).splitlines()) <= 2


def test_a_whole_recipe_with_routed_teachers(tmp_path):
    student, *teachers = (
        {
            "model": str(saved(tmp_path / name, tiny_model(vocabulary=98, seed=seed), turn_tokenizer())),
            "template": "plain",
        }
        for name, seed in (("student", 1), ("math", 2), ("code", 3))
    )
    recipe = {
        "output": str(tmp_path / "run"),
        "steps": 3,
        "student": student,
        "teacher": {"kind": "routed", "by": "side", "routes": dict(zip("ab", teachers, strict=True))},
        "prompts": {"kind": "inline", "prompts": ROWS},
        "curriculum": {"kind": "difficulty", "responses": 4, "by": "side"},
        "rollout": {"max_new_tokens": 8},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "shaping": TOGETHER,
        "objective": {"kind": "lightning", "clamp": None},
        "reduction": "sequence_mean",
        "batch": {"prompts": 3, "group": 4, "micro": 5},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "end_tokens": [1, 89],
    }
    result = execute(parse_recipe(recipe), quiet=True)
    steps = steps_of(result)
    assert len(steps) == 3
    assert all("train/margin/mixed" in step and math.isfinite(step["train/loss"]) for step in steps)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {"offset", "return", "group_margin", "group_margin_after", "outcome_kept", "gated"} <= rows[0][
        "values"
    ].keys()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["group", "global"])
def test_two_processes_find_what_one_finds(scope, tmp_path):
    """Margins, draws and difficulty do not depend on how many processes share a step."""
    model = saved(tmp_path / "student", tiny_model(vocabulary=98, seed=1), turn_tokenizer())
    teacher = saved(tmp_path / "teacher", tiny_model(vocabulary=98, seed=2), turn_tokenizer())
    recipe = {
        "steps": 2,
        "student": {"model": model, "template": "plain"},
        "teacher": {"model": teacher, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": ROWS},
        "curriculum": {"kind": "difficulty", "responses": 3},
        "rollout": {"max_new_tokens": 6},
        "verifier": {"kind": "exact_match", "pattern": "([0-9])"},
        "shaping": [
            {"kind": "margin_shift", "statistic": "minmax", "scope": scope},
            {"kind": "outcome_balance", "scope": scope, "denominator": "kept"},
        ],
        "objective": "reverse_kl_sampled",
        "reduction": "sequence_mean",
        "batch": {"prompts": 4, "group": 6, "micro": 5},
        "evaluation": {"held_out": 2, "samples": 0},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "end_tokens": [1, *range(8, 90, 6)],
    }
    found = []
    for processes in (1, 2):
        folder = tmp_path / f"of{processes}"
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "output": str(folder)}))
        made = load_recipe(str(tmp_path / "recipe.yaml"))
        if processes == 1:
            execute(made, quiet=True)
        else:
            assert all(isinstance(answer, dict) for answer in together(made, {}))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([record for record in lines if "train/loss" in record])
    assert any(step["train/margin/mixed"] > 0 for step in found[0])
    ours = ("train/loss", "train/reward", "train/gradient_norm", "train/margin/", "train/balance/", "train/curriculum/")
    for one, two in zip(*found, strict=True):
        one, two = ({n: v for n, v in step.items() if n.startswith(ours)} for step in (one, two))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
