"""A drafter trained on its own blocks, through the whole loop; and its two objectives by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import opd
from opd.api import execute, measure
from opd.assembly import assemble
from opd.distributions import Categorical, Head, Target
from opd.divergences.forward_kl import ForwardKL
from opd.divergences.of_blocks import Accepted, Rejected
from opd.divergences.reverse_kl import ReverseKL
from opd.drafting.base import Blocks
from opd.errors import IncompatibleError, RecipeError
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.loop import train
from opd.monitor import Monitor
from opd.plan import DrafterPlan, make_plan
from opd.planning import saved_bytes
from opd.recipe import load_recipe, parse_recipe
from tests.conftest import save_tiny, trajectories_of
from tests.drafters import LAYERS
from tests.test_gpu import on_each_device

TEXTS = [f"{a}+{b}=" for a in range(1, 6) for b in range(1, 5)]
CHAIN = {"kind": "chain", "proposals": 4}
BLOCK = {"kind": "block", "layers": 2, "block": 5, "mask_token": 2}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("target"), seed=1, layers=LAYERS, initializer_range=0.15)


def recipe_for(target, tmp_path, drafter=CHAIN, **changes):
    student = {"kind": "draft", "target": {"model": target, "template": "plain"}, "drafter": drafter}
    data = {
        "output": str(tmp_path / "run"),
        "steps": 3,
        "student": student,
        "teacher": "target",
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "rollout": {"kind": "speculative", "max_new_tokens": 16},
        "objective": [{"kind": "accepted", "weight": 0.5}, {"kind": "rejected", "weight": 0.5}],
        "batch": {"prompts": 6, "micro": 4},
        "update": {"learning_rate": 1e-2},
        "evaluation": {"held_out": 4, "samples": 1},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    data["teacher"] = {"kind": data["teacher"]} if isinstance(data["teacher"], str) else data["teacher"]
    return parse_recipe(data)


def build(recipe, tmp_path):
    (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    return assemble(recipe, Monitor(tmp_path / "run", quiet=True))


# The objectives: two answers with the blocks of the specification's example, K = 3.

ACCEPTED = [[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
REJECTED = [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
CORRECTED = [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


def blocks(accepted=ACCEPTED, rejected=REJECTED, corrected=CORRECTED, lengths=(6, 6)):
    made = trajectories_of(list(lengths))
    columns = {
        name: torch.tensor(value).flatten().bool()
        for name, value in (("accepted", accepted), ("rejected", rejected), ("corrected", corrected))
    }
    columns["slot"] = torch.tensor([1, 2, 3] * len(accepted))
    columns["verified"] = torch.where(columns["accepted"], 0, torch.where(columns["corrected"], 1, -1))
    learn = columns["accepted"] | columns["rejected"]
    return replace(made, columns=columns, learn=learn)


def whole(x):
    return x


def test_each_stream_has_its_own_denominator():
    made = blocks()
    weights = Accepted().position_weights(made, "token_mean", whole)
    torch.testing.assert_close(weights.view(4, 3), torch.tensor(ACCEPTED) / 6)
    weights = Rejected().position_weights(made, "token_mean", whole)
    share = torch.tensor([[0, 0, 0.64], [1, 0.8, 0.64], [0, 0, 0], [0, 0, 0]])
    assert float(share.sum()) == pytest.approx(3.08)
    torch.testing.assert_close(weights.view(4, 3), share / 3.08)
    plain = Rejected(decay=1.0, weight=0.5).position_weights(made, "token_mean", whole)
    torch.testing.assert_close(plain.view(4, 3), 0.5 * torch.tensor(REJECTED) / 4.0)
    both = Accepted(correction=True).position_weights(made, "token_mean", whole)
    torch.testing.assert_close(both.view(4, 3), (torch.tensor(ACCEPTED) + torch.tensor(CORRECTED)) / 8)


def test_denominators_of_other_reductions_and_of_several_processes():
    made = blocks()
    share = torch.tensor([[0, 0, 0.64], [1, 0.8, 0.64], [0, 0, 0], [0, 0, 0]])
    # All rejected slots are the first answer's, which alone counts.
    weights = Rejected().position_weights(made, "sequence_mean", whole)
    torch.testing.assert_close(weights.view(4, 3), share / 3.08)
    weights = Accepted().position_weights(made, "sequence_mean", whole)
    torch.testing.assert_close(weights.view(2, 6).sum(1), torch.tensor([0.5, 0.5]))
    weights = Rejected().position_weights(made, "sequence_sum", whole)
    torch.testing.assert_close(weights.view(4, 3), share)
    # Another process has as much.
    weights = Rejected().position_weights(made, "token_mean", lambda x: 2 * x)
    torch.testing.assert_close(weights.view(4, 3), share / 6.16)


def test_a_stream_without_a_slot_adds_nothing():
    none = [[0, 0, 0]] * 4
    made = blocks(rejected=none, corrected=none)
    assert not Rejected().position_weights(made, "token_mean", whole).any()
    made = blocks(accepted=none)
    assert not Accepted().position_weights(made, "token_mean", whole).any()


def test_a_slot_that_is_not_learnt_is_in_neither_sum_nor_denominator():
    made = blocks()
    made = replace(made, learn=made.learn & (torch.arange(12) != 3))
    weights = Rejected().position_weights(made, "token_mean", whole)
    assert float(weights[3]) == 0
    assert float(weights[4]) == pytest.approx(0.8 / 2.08)


@pytest.mark.parametrize(
    ("objective", "value", "gradient"),
    [
        (Accepted(), 0.1308, -0.25),
        (Accepted(kl="reverse_kl"), 0.1438, -0.2747),
        (Rejected(), 0.1438, -0.2747),
        (Rejected(kl="forward_kl"), 0.1308, -0.25),
    ],
)
def test_directions_by_hand(objective, value, gradient):
    """Of p = (3/4, 1/4) and q = (1/2, 1/2): value, and gradient in the first logit."""
    logits, p = torch.zeros(12, 2, requires_grad=True), torch.tensor([0.75, 0.25]).log().expand(12, 2)
    one = Head(torch.eye(2))
    made = blocks()
    made = replace(made, actions=made.actions % 2)
    weights = objective.position_weights(made, "token_mean", whole)
    loss = objective(Categorical(logits, one), [Target(Categorical(p, one))], weights, made)
    assert float(loss.total.detach()) == pytest.approx(value, abs=1e-4)
    loss.total.backward()
    torch.testing.assert_close(logits.grad[:, 0], weights * gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("objective", "values", "slopes"),
    [
        # At accepted slots stands token 0, at corrected ones token 1: of p 3/4 and 1/4, of q 1/2 both.
        (Accepted(estimator="token"), {0: 0.1308}, {0: -0.5}),
        (Accepted(estimator="token", correction=True), {0: 0.1308, 2: 0.1308}, {0: -0.5, 2: 0.5}),
        (Accepted(estimator="token", kl="reverse_kl"), {0: 0.0945}, {0: -0.5}),
        (Rejected(estimator="token"), {2: 0.1931, 3: 0.1931}, {2: 0.5, 3: 0.5}),
    ],
)
def test_one_token_of_a_slot_by_hand(objective, values, slopes):
    """`slopes` are in that token's log-probability; a logit of two gets half of it."""
    logits, p = torch.zeros(12, 2, requires_grad=True), torch.tensor([0.75, 0.25]).log().expand(12, 2)
    one = Head(torch.eye(2))
    made = replace(blocks(), actions=torch.ones(12, dtype=torch.int64))
    ones = torch.ones(12)
    loss = objective(Categorical(logits, one), [Target(Categorical(p, one))], ones, made)
    assert {i: float(loss.values[i]) for i in values} == pytest.approx(values, abs=1e-4)
    loss.total.backward()
    for i, slope in slopes.items():
        token = int(made.columns["verified"][i]) if isinstance(objective, Accepted) else 1
        assert float(logits.grad[i, token]) == pytest.approx(slope * 0.5, abs=1e-4)
    assert not loss.values[objective.slots(made.columns) == 0].any()


