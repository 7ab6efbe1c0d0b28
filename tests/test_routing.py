"""Routing: each trajectory is answered by its own teacher, of whatever width, and by no other."""

from __future__ import annotations

import json
import random
import shutil
import sys

import pytest
import torch
import yaml

import opd.operator.gradient
import opd.operator.head
from opd.api import execute
from opd.checkpoints.store import folder_of
from opd.cli.main import main
from opd.context import Context
from opd.distributions import Routed, Sampled, TopK, joined
from opd.divergences import ForwardKL, ReverseKL, Target, compare
from opd.divergences.reverse_kl_sampled import ReverseKLSampled
from opd.errors import DataError, IncompatibleError, RecipeError
from opd.evaluation import evaluate
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from opd.operator import divergence_loss
from opd.plan import make_plan
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.saving import origin
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.routed import RoutedTeacher, RoutedTeachers
from tests.conftest import character_tokenizer, rolled_out, said, save_tiny, tiny_model, trajectories_of
from tests.test_loop import build, recipe_for
from tests.tiny import turn_tokenizer

CPU = Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,)))
WIDTHS = {"math": 32, "code": 48}
ROWS = [{"prompt": f"{a}+{b}=", "task": "math" if (a + b) % 2 else "code"} for a in range(1, 6) for b in range(1, 5)]


def experts(weight=1.0, **changes):
    """A routed teacher of two models of different widths."""
    settings = RoutedTeacher(
        by="task",
        routes={tag: LocalTeacher(model="(live)", weight=weight if tag == "code" else 1.0) for tag in WIDTHS},
        **changes,
    )
    built = {
        tag: LanguageTeacher(
            LanguageModel(
                tiny_model(width=width, seed=width).requires_grad_(False), character_tokenizer(), template="plain"
            ),
            settings.routes[tag],
            torch.device("cpu"),
        )
        for tag, width in WIDTHS.items()
    }
    return RoutedTeachers(settings, built)


def mixed(lengths=(3, 5, 2, 4, 1, 6), seed=0, tags=("math", "code", "code", "math", "code", "math")):
    prompts = [Prompt(f"p{i}", {"prompt": "x", "task": tag}, where=f"here:{i}") for i, tag in enumerate(tags)]
    return trajectories_of(list(lengths), seed=seed, prompts=prompts)


def gradients(student, teacher_targets, trajectories, weights, objective):
    """Gradients of the student's parameters, and the loss."""
    student.module.zero_grad()
    loss = objective(student(trajectories), teacher_targets, weights, trajectories)
    loss.total.backward()
    return torch.cat([p.grad.flatten().clone() for p in student.module.parameters()]), loss


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {"student": save_tiny(folder / "student", seed=1)}
    return found | {tag: save_tiny(folder / tag, seed=w, width=w, vocabulary=64 + w) for tag, w in WIDTHS.items()}


def routed_recipe(models, tmp_path, **changes):
    teacher = {
        "kind": "routed",
        "by": "task",
        "routes": {tag: {"model": models[tag], "template": "plain", "batch": 4} for tag in WIDTHS},
    } | changes.pop("teacher", {})
    recipe = recipe_for((models["student"], models["math"]), tmp_path, **changes).dump()
    return parse_recipe(recipe | {"teacher": teacher, "prompts": {"kind": "inline", "prompts": ROWS}})


