"""The page on extending: each of its choices, taken from the page alone, trains under its name."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import opd
from opd.acting.creation import create_policy
from opd.catalogue import axes, find, settings_of
from opd.choice import Choice
from opd.distributions import Categorical, Head
from opd.environments import Start
from opd.errors import DataError, IncompatibleError, ModelError
from opd.language.creation import create_model, task_tokenizer
from opd.loop import accumulate_step
from opd.prompts import Prompt
from opd.recipe import json_schema, parse_recipe
from opd.rollouts import Request
from opd.rollouts.student import StudentRollout
from opd.truth_table import measure_choice
from opd.verifiers.drawing import DrawingReward
from tests.agents import talking
from tests.conftest import save_tiny
from tests.test_imports import AXES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:] if "```python" in part}


def code_of(section: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
    return code


def named(section: str) -> dict:
    """What the page writes into a recipe."""
    (text,) = re.findall(r"In a recipe:\s+`(.*?)`", SECTIONS[section], re.S)
    return yaml.safe_load(text)


@pytest.fixture(scope="module", autouse=True)
def theirs(tmp_path_factory) -> dict[str, ModuleType]:
    """Every block as a file of its own in a package of somebody else's, by section."""
    folder = tmp_path_factory.mktemp("theirs")
    package = folder / "their_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    found = {}
    sys.path.insert(0, str(folder))
    for section in SECTIONS:
        (package / f"{section.lower()}.py").write_text(code_of(section), encoding="utf-8")
        found[section] = importlib.import_module(f"their_methods.{section.lower()}")
    yield found
    # What is defined here is a choice nowhere else.
    for module in found.values():
        for choice in choices_in(module):
            choice.__annotations__.pop("kind")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    widths = {"small": 32, "large": 48, "other": 32}
    return {
        f"org/{name}": save_tiny(folder / name, width=width, seed=seed)
        for seed, (name, width) in enumerate(widths.items())
    }


def trained(folder: Path, models: dict[str, str], **blocks):
    """One short run: its result, the trajectories of each step, and the run itself."""
    shared = {
        "student": {"model": "org/small"},
        "teacher": {"model": "org/large"},
        "rollout": {"max_new_tokens": 12},
        "steps": 2,
        "batch": {"prompts": 6, "group": 2, "micro": 5},
        "end_tokens": [2, 5, 8, 11, 14, 17],
        "evaluation": {"held_out": 2, "samples": 1},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "output": str(folder),
    }
    text = json.dumps(shared | blocks)
    for name, path in models.items():
        text = text.replace(f'"{name}"', json.dumps(path))
    settings = json.loads(text)
    for block in (
        settings["student"],
        settings["teacher"],
        *(settings["teacher"].get(k, {}) for k in ("first", "second")),
    ):
        if "model" in block:
            block["template"] = "plain"
    settings.setdefault("prompts", {"kind": "inline", "prompts": [f"{a}+{b}=" for a in range(4) for b in range(4)]})
    seen, runs = [], []
    with pytest.MonkeyPatch.context() as patch:

        def noted(run, *rest):
            seen.append(accumulate_step(run, *rest))
            runs.append(run)
            return seen[-1]

        patch.setattr(opd.loop, "accumulate_step", noted)
        result = opd.distill(**settings, quiet=True)
    return result, seen, runs[0]


@pytest.fixture(scope="module")
def together(theirs, models, tmp_path_factory):
    """Nine of them in one run."""
    folder = tmp_path_factory.mktemp("together")
    questions = folder / "questions"
    questions.mkdir()
    for i in range(12):
        (questions / f"{i}.txt").write_text(f"{i}+1=\n")
        # What a tiny student writes has some letters of the alphabet.
        (questions / f"{i}.pattern").write_text(".*[A-M].*")
    parts = ("Prompts", "Curriculum", "Rollout", "Teacher", "Policy", "Shaping", "Update", "Verifier")
    blocks = {key: value for part in parts for key, value in named(part).items()}
    blocks["prompts"]["path"] = str(questions)
    blocks["rollout"]["writer"] = {"kind": "student", "max_new_tokens": 12}
    blocks["objective"] = [named("Divergence")["objective"], named("Objective")["objective"]]
    return trained(folder / "run", models, **blocks, steps=3, temperature=0.8)