def test_one_token_has_bounds():
    """What a drafter, or its target, finds nearly impossible or nearly sure counts up to a bound."""
    logits = torch.tensor([[0.0, 40.0]] * 12, requires_grad=True)
    p = torch.tensor([[40.0, 0.0]] * 12).log_softmax(-1)
    one, made = Head(torch.eye(2)), replace(blocks(), actions=torch.zeros(12, dtype=torch.int64))
    for objective in (Accepted(estimator="token"), Rejected(estimator="token")):
        loss = objective(Categorical(logits, one), [Target(Categorical(p, one))], torch.ones(12), made)
        assert 0 < float(loss.values.max()) <= 10
        loss.total.backward()
        assert logits.grad.isfinite().all()
        logits.grad = None


def test_what_they_descend_is_said():
    assert (Accepted().descends, Rejected().descends) == ("forward_kl", "reverse_kl")
    log_p, log_q = torch.randn(2, 5, 7).log_softmax(-1)
    torch.testing.assert_close(Accepted().exact(log_p, log_q), ForwardKL().exact(log_p, log_q))
    torch.testing.assert_close(Rejected().exact(log_p, log_q), ReverseKL().exact(log_p, log_q))


def test_trajectories_without_blocks_are_refused():
    with pytest.raises(IncompatibleError, match=r"'accepted'.*drafts none.*speculative"):
        Accepted().position_weights(trajectories_of([3]), "token_mean", whole)