@pytest.mark.parametrize("seed", range(3))
def test_each_trajectory_is_answered_by_its_own_teacher_after_shuffling(seed):
    """Against each teacher asked alone about the one trajectory; each sees exactly its own rows."""
    teacher, trajectories = experts(), mixed()
    order = random.Random(seed).sample(range(6), 6)
    trajectories, _ = trajectories.pick(order)
    seen = {tag: [] for tag in WIDTHS}
    for tag, route in teacher.routes.items():
        route.language.register_forward_hook(lambda _, given, __, tag=tag: seen[tag].append(len(given[1])))
    answer = said(teacher, trajectories)
    assert {tag: sum(counts) for tag, counts in seen.items()} == {"math": 3, "code": 3}
    assert teacher.asked == 1.0
    assert isinstance(answer, Routed)
    assert len(answer) == trajectories.positions
    found = answer.log_probs()
    for i, prompt in enumerate(trajectories.prompts):
        one, here = trajectories.rows(i, i + 1)
        own = said(teacher.routes[prompt.fields["task"]], one)
        torch.testing.assert_close(found[here], own.log_probs(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answer.select(here).log_probs(), found[here])


def test_a_source_of_prompts_says_what_its_rows_are_for(models, tmp_path):
    data = routed_recipe(models, tmp_path).dump()
    texts = [[f"{a}+{b}=" for b in range(1, 5)] for a in range(1, 4)]
    data["prompts"] = [
        {"kind": "file", "path": str(tmp_path / f"{tag}.jsonl"), "add": {"task": tag}} for tag in ("math", "code")
    ]
    for tag, rows in zip(("math", "code"), texts, strict=False):
        (tmp_path / f"{tag}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
    run = build(parse_recipe(data), tmp_path)
    routes = {p.view(): run.teachers[0].route(p) for p in [*run.held_out, *run.course.next(0, {}, None).prompts]}
    assert set(routes.values()) == {"math", "code"}
    assert all(route == ("math" if text in texts[0] else "code") for text, route in routes.items())


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL(), ReverseKL(top_k=5), ReverseKLSampled()])
def test_the_gradient_is_that_of_the_halves_apart_with_one_denominator(student, objective):
    teacher, trajectories = experts(), mixed()
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    got, loss = gradients(student, [Target(said(teacher, trajectories))], trajectories, weights, objective)
    want, values = 0.0, torch.zeros(trajectories.positions)
    for tag, route in teacher.routes.items():
        mine = [i for i, p in enumerate(trajectories.prompts) if p.fields["task"] == tag]
        part, here = trajectories.pick(mine)
        grad, own = gradients(student, [Target(said(route, part))], part, weights[here], objective)
        want, values[here] = want + grad, own.values
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loss.values, values, atol=1e-5, rtol=1e-4)


def test_returns_over_whole_trajectories_see_each_teacher_at_its_own(student):
    objective = ReverseKLSampled(discount=1.0)
    assert objective.sees_whole_trajectories
    teacher, trajectories = experts(), mixed()
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    got, _ = gradients(student, [Target(said(teacher, trajectories))], trajectories, weights, objective)
    want = 0.0
    for i, prompt in enumerate(trajectories.prompts):
        part, here = trajectories.rows(i, i + 1)
        answer = said(teacher.routes[prompt.fields["task"]], part)
        want = want + gradients(student, [Target(answer)], part, weights[here], objective)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_rows_are_projected_once_and_by_their_own_head_alone(student, monkeypatch):
    counted = []
    project = opd.operator.head.project

    def counting(rows, head, buffers, place):
        counted.append((rows.shape[1], len(rows)))
        return project(rows, head, buffers, place)

    monkeypatch.setattr(opd.operator.head, "project", counting)
    monkeypatch.setattr(opd.operator.gradient, "project", counting)
    teacher, trajectories = experts(), mixed()
    weights = torch.full((trajectories.positions,), 1.0)
    weights[:2] = 0.0  # of a math trajectory
    answer = said(teacher, trajectories)
    divergence_loss(
        ReverseKL(),
        student(trajectories),
        [Target(answer)],
        weights,
        trajectories.actions,
        trajectories.lengths,
        rows=4,
    )
    code = sum(n for n, p in zip((3, 5, 2, 4, 1, 6), trajectories.prompts, strict=True) if p.fields["task"] == "code")
    of = {width: sum(n for w, n in counted if w == width) for width in WIDTHS.values()}
    # The student is as wide as the math teacher.
    assert of == {48: code, 32: (trajectories.positions - 2) + (trajectories.positions - 2 - code)}
    assert max(n for _, n in counted) <= 4


def test_a_routed_teacher_beside_another_one_and_with_weights(student):
    teacher, trajectories = experts(weight=0.25), mixed()
    weights = torch.full((trajectories.positions,), 1 / trajectories.positions)
    anchor = teacher.routes["math"]
    (own,) = (target.weight for target in teacher.answer(trajectories, teacher.settings, CPU))
    assert own.unique().tolist() == [0.25, 1.0]
    targets = [Target(said(teacher, trajectories), own), Target(said(anchor, trajectories), 0.5)]
    got, _ = gradients(student, targets, trajectories, weights, ReverseKL())
    parts = [
        gradients(student, [Target(each.distribution)], trajectories, weights * each.weight, ReverseKL())[0]
        for each in targets
    ]
    torch.testing.assert_close(got, parts[0] + parts[1], atol=1e-6, rtol=1e-4)
    assert teacher.answer(mixed(tags=("math",) * 6), teacher.settings, CPU)[0].weight == 1.0


