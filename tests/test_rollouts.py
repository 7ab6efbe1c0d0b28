"""Prefix sources: who wrote what, in which order, and what the student then learns on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import opd
from opd.api import execute
from opd.context import Context
from opd.evaluation import moment
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from opd.loop import train
from opd.policies.held_out import roll_out
from opd.prompts import Prompt, count_repeats
from opd.recipe import parse_recipe
from opd.rollouts import Request
from opd.rollouts.base import row_seed
from opd.rollouts.data import DataRollout
from opd.rollouts.mixture import MixtureRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.switch import SwitchRollout
from opd.rollouts.teacher import TeacherRollout
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.trajectories import AUTHORS
from tests.conftest import character_tokenizer, tiny_model, trajectories_of, writing
from tests.test_loop import build, models, recipe_for  # noqa: F401

STUDENT, TEACHER, DATA = (AUTHORS.index(a) for a in ("student", "teacher", "data"))


@pytest.fixture
def teacher(tokenizer):
    language = LanguageModel(tiny_model(seed=5), tokenizer, template="plain")
    settings = LocalTeacher(model="(live)", template="plain", name="t")
    return LanguageTeacher(language, settings, torch.device("cpu"))


@pytest.fixture
def rows():
    return [Prompt(f"r{i}", {"prompt": f"{i}+1=", "response": f"{i + 1}."}, where=f"t:{i}") for i in range(6)]


def test_the_teachers_trajectories_are_those_that_it_would_write_as_a_student(student, teacher, prompts):
    source = writing(TeacherRollout(max_new_tokens=9), student, [teacher])
    mine = writing(StudentRollout(max_new_tokens=9), teacher, context=student.context)
    ours, theirs = source(prompts, 2, 9, stream=3), mine(prompts, 2, 9, stream=3)
    assert torch.equal(ours.actions, theirs.actions)
    assert set(ours.authors.tolist()) == {TEACHER}
    assert not source.source.exact(source.settings)
    assert source.source.authors == {"teacher"}


def test_a_prompt_that_a_step_draws_twice_gets_other_trajectories(models, student, prompts, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, batch={"prompts": 12, "group": 2}, steps=1)
    run, seen = build(recipe, tmp_path), []
    verify = run.verify
    run.verify = lambda trajectories: seen.append(verify(trajectories)) or seen[-1]
    epochs = run.course.epochs[0]
    epochs.prompts = epochs.prompts[:6]
    train(run)
    made = next(trajectories for trajectories in seen if len(trajectories) == 24)
    drawn = Counter((p.id, *a.tolist()) for p, a in zip(made.prompts, made.completions(), strict=True))
    assert len({p.id for p in made.prompts}) == 6
    assert set(drawn.values()) == {1}
    # Those of a prompt that occurs once are what they are without the others.
    source = writing(StudentRollout(max_new_tokens=9), student)
    alone, both = (source(count_repeats(some), 2, 9, stream=3) for some in (prompts[:2], [*prompts[:2], prompts[0]]))
    assert torch.equal(both.rows(0, 4)[0].actions, alone.actions)


def test_a_teacher_that_is_not_there_is_refused(student, teacher):
    with pytest.raises(opd.OpdError, match="'tt'"):
        TeacherRollout(teacher="tt").build(student.context, student, [teacher])
    with pytest.raises(opd.OpdError, match="needs a teacher"):
        TeacherRollout().build(student.context, student, [])


def test_stored_responses_end_with_the_end_token_unless_cut(student, rows):
    source = writing(DataRollout(), student)
    whole = source(rows, 1, 8, stream=0)
    ids = student.language.tokenizer("3.")["input_ids"]
    assert whole.completions()[2].tolist() == [*ids, 0]
    assert bool(whole.finished.all())
    cut = source(rows, 1, 2, stream=0)
    assert cut.completions()[2].tolist() == ids
    assert not bool(cut.finished.any())
    assert set(whole.authors.tolist()) == {DATA}


def test_a_padding_token_that_is_the_end_token_never_deletes_it(models, tmp_path, rows):  # noqa: F811
    # The end is supervised: with pad = eos a mask made of ids would lose it.
    tokenizer = character_tokenizer(pad="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    from opd.policies.causal_lm import CausalLMStudent

    language = LanguageModel(tiny_model(), tokenizer, "plain")
    student = CausalLMStudent(language, None, Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,))))
    trajectories = writing(DataRollout(), student)(rows, 1, 8, stream=0)
    from opd.objectives.sft import SFT
    from opd.reduction import position_weights

    weights = position_weights(trajectories, "token_mean")
    last = trajectories.lengths.cumsum(0) - 1
    assert trajectories.actions[last].tolist() == [0] * 6
    assert bool((weights[last] > 0).all())
    loss = SFT()(student(trajectories), [], weights, trajectories)
    assert bool((loss.values[last] > 0).all())


def test_several_responses_take_turns(student):
    row = Prompt("r", {"prompt": "1=", "response": ["a", "b", "c"]}, where="t:0")
    source = writing(DataRollout(), student)

    def visit(stream):
        both = [row, Prompt("other", {"prompt": "2=", "response": ["x", "y"]}, where="t:2")]
        source.source.drawn(Request(both, 2, 8, stream, source.settings, source.context))
        return [student.decode(c) for c in source([row], 2, 8, stream).completions()]

    # By visits and not by steps: a prompt that comes every third step would always get the same response.
    assert [visit(stream) for stream in (0, 3, 6)] == [["a", "b"], ["c", "a"], ["b", "c"]]
    again = writing(DataRollout(), student)
    again.source.load_state_dict(source.source.state_dict())
    source = again
    assert visit(9) == ["a", "b"]
    with pytest.raises(opd.DataError, match="holds int"):
        source.source.check_prompts([Prompt("x", {"prompt": "1=", "response": 3}, where="t:1")])


@pytest.mark.parametrize("by", ["prompt", "batch"])
def test_a_mixture_keeps_the_order_of_prompts_and_its_share(student, teacher, prompts, by):
    settings = MixtureRollout(first=StudentRollout(max_new_tokens=6), second=TeacherRollout(max_new_tokens=6), by=by)
    source = writing(settings, student, [teacher])
    alone = [writing(part, student, [teacher])(prompts, 2, 6, stream=4) for part in settings.parts]
    mixed = source(prompts, 2, 6, stream=4)
    assert [p.id for p in mixed.prompts] == [p.id for p in alone[0].prompts]
    assert mixed.groups.tolist() == alone[0].groups.tolist()
    chosen = []
    for i, completion in enumerate(mixed.completions()):
        start = int(mixed.lengths[:i].sum())
        author = int(mixed.authors[start])
        chosen.append(author)
        assert torch.equal(completion, alone[0 if author == STUDENT else 1].completions()[i])
    assert len(set(chosen)) == (2 if by == "prompt" else 1)
    for share, author in ((0.0, TEACHER), (1.0, STUDENT)):
        assert set(source.changed(share=share)(prompts, 1, 6, stream=0).authors.tolist()) == {author}


def test_a_mixtures_share_is_what_it_says(student, teacher, rows):
    parts = {"first": StudentRollout(max_new_tokens=1), "second": TeacherRollout(max_new_tokens=1)}
    source = writing(MixtureRollout(**parts, share=0.25), student, [teacher])
    authors = torch.cat([source(rows, 1, 1, stream=s).authors for s in range(60)])
    assert float((authors == STUDENT).float().mean()) == pytest.approx(0.25, abs=0.07)


def test_the_temperature_of_a_step_reaches_the_sources_of_a_mixture(student, teacher, prompts):
    parts = {"first": StudentRollout(max_new_tokens=6), "second": TeacherRollout(max_new_tokens=6)}
    warm = writing(MixtureRollout(**parts), student, [teacher])
    cold = replace(warm, context=student.context.with_(temperature=1e-3))
    least = [source(prompts, 1, 6, stream=0).behaviour_log_probs.exp().min() for source in (cold, warm)]
    assert least[0] > 0.99 > least[1]


def test_the_switch_continues_what_the_first_source_began(student, teacher, prompts):
    first, then = TeacherRollout(max_new_tokens=12), StudentRollout(max_new_tokens=12)
    source = writing(SwitchRollout(first=first, then=then, position=4), student, [teacher])
    begun = writing(first, student, [teacher])(prompts, 2, 4, stream=1)
    whole = source(prompts, 2, 12, stream=1)
    start = 0
    for head, n, done in zip(begun.completions(), whole.lengths.tolist(), begun.finished.tolist(), strict=True):
        assert torch.equal(whole.actions[start : start + len(head)], head)
        assert whole.authors[start : start + n].tolist() == [TEACHER] * len(head) + [STUDENT] * (n - len(head))
        assert done == (n == len(head)) or n == 12
        start += n
    assert int(whole.lengths.max()) <= 12
    # The student's part is scored as the student draws it: its log-probabilities are those of training.
    log_q = student(whole).log_probs().gather(1, whole.actions[:, None]).squeeze(1)
    mine = whole.authors == STUDENT
    torch.testing.assert_close(log_q[mine], whole.behaviour_log_probs[mine], atol=1e-4, rtol=1e-4)


def test_what_goes_on_in_a_switch_has_draws_of_its_own(student, teacher, prompts):
    first, then = TeacherRollout(max_new_tokens=3, top_k=1), StudentRollout(max_new_tokens=12)
    switched = writing(SwitchRollout(first=first, then=then, position=3), student, [teacher])
    made = switched(prompts[:1], 4, 12, stream=1)
    # All of a group begin alike, and go on each in its own way.
    starts, rests = zip(*((tuple(a[:3].tolist()), tuple(a[3:].tolist())) for a in made.completions()), strict=True)
    assert len(set(starts)) == 1
    assert len(set(rests)) > 1
    # What began by chance and goes on by chance is not drawn by the same numbers twice.
    seeds = {row_seed(0, 1, prompts[0], 4, member, begun) for member in range(4) for begun in (0, 3)}
    assert len(seeds) == 8
    again = writing(SwitchRollout(first=first, then=then, position=3), student, [teacher])(prompts[:1], 4, 12, stream=1)
    assert torch.equal(made.actions, again.actions)


def test_each_source_of_a_switch_keeps_its_own_bound(student, teacher, prompts):
    def lengths(budget=None, **settings):
        made = SwitchRollout(**settings)
        return writing(made, student, [teacher])(prompts, 4, budget or made.budget, stream=1)

    long, short = TeacherRollout(max_new_tokens=30), StudentRollout(max_new_tokens=4)
    whole = lengths(first=long, then=short, position=3)
    assert SwitchRollout(first=long, then=short, position=3).budget == 7
    assert int(whole.lengths.max()) == 7
    for authors in whole.authors.split(whole.lengths.tolist()):
        assert (authors == TEACHER).sum() <= 3
        assert (authors == STUDENT).sum() <= 4
    assert int(lengths(budget=30, first=long, then=short, position=0).lengths.max()) == 4
    # A schedule may begin beyond what the first source writes.
    first, then = TeacherRollout(max_new_tokens=2), StudentRollout(max_new_tokens=9)
    early = SwitchRollout(first=first, then=then, position={"kind": "linear", "start": 40, "steps": 4})
    whole = writing(early.at(0, 4), student, [teacher])(prompts, 4, 9, stream=1)
    assert max(int((a == TEACHER).sum()) for a in whole.authors.split(whole.lengths.tolist())) == 2
    assert int(whole.lengths.max()) == 9
    assert (early.budget, early.longest) == (9, 9)


SIX = {"first": {"kind": "teacher", "max_new_tokens": 6}, "then": {"kind": "student", "max_new_tokens": 6}}
LADDER = {"kind": "length_ladder", "lengths": [2, 4], "steps_per_rung": 1}


@pytest.mark.parametrize(
    ("rollout", "curriculum", "words"),
    [
        ({**SIX, "position": 6}, None, "position is 6, and a trajectory has at most 6 tokens"),
        (SIX, None, "position is 16, and a trajectory has at most 6 tokens: 'then' would never write"),
        ({**SIX, "position": {"kind": "linear", "start": 20, "end": 7}}, None, "position is 7, and a trajectory"),
        ({**SIX, "then": {"kind": "student"}}, None, "position is 16, and 'first' writes at most 6 tokens"),
        ({**SIX, "position": 5}, LADDER, r"rollout.position is 5 and curriculum.lengths goes up to 4"),
        ({**SIX, "position": 1}, {**LADDER, "lengths": [2, 9]}, "a source of the switch to 6 tokens"),
    ],
)
def test_a_switch_whose_second_source_never_writes_is_refused(rollout, curriculum, words, models, tmp_path):  # noqa: F811
    data = recipe_for(models, tmp_path).dump()
    data |= {"rollout": {"kind": "switch", **rollout}} | ({"curriculum": curriculum} if curriculum else {})
    with pytest.raises(opd.OpdError, match=words) as error:
        parse_recipe(data)
    assert len(str(error.value).splitlines()) <= 2
    for position in ([[0, 30], [2, 0]], 5, 0):
        parse_recipe({**data, "rollout": {"kind": "switch", **SIX, "position": position}, "curriculum": "shuffled"})


@pytest.mark.parametrize(
    ("rollout", "longest"),
    [
        ({"kind": "switch", "first": {"kind": "data"}, "then": {"kind": "student", "max_new_tokens": 5}}, 5),
        ({"kind": "mixture", "first": {"kind": "student", "max_new_tokens": 5}, "second": {"kind": "data"}}, 5),
        ({"kind": "data", "max_new_tokens": 7}, 7),
    ],
)
def test_held_out_samples_are_as_long_as_the_students_own(rollout, longest, models, tmp_path):  # noqa: F811
    prompts = {"kind": "inline", "prompts": [{"prompt": f"{i}+1=", "response": "1" * 40} for i in range(24)]}
    recipe = recipe_for(models, tmp_path, prompts=prompts, objective="forward_kl")
    data = {**recipe.dump(), "rollout": rollout | ({"position": 3} if rollout["kind"] == "switch" else {})}
    data["evaluation"] |= {"max_new_tokens": None, "held_out": 8}
    run = build(parse_recipe(data), tmp_path)
    drawn = roll_out(run, moment(run), run.sampler(run.at(0)), run.held_out, 4)
    assert int(drawn.lengths.max()) == longest


def test_a_switch_at_zero_is_the_second_source(student, teacher, prompts):
    then = StudentRollout(max_new_tokens=5)
    source, alone = writing(SwitchRollout(then=then, position=0), student, [teacher]), writing(then, student)
    assert torch.equal(source(prompts, 1, 5, stream=2).actions, alone(prompts, 1, 5, stream=2).actions)
    with pytest.raises(opd.OpdError, match="stored response"):
        SwitchRollout(then=DataRollout()).build(student.context, student, [teacher])


def test_data_then_student_is_a_hint_of_given_length(student, rows):
    settings = SwitchRollout(first=DataRollout(), then=StudentRollout(max_new_tokens=6), position=1)
    source = writing(settings, student)
    whole = source(rows, 1, 6, stream=0)
    ids = [student.language.tokenizer(f"{i + 1}")["input_ids"][0] for i in range(6)]
    starts = (whole.lengths.cumsum(0) - whole.lengths).tolist()
    assert [int(whole.actions[s]) for s in starts] == ids


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("rollout", [{"kind": "student"}, {"kind": "teacher"}, {"kind": "data"}, {"kind": "mixture"}])
def test_the_four_objectives_and_more_bring_the_student_nearer(models, tmp_path, objective, rollout):  # noqa: F811
    prompts = {"kind": "inline", "prompts": [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(24)]}
    if rollout["kind"] == "data":
        rollout = {**rollout, "max_new_tokens": 8}
    elif rollout["kind"] == "mixture":
        rollout = {**rollout, "first": {"kind": "student", "max_new_tokens": 8}}
    else:
        rollout = {**rollout, "max_new_tokens": 8}
    recipe = recipe_for(
        models, tmp_path, steps=25, prompts=prompts, objective=objective, evaluation={"max_new_tokens": 8}
    )
    recipe = parse_recipe({**recipe.dump(), "rollout": rollout})
    result = execute(recipe, quiet=True)
    assert result.after[objective] < 0.8 * result.before[objective]
    assert all("train/rollout_gap" not in r for r in result.history) or rollout["kind"] == "student"


def test_a_policy_gradient_on_anothers_samples_is_refused(models, tmp_path):  # noqa: F811
    recipe = recipe_for(models, tmp_path, objective="reverse_kl_sampled")
    recipe = parse_recipe({**recipe.dump(), "rollout": {"kind": "teacher", "max_new_tokens": 4}})
    with pytest.raises(opd.OpdError, match="student's own samples"):
        execute(recipe, quiet=True)


@pytest.mark.parametrize(
    ("rollout", "written_by", "known"),
    [
        ({"kind": "student"}, ["data"], "student"),
        ({"kind": "student"}, ["student", "teacher"], "student"),
        ({"kind": "data"}, ["student"], "data"),
        ({"kind": "data", "author": "teacher"}, ["data"], "teacher"),
    ],
)
def test_somebody_who_never_writes_is_refused(rollout, written_by, known, models, tmp_path):  # noqa: F811
    prompts = {"kind": "inline", "prompts": [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(24)]}
    recipe = recipe_for(models, tmp_path, prompts=prompts)
    objective = [{"kind": "reverse_kl", "written_by": written_by}]
    with pytest.raises(opd.OpdError, match=rf"written_by names '{written_by[-1]}', .* written by {known}: ") as error:
        build(parse_recipe({**recipe.dump(), "rollout": rollout, "objective": objective}), tmp_path)
    assert len(str(error.value).splitlines()) <= 2


def test_what_the_environment_wrote_is_in_no_loss_whatever_written_by_says(models, tmp_path):  # noqa: F811
    data = recipe_for(models, tmp_path).dump()
    with pytest.raises(opd.OpdError, match=r"written_by.0 is 'environment': accepted: student, teacher, data"):
        parse_recipe({**data, "objective": [{"kind": "reverse_kl", "written_by": ["environment"]}]})


def test_join_numbers_groups_by_place():
    from opd.trajectories import join

    a, b = trajectories_of([2, 3], seed=1), trajectories_of([4], seed=2)
    joined = join([a, b], [2, 0, 1])
    assert joined.lengths.tolist() == [3, 4, 2]
    assert joined.groups.tolist() == [0, 1, 2]
    assert torch.equal(joined.completions()[2], a.completions()[0])
