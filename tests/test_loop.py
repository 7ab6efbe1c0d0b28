"""The whole loop on tiny real models: it learns, does not depend on how a batch is cut, refuses wrong set-ups."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import opd
from opd.api import execute
from opd.assembly import assemble
from opd.cli import main
from opd.context import Context
from opd.divergences import Loss, ReverseKL, Target
from opd.divergences.reverse_kl_sampled import ReverseKLSampled
from opd.errors import IncompatibleError, RunError, SelfTestError
from opd.evaluation import evaluate
from opd.loop import train
from opd.measurement import Measurement
from opd.monitor import Monitor
from opd.policies.causal_lm import CausalLM
from opd.recipe import load_recipe, parse_recipe
from opd.reduction import position_weights
from opd.rollouts import PrefixSource, Request
from opd.rollouts.student import StudentRollout
from opd.self_test import self_test
from opd.shaping import Shape
from opd.teachers.self_teacher import SelfTeacher
from opd.verifiers.exact_match import ExactMatch
from tests.conftest import character_tokenizer, rolled_out, said, save_tiny, tiny_model, trajectories_of

TEXTS = [f"{a}+{b}=" for a in range(1, 6) for b in range(1, 5)]


@pytest.fixture
def models(tmp_path):
    return save_tiny(tmp_path / "student", seed=1), save_tiny(tmp_path / "teacher", seed=2, vocabulary=72)


def recipe_for(models, tmp_path, **changes):
    student, teacher = models
    data = {
        "name": "t",
        "output": str(tmp_path / "run"),
        "steps": 3,
        "student": {"model": student, "template": "plain"},
        "teacher": {"model": teacher, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "rollout": {"max_new_tokens": 12},
        "batch": {"prompts": 8, "group": 2, "micro": 16},
        "update": {"learning_rate": 1e-2},
        "evaluation": {"held_out": 4, "samples": 1},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return parse_recipe(data)


def build(recipe, tmp_path):
    (tmp_path / "run").mkdir(exist_ok=True)
    return assemble(recipe, Monitor(tmp_path / "run", quiet=True))


@pytest.mark.parametrize("self_test", [True, False])
def test_the_student_trains_in_training_mode(models, tmp_path, self_test):
    """Dropout and gradient checkpointing would do nothing otherwise; rollouts and evaluations give the mode back."""
    recipe = recipe_for(models, tmp_path, self_test=self_test, student={"lora": {"rank": 2, "dropout": 0.5}})
    run = build(recipe, tmp_path)
    trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 1, 6)
    evaluate(run)
    assert run.student.module.training
    with torch.no_grad():
        for name, parameter in run.student.module.named_parameters():
            if "lora_B" in name:  # which begins at zero, where dropout before it changes nothing
                parameter.normal_()
    first, second = (run.student(trajectories).hidden for _ in range(2))
    assert not torch.equal(first, second), "dropout draws anew each time"
    assert not any(teacher.language.training for teacher in run.teachers)


def test_training_moves_the_student_to_the_teacher(models, tmp_path):
    result = execute(recipe_for(models, tmp_path, steps=60), quiet=True)
    assert result.after["reverse_kl"] < 0.6 * result.before["reverse_kl"]
    assert result.after["top1_agreement"] > result.before["top1_agreement"]
    assert len([r for r in result.history if "train/loss" in r]) == 60


def test_what_a_run_writes_and_that_its_student_loads_in_plain_transformers(models, tmp_path):
    recipe = recipe_for(models, tmp_path, tracking={"trackers": ["tensorboard"]}, evaluation={"every": 2})
    result = execute(recipe, quiet=True)
    folder = result.directory
    assert load_recipe(str(folder / "recipe.yaml")) == recipe
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["seed"] == 0
    assert {"torch", "transformers", "opd"} <= facts["versions"].keys()
    assert repr(result).startswith("Result(directory="), "models and tokenizers print whole pages"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert {"reverse_kl", "forward_kl", "top1_agreement"} <= summary["before"].keys() & summary["after"].keys()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "held_out/reverse_kl" in r] == [0, 2, 3]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert all(len(r["tokens"]) == len(r["values"]["reverse_kl"]) == len(r["values"]["log_q"]) for r in rows)
    for row in rows:
        assert len(row["alternatives"]["teacher"]) == len(row["tokens"])
        assert all(p[0][1] >= p[1][1] for p in row["alternatives"]["student"])
    trained = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [r["step"] for r in trained] == [1, 1, 2, 2, 3, 3], "both trajectories of one prompt"
    assert all(a["id"] == b["id"] for a, b in zip(trained[::2], trained[1::2], strict=True))
    assert all(len(r["values"]["divergence"]) == len(r["tokens"]) for r in trained)
    assert list(folder.glob("opd/events*")) or list(folder.rglob("events.out*"))
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids).logits, result.student(ids).logits)
    card = (folder / "student" / "README.md").read_text()
    assert "reverse_kl" in card
    assert (folder / "report.html").stat().st_size < 10_000_000
    with pytest.raises(RunError, match=r"--resume \(Python: resume=True\).*--overwrite \(Python: overwrite=True\)"):
        execute(recipe, quiet=True)
    execute(recipe, overwrite=True, quiet=True)


def gradient(recipe, tmp_path, trajectories, micro, layout="auto", order=None):
    """The whole step's gradient as one vector, with micro-batches of `micro` trajectories."""
    run = build(recipe, tmp_path)
    weights = position_weights(trajectories, recipe.reduction)
    (target,) = run.ask(trajectories, run.at(0))
    for part, here in trajectories.split(micro):
        student = run.student(part, layout=layout)
        loss = recipe.objective[0](student, [target.select(here)], weights[here], part)
        run.optimiser.accumulate([loss], last=True)
    return torch.cat([p.grad.flatten() for p in run.student.module.parameters()])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(reduction, models, tmp_path):
    # Several end tokens, so that an untrained model stops at many different lengths.
    recipe = recipe_for(models, tmp_path, reduction=reduction, end_tokens=list(range(0, 47, 8)))
    run = build(recipe, tmp_path)
    trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 2, 12)
    assert len(set(trajectories.lengths.tolist())) > 2
    reference = gradient(recipe, tmp_path, trajectories, 16)
    for micro, layout in [(4, "auto"), (1, "auto"), (16, "left"), (16, "right"), (4, "left"), (3, "packed")]:
        other = gradient(recipe, tmp_path, trajectories, micro, layout)
        assert (other - reference).norm() / reference.norm() <= 1e-5, (micro, layout)