def test_per_example_gradients_of_a_routed_answer(student):
    teacher, trajectories = experts(), mixed()
    weights = torch.full((trajectories.positions,), 0.1)
    mine = student(trajectories)
    arguments = ([Target(said(teacher, trajectories))], weights, trajectories.actions, trajectories.lengths)
    loss = divergence_loss(ReverseKL(), mine, *arguments, per_example=True)
    total = divergence_loss(ReverseKL(), mine, *arguments)
    torch.testing.assert_close(loss.per_example.sum(), total.total)
    parameters = list(student.module.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.per_example.sum(), parameters, retain_graph=True),
        torch.autograd.grad(total.total, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_answers_of_one_shape_become_one_tensor_and_others_stay_apart():
    rows = [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]
    values = torch.arange(5.0)
    one = joined([Sampled(values[r]) for r in rows], rows)
    assert isinstance(one, Sampled)
    assert one.log_probs.tolist() == values.tolist()
    ids = torch.arange(10).view(5, 2)
    top = joined([TopK(-ids[r].float(), ids[r]) for r in rows], rows)
    assert isinstance(top, TopK)
    assert torch.equal(top.ids, ids)
    assert torch.equal(top.log_probs, -ids.float())
    uneven = joined([TopK(torch.zeros(2, 2), ids[:2]), TopK(torch.ones(3, 1), ids[:3, :1])], rows)
    assert isinstance(uneven, Routed)
    pieces = dict(enumerate(uneven.select(torch.tensor([4, 3])).pieces()))
    assert [mine.tolist() for mine, _ in pieces.values()] == [[1], [0]]
    assert pieces[1][1].ids.tolist() == [[4]]


def test_every_comparison_reads_a_routed_answer(student):
    teacher, trajectories = experts(), mixed()
    answer = said(teacher, trajectories)
    values = compare(student(trajectories).detach(), answer, trajectories.actions).values
    sampled = Sampled.of(answer, trajectories.actions, rows=4)
    torch.testing.assert_close(values["log_p"], sampled.log_probs)
    assert (values["reverse_kl"] > 0).all()


def test_a_prompt_without_a_route_is_an_error_that_names_it():
    teacher = experts()
    with pytest.raises(DataError, match=r"here:0: prompt 'p0' has task 'maths' \(did you mean 'math'\?\).*math, code"):
        teacher.check_prompts(mixed(tags=("maths",) * 6).prompts)
    with pytest.raises(DataError, match=r"no column 'task'.*it has \['prompt', 'tsk'\]"):
        teacher.check_prompts([Prompt("q", {"prompt": "x", "tsk": "math"}, where="here")])
    lenient = experts(default="code")
    assert lenient.route(Prompt("q", {"prompt": "x", "task": "poetry"})) == "code"
    assert lenient.route(Prompt("q", {"prompt": "x", "task": None})) == "code"
    with pytest.raises(DataError, match="no column"):
        lenient.check_prompts([Prompt("q", {"prompt": "x"}, where="here")])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"by": None}, "teacher.by"),
        ({"routes": {}}, "routes"),
        ({"default": "mth"}, r"did you mean 'math'\?"),
        ({"sees": "hint"}, "settings of each route"),
        ({"routes": {"a.b": {"model": "m"}}}, "no dot"),
        ({"routes": {"math": {"model": "m", "name": "n"}}}, "tag is its name"),
        ({"routes": {"math": {"kind": "routed", "by": "x", "routes": {"a": {"model": "m"}}}}}, "routed itself"),
        (
            {"routes": {"math": {"model": "m", "bacth": 2}}},
            "unknown key .teacher.routes.math.bacth. .did you mean .teacher.routes.math.batch.",
        ),
        ({"routes": {"math": {"kind": "lokal"}}}, "teacher.routes.math.kind is 'lokal'"),
    ],
)
def test_mistakes_in_a_recipe(models, tmp_path, block, message):
    with pytest.raises(RecipeError, match=message):
        routed_recipe(models, tmp_path, teacher=block)