def steps_of(result):
    return [record for record in result.history if "train/loss" in record]


def weights_of(folder):
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def choices_in(module: ModuleType) -> list[type[Choice]]:
    own = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
    return [value for value in own if issubclass(value, Choice)]


def test_the_page_has_a_choice_of_every_axis(theirs):
    shown = [choice for module in theirs.values() for choice in choices_in(module)]
    assert len(shown) == len(theirs)
    assert {choice.axis for choice in shown} == {*axes(), "divergence"}
    bases = [next(base for base in choice.__mro__ if "axis" in vars(base)) for choice in shown]
    assert {base.__module__.split(".")[1] for base in bases} >= set(AXES)


def test_they_are_in_the_schema_and_in_the_list_of_choices(theirs):
    schema = json.loads(json_schema())["$defs"]
    assert {"SureTeacher", "HardOnes", "Hellinger", "Euclid", "Confident"} <= schema.keys()
    (kind,) = find("shaping.sure_teacher")
    assert kind.package == "their_methods"
    assert kind.line.startswith("Counts a position by `exp(-H / scale)`")
    assert {s.key: s.bounds for s in settings_of(kind.choice)}["scale"] == "> 0"


def test_prompts_are_the_files_of_a_folder(together, theirs, tmp_path):
    made = together[1][0]
    assert {p.fields["pattern"] for p in made.prompts} == {".*[A-M].*"}
    assert all(p.view() == f"{p.id}+1=" for p in made.prompts)
    with pytest.raises(DataError, match="no file of texts"):
        theirs["Prompts"].FolderPrompts(path=str(tmp_path)).load()


def test_the_curriculum_draws_what_was_wrong(together, theirs):
    result, seen, run = together
    course = run.course
    assert isinstance(course, theirs["Curriculum"].HardOnesCourse)
    right = dict.fromkeys(course.places, 0.0)
    for made in seen:
        for prompt, reward in zip(made.prompts, made.rewards.tolist(), strict=True):
            right[prompt.id] = 0.8 * right[prompt.id] + 0.2 * reward
    assert max(right.values()) > 0, "some were right"
    assert course.right.tolist() == pytest.approx(list(right.values()))
    means = [record["train/curriculum/right"] for record in steps_of(result)]
    assert means[0] == 0
    assert means[-1] > 0
    again = theirs["Curriculum"].HardOnesCourse(0.1, course.prompts, 200, 0)
    again.load_state_dict({"right": (torch.arange(len(course.prompts)) > 0).float()})
    drawn = [prompt.id for prompt in again.next(0, {}, None).prompts]
    first, others = drawn.count(course.prompts[0].id), len(drawn) - drawn.count(course.prompts[0].id)
    assert first > others / (len(course.prompts) - 1) * 4, "ten times as often as each other one"
    with pytest.raises(IncompatibleError, match="there is no verifier"):
        again.saw(replace(seen[0], rewards=None), {}, {}, None)


def test_the_rollout_draws_at_two_temperatures(together):
    made, run = together[1][0], together[2]
    hot = made.columns["hot"]
    assert 0 < hot.float().mean() < 1
    by_prompt = {}
    for prompt, here in zip(made.prompts, torch.split(hot, made.lengths.tolist()), strict=True):
        by_prompt.setdefault((prompt.id, prompt.repeat), set()).update(here.tolist())
    assert all(len(found) == 1 for found in by_prompt.values())
    # Before the first step the student is the one that is saved under its name.
    fresh = run.recipe.student.build(run.context)
    for temperature, where in ((0.8, ~hot), (1.5, hot)):
        with torch.no_grad():
            own = fresh(made, run.context.with_(temperature=temperature)).log_probs()
        taken = own.gather(1, made.actions[:, None]).squeeze(1)
        torch.testing.assert_close(taken[where], made.behaviour_log_probs[where], atol=1e-4, rtol=1e-4)