# Runs.


@pytest.mark.parametrize("drafter", [CHAIN, {**CHAIN, "vocabulary": list(range(3, 40))}, BLOCK])
def test_a_drafter_learns_from_its_target(target, tmp_path, drafter):
    result = execute(recipe_for(target, tmp_path, drafter, steps=25), quiet=True)
    for name in ("forward_kl", "reverse_kl"):
        assert result.after[name] < 0.6 * result.before[name]
    steps = [r for r in result.history if "train/loss" in r]
    assert len(steps) == 25
    for record in steps:
        assert record["train/acceptance_length"] == pytest.approx(1 + record["train/accepted_proposals"], abs=0.3)
        assert {"train/objective/accepted", "train/objective/rejected"} & record.keys()
    assert 1 <= result.after["acceptance_length"] <= 5
    assert isinstance(result.student, torch.nn.Module)
    rows = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        assert len(row["tokens"]) == len(row["values"]["slot"]) == len(row["values"]["accepted"])
        assert len(row["tokens"]) % 4 == 0
        assert row["completion"]
        # The first token comes from reading the prompt; each block adds what stood and the target's own.
        at, added = 0, []
        for block in row["blocks"]:
            added += row["tokens"][at : at + block["accepted"]] + ([block["own"]] if block["own"] is not None else [])
            at += block["proposals"]
        assert at == len(row["tokens"])
        # A decoded answer is without its end token.
        assert row["completion"].endswith(("".join(added), "".join(added[:-1])))
    last = steps[-1]
    at = [last[f"train/accepted_at/{k}"] for k in range(1, 5)]
    assert at == sorted(at, reverse=True)
    assert sum(at) == pytest.approx(last["train/accepted_proposals"])
    assert sum(result.after[f"accepted_at/{k}"] for k in range(1, 5)) == pytest.approx(
        result.after["accepted_proposals"]
    )
    summary = json.loads((result.directory / "summary.json").read_text())
    assert "lacking" not in summary
    assert "acceptance_length" in summary["after"]


def test_a_saved_drafter_goes_on_as_it_was(target, tmp_path):
    first = execute(recipe_for(target, tmp_path / "a"), quiet=True)
    folder = str(first.directory / "student")
    student = {"kind": "draft", "target": {"model": target, "template": "plain"}, "model": folder, "drafter": None}
    second = execute(recipe_for(target, tmp_path / "b", student=student), quiet=True)
    assert second.before == pytest.approx(first.after, rel=1e-4)
    again = measure(recipe_for(target, tmp_path / "c", student={"model": folder})).metrics
    assert again == pytest.approx(first.after, rel=1e-4), "the recipe of the run itself, as `opd eval` has it"
    longer = {**CHAIN, "proposals": 5}
    for drafter, said in ((longer, "proposals is 5, .* has 4"), (BLOCK, "kind is block, .* has chain")):
        with pytest.raises(opd.OpdError, match=said):
            build(recipe_for(target, tmp_path / "d", drafter, student={"model": folder}), tmp_path / "d")
    weights = load_file(first.directory / "student" / "model.safetensors")
    assert weights["embed_tokens.weight"].shape == (64, 32)