def test_a_schedule_of_a_routes_weight(models, tmp_path):
    routes = {tag: {"model": models[tag], "template": "plain"} for tag in WIDTHS}
    routes["code"]["weight"] = [[0, 1.0], [2, 0.0]]
    recipe = routed_recipe(models, tmp_path, teacher={"routes": routes})
    assert parse_recipe(recipe.dump()) == recipe
    result = execute(recipe, quiet=True)
    weights = [r["train/schedule/teacher.0.routes.code.weight"] for r in result.history if "train/loss" in r]
    assert weights == [1.0, 0.5, 0.0]


def test_training_moves_each_half_to_its_own_teacher(models, tmp_path):
    result = execute(routed_recipe(models, tmp_path, steps=40), quiet=True)
    assert result.after["reverse_kl"] < 0.7 * result.before["reverse_kl"]
    assert all(r["train/teacher_tokens"] == r["train/sampled_tokens"] for r in result.history if "train/loss" in r)
    for name in ("samples.jsonl", "rollouts.jsonl"):
        rows = [json.loads(line) for line in (result.directory / name).read_text().splitlines()]
        tags = {row["prompt"]: row["task"] for row in ROWS}
        assert rows
        assert all(row["teacher"] == tags[row["prompt"]] for row in rows)
    card = (result.directory / "student" / "README.md").read_text()
    assert "math for math, code for code" in card
    assert "math for math, code for code" in (result.directory / "report.html").read_text()


def test_each_route_logs_its_own_trajectories_lengths_rewards_and_divergence(models, tmp_path):
    changes = {"steps": 3, "batch": {"prompts": 6, "group": 2, "micro": 5}, "end_tokens": [2, 5, 8, 11]}
    changes |= {"shaping": {"kind": "log_ratio_gate", "limit": 2.0}, "verifier": {"kind": "exact_match"}}
    data = routed_recipe(models, tmp_path, **changes).dump()
    # Only the rows of one route have an answer to be judged by.
    rows = [row | ({"answer": "1"} if row["task"] == "math" else {}) for row in ROWS]
    data["prompts"] = {"kind": "inline", "prompts": rows}
    steps = [record for record in execute(parse_recipe(data), quiet=True).history if "train/loss" in record]
    assert len(steps) == 3
    for step in steps:
        counts = {tag: step[f"train/route/{tag}/trajectories"] for tag in WIDTHS}
        assert sum(counts.values()) == 12
        of = {name: [step.get(f"train/route/{tag}/{name}", 0.0) for tag in WIDTHS] for name in ("length", "divergence")}
        lengths = [n * length for n, length in zip(counts.values(), of["length"], strict=True)]
        assert sum(lengths) == pytest.approx(12 * step["train/length"])
        assert all(f"train/route/{tag}/gated" in step for tag, count in counts.items() if count)
        assert "train/route/code/reward" not in step
        if counts["math"]:
            assert step["train/route/math/reward"] == step["train/reward"]
    one = [step for step in steps if step["train/route/math/trajectories"] and step["train/route/code/trajectories"]]
    assert any(step["train/route/math/divergence"] != step["train/route/code/divergence"] for step in one)


TURNS = "{% for m in messages %}<turn>{{ m['role'] }}: {{ m['content'] }}<end_of_turn>{% endfor %}<turn>"


def test_a_template_of_a_routes_own_leaves_the_completions_as_they_are():
    teacher, trajectories = experts(), mixed()
    model, tokenizer = tiny_model(vocabulary=98, seed=5).requires_grad_(False), turn_tokenizer(TURNS)
    seen = {}
    for template in ("plain", "auto"):
        language = LanguageModel(model, tokenizer, **({} if template == "auto" else {"template": template}))
        language.register_forward_hook(lambda _, given, __, name=template: seen.setdefault(name, []).extend(given))
        teacher.routes["code"] = LanguageTeacher(language, LocalTeacher(model="(live)"), torch.device("cpu"))
        parts = list(teacher.answer(trajectories, teacher.settings, CPU))
        assert len(parts[0].distribution) == trajectories.positions
    mine = [i for i, prompt in enumerate(trajectories.prompts) if prompt.fields["task"] == "code"]
    completions = [trajectories.completions()[i].tolist() for i in mine]
    for contexts, written, *_ in seen.values():
        assert sorted(each.tolist() for each in written) == sorted(completions)
        assert len(contexts) == len(mine)
    assert [list(map(int, c)) for c in seen["plain"][0]] != [list(map(int, c)) for c in seen["auto"][0]]