def test_the_teacher_is_the_product_of_two(together, theirs):
    made, run = together[1][0], together[2]
    (teacher,), now = run.teachers, run.at(0)
    assert isinstance(teacher, theirs["Teacher"].BlendedTeacher)
    (said,) = teacher.answer(made, now.recipe.teacher[0], now.context)
    first, second = (
        part.answer(made, of_part, now.context)[0].distribution.log_probs()
        for part, of_part in zip(
            teacher.parts, (now.recipe.teacher[0].first, now.recipe.teacher[0].second), strict=True
        )
    )
    wanted = (0.7 * first + 0.3 * second).log_softmax(-1)
    drawn = wanted > -1e6
    torch.testing.assert_close(said.distribution.log_probs()[drawn], wanted[drawn], atol=1e-4, rtol=1e-4)
    assert len(json.loads((together[0].directory / "student/opd.json").read_text())["teachers"]) == 2


def test_the_policy_trains_vectors_and_the_update_moves_each_by_signs(together, models, theirs):
    result, _, run = together
    before, after = weights_of(models["org/small"]), weights_of(result.directory / "student")
    moved = {name: (after[name] - before[name]).abs().max() for name in before}
    assert all((change > 0) == (before[name].ndim == 1) for name, change in moved.items())
    # Three steps of 1e-4 each, forth or back.
    steps = torch.cat([(after[n] - before[n]) / 1e-4 for n in before if before[n].ndim == 1])
    torch.testing.assert_close(steps, steps.round(), atol=2e-2, rtol=0)
    assert steps.abs().max() <= 3.01
    assert set(run.optimiser.state_dict()["means"]) == {f"model.{n}" for n in before if before[n].ndim == 1}
    with pytest.raises(ModelError, match="no vector to train"):
        theirs["Policy"].keep_vectors(torch.nn.Linear(2, 2, bias=False))


def test_the_shaping_counts_less_where_the_teacher_is_unsure(together):
    result, seen, run = together
    made = seen[-1]
    now = run.at(2)
    targets = run.ask(made, now)
    (shaper,), (settings,) = run.shaping, now.recipe.shaping
    shape = shaper(None, targets, made, settings)
    log_p = targets[0].distribution.log_probs()
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(shape.weights, torch.exp(-entropy / 0.5), atol=1e-5, rtol=1e-5)
    assert all(record["train/teacher_entropy"] > 0 for record in steps_of(result))
    with pytest.raises(IncompatibleError, match="one teacher's whole distributions"):
        shaper(None, targets * 2, made, settings)


def test_the_engine_writes_with_a_copy_that_follows(theirs, models, tmp_path):
    result, _, run = trained(tmp_path / "run", models, **named("Engine"))
    records = steps_of(result)
    copied = [record["train/engine/copied"] for record in records]
    assert copied == sorted(set(copied))
    # A copy that had stayed behind would be farther off at each step.
    assert all(0 < record["train/rollout_gap"] < 0.1 for record in records)
    assert run.rollout.writer.copy is None


def test_the_signal_of_compatibility_says_where_they_part(theirs, models, tmp_path):
    result, _, run = trained(tmp_path / "run", models, **named("Compatibility"))
    assert all(0 < record["train/likeness"] <= 1 for record in steps_of(result))
    assert isinstance(run.recipe.shaping[0].signal, theirs["Compatibility"].Likeness)
    g = torch.Generator().manual_seed(0)
    log_q, log_p = (torch.randn(20, 6, generator=g).log_softmax(-1) for _ in range(2))
    student, teacher = (Categorical(each, Head(torch.eye(6))) for each in (log_q, log_p))
    actions = torch.zeros(20, dtype=torch.long)
    # Over all ids it is the textbook's, of one distribution with itself 1, and of ids that none shares 0.
    m = ((log_q.exp() + log_p.exp()) / 2).log()
    divergence = ((log_q.exp() * (log_q - m)).sum(-1) + (log_p.exp() * (log_p - m)).sum(-1)) / 2
    signal = theirs["Compatibility"].Likeness(k=6)
    found = signal.measure(student, teacher, actions)
    torch.testing.assert_close(found, 1 - divergence / torch.tensor(2.0).log())
    assert signal.events(found).tolist() == (found < 0.8).tolist()
    few = theirs["Compatibility"].Likeness(k=2)
    torch.testing.assert_close(few.measure(student, student, actions), torch.ones(20))
    mirrored = Categorical(-log_q, Head(torch.eye(6)))
    torch.testing.assert_close(few.measure(student, mirrored, actions), torch.zeros(20))