def test_gradient_does_not_depend_on_the_order_of_trajectories(models, tmp_path):
    recipe = recipe_for(models, tmp_path)
    contexts = [torch.tensor([5, 6]), torch.tensor([7, 8, 9]), torch.tensor([4])]
    forward = trajectories_of([4, 7, 2], contexts=contexts)
    from dataclasses import replace

    rows = forward.completions()
    backward = replace(
        forward,
        contexts=contexts[::-1],
        prompts=list(forward.prompts)[::-1],
        actions=torch.cat(rows[::-1]),
        lengths=forward.lengths.flip(0),
    )

    def of(trajectories):
        run = build(recipe, tmp_path)
        answer = run.student(trajectories).detach()
        shifted = type(answer)(answer.hidden.roll(1, -1), answer.head)
        loss = recipe.objective[0](
            run.student(trajectories),
            [Target(shifted)],
            position_weights(trajectories, "sequence_mean"),
            trajectories,
        )
        loss.total.backward()
        return torch.cat([p.grad.flatten() for p in run.student.module.parameters()])

    one, two = of(forward), of(backward)
    assert (one - two).norm() / one.norm() <= 1e-5


def test_tokens_that_the_student_did_not_write_have_no_influence(models, tmp_path):
    recipe = recipe_for(models, tmp_path)
    run = build(recipe, tmp_path)
    from dataclasses import replace

    trajectories = trajectories_of([6, 4])
    learn = trajectories.learn.clone()
    learn[2:4] = False
    masked = replace(trajectories, learn=learn)
    weights = position_weights(masked, "token_mean")
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[2:4].tolist() == [0, 0]
    per_sequence = position_weights(masked, "sequence_mean")
    assert per_sequence[:6].sum().item() == pytest.approx(0.5)
    loss = recipe.objective[0](run.student(masked), run.ask(masked, run.at(0)), weights, masked)
    assert loss.values[2:4].abs().sum() == 0


