"""Lightning OPD: its identities and bounds by enumeration, its gate, and training without the teacher."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

import opd
from opd.api import execute
from opd.distributions import Categorical, Head, Sampled
from opd.divergences import Target, divergence_loss
from opd.divergences.lightning import Lightning
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.objectives.sft import SFT
from opd.plan import make_plan
from opd.recipe import parse_recipe
from opd.reduction import position_weights
from opd.rollouts.stored import StoredTrajectories
from opd.store import Targets
from opd.weights import weights_hash
from reproductions.enumeration import ACTIONS, PREFIXES, STATES, Gap, L, V, gradient_gap, table, taken, updates
from tests.checkpoints import assert_same_run, killed_at
from tests.conftest import save_tiny, trajectories_of
from tests.test_loop import models, recipe_for  # noqa: F401

# -- by enumeration: V = 4 ids, sequences of L = 4 tokens, one row of logits for each of the 85 prefixes ---------------


def gap_at(distance, other=0.5):
    """A student that started from `ref` and moved by `distance`, the teacher, and another one."""
    ref, teacher = table(0), table(1)
    return Gap(ref + distance * table(2), ref, teacher, teacher + other * table(5))


@pytest.mark.parametrize("distance", [0.0, 0.01, 0.1, 1.0])
def test_offline_gradient_is_the_online_one_less_a_covariance(distance):
    """T3.7: `off = on - Cov_ref[w, f]`, and T3.5: `|on - off| <= G sigma_A sqrt(chi2)`; both vanish at the start."""
    gap = gap_at(distance)
    torch.testing.assert_close(gap.off, gap.on - gap.covariance, atol=1e-9, rtol=1e-9)
    assert gap.size <= gap.bound + 1e-6
    assert (gap.size < 1e-9) == (distance == 0.0)


@pytest.mark.parametrize("distance", [0.0, 0.3])
def test_another_teacher_costs_at_most_its_distance(distance):
    """T3.8: the offline gradient of another teacher is off by at most `G sigma_Delta`, at the start too; where both
    sides hear it, online and offline differ by at most `G (sigma_A + sigma_Delta) sqrt(chi2)`."""
    gap = gap_at(distance)
    assert 1e-3 < gap.wrong <= gap.wrong_bound + 1e-6
    assert gap.mixed <= gap.mixed_bound + 1e-6
    assert gap_at(distance, other=0.0).wrong == 0.0


def test_the_experiments_gates_hold(tmp_path):
    found = gradient_gap(tmp_path, {}, distances=[0.01, 1.0], other=0.5)
    assert max(found[name] for name in ("t35_excess", "t37_error", "t38_excess", "gap_at_start")) <= 1e-6
    assert found["growth"] == pytest.approx(2.0, rel=0.01)


def test_the_operator_makes_that_update():
    """Through the loss operator that training uses, sequence by sequence, from stored log-probabilities."""
    theta, teacher = table(0) + 0.3 * table(2), table(1)
    states, n = STATES.flatten(), STATES.numel()
    weights = theta.float().T.contiguous().requires_grad_()
    loss = divergence_loss(
        Lightning(clamp=None),
        Categorical(torch.eye(len(theta))[states], Head(weights)),
        [Target(Sampled(taken(teacher).flatten().float()))],
        torch.ones(n),
        ACTIONS.flatten(),
        torch.full((len(ACTIONS),), L),
        per_example=True,
    )
    for y in (0, 77, 255):
        (grad,) = torch.autograd.grad(loss.per_example[y], weights, retain_graph=True)
        expected = -updates(theta, teacher)[y].view(len(PREFIXES), V)
        torch.testing.assert_close(grad.T.double(), expected, atol=2e-6, rtol=1e-5)


def test_k2_identity_and_the_clamp():
    """`-sg(clamp(A)) grad log q` is the gradient of half the square, and of its tangent beyond the bound."""
    log_q = torch.tensor([-0.5, -3.0, -14.0, -1.0], requires_grad=True)
    log_p = torch.tensor([-0.7, -1.0, -1.0, -13.5])
    lengths = torch.tensor([4])
    for clamp in (None, 10.0, 1.0):
        value, coefficient = Lightning(clamp=clamp).value_and_coefficient(log_p, log_q.detach(), lengths)
        advantage = log_p - log_q.detach()
        torch.testing.assert_close(coefficient, -(advantage if clamp is None else advantage.clamp(-clamp, clamp)))
        bound = clamp or 1e6
        expected = torch.nn.functional.huber_loss(log_q, log_p, reduction="none", delta=bound)
        torch.testing.assert_close(value, expected.detach())
        (grad,) = torch.autograd.grad(expected.sum(), log_q)
        torch.testing.assert_close(coefficient, grad)


def test_sum_and_means_over_sequences():
    trajectories = trajectories_of([2, 6])
    summed = position_weights(trajectories, "sequence_sum")
    assert summed.tolist() == [0.5] * 8
    assert position_weights(trajectories, "sequence_mean").tolist() == pytest.approx([1 / 4] * 2 + [1 / 12] * 6)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(models, tmp_path):  # noqa: F811
    """A recipe that samples and scores, and its store, complete."""
    recipe = recipe_for(models, tmp_path, rollout={"max_new_tokens": 10}, batch={"prompts": 8, "group": 1})
    store = sample(recipe, tmp_path / "store", quiet=True)
    for kind in ("sampled", "top_k", "exact"):
        score(recipe, store.path, kind, top_k=20, dtype="float32", name=kind, quiet=True)
    return recipe, store


def offline(recipe, store, objective="lightning", targets="sampled", **changes):
    """The recipe that trains on the store, with a teacher that was declared."""
    scored = Targets.open(store, targets).header.teacher["weights"]
    data = recipe.dump()
    data |= {
        "rollout": {"kind": "stored", "path": str(store.path), "max_new_tokens": 10},
        "teacher": {"kind": "stored", "path": str(store.path), "targets": targets, "sft_teacher": scored},
        "objective": objective,
        "output": str(store.path.parent / f"run-{targets}"),
        **changes,
    }
    return parse_recipe(data)


@pytest.mark.parametrize(
    ("objective", "targets"),
    [
        ("lightning", "sampled"),
        ("lightning", "exact"),
        ("reverse_kl", "exact"),
        ("reverse_kl", "top_k"),
        ("forward_kl", "top_k"),
        ({"kind": "jensen_shannon", "top_k": 8}, "exact"),
    ],
)
def test_training_on_a_store_teaches_without_the_teacher(made, models, objective, targets):  # noqa: F811
    recipe, store = made
    shutil.rmtree(models[1])  # nobody can ask it any more
    result = execute(offline(recipe, store, objective, targets, steps=40), quiet=True)
    steps = [r for r in result.history if "train/divergence" in r]
    assert steps[-1]["train/divergence"] < 0.5 * steps[0]["train/divergence"]
    assert steps[0]["train/teacher_tokens"] == 0.0
    assert steps[0]["train/sampled_tokens"] == 0.0
    assert steps[0]["train/drift"] == pytest.approx(1.0, abs=1e-3)
    assert result.before["drift"] == pytest.approx(1.0, abs=1e-3)
    assert result.after["drift_std"] > result.before["drift_std"]
    assert "reverse_kl" not in result.after
    if objective == "lightning":
        assert steps[-1]["train/advantage_size"] < steps[0]["train/advantage_size"]
        assert steps[0]["train/clamped"] == 0.0


def test_first_step_is_the_live_one(made):
    """Same tokens, same teacher: offline and online make the same first step."""
    recipe, store = made
    live = recipe.model_copy(update={"objective": [Lightning()], "steps": 1, "output": str(store.path.parent / "live")})
    stored = execute(offline(recipe, store, steps=1), quiet=True)
    online = execute(live, quiet=True)
    for (name, a), b in zip(stored.student.state_dict().items(), online.student.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)


def test_a_killed_run_on_a_store_goes_on_bit_for_bit(made, monkeypatch):
    recipe, store = made
    shared = {"steps": 6, "checkpoint": {"every": 2}}
    one, other = (
        offline(recipe, store, **shared, output=str(store.path.parent / name)) for name in ("undisturbed", "broken")
    )
    execute(one, quiet=True)
    killed_at(monkeypatch, other, 3)
    execute(other, resume=True, quiet=True)
    assert_same_run(one, other)


def read_by(monkeypatch):
    """Rows of the store that training reads from here on, by prompt and step."""
    call, rows = StoredTrajectories.__call__, {}

    def reading(self, request):
        found = call(self, request)
        for prompt, row in zip(found.prompts, found.stored.tolist(), strict=True) if request.stream >= 0 else ():
            rows.setdefault(prompt.id, {})[request.stream] = row
        return found

    monkeypatch.setattr(StoredTrajectories, "__call__", reading)
    return rows


@pytest.mark.parametrize("mixed", [False, True])
def test_each_visit_of_a_prompt_takes_its_next_trajectories(mixed, made, monkeypatch):
    """Through a run that is killed on the way: 16 prompts of 3 draws by 4 a step, 6 steps are one epoch and a half."""
    recipe, store = made
    store = sample(recipe, store.path, draws=3, quiet=True)
    score(recipe, store.path, "sampled", name="sampled", quiet=True)
    rollout = {"kind": "stored", "path": str(store.path), "max_new_tokens": 10}
    if mixed:
        rollout = {"kind": "mixture", "first": rollout, "second": rollout, "share": 0.5}
    changes = {"steps": 12, "batch": {"prompts": 4, "group": 1, "micro": 4}, "checkpoint": {"every": 2}}
    recipe = offline(recipe, store, **changes, rollout=rollout, self_test=False)
    rows = read_by(monkeypatch)
    killed_at(monkeypatch, recipe, 6)
    execute(recipe, resume=True, quiet=True)
    assert len(rows) == 16
    for name, steps in rows.items():
        read = [steps[step] for step in sorted(steps)]
        mine = store.rows_of(name)
        assert len(mine) == 3
        if mixed:
            # Two sources that each take turns: none of them reads one again before it has read all.
            assert all(read.count(row) <= 2 for row in mine)
        else:
            assert read == mine, "three visits, three trajectories, whatever their places in the batches"


def test_a_teacher_that_is_its_own_student_moves_nothing(made, models, tmp_path):  # noqa: F811
    recipe, store = made
    own = recipe.model_copy(update={"teacher": [recipe.teacher[0].model_copy(update={"model": models[0]})]})
    targets = score(own, store.path, "sampled", name="own", quiet=True)
    stored = [store.row(r) for r in range(store.header.rows)]
    behaviour = torch.cat([row.behaviour for row in stored])
    said = targets.answer(range(len(stored)), [len(row.actions) for row in stored]).log_probs
    torch.testing.assert_close(said, behaviour, atol=1e-5, rtol=1e-4)


# -- the gate ----------------------------------------------------------------------------------------------------------


def fine_tuned(recipe, teacher, output):
    """A student that was fine-tuned on what `teacher` wrote."""
    data = recipe.dump() | {"output": str(output), "steps": 2, "objective": "sft"}
    data["teacher"] = [{**data["teacher"][0], "model": teacher}]
    data["rollout"] = {"kind": "teacher", "max_new_tokens": 6}
    return execute(parse_recipe(data), quiet=True)


def test_the_gate_knows_the_teacher_of_the_fine_tuning(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, rollout={"max_new_tokens": 6}, steps=1)
    sft = fine_tuned(recipe, models[1], tmp_path / "sft")
    origin = json.loads((sft.directory / "student" / "opd.json").read_text())
    data = recipe.dump()
    data["student"]["model"] = str(sft.directory / "student")
    recipe = parse_recipe(data)
    other = save_tiny(tmp_path / "other", seed=9, vocabulary=72)
    store = sample(recipe, tmp_path / "store", quiet=True)
    right = score(recipe, store.path, name="right", quiet=True)
    assert origin["teachers"] == [right.header.teacher["weights"]]
    data["teacher"][0]["model"] = other
    score(parse_recipe(data), store.path, name="wrong", quiet=True)

    runs = itertools.count()

    def train(targets, **teacher):
        block = {"kind": "stored", "path": str(store.path), "targets": targets, **teacher}
        rollout = {"kind": "stored", "path": str(store.path)}
        output = str(tmp_path / f"run-{next(runs)}")
        changes = {"teacher": block, "rollout": rollout, "objective": "lightning", "output": output}
        return execute(parse_recipe({**data, **changes}), quiet=True)

    done = train("right")
    # The gate goes on to whoever starts from this student, and through a run that has no teacher.
    assert json.loads((done.directory / "student" / "opd.json").read_text())["teachers"] == origin["teachers"]
    with pytest.raises(opd.IncompatibleError, match=r"fine-tuned by sha256:.*consistency: ignored"):
        train("wrong")
    assert train("wrong", consistency="ignored").summary["steps"] == 1
    (sft.directory / "student" / "opd.json").unlink()
    with pytest.raises(opd.IncompatibleError, match="does not say which teacher"):
        train("right")
    assert train("right", sft_teacher=origin["teachers"][0]).summary["steps"] == 1


def test_what_does_not_fit_the_store_is_refused_at_start(made, tmp_path):
    recipe, store = made

    def refused(match, **changes):
        with pytest.raises(opd.OpdError, match=match):
            execute(offline(recipe, store, **changes), quiet=True, overwrite=True)

    refused("scored at temperature 1", temperature=0.5)
    refused("another end token", end_tokens=[0, 5])
    refused("own samples", objective="reverse_kl_sampled")
    refused("answers sampled or categorical|needs a teacher that answers", objective="reverse_kl")
    refused("answers categorical or sampled", targets="top_k")
    refused("no targets 'nobody'", teacher={"kind": "stored", "path": str(store.path), "targets": "nobody"})
    refused("say which: teacher.targets", teacher={"kind": "stored", "path": str(store.path)})
    refused("no store at", rollout={"kind": "stored", "path": str(tmp_path / "nowhere")})
    refused("take rollout: stored", rollout={"kind": "student", "max_new_tokens": 4})
    refused("has other tokens than in", prompts={"kind": "inline", "prompts": list("abcdefgh")})
    rows = [{"id": f"n{i}", "prompt": "1+1="} for i in range(8)]
    refused("has no trajectory", prompts={"kind": "inline", "prompts": rows})
    student = {**recipe.dump()["student"]}
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(student["model"], tokenizer)
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace('"7": 10', '"!": 10'))
    refused("another tokenizer", student={**student, "tokenizer": str(tokenizer)})
    store.shard_path(0).with_name("000000.safetensors.sha256").unlink()
    refused("opd rollout again")


def test_the_plan_holds_no_teacher(made):
    recipe, store = made
    plan = make_plan(offline(recipe, store))
    assert not [part for part in plan.memory if "teacher" in part]
    assert plan.teraflops["teachers"] == plan.teraflops["rollout"] == 0.0
    assert any("read from the disk, kind sampled" in note for note in plan.notes)
    with pytest.raises(opd.IncompatibleError, match="the store answers 'sampled'"):
        make_plan(offline(recipe, store, objective="reverse_kl"))
    shutil.rmtree(store.path)
    notes = make_plan(offline_without(recipe, store)).notes
    assert any("not on this machine" in note for note in notes)


def offline_without(recipe, store):
    """The recipe of `offline` before there is a store."""
    block = {"kind": "stored", "path": str(store.path)}
    return parse_recipe(recipe.dump() | {"rollout": block, "teacher": block, "objective": "lightning"})


def test_the_hash_of_weights_is_theirs_not_their_files(models, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[0])
    same = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    same.save_pretrained(tmp_path / "halved", max_shard_size="20KB")
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "halved", dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "halved", dtype=torch.float32)
    assert weights_hash(halved) == weights_hash(again)
    assert weights_hash(model) != weights_hash(again)


def test_stored_texts_of_a_teacher_are_a_store_too(models, tmp_path):  # noqa: F811
    """`opd rollout` with the teacher as the writer makes fine-tuning data; the student remembers whose they were."""
    recipe = recipe_for(models, tmp_path, steps=2)
    data = {**recipe.dump(), "rollout": {"kind": "teacher", "max_new_tokens": 6}}
    store = sample(parse_recipe(data), tmp_path / "texts", quiet=True)
    assert store.header.authors == ["teacher"]
    data |= {"teacher": [], "objective": "sft", "rollout": {"kind": "stored", "path": str(store.path)}}
    result = execute(parse_recipe(data), quiet=True)
    origin = json.loads((result.directory / "student" / "opd.json").read_text())
    assert origin["teachers"] == [store.header.writers[0]["weights"]]
    assert "drift" not in result.after


def test_advantages_are_logged_for_every_kind_of_answer(student, prompts):
    trajectories = trajectories_of([3, 4])
    mine = student(trajectories)
    weights = position_weights(trajectories, "token_mean")
    target = replace(mine.detach(), hidden=mine.hidden.detach() + 0.1)
    full = Lightning(clamp=0.01)(mine, [Target(target)], weights, trajectories)
    small = Lightning(clamp=0.01)(mine, [Target(Sampled.of(target, trajectories.actions))], weights, trajectories)
    own = SFT()(mine, [], weights, trajectories)
    expected = Sampled.of(target, trajectories.actions).log_probs - own.log_probs
    for loss in (full, small):
        torch.testing.assert_close(loss.measured["advantage"], expected, atol=1e-5, rtol=1e-4)
        assert loss.measured["clamped"].tolist() == (expected.abs() > 0.01).float().tolist()
    torch.testing.assert_close(full.total, small.total)