def test_a_live_drafter_is_trained_in_place(target, tmp_path):
    first = execute(recipe_for(target, tmp_path / "a"), quiet=True)
    before = {name: p.detach().clone() for name, p in first.student.named_parameters()}
    recipe = recipe_for(target, tmp_path / "b").dump()
    result = opd.distill(
        {"model": first.student, "target": recipe["student"]["target"]},
        {"kind": "target"},
        TEXTS,
        quiet=True,
        **{k: recipe[k] for k in ("rollout", "objective", "batch", "update", "evaluation", "tracking", "hardware")},
        steps=2,
        output=str(tmp_path / "b"),
    )
    assert result.student is first.student
    assert any(bool((p != before[name]).any()) for name, p in result.student.named_parameters())


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(target, tmp_path):
    norms = []
    for micro in (1, 2, 6):
        result = execute(recipe_for(target, tmp_path / str(micro), steps=1, batch={"micro": micro}), quiet=True)
        norms.append(result.history[1]["train/gradient_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_the_target_is_not_asked_again_and_does_not_move(target, tmp_path, monkeypatch):
    run = build(recipe_for(target, tmp_path), tmp_path)
    before = run.student.fingerprint()
    monkeypatch.setattr(type(run.teachers[0]), "answer", None)
    train(run)
    assert run.student.fingerprint() == before
    state = run.student.state_dict()
    assert state.keys() == dict(run.student.drafter.named_parameters()).keys(), "checkpoints hold the drafter alone"


def test_a_state_is_gone_on_from(target, tmp_path):
    whole_run = build(recipe_for(target, tmp_path / "a", steps=4), tmp_path / "a")
    train(whole_run)
    half = build(recipe_for(target, tmp_path / "b", steps=4), tmp_path / "b")
    half.watch.read = lambda run, step, measured: setattr(run.watch, "ended_by", "enough" if step == 2 else None)
    train(half)
    assert half.step == 2
    rest = build(recipe_for(target, tmp_path / "c", steps=4), tmp_path / "c")
    rest.restore(half.state())
    train(rest)
    other = rest.student.state_dict()
    for name, one in whole_run.student.state_dict().items():
        torch.testing.assert_close(one, other[name], atol=1e-6, rtol=1e-5, msg=name)


def test_held_out_texts_have_a_temperature_of_their_own(target, tmp_path):
    texts = []
    for i, temperature in enumerate((None, 0.0, 1.0)):
        recipe = recipe_for(target, tmp_path / str(i), evaluation={"temperature": temperature, "max_new_tokens": 9})
        run = build(recipe, tmp_path / str(i))
        made = run.sampler(run.at(0))(run.held_out, 1, 9, -1)
        texts.append(run.student.outcomes(made))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("drafter", [{**CHAIN, "vocabulary": list(range(3, 40))}, BLOCK])
def test_a_run_by_one_token_of_each_slot(target, tmp_path, drafter):
    objective = [
        {"kind": "accepted", "estimator": "token", "correction": True, "weight": 0.5},
        {"kind": "rejected", "estimator": "token", "weight": 0.5},
    ]
    recipe = recipe_for(target, tmp_path, drafter, objective=objective, rollout={"text_temperature": 1.0}, steps=10)
    result = execute(recipe, quiet=True)
    assert result.after["reverse_kl"] < result.before["reverse_kl"]


def test_groups_of_drawn_texts(target, tmp_path):
    rollout = {"text_temperature": 1.0, "proposing": "drawn", "proposals": 3}
    run = build(recipe_for(target, tmp_path, rollout=rollout, batch={"group": 3}), tmp_path)
    made = run.rollout(run.at(0).request(run.course.next(0, {}, None).prompts, stream=0))
    assert len(set(run.student.outcomes(made)[:3])) == 3
    assert int(made.columns["slot"].max()) == 3
    train(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"kind": "student"}}, r"rollout 'student' beside student.kind draft.*take speculative"),
        ({"rollout": {"kind": "stored", "path": "x"}}, r"'stored' beside student.kind draft.*kind: anchored, texts"),
        ({"rollout": {"kind": "data"}}, r"'data' beside student.kind draft.*kind: anchored, texts"),
        ({"teacher": {"kind": "self"}}, r"teacher 'self' beside student.kind draft.*teacher: target"),
        ({"teacher": {"kind": "local", "model": "TARGET", "template": "plain"}}, r"teacher 'local'.*teacher: target"),
        ({"teacher": {"kind": "served", "url": "http://127.0.0.1:1"}}, r"teacher 'served'.*teacher: target"),
        ({"teacher": []}, r"key 'teacher' is required: .* beside student.kind draft write teacher: target$"),
        ({"rollout": {"proposals": 9}, "drafter": BLOCK}, r"rollout.proposals is 9.*4 at most"),
        ({"rollout": {"proposing": "drawn", "text_temperature": 1.0}, "drafter": BLOCK}, r"'drawn'.*likeliest"),
        ({"student": {"kind": "causal_lm", "model": "TARGET", "template": "plain"}}, r"student is none"),
        ({"evaluation": {"greedy": True}}, r"greedy"),
        ({"student": {"drafter": None}}, r"model, the folder of a drafter, or drafter"),
        ({"student": {"model": "x"}}, r"'x' holds no drafter: there is no such folder here; give a drafter's folder"),
        ({"student": {"model": "x", "drafter": None}}, r"'x' holds no drafter"),
        ({"objective": [{"kind": "rejected", "decay": 0}]}, r"decay"),
        ({"drafter": {**CHAIN, "vocabulary": [5]}}, r"vocabulary is one id"),
        ({"evaluation": {"max_new_tokens": 1}}, r"evaluation.max_new_tokens is 1"),
    ],
)
def test_mistakes_are_told_of(target, tmp_path, changes, said):
    changes = json.loads(json.dumps(changes).replace('"TARGET"', json.dumps(target)))

    def assembled():
        if changes.get("student", {}).get("kind") != "causal_lm":
            return build(recipe_for(target, tmp_path, **changes), tmp_path)
        data = recipe_for(target, tmp_path).dump() | changes | {"evaluation": {"held_out": 4}, "teacher": []}
        return build(parse_recipe(data | {"objective": "sft"}), tmp_path)

    with pytest.raises(opd.OpdError, match=said):
        assembled()