@pytest.mark.parametrize(
    "choice",
    [
        {"objective": "forward_kl"},
        {"objective": {"kind": "mixture", "reverse_weight": 0.25}},
        {"objective": {"kind": "reverse_kl", "top_k": 8}},
        {"objective": {"kind": "reverse_kl_sampled", "clamp": 10, "discount": 0.5}},
        {"student": {"lora": {"rank": 4}}},
        {"student": {"gradient_checkpointing": True}},
        {"hardware": {"precision": "bf16"}},
        {"rollout": {"dtype": "bfloat16"}},
        {"rollout": {"top_p": 0.9, "segment": 3, "watch": "repetition"}},
        {"update": {"learning_rate": {"kind": "cosine", "start": 1e-2, "warmup": 1}, "clip_norm": None}},
        {"reduction": "sequence_mean"},
    ],
    ids=str,
)
def test_every_choice_trains_through_the_same_loop(choice, models, tmp_path):
    result = execute(recipe_for(models, tmp_path, **choice), quiet=True)
    assert all(torch.isfinite(torch.tensor(list(result.after.values()))))
    gap = [r["train/rollout_gap"] for r in result.history if "train/rollout_gap" in r]
    assert len(gap) == (0 if "top_p" in choice.get("rollout", {}) else 3)
    rounded = "hardware" in choice or "dtype" in choice.get("rollout", {})
    assert max(gap, default=0) < (0.5 if rounded else 1e-3)
    assert not rounded or min(gap) > 1e-4


def test_two_teachers_weigh_in_together(models, tmp_path):
    _student, teacher = models
    third = save_tiny(tmp_path / "third", seed=3)
    both = [
        {"model": teacher, "template": "plain", "weight": 0.7},
        {"model": third, "template": "plain", "weight": 0.3},
    ]
    result = execute(recipe_for(models, tmp_path, teacher=both), quiet=True)
    assert result.summary["steps"] == 3


def test_teacher_may_see_another_prompt_for_the_same_completion(models, tmp_path):
    rows = [{"prompt": text, "hint": f"{text} think hard"} for text in TEXTS]
    recipe = recipe_for(models, tmp_path, prompts={"prompts": rows})
    recipe = parse_recipe({**recipe.dump(), "teacher": {"kind": "self", "mode": "frozen", "sees": "hint"}})
    run = build(recipe, tmp_path)
    trajectories = rolled_out(run, run.course.next(0, {}, None).prompts, 1, 6)
    answer = said(run.teachers[0], trajectories, run.context)
    assert len(answer) == trajectories.positions
    own = run.student(trajectories)
    assert not torch.allclose(answer.log_probs(), own.log_probs(), atol=1e-3)
    hinted = [run.student.language.encode(p, "hint") for p in trajectories.prompts]
    expected = run.student.language(hinted, trajectories.completions())
    torch.testing.assert_close(answer.hidden, expected.detach())


def test_ema_teacher_follows_at_its_rate(models, tmp_path):
    for mode, rate in [("ema", 0.25), ("frozen", 0.05)]:
        student = CausalLM(model=models[0], template="plain").build(Context(torch.device("cpu")))
        teacher = SelfTeacher(mode=mode, rate=rate).build(Context(torch.device("cpu")), student)
        before = {n: p.clone() for n, p in teacher.language.named_parameters()}
        with torch.no_grad():
            for p in student.module.parameters():
                p.add_(1.0)
        teacher.follow(student)
        moved = 0.25 if mode == "ema" else 0.0
        for name, p in teacher.language.named_parameters():
            torch.testing.assert_close(p, before[name] + moved)
            assert not p.requires_grad