def test_swapped_routes_give_each_trajectory_the_other_ones_answer():
    teacher, trajectories = experts(), mixed()
    straight = said(teacher, trajectories).log_probs()
    teacher.routes = dict(zip(WIDTHS, reversed(teacher.routes.values()), strict=True))
    swapped = said(teacher, trajectories).log_probs()
    assert ((straight - swapped).abs().amax(1) > 1e-3).all()
    for i, prompt in enumerate(trajectories.prompts):
        one, here = trajectories.rows(i, i + 1)
        other = said(teacher.routes[prompt.fields["task"]], one)
        torch.testing.assert_close(swapped[here], other.log_probs(), atol=1e-5, rtol=1e-5)


def test_evaluation_judges_each_prompt_by_its_own_teacher(models, tmp_path):
    run = build(routed_recipe(models, tmp_path), tmp_path)
    for row in evaluate(run).rows:
        (prompt,) = [p for p in run.held_out if p.id == row["id"]]
        trajectories = run.sampler(run.at(0))([prompt], 1, 12, stream=-1)
        own = said(run.teachers[0].routes[prompt.fields["task"]], trajectories, run.context)
        value = compare(run.student(trajectories).detach(), own, trajectories.actions).values["reverse_kl"]
        assert row["values"]["reverse_kl"] == pytest.approx(value.tolist(), abs=1e-3)


def test_a_student_says_all_its_teachers(models, tmp_path):
    run = build(routed_recipe(models, tmp_path), tmp_path)
    assert len(origin(run)) == 2
    assert set(origin(run)) == {route.identity() for route in run.teachers[0].routes.values()}
    other = build(routed_recipe(models, tmp_path), tmp_path)
    with torch.no_grad():
        next(other.teachers[0].routes["code"].language.parameters())[0, 0] += 1
    assert run.teachers[0].fingerprint() != other.teachers[0].fingerprint()


def test_routes_remember_their_answers(models, tmp_path):
    rows = [{**row, "response": "7"} for row in ROWS]
    recipe = routed_recipe(models, tmp_path, steps=4, self_test=False)
    data = recipe.dump() | {"rollout": {"kind": "data"}, "objective": "forward_kl"}
    data["prompts"] = {"kind": "inline", "prompts": rows}
    data["batch"] = {"prompts": 8, "group": 1}
    data["evaluation"] = {"held_out": 4}
    for route in data["teacher"][0]["routes"].values():
        route["cache"] = {"path": str(tmp_path / "answers")}
    result = execute(parse_recipe(data), quiet=True)
    assert [r["train/teacher_hit_rate"] for r in result.history if "train/loss" in r] == [0.0, 0.0, 1.0, 1.0]