def test_a_recipe_that_mixes_is_refused_before_anything_is_loaded(target, tmp_path):
    for changes in ({"teacher": {"kind": "self"}}, {"rollout": {"kind": "student"}}):
        with pytest.raises(RecipeError, match=r"beside student.kind draft"):
            recipe_for(target, tmp_path, **changes)


def test_a_runs_folder_in_the_place_of_its_drafter_is_told_of(target, tmp_path):
    (tmp_path / "run/student").mkdir(parents=True)
    (tmp_path / "run/student/config.json").write_text("{}")
    with pytest.raises(opd.ModelError, match=r"no config.json is in it; did you mean '.*run/student'\?"):
        build(recipe_for(target, tmp_path, student={"model": str(tmp_path / "run")}), tmp_path)


def test_a_plan_refuses_texts_without_blocks(target, tmp_path):
    mixture = {"kind": "mixture", "first": {"kind": "speculative"}, "second": {"kind": "student"}}
    recipe = parse_recipe(recipe_for(target, tmp_path).dump() | {"rollout": mixture})
    with pytest.raises(IncompatibleError, match=r"rollout 'student' proposes no blocks.*speculative, or anchored"):
        make_plan(recipe)


def test_a_text_beyond_the_targets_positions_is_told_of_as_the_targets(target, tmp_path):
    run = build(recipe_for(target, tmp_path), tmp_path)
    (said,) = run.student.check_lengths(run.held_out, 300)
    assert said.startswith("the target was made for 256 positions")