def probe_of(student, prompts):
    return Request(prompts, 1, 16, -2, StudentRollout(), student.context)


def test_self_test_catches_a_sampler_that_runs_another_model(student, prompts):
    class Other(PrefixSource):
        def __call__(self, request):
            trajectories = trajectories_of([6, 4])
            return trajectories

    with pytest.raises(SelfTestError, match="rollout and training log-probabilities"):
        self_test(student, [], Other(), [ReverseKL()], probe_of(student, prompts))


def test_self_test_catches_a_divergence_that_does_not_vanish(student, prompts):
    class Wrong(ReverseKLSampled):
        def value_and_coefficient(self, log_p, log_q, lengths):
            return log_q - log_p, torch.ones_like(log_p)

    rollout = StudentRollout().build(student.context, student, [])
    self_test(student, [], rollout, [ReverseKLSampled()], probe_of(student, prompts))
    with pytest.raises(SelfTestError, match="gradient"):
        self_test(student, [], rollout, [Wrong()], probe_of(student, prompts))


def test_self_test_catches_a_model_that_changes_its_logits(student, prompts):
    forward = student.language.model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    student.language.model.forward = doubled
    rollout = StudentRollout().build(student.context, student, [])
    with pytest.raises(SelfTestError, match="logits"):
        self_test(student, [], rollout, [ReverseKL()], probe_of(student, prompts))


def test_a_pair_of_kinds_that_makes_no_sense_is_refused_with_the_alternative():
    from opd.distributions import Sampled, TopK

    with pytest.raises(IncompatibleError, match="use reverse_kl_sampled"):
        ReverseKL().check_accepts(Sampled, "the teacher")
    with pytest.raises(IncompatibleError, match="log-probability of given tokens"):
        ReverseKLSampled().check_accepts(TopK, "the teacher")


def test_verifier_scores_reach_signals_and_evaluation(models, tmp_path):
    rows = [{"prompt": text, "answer": str(eval(text[:-1]))} for text in TEXTS]
    recipe = recipe_for(
        models, tmp_path, prompts={"prompts": rows}, verifier={"kind": "exact_match", "pattern": r"([0-9])"}
    )
    result = execute(recipe, quiet=True)
    assert 0 <= result.after["accuracy"] <= 1
    assert all("train/reward" in r for r in result.history if "train/loss" in r)


@pytest.mark.parametrize(
    ("completion", "pattern", "score"), [(" 7 ", None, 1.0), ("so #7.", r"#(\d)", 1.0), ("no", r"#(\d)", 0.0)]
)
def test_exact_match(completion, pattern, score):
    from opd.prompts import Prompt

    assert ExactMatch(pattern=pattern).score(Prompt("a", {"answer": 7}), completion) == score
    assert ExactMatch().score(Prompt("a", {}), completion) is None


def test_reasoning_gym_scores_its_own_tasks():
    from opd.prompts.reasoning_gym import ReasoningGymPrompts
    from opd.verifiers.reasoning_gym import ReasoningGym

    prompts = ReasoningGymPrompts(tasks=["simple_equations"], size=2).load()
    assert ReasoningGym().score(prompts[0], str(prompts[0].fields["answer"])) == 1.0
    assert ReasoningGym().score(prompts[0], "nonsense") < 0.5