def test_the_objectives_are_summed_and_the_best_are_imitated(together, theirs):
    result, seen, run = together
    assert {"train/objective/hellinger(top_k=32)", "train/objective/above_mean(margin=0.1)"} <= set(
        steps_of(result)[-1]
    ), sorted(steps_of(result)[-1])
    made = next(made for made in seen if 0 < made.rewards.mean() < 1)
    objective = next(o for o in run.recipe.objective if isinstance(o, theirs["Objective"].AboveMean))
    with torch.no_grad():
        loss = objective(run.student(made), [], torch.ones(made.positions), made)
    better = (made.rewards > made.group_mean + 0.1).repeat_interleave(made.lengths)
    assert torch.equal(loss.values != 0, better)
    assert 0 < better.float().mean() < 1


def test_the_divergence_descends_what_it_promises(together, theirs):
    row = measure_choice(theirs["Divergence"].Hellinger())
    assert row.cosine == pytest.approx(1, abs=1e-4)
    assert row.norm_ratio == pytest.approx(1, abs=1e-3)
    assert 0 < steps_of(together[0])[0]["train/divergence"] <= 4


def test_the_verifier_reads_each_rows_pattern(together, theirs):
    for made in together[1]:
        texts = together[2].student.outcomes(made)
        assert made.rewards.tolist() == [float(re.search("[a-m]", text, re.I) is not None) for text in texts]
    matches = theirs["Verifier"].Matches()
    assert matches.score(Prompt("a", {"prompt": "x"}), "B") is None
    with pytest.raises(DataError, match="no regular expression"):
        matches.check_prompts([Prompt("a", {"prompt": "x", "pattern": "("})])


def test_the_task_asks_and_the_watch_ends_rows(tmp_path):
    blocks = named("Task") | named("Watch")
    blocks["rollout"]["watch"]["least"] = 0.0
    blocks["rollout"] |= {"segment": 4, "max_new_tokens": 12}
    own = {
        f"org/{name}": str(create_model(tmp_path / name, task_tokenizer("euclid"), width=32, layers=1, seed=seed))
        for seed, name in enumerate(("small", "large"))
    }
    result, seen, _ = trained(tmp_path / "run", own, **blocks)
    made = seen[0]
    assert set(made.stopped) - {None} == {"unlikely"}
    assert made.lengths.max() == 4
    assert steps_of(result)[0]["train/stopped"] > 0
    assert all(re.fullmatch(r"\d+,\d+:", prompt.view()) for prompt in made.prompts)


def test_the_tasks_completions_are_right():
    task = find("task.euclid")[0].choice()
    assert task.steps("84,36:") == [("84%36=12", "12"), ("36%12=0", "0")]
    for row in task.examples(20):
        assert task.first_wrong_step(row.prompt, row.response) is None
    assert task.first_wrong_step("84,36:", "84%36=11;36%12=0;#12") == 0


def test_the_watch_ends_what_its_teacher_finds_unlikely(theirs, student, prompts):
    teacher = type("Asked", (), {"language": student.language})()

    def drawn(least):
        settings = theirs["Watch"].Confident(least=least)
        watched = StudentRollout().model_copy(update={"watch": settings, "segment": 4})
        source = watched.build(student.context, student, [teacher])
        return source(Request(prompts, 1, 12, 0, watched, student.context))

    assert set(drawn(-99.0).stopped) == {None}
    stopped = drawn(0.0)
    assert set(stopped.stopped) - {None} == {"unlikely"}
    assert stopped.lengths.max() == 4
    with pytest.raises(IncompatibleError, match="asks a teacher's model"):
        theirs["Watch"].Confident().build(student.context, student, [])


