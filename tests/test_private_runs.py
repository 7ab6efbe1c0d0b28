"""Private runs: draws, noise, what is spent and never forgotten, and what a private recipe may not say."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from accelerate.tracking import GeneralTracker

import opd
from opd.api import execute
from opd.curricula import NobodyToAsk
from opd.curricula.poisson import Poisson
from opd.errors import DataError, OpdError, RecipeError, RunError
from opd.jobs.sampling import sample
from opd.plan import make_plan
from opd.privacy import Part, Spending, epsilon_of, noise_for, steps_within
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.recipe.private import check_live_trackers
from opd.updates.per_example import Batched, NotApartError
from tests.conftest import character_tokenizer, save_tiny, tiny_model

ROWS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(1, 8) for b in range(1, 9)]
PUBLIC = {"kind": "inline", "prompts": ["1-1=", "2-1="]}


def settings(folder, **changes):
    update = {
        "kind": "differentially_private",
        "noise_multiplier": 2.0,
        "accountant": "rdp",
        **changes.pop("update", {}),
    }
    return {
        "steps": 2,
        "curriculum": "poisson",
        "update": update,
        "objective": "jensen_shannon",
        "reduction": "sequence_mean",
        "batch": {"prompts": 4, "micro": 4},
        "rollout": {"max_new_tokens": 4},
        "end_tokens": [0],
        "evaluation": {"prompts": PUBLIC, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "self_test": False,
        "output": str(folder),
        **changes,
    }


def saved(folder):
    """Student and teacher as blocks of a recipe."""
    names = enumerate(("student", "teacher"), 1)
    return [{"model": save_tiny(folder / name, seed=i), "template": "plain"} for i, name in names]


def trained(folder, **changes):
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    before = [p.detach().clone() for p in student.parameters()]
    made = settings(folder, **changes)
    result = opd.distill(student, teacher, ROWS, tokenizer=character_tokenizer(), quiet=True, **made)
    return result, [p.detach() - b for p, b in zip(student.parameters(), before, strict=True)]


def steps_of(result):
    return [record for record in result.history if "train/loss" in record]


@pytest.mark.parametrize("micro", [1, 8])
def test_noise_comes_once_a_step_over_the_expected_number_whatever_was_drawn(tmp_path, micro):
    """With a bound of nearly nothing only the noise moves the weights: six steps of it, of which some drew nobody."""
    update = {"noise_multiplier": 1000.0, "clip_norm": 1e-6, "optimizer": "sgd", "learning_rate": 1.0}
    batch = {"prompts": 2, "micro": micro}
    result, moved = trained(tmp_path, steps=6, batch=batch, update=update, curriculum={"kind": "poisson", "seed": 5})
    drawn = [record["train/examples"] for record in steps_of(result)]
    assert 0 in drawn
    assert max(drawn) > 1
    numbers = torch.cat([m.flatten() for m in moved])
    deviation = math.sqrt(6) * 1000.0 * 1e-6 / 2
    assert float(numbers.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(numbers.mean())) < 5 * deviation / len(numbers) ** 0.5
    assert result.summary["privacy"]["steps"] == 6


def test_noise_and_draws_are_secret_unless_a_seed_is_given(tmp_path):
    drawn = {"kind": "poisson", "seed": 1}
    moved = [trained(tmp_path / str(i), curriculum=drawn)[1] for i in range(2)]
    assert not torch.equal(moved[0][0], moved[1][0])
    moved = [trained(tmp_path / f"seed{i}", curriculum=drawn, update={"seed": 3})[1] for i in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
    assert not torch.equal(*(trained(tmp_path / f"other{i}", update={"seed": i})[1][0] for i in range(2)))


def test_draws_are_of_each_prompt_by_itself():
    prompts = [Prompt(f"p{i}", {"prompt": str(i)}) for i in range(50)]
    course = Poisson(seed=2).build(prompts, 5, None)
    draws = [course.next(step, {}, NobodyToAsk()).prompts for step in range(2000)]
    counts = torch.tensor([sum(p is prompt for draw in draws for p in draw) for prompt in prompts]).float()
    sizes = torch.tensor([float(len(draw)) for draw in draws])
    assert float(sizes.mean()) == pytest.approx(5, abs=0.2)
    assert float(sizes.var()) == pytest.approx(50 * 0.1 * 0.9, rel=0.15)
    assert float(counts.min()) > 130
    assert float(counts.max()) < 270
    assert all(len({p.id for p in draw}) == len(draw) for draw in draws)
    secret = Poisson().build(prompts, 25, None)
    ahead = secret.next(1, {}, NobodyToAsk()).prompts
    assert secret.next(1, {}, NobodyToAsk()).prompts == ahead, "begun ahead, and the same in its turn"
    assert Poisson().build(prompts, 25, None).next(1, {}, NobodyToAsk()).prompts != ahead
    assert secret.state_dict() == {}
    with pytest.raises(DataError, match=r"batch.prompts is 51"):
        Poisson().build(prompts, 51, None)


SETTINGS = [
    # noise, rate, steps, delta; those of the specification's table, and some odd ones.
    (2.173, 4096 / 200_000, 1953, 1 / 200_000),
    (1.232, 1024 / 200_000, 7812, 1 / 200_000),
    (0.809, 4096 / 1_900_000, 2319, 1 / 1_900_000),
    (1.300, 512 / 20_000, 400, 1 / 20_000),
    (1.975, 1024 / 20_000, 300, 1 / 20_000),
    (3.051, 2048 / 20_000, 200, 1 / 20_000),
    (3.433, 1024 / 20_000, 300, 1 / 20_000),
    (0.777, 0.0133, 101, 3e-6),
    (5.37, 0.61, 77, 1e-5),
    (1.0, 1.0, 3, 1e-5),
    (11.3, 0.0917, 463, 2.5e-7),
    (0.53, 0.0021, 1, 1e-4),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SETTINGS)
def test_epsilon_is_that_of_another_library(noise, rate, steps, delta):
    pytest.importorskip("opacus")
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting import pld, rdp

    event = accounting.GaussianDpEvent(noise)
    event = event if rate == 1 else accounting.PoissonSampledDpEvent(rate, event)
    wanted = {"rdp": rdp.RdpAccountant(), "prv": pld.PLDAccountant()}
    for kind, accountant in wanted.items():
        accountant.compose(event, steps)
        found = epsilon_of([Part(noise, rate, steps)], delta, kind)
        exact = accountant.get_epsilon(delta)
        # Both are bounds from above; PRV's by its own allowance.
        assert found == pytest.approx(exact, rel=2e-3, abs=0.011 if kind == "prv" else 1e-4)
    assert epsilon_of([Part(noise, rate, steps)], delta, "pld") == pytest.approx(wanted["prv"].get_epsilon(delta))


@pytest.mark.parametrize(
    ("records", "expected", "steps", "sigma"), [(20_000, 512, 400, 1.300), (20_000, 1024, 300, 1.975)]
)
def test_noise_that_is_solved_for_keeps_epsilon_and_is_hardly_more_than_needed(records, expected, steps, sigma):
    pytest.importorskip("opacus")
    noise = noise_for(2.0, 1 / records, expected / records, steps, "rdp")
    assert noise == pytest.approx(sigma, rel=2e-3)
    spent = epsilon_of([Part(noise, expected / records, steps)], 1 / records, "rdp")
    assert 1.99 < spent <= 2.0
    assert steps_within(2.0, 1 / records, [], noise, expected / records, 10_000, "rdp") in range(steps, steps + 4)
    assert steps_within(2.0, 1 / records, [Part(noise, expected / records, steps)], noise, 0.5, 9, "rdp") == 0


def test_no_noise_is_no_privacy_and_nothing_spent_is_nothing():
    assert epsilon_of([], 1e-5, "rdp") == 0
    assert epsilon_of([Part(1.0, 0.1, 0)], 1e-5, "rdp") == 0
    assert epsilon_of([Part(0.0, 0.1, 1)], 1e-5, "rdp") == math.inf


def test_the_log_the_summary_and_the_report_say_what_was_spent(tmp_path):
    result, _ = trained(tmp_path, steps=3, update={"noise_multiplier": None, "epsilon": 3.0, "delta": 1e-4})
    spent = result.summary["privacy"]
    noise, rate = spent["noise_multiplier"], spent["sampling_rate"]
    assert rate == 4 / len(ROWS)
    assert noise == noise_for(3.0, 1e-4, rate, 3, "rdp")
    logged = [record["train/epsilon"] for record in steps_of(result)]
    assert logged == [epsilon_of([Part(noise, rate, k)], 1e-4, "rdp") for k in (1, 2, 3)]
    assert 2.9 < spent["epsilon"] <= 3.0
    assert result.summary["ended_by"] is None
    page = (tmp_path / "report.html").read_text()
    assert f"epsilon {spent['epsilon']:.3g} at delta 0.0001" in page
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"Differentially private: epsilon {spent['epsilon']:.4g} at delta 0.0001 for each of 56 records" in card
    # Nothing of the training prompts is written down; those of the evaluation are.
    rollouts = tmp_path / "rollouts.jsonl"
    assert not rollouts.exists() or not rollouts.read_text()
    assert (tmp_path / "samples.jsonl").read_text()
    recorded = json.loads((tmp_path / "privacy.json").read_text())
    assert recorded["spent"] == [{"noise_multiplier": noise, "sampling_rate": rate, "steps": 3}]
    revealed, _ = trained(tmp_path / "shown", update={"reveals": ["rollouts"]}, batch={"prompts": 20, "micro": 20})
    assert (revealed.directory / "rollouts.jsonl").read_text()


def test_what_was_spent_is_never_forgotten(tmp_path, capsys):
    models = saved(tmp_path)
    run = tmp_path / "run"

    def go(resume=True, budget=None, force_changed=False, **update):
        changes = {"steps": 4, "checkpoint": {"every": 2}, "update": {"noise_multiplier": 2.0, **update}}
        if budget is not None:
            changes["update"]["epsilon"] = budget
        made = settings(run, **changes)
        return opd.distill(*models, ROWS, quiet=True, resume=resume, force_changed=force_changed, **made).summary

    whole = epsilon_of([Part(2.0, 4 / len(ROWS), 4)], 1 / len(ROWS), "rdp")
    assert go(resume=False, budget=whole)["privacy"]["steps"] == 4
    last = run / "checkpoints" / "step-00000004"

    # Killed at step 4 with the checkpoint of step 2: the two steps that are lost are spent, and no further one is left.
    shutil.rmtree(last)
    summary = go(budget=whole)
    assert summary["steps"] == 2
    assert summary["stopped_early"]
    assert "the budget is spent: 4 steps" in summary["ended_by"]
    assert summary["privacy"]["epsilon"] == pytest.approx(whole)

    # Another noise does not begin anew, nor does a record that somebody removed: the checkpoint has it too.
    summary = go(force_changed=True, noise_multiplier=3.0)
    assert summary["steps"] == 4
    assert summary["privacy"]["steps"] == 4 + 2
    assert summary["privacy"]["epsilon"] > whole
    (run / "privacy.json").unlink()
    assert go(force_changed=True, noise_multiplier=3.0)["privacy"]["steps"] == 6
    assert "privacy.json is gone: 6 steps are counted as the checkpoint has them" in capsys.readouterr().err
    (run / "privacy.json").write_text("{")
    with pytest.raises(RunError, match=r"privacy.json says what this run has spent and cannot be read"):
        go(force_changed=True, noise_multiplier=3.0)


def test_with_seeds_a_run_goes_on_bit_for_bit(tmp_path):
    models, found = saved(tmp_path), []
    seeds = {"curriculum": {"kind": "poisson", "seed": 1}, "update": {"seed": 2}, "checkpoint": {"every": 2}}
    for name, ends in (("whole", [4]), ("halves", [2, 4])):
        for end in ends:
            made = settings(tmp_path / name, **{**seeds, "update": {"seed": 2}, "steps": end})
            result = opd.distill(*models, ROWS, quiet=True, resume=end > ends[0], **made)
        assert result.summary["privacy"]["steps"] == 4
        found.append(list(result.student.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_rows_are_not_apart_it_goes_one_by_one(tmp_path, monkeypatch):
    seeds = {"curriculum": {"kind": "poisson", "seed": 1}, "batch": {"prompts": 20, "micro": 8}}
    wanted = trained(tmp_path / "wanted", **seeds, update={"seed": 2, "gradients": "one_by_one"})[1]

    def fail(*given):
        raise NotApartError("layer Strange does not keep rows apart")

    monkeypatch.setattr(Batched, "add", fail)
    result, moved = trained(tmp_path / "auto", **seeds, update={"seed": 2})
    assert [record["train/one_by_one"] for record in steps_of(result)] == [1, 1]
    for a, b in zip(moved, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    with pytest.raises(
        RecipeError, match=r"'batched', and layer Strange does not keep rows apart; set update.gradients"
    ):
        trained(tmp_path / "batched", **seeds, update={"gradients": "batched"})


def test_adapters_have_the_same_gradients_either_way(tmp_path):
    """LoRA batched; with gradient checkpointing, which computes activations again, one by one."""
    (student, teacher), found = saved(tmp_path), []
    for i, change in enumerate(({}, {"gradient_checkpointing": True})):
        own = {"curriculum": {"kind": "poisson", "seed": 3}, "batch": {"prompts": 12, "micro": 5}}
        made = settings(tmp_path / str(i), **own, update={"seed": 1})
        result = opd.distill({**student, "lora": {"rank": 2}, **change}, teacher, ROWS, quiet=True, **made)
        assert [record["train/one_by_one"] for record in steps_of(result)] == [i, i]
        found.append([record["train/gradient_median"] for record in steps_of(result)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    objective = {"kind": "jensen_shannon", "weight": 1e38}
    with pytest.raises(RunError, match=r"step 1: a trajectory's gradient is not finite, and a private step cannot"):
        trained(tmp_path, objective=objective, batch={"prompts": 40, "micro": 40})
    assert not (tmp_path / "privacy.json").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_has_spent_all_the_same(tmp_path):
    models = saved(tmp_path)
    made = settings(tmp_path / "run", checkpoint={"every": 50})
    opd.distill(*models, ROWS, quiet=True, **made)
    for name in ("checkpoints", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    assert opd.distill(*models, ROWS, quiet=True, resume=True, **made).summary["privacy"]["steps"] == 4


def test_of_each_kind_of_step_the_larger_number_counts():
    spending = Spending(1e-5, "rdp")
    spending.add(1.0, 0.1)
    spending.at_least([{"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 5}])
    spending.at_least([{"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 2}])
    spending.at_least([{"noise_multiplier": 2.0, "sampling_rate": 0.1, "steps": 1}])
    assert spending.parts == [Part(1.0, 0.1, 5), Part(2.0, 0.1, 1)]


SERVER = {"kind": "served", "url": "http://teacher.example:8000"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": "shuffled"}, r"curriculum 'shuffled' draws otherwise; set curriculum: poisson"),
        ({"batch": {"prompts": 4, "group": 2}}, r"batch.group=2 gives a record several"),
        (
            {"objective": "grpo", "verifier": "exact_match"},
            r"objective 'grpo' (compares the trajectories|does not say)|batch.group is 1",
        ),
        ({"shaping": "truncated_importance"}, r"shaping 'truncated_importance' does not say"),
        ({"teacher": SERVER}, r"http://teacher.example:8000 would be sent them.*update.reveals=\[servers\]"),
        ({"tracking": {"trackers": ["wandb"]}}, r"tracker 'wandb' would send it on.*update.reveals=\[trackers\]"),
        ({"evaluation": {}}, r"evaluation.held_out takes records.*update.reveals=\[held_out\]"),
        ({"teacher": {"model": "t", "cache": True}}, r"teacher.cache keeps answers.*update.reveals=\[rollouts\]"),
        ({"update": {"epsilon": 1.0, "noise_multiplier": 0}}, r"noise_multiplier is 0, with which no epsilon holds"),
        ({"update": {"noise_multiplier": None}}, r"give epsilon, which the noise is solved for"),
        ({"update": {"momentum": 0.5}}, r"momentum is a setting of sgd"),
        ({"reduction": "token_mean"}, r"set reduction=sequence_mean"),
        (
            {"objective": ["jensen_shannon", {"kind": "sft", "reduction": "token_mean"}]},
            r"a number that hangs on all records of the step",
        ),
    ],
)
def test_what_breaks_the_promise_or_shows_records_is_refused(changes, message):
    with pytest.raises(OpdError, match=message):
        recipe_of(**changes)


def recipe_of(**changes):
    return parse_recipe(
        {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": INLINE, **settings("r", **changes)}
    )


INLINE = {"kind": "inline", "prompts": ROWS}


def test_what_is_revealed_on_purpose_is_taken():
    assert recipe_of(teacher=SERVER, update={"reveals": ["servers"]}).update.reveals == ["servers"]
    assert recipe_of(teacher={**SERVER, "url": "http://127.0.0.1:8000"})
    assert recipe_of(evaluation={}, update={"reveals": ["held_out"]})
    assert recipe_of(tracking={"trackers": ["tensorboard"]})


def test_a_live_tracker_is_refused_as_one_that_the_recipe_names(tmp_path):
    class Sending(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

    private = recipe_of(output=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"tracker 'mine' of callbacks may send it on.*update.reveals=\[trackers\]"):
        execute(private, quiet=True, callbacks=[Sending()])
    assert not (tmp_path / "run").exists()
    check_live_trackers(recipe_of(update={"reveals": ["trackers"]}), [Sending()])

    class Local(Sending):
        name = "tensorboard"

    check_live_trackers(private, [Local()])


def test_a_store_of_private_rollouts_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"a store holds them; set update.reveals=\[rollouts\]"):
        sample(recipe_of(), tmp_path / "store")


def test_measuring_on_records_is_refused(tmp_path):
    shared = {"kind": "inline", "prompts": [ROWS[3]["prompt"]]}
    with pytest.raises(DataError, match=r"1 of 1 are training prompts too .* update.reveals=\[held_out\]"):
        trained(tmp_path, evaluation={"prompts": shared})


def test_a_student_that_records_chose_is_refused_even_where_they_may_be_seen(tmp_path):
    shared = {"kind": "inline", "prompts": [ROWS[3]["prompt"]]}
    with pytest.raises(DataError, match=r"does not account for a choice by records, which checkpoint.keep_best makes"):
        trained(
            tmp_path,
            update={"reveals": ["held_out"]},
            evaluation={"prompts": shared, "every": 1},
            checkpoint={"every": 1, "keep_best": "reverse_kl"},
        )


def test_a_known_seed_of_the_draws_is_told_of(tmp_path, capsys):
    result, _ = trained(tmp_path, curriculum={"kind": "poisson", "seed": 5})
    assert result.summary["privacy"]["seed_known"]
    assert not trained(tmp_path / "secret")[0].summary["privacy"]["seed_known"]
    assert "to who does not know its seeds" in (tmp_path / "student" / "README.md").read_text()


def test_what_was_spent_stays_while_a_run_begins_again(tmp_path, monkeypatch):
    """Killed before its first new step, too."""
    models = saved(tmp_path)
    made = settings(tmp_path / "run", checkpoint={"every": 50})
    opd.distill(*models, ROWS, quiet=True, **made)
    for name in ("checkpoints", "student"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()

    def killed(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("opd.api.train", killed)
        with pytest.raises(KeyboardInterrupt):
            opd.distill(*models, ROWS, quiet=True, resume=True, **made)
    assert (tmp_path / "run" / "privacy.json").is_file()
    assert opd.distill(*models, ROWS, quiet=True, resume=True, **made).summary["privacy"]["steps"] == 4


def test_steps_of_two_kinds_are_both_on_the_card(tmp_path):
    models, run = saved(tmp_path), tmp_path / "run"
    for steps, noise, more in ((2, 2.0, {}), (4, 3.0, {"resume": True, "force_changed": True})):
        made = settings(run, steps=steps, update={"noise_multiplier": noise}, checkpoint={"every": 2})
        opd.distill(*models, ROWS, quiet=True, **made, **more)
    card = (run / "student" / "README.md").read_text()
    assert "noise of 2 clipping norms and 2 Poisson draws" in card
    assert "noise of 3 clipping norms" in card


def test_promises_of_teachers_and_starts_are_handed_on_and_add_up(tmp_path, capsys):
    """DPKD and a chain: a private student that learns from private models, and a plain one that learns from that."""
    student, teacher = saved(tmp_path)
    made = settings(tmp_path / "first", name="first", update={"noise_multiplier": 2.0, "delta": 1e-3})
    first = opd.distill(student, teacher, ROWS, quiet=True, **made).summary["privacy"]
    of_first = {**teacher, "model": str(tmp_path / "first" / "student")}
    made = settings(tmp_path / "second", name="second", update={"noise_multiplier": 4.0, "delta": 1e-3})
    second = opd.distill(student, of_first, ROWS, **made).summary
    assert "which is private too: for a record of both runs the epsilons add up" in capsys.readouterr().err
    epsilons = [second["privacy"]["epsilon"], first["epsilon"]]
    card = (tmp_path / "second" / "student" / "README.md").read_text()
    assert f"the sums hold: epsilon {sum(epsilons):.4g} at delta 0.002." in card
    plain = {"update": "plain", "curriculum": "shuffled", "steps": 1}
    made = {**settings(tmp_path / "third", name="third"), **plain}
    opd.distill(
        {**student, "model": str(tmp_path / "second" / "student")}, teacher, PUBLIC["prompts"], quiet=True, **made
    )
    origin = json.loads((tmp_path / "third" / "student" / "opd.json").read_text())
    assert [(each["model"], each["epsilon"]) for each in origin["privacy"]] == list(
        zip(("second", "first"), epsilons, strict=True)
    )
    assert "of those that its own run did not see" in (tmp_path / "third" / "student" / "README.md").read_text()


def test_what_ties_records_together_is_refused_when_the_run_is_built(tmp_path):
    with pytest.raises(OpdError, match=r"reduction=sequence_mean"):
        trained(tmp_path / "a", reduction="token_mean")
    with pytest.raises(RecipeError, match=r"'batched', which computes in float32 alone"):
        trained(tmp_path / "b", update={"gradients": "batched"}, hardware={"device": "cpu", "precision": "bf16"})


def test_rows_that_turn_with_the_longest_are_refused(tmp_path):
    student = tiny_model(seed=1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(OpdError, match=r"rotary embeddings of type 'dynamic' turn all rows of a batch by the length"):
        opd.distill(
            student, tiny_model(seed=2), ROWS, tokenizer=character_tokenizer(), quiet=True, **settings(tmp_path)
        )


def test_a_drafter_that_learns_without_noise_is_refused(tmp_path):
    engine = {"kind": "drafted", "model": str(tmp_path), "train": {}}
    with pytest.raises(RecipeError, match=r"a drafter learn from them without noise, .* update.reveals=\[rollouts\]"):
        recipe_of(rollout={"engine": engine})


def test_bfloat16_goes_one_by_one(tmp_path):
    result, _ = trained(tmp_path, hardware={"device": "cpu", "threads": 1, "precision": "bf16"})
    assert [record["train/one_by_one"] for record in steps_of(result)] == [1, 1]


def test_an_accountant_that_is_not_installed_is_named_with_one_that_is(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "dp_accounting" else real(name)
    )
    with pytest.raises(
        RecipeError, match=r"'pld', which is not installed: pip install dp-accounting, or set update.acc"
    ):
        trained(tmp_path, update={"accountant": "pld"})


def test_the_coin_is_of_the_whole_batch_and_of_no_data(tmp_path):
    """On-policy or teacher-forced by one coin a step: the mixture of student and data by batch."""
    rollout = {
        "kind": "mixture",
        "first": {"kind": "student", "max_new_tokens": 4},
        "second": {"kind": "data", "max_new_tokens": 4},
        "share": 0.5,
        "by": "batch",
    }
    result, _ = trained(tmp_path, steps=6, rollout=rollout, batch={"prompts": 20, "micro": 32}, self_test=True)
    sampled = [record["train/sampled_tokens"] for record in steps_of(result)]
    assert any(sampled)
    assert not all(sampled)


def test_hard_labels_count_on_the_forced_branch_alone(tmp_path):
    rollout = {"kind": "mixture", "first": "student", "second": "data", "share": 0.5, "by": "batch"}
    objective = ["jensen_shannon", {"kind": "sft", "weight": 0.5, "written_by": ["data"]}]
    result, _ = trained(tmp_path, steps=6, rollout=rollout, objective=objective, batch={"prompts": 20, "micro": 32})
    for record in steps_of(result):
        assert ("train/nll" in record) == (record["train/sampled_tokens"] == 0)


def test_a_plan_shows_noise_and_epsilon(tmp_path):
    student = {"model": save_tiny(tmp_path / "student"), "template": "plain"}
    made = settings("r", update={"noise_multiplier": None, "epsilon": 3.0, "delta": 1e-4})
    plan = make_plan(parse_recipe({"student": student, "teacher": student, "prompts": INLINE, **made}))
    ((_, rows),) = [(title, dict(rows)) for title, rows in plan.sections() if title == "update"]
    assert rows["records"] == str(len(ROWS))
    assert rows["noise multiplier (sigma)"] == f"{noise_for(3.0, 1e-4, 4 / len(ROWS), 2, 'rdp'):g}"
    assert float(rows["epsilon at delta 0.0001 (rdp)"]) <= 3.0
    assert plan.as_dict()["update"] == rows
