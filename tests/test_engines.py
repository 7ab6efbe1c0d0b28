"""The interface of engines: what a context may be, completions scored as they grow, and rows that are watched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd.context import Context
from opd.errors import ModelError, RecipeError
from opd.language.engines.base import Drawing, Look, Looker, PromptInputs, followed_by, same_prompt
from opd.language.engines.scorer import CachedScorer, WholeScorer
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from opd.recipe import parse_recipe
from opd.rollouts.mixture import MixtureRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.switch import SwitchRollout
from opd.teachers.memory import Memory, MemorySettings
from opd.watches.repetition import Repetition, repeated
from tests.conftest import tiny_model, writing
from tests.families import FAMILIES, tiny
from tests.tiny import turn_tokenizer

CPU = Context(torch.device("cpu"))
GROWING = {"llama": True, "gpt2": True, "gemma3_text": True, "mistral": True, "mamba": False, "bamba": False}
"""Families by name, and whether what they keep of a row can grow by several tokens."""


def ids(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=generator) for length in lengths]


def language_of(name):
    return LanguageModel(tiny(next(f for f in FAMILIES if f.name == name)), turn_tokenizer(), "plain").eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROWING)
def test_growing_completions_are_scored_as_in_one_pass(name, attention):
    """Prompts of unequal length, two of them one group; rows that stop early, are left out, and come back."""
    language = language_of(name)
    if attention == "eager":
        language.base.set_attn_implementation("eager")
    prompts = ids([9, 4, 4, 13])
    prompts[2] = prompts[1]
    completions = ids([11, 11, 7, 14], seed=1)
    # By extension and row, how many tokens are new; the first row is dropped, the third pauses.
    plan = [{0: 3, 1: 3, 2: 3, 3: 3}, {0: 4, 1: 4, 2: 2, 3: 4}, {1: 1, 3: 1}, {1: 3, 2: 2, 3: 3}, {3: 3}]
    scorer = language.scorer(prompts, CPU)
    assert isinstance(scorer, CachedScorer if GROWING[name] else WholeScorer)
    given, found = dict.fromkeys(range(4), 0), {i: [] for i in range(4)}
    for k, step in enumerate(plan):
        new = {row: completions[row][given[row] : given[row] + n] for row, n in step.items()}
        hidden = scorer.extend(new).hidden
        for row, states in zip(new, torch.split(hidden, list(step.values())), strict=True):
            found[row].append(states)
            given[row] += step[row]
        if k == 1:
            scorer.drop([0])
    whole = language.score(prompts, [y[: given[row]] for row, y in enumerate(completions)], CPU)
    for row, want in enumerate(torch.split(whole.hidden, list(given.values()))):
        torch.testing.assert_close(torch.cat(found[row]), want, atol=2e-5, rtol=2e-4)


def test_a_growing_completion_costs_a_pass_over_its_new_tokens_alone():
    language = language_of("llama")
    fed = []
    language.base.get_input_embeddings().register_forward_hook(lambda m, i, o: fed.append(i[0].numel()))
    scorer = language.scorer(ids([9, 9]), CPU)
    for start in range(0, 12, 4):
        scorer.extend({row: torch.arange(start + 3, start + 7) for row in range(2)})
    assert fed == [18, 6, 8, 8]


def test_contexts_with_inputs_go_on_and_compare_by_both():
    ids, image = torch.tensor([5, 6, 7]), torch.zeros(1, 3)
    one = PromptInputs(ids, {"pixel_values": image})
    longer = followed_by(one, torch.tensor([8]))
    assert len(longer) == 4
    assert longer.inputs is one.inputs
    assert followed_by(ids, torch.tensor([8])).tolist() == [5, 6, 7, 8]
    assert same_prompt(one, PromptInputs(ids.clone(), {"pixel_values": image.clone()}))
    assert not same_prompt(one, replace(one, inputs={"pixel_values": image + 1}))
    assert not same_prompt(one, ids)


def test_an_answer_is_remembered_for_the_inputs_that_it_was_given_for(tmp_path):
    memory = Memory(MemorySettings(path=str(tmp_path)), "teacher")
    ids, actions = torch.tensor([5, 6]), torch.tensor([7])
    images = [PromptInputs(ids, {"pixel_values": torch.full((1, 2), value)}) for value in (0.0, 1.0, 0.0)]
    first, second, again = (memory.path(image, actions) for image in images)
    assert first == again
    assert len({first, second, memory.path(ids, actions)}) == 3


def test_a_model_of_text_refuses_other_inputs(student):
    image = PromptInputs(torch.tensor([5, 6]), {"pixel_values": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"the student reads text alone, and a prompt has \['pixel_values'\]"):
        student.language([image], [torch.tensor([7])])


class Ending(Looker):
    """Notes what it sees, and ends a row of each batch at its first look."""

    segment = 3

    def __init__(self):
        self.seen, self.ended = [], {}

    def begin(self, written):
        assert all(len(actions) == 0 for actions in written.actions)
        self.seen.append([])
        return EndingOne(self.seen[-1], self.ended)


class EndingOne(Look):
    def __init__(self, seen, ended):
        self.seen, self.ended = seen, ended

    def look(self, written):
        self.seen.append(list(written.going))
        assert all(len(written.actions[place]) == 3 * len(self.seen) for place in written.going)
        return {written.going[0]: "enough"} if len(self.seen) == 1 else {}

    def end(self, written):
        assert not written.going
        self.ended[tuple(written.rows)] = [len(actions) for actions in written.actions]


def test_rows_end_where_a_looker_says_so_and_the_others_draw_as_ever(student):
    contexts, drawing = ids([4, 6, 5]), Drawing(student.context.with_(agreed=Tokens(end_ids=(0,))), batch=4)
    plain = student.language.sample(contexts, 2, 14, range(6), drawing)
    looker = Ending()
    watched = student.language.sample(contexts, 2, 14, range(6), drawing, looker)
    assert len(looker.seen) == 2
    stopped = [i for i, row in enumerate(watched) if row.stopped == "enough"]
    assert len(stopped) == 2
    for i, (own, before) in enumerate(zip(watched, plain, strict=True)):
        length = 3 if i in stopped else len(before.actions)
        assert torch.equal(own.actions, before.actions[:length])
        assert own.finished == (before.finished and i not in stopped)
    for rows, lengths in looker.ended.items():
        assert lengths == [len(watched[row].actions) for row in rows]


@pytest.fixture
def looping(student, prompts):
    """Prompts that end with a 7, and a student that goes on with 890890890...: its state is its last token's."""
    model = tiny_model(layers=1)
    head = torch.zeros(64, 32)
    with torch.no_grad():
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            part.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        for i in range(3):
            model.model.embed_tokens.weight[10 + i, i] = 1.0
            head[10 + (i + 1) % 3, i] = 9.0
        model.lm_head.weight.copy_(head)
    student.language.model = model
    return [replace(p, fields={"prompt": f"{p.fields['prompt']} 7"}) for p in prompts]