def test_the_drawings_are_prompts_with_a_reward(models, tmp_path):
    _, seen, _ = trained(tmp_path / "run", models, **named("Drawing"), steps=1)
    assert all(re.fullmatch(r"\w+ above \w+", prompt.view()) for prompt in seen[0].prompts)
    for prompt in seen[0].prompts:
        picture = prompt.fields["image"] / 255
        assert DrawingReward().score(prompt, picture) == 1
        assert DrawingReward().score(prompt, picture[::-1]) == 0


def test_the_environment_is_played_in_and_its_expert_teaches(tmp_path, theirs):
    blocks = named("Environment")
    world = theirs["Environment"].Line(width=2.0)
    made = create_policy(tmp_path / "policy", world.body(), ["go to zero"], reads=["state"], bins=8, width=16, heads=1)
    result = opd.distill(
        {"kind": "action_tokens", "model": str(made)},
        {"kind": "scripted"},
        blocks["prompts"],
        rollout={"kind": "simulator", "decisions": 3},
        steps=2,
        batch={"prompts": 4, "micro": 4},
        evaluation={"prompts": blocks["prompts"] | {"seed": 1}, "frames": False},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert all(record["train/gradient_norm"] > 0 for record in steps_of(result))
    # From anywhere its own expert comes to zero in one action after another.
    arm = world.build()
    chunk = arm.begin(Start("zero", 3), 4)
    while not chunk.turn.over:
        chunk = arm.play(chunk.plan.mean[:1], 4)
    assert chunk.turn.outcome == 1


def test_the_conversation_is_played_in_turns(tmp_path, theirs):
    student, teacher = talking(tmp_path)
    prompts = named("Conversation")["prompts"]
    result = opd.distill(
        student,
        teacher,
        prompts,
        rollout={"kind": "agent", "turns": 2, "max_new_tokens": 4},
        steps=2,
        batch={"prompts": 3, "micro": 4},
        evaluation={"prompts": prompts | {"seed": 1, "per_task": 2}},
        tracking={"trackers": []},
        hardware={"device": "cpu", "threads": 1},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    assert all(record["train/gradient_norm"] > 0 for record in steps_of(result))
    world = theirs["Conversation"].HigherLower(most=9).build()
    turn = world.reset(Start("find", 3))
    while not turn.over:
        turn = world.step(world.expert())
    assert turn.outcome >= 1 / 4, "it halves what is left"


@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_page_writes_into_a_recipe_is_accepted(section):
    rest = {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"kind": "inline", "prompts": ["a"]}}
    needs = {
        "Objective": {"verifier": "exact_match", "batch": {"group": 2}},
        "Drafter": {"teacher": {"kind": "target"}, "rollout": "speculative", "objective": "accepted"},
        "Environment": {"student": {"kind": "action_tokens", "model": "s"}, "teacher": "scripted"}
        | {"rollout": "simulator"},
        "Conversation": {"rollout": "agent"},
    }
    recipe = parse_recipe(rest | needs.get(section, {}) | named(section))
    (kind,) = re.findall(r'kind: Literal\["(.*?)"\]', code_of(section))
    assert f'"{kind}"' in json.dumps(recipe.dump())


def test_the_drafter_learns_and_is_loaded_again(models, tmp_path, theirs):
    def run(place, **student):
        return opd.distill(
            {**named("Drafter")["student"], "target": {"model": models["org/large"], "template": "plain"}, **student},
            {"kind": "target"},
            [f"{a}+{b}=" for a in range(4) for b in range(4)],
            rollout={"kind": "speculative", "max_new_tokens": 12},
            objective=["accepted", "rejected"],
            steps=8,
            batch={"prompts": 6, "micro": 5},
            update={"learning_rate": 1e-2},
            evaluation={"held_out": 2, "samples": 1},
            tracking={"trackers": []},
            hardware={"device": "cpu", "threads": 1},
            output=str(tmp_path / place),
            quiet=True,
        )

    first = run("first")
    assert first.after["reverse_kl"] < first.before["reverse_kl"]
    assert first.after["acceptance_length"] >= 1
    again = run("again", model=str(first.directory / "student"), drafter=None)
    assert type(again.student) is type(first.student) is theirs["Drafter"].HeadsDrafter
    assert again.before == pytest.approx(first.after, rel=1e-3)
