"""Language agents: episodes of text, turn by turn."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from opd.api import execute
from opd.environments import Start
from opd.environments.text import TextEnvironment
from opd.environments.tool_machine import TASKS, ToolMachine
from opd.errors import DataError, IncompatibleError, ModelError, OpdError, RecipeError
from opd.evaluation import evaluate
from opd.language.calls import Call, Reply
from opd.language.encoding import WRITTEN, conversation, rewritten
from opd.language.engines.base import ids_of
from opd.language.engines.transformers import LanguageModel
from opd.language.episodes import TURN
from opd.language.replies import CallFormat, call_format
from opd.loop import train
from opd.plan import make_plan
from opd.policies.causal_lm import CausalLM
from opd.policies.held_out import wilson
from opd.prompts import Prompt
from opd.report import write_report
from opd.rollouts import Request
from opd.server import Limits, ServedModel
from opd.server.serving import application
from tests.agents import DROPS, TOOLS, agents, game, talking
from tests.serving import serving
from tests.test_loop import build
from tests.tiny import turn_tokenizer


@pytest.fixture
def models(tmp_path):
    return talking(tmp_path)


def reader(template=TOOLS, **options):
    return LanguageModel(None, turn_tokenizer(template), "chat", options)


def played(run, group=2, prompts=None, stream=0, **settings):
    own = run.recipe.rollout.model_copy(update=settings)
    return run.rollout(Request(prompts or run.held_out, group, own.budget, stream, own, run.context))


def episodes(made):
    """Rows of each episode."""
    of = made.episodes.tolist()
    return [[i for i, each in enumerate(of) if each == number] for number in dict.fromkeys(of)]


# -- environments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["template", "words"])
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_of_the_machine_reaches_the_goal_by_several_calls(task, style):
    world = ToolMachine(style=style).build()
    for seed in range(5):
        turn, calls = world.reset(Start(task, seed)), 0
        assert [m["role"] for m in turn.observation] == ["user"]
        while not turn.over:
            turn, calls = world.step(world.expert()), calls + 1
        assert turn.outcome == 1
        assert 2 <= calls <= 4, "what is written was read before"


def test_the_machine_says_what_was_wrong_and_checks_the_goal_itself():
    world = ToolMachine(only=["copy"]).build()
    world.reset(Start("copy", 3))
    names, cells = world.goal.names, world.goal.cells
    said = world.step(Reply("", (Call("read", {"cell": names["a"]}), Call("read", {"cell": "zz"}))))
    assert [m["content"] for m in said.observation] == [str(cells[names["a"]]), "error: there is no cell 'zz'"]
    assert not said.over
    for reply, told in (
        (Reply("hello"), "error: no tool was called"),
        (Reply("x", (), "the call is not JSON"), "error: the call is not JSON"),
        (Reply("", (Call("open", {}),)), "error: there is no tool 'open'"),
        (Reply("", (Call("write", {"cell": "a", "value": "7"}),)), "error: value is no whole number"),
    ):
        assert world.step(reply).observation[0]["content"] == told
    won = world.step(Reply("", (Call("write", {"cell": names["c"], "value": cells[names["a"]]}),)))
    assert (won.done, won.outcome) == (True, 1.0)


def test_rows_name_environment_and_tools_and_refuse_other_students(tmp_path):
    from opd.environments.control import Control
    from opd.prompts.episodes import EpisodePrompts

    rows = EpisodePrompts(environment=ToolMachine(only=["sum", "swap"]), per_task=2, seed=3).load()
    assert [row.id for row in rows] == [f"tool_machine-{t}-3-{i}" for i in (0, 1) for t in ("sum", "swap")]
    assert [tool["function"]["name"] for tool in rows[0].fields["tools"]] == ["read", "write"]
    assert TextEnvironment.of(rows[0]) == ToolMachine(only=["sum", "swap"])
    with pytest.raises(DataError, match="is for students of language models"):
        Control.of(rows[0])


def test_single_turns_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    from opd.environments.reasoning_gym import ReasoningGymEnvironment

    world = ReasoningGymEnvironment(only=["leg_counting"]).build()
    asked = world.reset(Start("leg_counting", 4)).observation
    assert (
        asked == world.reset(Start("leg_counting", 4)).observation != world.reset(Start("leg_counting", 5)).observation
    )
    world.reset(Start("leg_counting", 4))
    answered = world.step(Reply(str(world.entry["answer"])))
    assert (answered.done, answered.outcome) == (True, 1.0)
    world.reset(Start("leg_counting", 4))
    assert world.step(Reply("none")).outcome < 1


def test_options_of_reasoning_gym_are_the_tasks_own(models, tmp_path):
    pytest.importorskip("reasoning_gym")
    for key in ("seed", "size"):
        with pytest.raises(RecipeError, match=f"'{key}' is not the task's"):
            agents(models, tmp_path, prompts=game(kind="reasoning_gym", only=["leg_counting"], options={key: 3}))
    wrong = game(kind="reasoning_gym", only=["leg_counting"], options={"max_animal": 3})
    with pytest.raises(DataError, match=r"'reasoning_gym' cannot begin the task 'leg_counting' \(.*max_animal"):
        build(agents(models, tmp_path, prompts=wrong), tmp_path)


def test_games_of_textworld_are_won_by_their_own_walkthrough():
    pytest.importorskip("textworld")
    from opd.environments.textworld import TextWorldEnvironment

    world = TextWorldEnvironment(rooms=1, objects=2, quest=1).build()
    try:
        turn = world.reset(Start("quest", 3))
        assert "You can: " in turn.observation[0]["content"]
        lost = world.step(Reply("examine nothing at all\nand more"))
        assert not lost.over
        assert ">" not in lost.observation[0]["content"]
        for _ in range(3):
            turn = turn if turn.over else world.step(world.expert())
        assert (turn.done, turn.outcome) == (True, 1.0)
    finally:
        world.close()


# -- calls and contexts --------------------------------------------------------------------------------------------

HERMES = TOOLS.replace("[CALL]", "<tool_call>").replace("[END]", "</tool_call>")
BARE = (
    "{{ tools | length if tools else '' }}{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{% for c in m['tool_calls'] or [] %}"
    '{"name": "{{ c["function"]["name"] }}", "parameters": {{ c["function"]["arguments"] | tojson }}}{% endfor %}'
    '{{ m["content"] }}<end_of_turn>{% endfor %}'
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
LIST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% elif m['tool_calls'] %}"
    "[TOOL_CALLS][{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}]<eos>{% else %}"
    "{{ m['content'] }}<eos>{% endif %}{% endfor %}{% if tools %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, 'I look. <tool_call>\n{"name": "read", "arguments": {"cell": "a"}}\n</tool_call>'),
        (BARE, '{"name": "read", "parameters": {"cell": "a"}}'),
        (LIST, '[TOOL_CALLS][{"name": "read", "arguments": {"cell": "a"}}]'),
    ],
)
def test_calls_are_read_in_the_form_that_the_template_writes(template, text):
    form = call_format(reader(template))
    assert form.read(text).calls == (Call("read", {"cell": "a"}),)
    assert form.read("I do not know").calls == ()
    call = Call("write", {"cell": "b", "value": 3})
    assert form.read(form.write(call)) == Reply(form.write(call), (call,))


def test_what_is_no_call_is_said_and_a_template_without_calls_is_refused():
    form = CallFormat("[CALL]", "[END]", "name", "arguments")
    assert form.read("[CALL]{[END]").fault == "the call is not JSON"
    assert form.read('[CALL]{"name": "a"').fault == "the call is not closed by [END]"
    assert form.read('[CALL]{"nom": "a"}[END]').fault == "the call has no text under the key 'name'"
    assert form.read('[CALL]{"name": "a", "arguments": 3}[END]').fault == "'arguments' of the call is no object"
    with pytest.raises(IncompatibleError, match=r"no JSON object for one\); take an environment .*style: words"):
        call_format(reader(DROPS))


def test_replies_stand_by_their_ids_and_the_template_adds_the_rest():
    language, prompt = reader(), Prompt("p", {}, where="here")
    tokens = language.tokenizer
    opening = [{"role": "user", "content": "hi"}]
    # Ids that no text would be split into: 'a', then the end token, which stands once.
    written = {"role": "assistant", "content": "?", WRITTEN: [tokens.convert_tokens_to_ids("a"), 5]}
    heard = {"role": "user", "content": "no"}
    first, later = (conversation(language, prompt, m) for m in (opening, [*opening, written, heard]))
    assert later[: len(first) + 2] == [*first, *written[WRITTEN]]
    assert (
        tokens.decode(later)
        == "<turn>user\nhi<end_of_turn>\n<turn>model\na<end_of_turn>\n<turn>user\nno<end_of_turn>\n<turn>model\n"
    )
    # One that was cut gets its end from the template.
    cut = conversation(language, prompt, [*opening, {**written, WRITTEN: written[WRITTEN][:1]}, heard])
    assert cut == later


def test_templates_that_rewrite_history_are_told_from_those_that_keep_it():
    prompt, opening = Prompt("p", {}, where="here"), [{"role": "user", "content": "hi"}]
    heard = [{"role": "user", "content": "no"}]
    assert rewritten(reader(), prompt, opening, heard) is None
    assert "once a turn is over" in rewritten(reader(DROPS), prompt, opening, heard)
    thinks = TOOLS.replace(
        "{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"
    )
    assert "between <think> and </think>" in rewritten(reader(thinks), prompt, opening, heard)


# -- rollouts ------------------------------------------------------------------------------------------------------


def test_each_turn_is_a_trajectory_that_goes_on_exactly_where_the_one_before_ended(models, tmp_path):
    run = build(agents(models, tmp_path), tmp_path)
    made = played(run)
    rows = episodes(made)
    assert len(rows) == 8
    assert any(len(each) > 1 for each in rows)
    for each in rows:
        for before, after in itertools.pairwise(each):
            so_far = [*ids_of(made.contexts[before]).tolist(), *made.completions()[before].tolist()]
            assert ids_of(made.contexts[after]).tolist()[: len(so_far)] == so_far
        told = [made.prompts[i].fields[TURN] for i in each]
        assert [t["number"] for t in told] == list(range(1, len(each) + 1))
        assert [t["ended"] for t in told[:-1]] == [None] * (len(each) - 1)
        assert told[-1]["ended"] == ("itself" if made.rewards[each[0]] == 1 else "turns")
        assert len({float(made.rewards[i]) for i in each}) == 1
    assert bool(made.chosen.all()), "what the environment says stands in contexts alone"
    # Draws are the row's: the same whatever it is played beside.
    alone = played(run, prompts=run.held_out[1:2])
    mine = [i for i, prompt in enumerate(made.prompts) if prompt.id == run.held_out[1].id]
    assert torch.equal(torch.cat([made.completions()[i] for i in mine]), alone.actions)
    assert torch.equal(played(run, worlds=3).actions, made.actions)


def test_an_episode_counts_once_where_rewards_are_compared(models, tmp_path):
    run = build(agents(models, tmp_path, objective="grpo"), tmp_path)
    made = played(run, group=4)
    judged = run.verify(made)
    by_episode = [each[0] for each in episodes(made)]
    for group in made.groups.unique().tolist():
        mine = made.rewards[[i for i in by_episode if made.groups[i] == group]]
        here = judged.groups == group
        assert judged.group_mean[here].unique().item() == pytest.approx(float(mine.mean()))
        assert judged.group_spread[here].unique().item() == pytest.approx(float(mine.std()), abs=1e-6)
    assert judged.reward_spread == pytest.approx(float(made.rewards[by_episode].std(correction=0)), abs=1e-6)
    assert float(judged.reward_share.sum()) == pytest.approx(len(by_episode))


@pytest.mark.parametrize("objective", ["jensen_shannon", "grpo"])
def test_agents_train_by_a_teacher_or_by_the_outcome(objective, models, tmp_path):
    run = build(agents(models, tmp_path, objective=objective, batch={"prompts": 4, "group": 4}), tmp_path)
    train(run)
    steps = [r for r in run.monitor.history if "train/loss" in r]
    assert len(steps) == 2
    assert all(r["train/gradient_norm"] > 0 for r in steps)
    assert all(r["train/rollout_gap"] < 1e-3 for r in steps)
    assert all(1 <= r["train/agent/turns"] <= 3 and 0 <= r["train/reward"] <= 1 for r in steps)
    after = run.monitor.after.metrics
    assert {"accuracy", "accuracy/low", "accuracy/high", "steps", "reverse_kl"} <= after.keys()
    assert (after["accuracy_low"], after["accuracy_high"]) == pytest.approx(wilson(4 * after["accuracy"], 4))
    # One row an episode, with all of its turns.
    for name in ("samples", "rollouts"):
        rows = [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        for row in rows:
            assert len(row["tokens"]) == len(row["authors"]) == len(next(iter(row["values"].values())))
            assert len(row["turns"]) == row["authors"].count("environment")
            assert row["turns"][-1]["ended"] in ("itself", "turns")
            assert WRITTEN not in str(row["prompt"])
    samples = [json.loads(line)["id"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 4, "one episode a prompt, before and after"


def test_the_gradient_does_not_depend_on_micro_batches_that_cut_episodes(models, tmp_path):
    norms = []
    for micro in (1, 4, 64):
        run = build(agents(models, tmp_path, objective="grpo", steps=1, batch={"micro": micro}), tmp_path)
        train(run)
        norms.append([r["train/gradient_norm"] for r in run.monitor.history if "train/loss" in r])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)


def test_the_student_as_its_own_teacher_agrees_at_every_turn_and_a_shifted_context_does_not(models, tmp_path):
    run = build(agents([models[0], models[0]], tmp_path), tmp_path)
    assert evaluate(run).metrics["reverse_kl"] == pytest.approx(0, abs=1e-6)
    made = played(run)
    (target,) = run.ask(made, run.at(0))
    own = run.student(made, run.context).log_probs()
    assert torch.allclose(own, target.distribution.log_probs(), atol=1e-5)
    moved = [replace(p, fields={**p.fields, "prompt": [*p.fields["prompt"], {"role": "user", "content": "x"}]})
             for p in made.prompts]  # fmt: skip
    (other,) = run.ask(replace(made, prompts=moved), run.at(0))
    assert not torch.allclose(own, other.distribution.log_probs(), atol=1e-2)


def test_experts_debate_each_state_once_and_blindly(models, tmp_path):
    expert = {"model": models[1], "template": "chat"}
    debate = {"kind": "debate", "experts": {"a": expert, "b": {"model": models[0]}}, "rounds": 1, "max_new_tokens": 4}
    debate |= {"weighting": "uniform"}
    recipe = agents(models, tmp_path, teacher=debate, steps=1, rollout={"turns": 2}, batch={"prompts": 1})
    run = build(recipe, tmp_path)
    made = played(run, prompts=run.held_out[:1], group=3)
    (teacher,) = run.teachers
    states = {str(prompt.fields["prompt"]) for prompt in made.prompts}
    before = len(teacher.transcripts.held)
    targets = run.ask(made, run.at(0))
    assert len(teacher.transcripts.held) - before == len(states), "replies to one state share its debate"
    assert [len(target.distribution) for target in targets] == [made.positions] * 2


def test_history_from_data_is_the_experts_and_has_no_reward(models, tmp_path):
    run = build(agents(models, tmp_path, rollout={"history": "data"}), tmp_path)
    made = played(run)
    assert made.rewards is None
    for each in episodes(made):
        said = [m["content"] for m in made.prompts[each[-1]].fields["prompt"] if m["role"] == "assistant"]
        assert set(said) <= {"aa", "ab"}
        assert all(WRITTEN not in m for m in made.prompts[each[-1]].fields["prompt"])
    # Who is measured plays for itself.
    assert "accuracy" in evaluate(run).metrics
    with pytest.raises(RecipeError, match=r"goes by rewards, and rollout .agent. has none.*rollout.history to student"):
        agents(models, tmp_path, objective="grpo", rollout={"history": "data"})


def test_held_out_episodes_need_no_expert_whatever_is_played_in_training(models, tmp_path):
    held_out = {"prompts": {**game(), "environment": {"kind": "guess_alone"}, "per_task": 1}}
    run = build(agents(models, tmp_path, rollout={"history": "data"}, evaluation=held_out), tmp_path)
    assert "accuracy" in evaluate(run).metrics
    with pytest.raises(DataError, match="'guess_alone' has no expert"):
        build(agents(models, tmp_path, rollout={"history": "data"}, prompts=held_out["prompts"]), tmp_path)


def test_the_machine_is_worked_through_the_templates_own_tools(models, tmp_path):
    machine = {"kind": "episodes", "environment": {"kind": "tool_machine", "only": ["sum"]}, "per_task": 3}
    recipe = agents(
        models,
        tmp_path,
        prompts=machine,
        evaluation={"prompts": {**machine, "seed": 1}},
        rollout={"history": "data", "turns": 5, "max_context_tokens": 900},
        self_test=False,
    )
    run = build(recipe, tmp_path)
    made = played(run, group=1)
    for each in episodes(made):
        assert len(each) == 3, "both are read, and the sum is written"
        assert made.prompts[each[-1]].fields[TURN]["ended"] == "itself"
        text = run.student.reader.tokenizer.decode(ids_of(made.contexts[each[-1]]))
        assert text.startswith("<turn>tools\nread\nwrite\n")
        assert text.count("[CALL]") == text.count("<turn>tool\n") == 2
    # A student that knows no tools is told so, and plays on.
    alone = played(run, group=1, history="student", turns=2)
    assert all(len(each) == 2 for each in episodes(alone))
    assert "error: no tool was called" in str(alone.prompts[1].fields["prompt"])


def test_an_episode_ends_at_its_limits_and_they_are_counted(models, tmp_path):
    run = build(agents(models, tmp_path), tmp_path)
    made = played(run, turns=2)
    assert max(map(len, episodes(made))) == 2
    assert run.rollout.own_signals()["agent/ended_by_turns"] > 0
    longest = len(made.contexts[0]) + 3
    made = played(run, max_context_tokens=longest)
    assert all(len(context) <= longest for context in made.contexts)
    assert run.rollout.own_signals()["agent/ended_by_context"] > 0


@pytest.mark.parametrize(
    ("misbehaves", "told"),
    [("raise", "ValueError: the game is broken"), ("over", "an episode is over before anything was done in it")],
)
def test_an_environment_that_fails_costs_its_episode(misbehaves, told, models, tmp_path):
    run = build(agents(models, tmp_path), tmp_path)
    prompts = [
        replace(p, fields={**p.fields, "environment": {**p.fields["environment"], "misbehaves": misbehaves}})
        for p in run.held_out
    ]
    made = played(run, prompts=prompts)
    odd = torch.tensor([p.fields["seed"] % 2 == 1 for p in made.prompts])
    assert torch.equal(made.lost, odd)
    assert bool(made.rewards[odd].isnan().all())
    assert dict(run.rollout.failures()) == {f"guess: {told}": 4}


def test_processes_of_environments_of_text_need_no_torch():
    code = "import sys, opd.environments.textworld, opd.environments.tool_machine; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_a_world_whose_process_dies_costs_its_episode_and_no_other(models, tmp_path):
    run = build(agents(models, tmp_path, self_test=False, rollout={"processes": 1, "turns": 2}), tmp_path)
    before = played(run, group=1)
    odd = [i for i, p in enumerate(run.held_out) if p.fields["seed"] % 2]
    prompts = list(run.held_out)
    own = prompts[odd[0]].fields
    prompts[odd[0]] = replace(
        prompts[odd[0]], fields={**own, "environment": {**own["environment"], "misbehaves": "crash"}}
    )
    after = played(run, group=1, prompts=prompts)
    run.rollout.close()
    gone = after.lost.nonzero().flatten().tolist()
    assert {after.prompts[i].id for i in gone} == {prompts[odd[0]].id}
    assert dict(run.rollout.failures()) == {"guess: crash": 1}
    for i, prompt in enumerate(after.prompts):
        same = [k for k, other in enumerate(before.prompts) if other.id == prompt.id]
        if i not in gone:
            assert after.completions()[i].tolist() in [before.completions()[k].tolist() for k in same]


def test_a_served_teacher_scores_turns_as_one_here_does(models, tmp_path):
    model = ServedModel(LanguageModel.load(CausalLM(model=models[1]), "cpu"), "tiny")
    with serving(application(model, None)) as running:
        served = {"kind": "served", "url": running.url, "tokenizer": models[1], "answers": "exact"}
        run = build(agents(models, tmp_path, teacher=served), tmp_path)
        made = played(run)
        (there,) = run.ask(made, run.at(0))
        run.teachers[0].close()
    model.batcher.close()
    local = build(agents(models, tmp_path), tmp_path)
    (here,) = local.ask(made, local.at(0))
    assert torch.allclose(there.distribution.log_probs(), here.distribution.log_probs(), atol=1e-4)


def test_what_a_teacher_reads_besides_counts_where_lengths_are_checked(models, tmp_path):
    room = {"max_context_tokens": 1010, "turns": 1}
    run = build(agents(models, tmp_path, rollout=room), tmp_path)
    assert run.rollout.warnings == []
    run = build(agents(models, tmp_path, rollout=room, teacher={"system": "be brief"}), tmp_path)
    (warning,) = run.rollout.warnings
    assert warning.startswith("teacher was made for 1024 positions")
    assert "what an episode says before its last reply (rollout.max_context_tokens)" in warning


def test_a_servers_longest_text_holds_a_whole_episode_and_its_last_reply(models, tmp_path):
    model = ServedModel(LanguageModel.load(CausalLM(model=models[1]), "cpu"), "tiny", limits=Limits(300))
    with serving(application(model, None)) as running:
        served = {"kind": "served", "url": running.url, "tokenizer": models[1], "answers": "exact"}
        with pytest.raises(ModelError, match=r"start it with --max-model-len 306, .*rollout.max_context_tokens"):
            build(agents(models, tmp_path, teacher=served), tmp_path)
    model.batcher.close()


def test_killed_and_resumed_goes_on_bit_for_bit(models, tmp_path):
    settings = {"steps": 3, "checkpoint": {"every": 1}, "objective": "jensen_shannon"}
    whole = execute(agents(models, tmp_path / "a", **settings), quiet=True)
    first = agents(models, tmp_path / "b", **settings)
    execute(first.model_copy(update={"steps": 2}), quiet=True)
    resumed = execute(first, resume=True, force_changed=True, quiet=True)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


# -- refusals, plans, reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verifier": {"kind": "exact_match", "pattern": "(a)"}}, "the environment judges episodes; remove it"),
        ({"shaping": "outcome_balance"}, "gives the turns of episodes"),
        ({"shaping": {"kind": "outcome_bonus", "scope": "global"}}, "gives the turns of episodes"),
        ({"shaping": {"kind": "outcome_balance", "scope": "global"}}, "gives the turns of episodes"),
        ({"curriculum": "difficulty"}, "gives the turns of episodes"),
        ({"teacher": {"tokenizer": "own"}}, "earlier replies of an episode stand .* of the student's tokenizer"),
        (
            {"teacher": {"kind": "served", "url": "http://localhost:1", "tokenizer": "own:somewhere"}},
            "teacher.tokenizer is 'own:somewhere'",
        ),
        ({"teacher": {"sees": "hint"}}, "holds nothing of what was said since"),
        ({"evaluation": {"teacher_answers": True}}, "has the teacher answer the rows"),
        (
            {"rollout": {"kind": "mixture", "first": {"kind": "agent"}, "second": {"kind": "agent"}}},
            "one a turn",
        ),
    ],
)
def test_what_takes_turns_for_answers_is_refused(changes, told, models, tmp_path):
    with pytest.raises(RecipeError, match=told):
        agents(models, tmp_path, **changes)


def test_what_an_episode_cannot_be_held_in_is_refused_at_start(models, tmp_path):
    rewrites = talking(tmp_path / "other", template=DROPS)
    with pytest.raises(IncompatibleError, match=r"the student rewrites .* set rollout.rewritten=keep"):
        build(agents(rewrites, tmp_path), tmp_path)
    kept = build(agents(rewrites, tmp_path, rollout={"rewritten": "keep"}), tmp_path)
    made = played(kept)
    for each in episodes(made):
        for before, after in itertools.pairwise(each):
            so_far = [*ids_of(made.contexts[before]).tolist(), *made.completions()[before].tolist()]
            assert ids_of(made.contexts[after]).tolist()[: len(so_far)] == so_far
    plain = {"model": models[0], "template": "plain"}
    with pytest.raises(OpdError, match="plain"):
        build(agents(models, tmp_path, student=plain, prompts=game(), teacher=plain), tmp_path)
    with pytest.raises(DataError, match=r"'guess' cannot begin the task '(low|high)' \(AssertionError: there is no"):
        build(agents(models, tmp_path, prompts=game(misbehaves="begin")), tmp_path)
    rows = {"kind": "inline", "prompts": ["a", "b", "c", "d"]}
    with pytest.raises(DataError, match="take prompts of kind episodes"):
        build(agents(models, tmp_path, prompts=rows, evaluation={"held_out": 1, "prompts": []}), tmp_path)


def test_the_plan_counts_turns_and_the_report_shows_them(models, tmp_path):
    recipe = agents(models, tmp_path)
    plan = make_plan(recipe)
    assert (plan.trajectories, plan.prompt_tokens) == (3 * 2 * 3, 300)
    assert any("up to 3 turns" in note for note in plan.notes)
    assert not any("training prompts too" in note for note in plan.notes), "other seeds are other episodes"
    execute(recipe, quiet=True)
    page = write_report([tmp_path / "run"], tmp_path / "report.html")
    text = page.read_text()
    assert "opd.rowRenderers.turns" in text
    assert "what was said, turn by turn" in text