@pytest.mark.parametrize(
    ("actions", "size"), [([1, 2, 1, 2, 1, 2], 2), ([5, 5, 5], 1), ([1, 2, 3, 1, 2], None), ([], None)]
)
def test_the_smallest_repeated_piece_is_found(actions, size):
    assert repeated(torch.tensor(actions, dtype=torch.int64), 3, 4) == size


def test_a_piece_longer_than_the_longest_is_none():
    actions = torch.arange(5).repeat(3)
    assert repeated(actions, 3, 4) is None
    assert repeated(actions, 3, 5) == 5


def test_a_completion_that_goes_round_in_circles_is_ended(student, looping):
    settings = {"watch": {"kind": "repetition", "times": 4, "longest": 5}, "segment": 10}
    watched = writing(StudentRollout(**settings), student)(looping, 2, 200, stream=0)
    plain = writing(StudentRollout(), student)(looping, 2, 200, stream=0)
    assert plain.stopped is None
    assert plain.lengths.float().mean() > 100
    assert watched.lengths.max() <= 40
    assert set(watched.stopped) == {"3 tokens 4 times over"}
    assert not watched.finished.any()
    for own, before in zip(watched.completions(), plain.completions(), strict=True):
        assert torch.equal(own, before[: len(own)])
    assert student.rows(watched, {})[0]["stopped"] == "3 tokens 4 times over"


def test_mixtures_and_switches_watch_what_their_parts_write(student, looping):
    watched = {"kind": "student", "watch": {"kind": "repetition", "times": 4}, "segment": 8}
    mixed = writing(MixtureRollout(first=watched, second="student", share=0.5), student)
    trajectories = mixed(looping, 2, 64, stream=0)
    stopped = [reason is not None for reason in trajectories.stopped]
    assert 0 < sum(stopped) < len(stopped)
    assert all((n < 64) == cut for n, cut in zip(trajectories.lengths.tolist(), stopped, strict=True))
    switched = writing(SwitchRollout(first=watched, then="student", position=32), student)
    trajectories = switched(looping, 1, 64, stream=0)
    # A row that was ended goes on under nobody.
    assert trajectories.lengths.max() < 32
    assert all(trajectories.stopped)
    later = writing(SwitchRollout(first="student", then=watched, position=5), student)
    trajectories = later(looping, 1, 64, stream=0)
    assert trajectories.lengths.min() > 5
    assert all(trajectories.stopped)


def test_nobody_watches_held_out_samples(student, looping):
    watched = writing(StudentRollout(watch={"kind": "repetition", "times": 3}), student)
    assert watched(looping, 1, 64, stream=0).stopped is not None
    measured = watched.source.held_out(watched.settings, student.context, student)
    assert measured(looping, 1, 64, stream=0).stopped is None


def test_segments_without_a_watch_are_refused():
    with pytest.raises(RecipeError, match="segment is 8, and without a watch nobody looks between segments"):
        parse_recipe(
            {
                "student": {"model": "s"},
                "teacher": {"model": "t"},
                "prompts": {"kind": "inline", "prompts": ["a"]},
                "rollout": {"kind": "student", "segment": 8},
            }
        )


def test_a_watch_of_a_recipe_is_a_choice_like_others():
    recipe = parse_recipe(
        {
            "student": {"model": "s"},
            "teacher": {"model": "t"},
            "prompts": {"kind": "inline", "prompts": ["a"]},
            "rollout": {"kind": "student", "watch": "repetition", "segment": 8},
        }
    )
    assert recipe.rollout.watch == Repetition()
    with pytest.raises(RecipeError, match="did you mean 'repetition'"):
        parse_recipe({**recipe.dump(), "rollout": {"kind": "student", "watch": "repetitions"}})