def test_a_moving_route_goes_on_bit_for_bit(models, tmp_path):
    """One route is frozen, the other follows the student and is in the checkpoint."""
    routes = {"math": {"model": models["math"], "template": "plain"}, "code": {"kind": "self", "rate": 0.5}}
    settings = {"teacher": {"routes": routes}, "steps": 4, "checkpoint": {"every": 2, "keep_last": 9}}
    whole = execute(routed_recipe(models, tmp_path, **settings), quiet=True)
    again = routed_recipe(models, tmp_path, **settings | {"teacher": {"routes": routes}})
    shutil.rmtree(folder_of(whole.directory, 4))
    resumed = execute(again, resume=True, quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stored_routes_pass_the_gate_each_for_itself(models, tmp_path):
    """Both experts score one store; a student that was fine-tuned by only one of them is refused."""
    from opd.jobs.sampling import sample
    from opd.jobs.scoring import score

    recipe = routed_recipe(models, tmp_path)
    store = tmp_path / "store"
    sample(recipe, store, quiet=True)
    with pytest.raises(RecipeError, match=r"the recipe has 2 teachers.*--teacher NAME"):
        score(recipe, store, quiet=True)
    names = {}
    for tag in WIDTHS:
        targets = score(recipe, store, "exact", teacher=tag, dtype="float32", quiet=True)
        names[tag] = (targets.path.name, targets.header.teacher["weights"])
    folder = models["student"]
    routes = {tag: {"kind": "stored", "path": str(store), "targets": names[tag][0]} for tag in WIDTHS}
    settings = {"teacher": {"routes": routes}, "rollout": {"kind": "stored", "path": str(store)}}
    data = routed_recipe(models, tmp_path).dump()
    data |= {"rollout": settings["rollout"], "objective": {"kind": "reverse_kl"}, "output": str(tmp_path / "offline")}
    data["teacher"][0]["routes"] = routes
    data["rollout"]["max_new_tokens"] = 12
    data["teacher"][0]["routes"]["math"]["sft_teacher"] = names["math"][1]
    with pytest.raises(IncompatibleError, match="does not say which teacher"):
        execute(parse_recipe({**data, "objective": "lightning"}), quiet=True)
    data["teacher"][0]["routes"]["code"]["sft_teacher"] = names["code"][1]
    result = execute(parse_recipe(data), quiet=True, overwrite=True)
    assert result.summary["steps"] == 3
    assert set(json.loads((result.directory / "student/opd.json").read_text())["teachers"]) == {
        weights for _, weights in names.values()
    }
    assert folder


def test_routes_that_answer_otherwise_are_refused(models, tmp_path):
    teacher = experts()
    teacher.routes["code"].answers = Sampled
    with pytest.raises(IncompatibleError, match="math categorical, code sampled"):
        RoutedTeachers(teacher.settings, teacher.routes)


def test_a_route_with_another_tokenizer_is_refused_by_its_name(models, tmp_path):
    from opd.language.creation import create_model, named_tokenizer

    other = create_model(tmp_path / "other", named_tokenizer("task:arithmetic"), width=32, heads=2)
    routes = {
        "math": {"model": models["math"], "template": "plain"},
        "code": {"model": str(other), "template": "plain"},
    }
    with pytest.raises(IncompatibleError, match="the teacher of route 'code' has another tokenizer"):
        build(routed_recipe(models, tmp_path, teacher={"routes": routes}), tmp_path)


def test_a_routed_teacher_writes_each_prompt_by_its_own(models, tmp_path):
    """Cold start: the student imitates each expert on its own prompts."""
    recipe = routed_recipe(models, tmp_path, objective="sft").dump()
    recipe["rollout"] = {"kind": "teacher", "max_new_tokens": 8}
    run = build(parse_recipe(recipe), tmp_path)
    prompts = run.course.next(0, {}, None).prompts
    written = rolled_out(run, prompts, 2, 8, stream=3)
    assert [p.id for p in written.prompts] == [p.id for p in prompts for _ in range(2)]
    for i, prompt in enumerate(prompts):
        source = run.rollout.sources[prompt.fields["task"]]
        alone = source(run.at(0).request([prompt], 8, stream=3, group=2))
        mine, _ = written.rows(2 * i, 2 * i + 2)
        assert torch.equal(mine.actions, alone.actions)


def test_the_plan_counts_all_weights_and_the_widest_answers(models, tmp_path):
    plan = make_plan(routed_recipe(models, tmp_path))
    math, code = plan.teachers
    assert math.name.endswith("for math")
    assert plan.memory["teacher 0 weights"] == math.weight_bytes
    assert plan.memory["teacher 1 weights"] == code.weight_bytes
    assert plan.memory["teachers 0-1 answers (hidden states)"] == 8 * 2 * 12 * 48 * 4


def test_the_command_line_from_end_to_end(models, tmp_path, monkeypatch, capsys):
    recipe = routed_recipe(models, tmp_path).dump()
    recipe["prompts"][0]["prompts"] = [*ROWS[:-1], {"prompt": "1+1=", "task": "poetry"}]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["opd", "train", str(path), "--quiet"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "has task 'poetry', and teacher.routes has math, code; add" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["opd", "train", str(path), "--quiet", "teacher.0.default=code"])
    with pytest.raises(SystemExit) as trained:
        main()
    assert not trained.value.code
    assert (tmp_path / "run/student/model.safetensors").is_file()