def test_objectives_on_blocks_need_a_rollout_that_drafts(target, tmp_path):
    data = {
        "output": str(tmp_path / "run"),
        "student": {"model": target, "template": "plain"},
        "teacher": {"model": target, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "rollout": {"max_new_tokens": 8},
        "objective": "accepted",
        "evaluation": {"held_out": 4},
        "hardware": {"device": "cpu", "threads": 1},
        "tracking": {"trackers": []},
    }
    with pytest.raises(IncompatibleError, match="drafts none"):
        build(parse_recipe(data), tmp_path)


def test_commands_that_know_no_drafters_say_so(target, tmp_path):
    recipe = recipe_for(target, tmp_path)
    store = sample(recipe, tmp_path / "store", quiet=True)
    with pytest.raises(opd.OpdError, match="no frozen model; opd score takes kinds local,"):
        score(recipe, store.path, quiet=True)


@pytest.mark.parametrize("drafter", [CHAIN, {**CHAIN, "vocabulary": list(range(3, 40))}, BLOCK])
def test_a_plan_counts_what_a_step_holds(target, tmp_path, drafter):
    recipe = recipe_for(target, tmp_path, drafter)
    plan = make_plan(recipe)
    assert isinstance(plan, DrafterPlan)
    student = build(recipe, tmp_path).student
    count = sum(p.numel() for p in student.drafter.parameters())
    assert plan.drafter.parameters == plan.drafter.trainable == count
    assert plan.memory["drafter weights"] == 4 * count
    width, answers, texts = student.target.outline.width, 6, 6 * (plan.prompt_tokens + 16)
    assert plan.memory["features of the answers"] == 4 * texts * len(student.drafter.taps) * width
    assert plan.memory["target's hidden states at the slots"] == 4 * answers * 16 * 4 * width
    assert plan.peak == sum(plan.memory.values()) == plan.peaks[1] > plan.peaks[2] > plan.peaks[4]
    assert plan.as_dict()["slots_per_step"] == answers * 16 * 4
    assert dict(plan.sections())["memory at the peak of a step"][-1][0] == "sum at an acceptance length of 4"


def test_a_plan_counts_activations_as_autograd_keeps_them(target, tmp_path):
    recipe = recipe_for(target, tmp_path, BLOCK, rollout={"max_new_tokens": 16, "kind": "speculative"})
    plan = make_plan(recipe)
    student = build(recipe, tmp_path).student
    rows, blocks, length = 4, 16, plan.prompt_tokens + 16
    outline = student.target.outline
    told = Blocks(
        torch.randn(rows, length, len(student.drafter.taps) * outline.width),
        torch.ones(rows, length + 1, dtype=torch.int64),
        torch.arange(1, blocks + 1).expand(rows, blocks),
        torch.ones(rows, blocks, 4, dtype=torch.int64),
        torch.ones(rows, blocks, 4, dtype=torch.bool),
    )
    kept = saved_bytes(student.drafter, lambda: student.drafter(told, student.target.embed))
    scores = rows * outline.heads * blocks * 5 * (length + 5) * 16
    assert plan.memory["activations of a micro-batch"] == pytest.approx(kept + scores, rel=0.1)


@pytest.mark.parametrize("name", ["draft_opd_qwen3_4b", "draft_opd_qwen3_8b"])
def test_recipes_of_the_paper_are_planned_without_a_network(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = make_plan(load_recipe(name))
    assert plan.proposals == 15
    assert any("not at hand" in note for note in plan.notes)


@on_each_device
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("drafter", [CHAIN, BLOCK])
def test_a_run_on_each_device_of_a_target_in_each_dtype(target, tmp_path, drafter, dtype, device):
    block = {"target": {"model": target, "template": "plain", "dtype": dtype}}
    rollout = {"text_temperature": 1.0}
    recipe = recipe_for(target, tmp_path, drafter, student=block, rollout=rollout, hardware={"device": device})
    result = execute(recipe, quiet=True)
    assert result.after["reverse_kl"] < result.before["reverse_kl"]