def test_distill_takes_live_objects_strings_and_lists(models, tmp_path):
    tokenizer = character_tokenizer()
    student = tiny_model(seed=1)
    before = student.lm_head.weight.clone()
    result = opd.distill(
        student,
        tiny_model(seed=2),
        TEXTS,
        tokenizer=tokenizer,
        output=str(tmp_path / "live"),
        steps=2,
        rollout={"max_new_tokens": 6},
        batch={"prompts": 4},
        evaluation={"held_out": 2},
        tracking={"trackers": []},
        hardware={"device": "cpu"},
        quiet=True,
    )
    assert result.student is student
    assert not torch.equal(student.lm_head.weight, before)
    with pytest.raises(RunError, match="nothing to resume"):
        opd.distill(models[0], models[1], TEXTS, output=str(tmp_path / "absent"), resume=True)
    with pytest.raises(RunError, match="tokenizer"):
        opd.distill(student, tiny_model(seed=2), TEXTS, output=str(tmp_path / "x"))
    with pytest.raises(RunError, match=r"the live student's own weights.*'mode': 'frozen'"):
        opd.distill(student, student, TEXTS, tokenizer=tokenizer, output=str(tmp_path / "x"))
    with pytest.raises(opd.RecipeError, match="objective"):
        opd.distill(models[0], models[1], TEXTS, objective="kl")


def test_same_seed_same_run_and_another_seed_another(models, tmp_path):
    losses = []
    for seed in (0, 0, 1):
        recipe = recipe_for(models, tmp_path, seed=seed)
        run = build(recipe, tmp_path)
        train(run)
        losses.append([r["train/loss"] for r in run.monitor.history if "train/loss" in r])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_prompt_longer_than_the_budget_is_named(models, tmp_path):
    recipe = recipe_for(models, tmp_path, max_prompt_tokens=3)
    with pytest.raises(opd.DataError, match=r"prompts\[\d+\]: the prompt has 4 tokens, more than max_prompt_tokens=3"):
        build(recipe, tmp_path)


def test_a_device_that_is_not_there_is_one_message(models, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(opd.RecipeError, match="no CUDA device"):
        build(recipe_for(models, tmp_path, hardware={"device": "cuda"}), tmp_path)
    # Live models are moved there before a recipe's are built.
    student, teacher = tiny_model(), tiny_model(seed=1)
    with pytest.raises(opd.RecipeError, match=r"hardware\.device is 'cuda' and this machine has no CUDA device"):
        opd.distill(student, teacher, ["1+1=", "2+2="], tokenizer=character_tokenizer(), hardware={"device": "cuda"})


def test_measurement_weighs_positions_not_micro_batches():
    measurement = Measurement([ReverseKL()])
    for lengths, value in [([1], 1.0), ([3, 3], 2.0)]:
        part = trajectories_of(lengths)
        n = sum(lengths)
        loss = Loss(torch.tensor(0.5), torch.full((n,), value), torch.full((n,), -0.1))
        ones = torch.ones(n)
        measurement.add([loss], [ones], part, Shape(ones), [ones], ones.bool(), exact_behaviour=True)
    signals = measurement.signals(lambda x: x)
    assert signals["divergence"] == pytest.approx((1 + 12) / 7)
    assert signals["loss"] == pytest.approx(1.0)
    assert signals["length"] == pytest.approx(7 / 3)
    assert signals["rollout_gap"] == pytest.approx(0.1, abs=1e-6)


def cli(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "opd", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_the_command_line_end_to_end(models, tmp_path, monkeypatch, capsys):
    recipe = recipe_for(models, tmp_path, evaluation={"held_out": 2, "samples": 1})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    process = cli("train", str(path), "steps=2", "--quiet")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "reverse_kl" in out
    assert "next: opd eval" in out
    # What a process of its own is for has been seen: the second command runs in this one.
    monkeypatch.setattr(sys, "argv", ["opd", "eval", str(tmp_path / "run"), "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(out)["reverse_kl"] == pytest.approx(summary["after"]["reverse_kl"], rel=1e-4)


def test_interrupt_finishes_the_step_saves_and_exits_130(models, tmp_path):
    recipe = recipe_for(models, tmp_path, steps=100000)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.dump()))
    process = cli("train", str(path), "--quiet")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 90
    while time.time() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 4):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped early" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_early"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
