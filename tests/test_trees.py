"""Trees of proposals: texts are the target's own, what is kept of one is what was drafted, and never less stands."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import opd
import opd.drafting.decoding
from opd.api import execute
from opd.drafting.base import Drafter
from opd.drafting.chain import Chain
from opd.drafting.decoding import Speculation, speculate
from opd.drafting.proposing import Tree
from opd.drafting.record import acceptance_length, blocks_of, numbered, saved
from opd.drafting.target import Target
from opd.drafting.tree import Grown, followed, grow
from opd.errors import IncompatibleError, SelfTestError
from opd.language.engines.sampler import Sampler, inverse_cdf
from opd.plan import make_plan
from opd.teachers.target import TargetTeacher
from tests.conftest import save_tiny
from tests.drafters import FORMS, LAYERS, Knowing, drafted, drafter_of, head_of, language, student_of
from tests.test_draft_opd import BLOCK, build, recipe_for
from tests.test_drafting import SMALL, exact_texts, p_value, prompts_of
from tests.test_gpu import on_each_device

TREE = Tree(width=3, nodes=12)
CHAINS = {name: form for name, form in FORMS.items() if name != "block"}


def how(model, drafter, tree: Tree | None = TREE, ends=(0,), proposals=4, temperature=0.0):
    return Speculation(
        Target(model, drafter.taps),
        drafter.eval(),
        model.head(1.0).detach(),
        head_of(drafter, model),
        ends,
        proposals,
        temperature,
        "likeliest",
        tree=tree,
    )


def alone(model, prompts, seeds, budget, temperature):
    sampler = Sampler(model, model.head(temperature or 1.0), (0,), top_k=0 if temperature else 1)
    state = sampler.start(prompts, 1, budget, seeds)
    sampler.extend(state, budget)
    return state.rows()


# Texts.


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("form", CHAINS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_what_the_target_writes_alone(kind, form, temperature):
    model = language(kind=kind)
    prompts, seeds = prompts_of(), [11, 12, 13, 14, 15]
    found = speculate(how(model, drafter_of(CHAINS[form], model), temperature=temperature), prompts, seeds, 40)
    for answer, (text, _, finished) in zip(found, alone(model, prompts, seeds, 40, temperature), strict=True):
        assert answer.record.response.tolist() == text.tolist()
        assert answer.finished == finished


def test_two_hundred_greedy_texts_are_the_same():
    """Of a target with few ids, so that trees are gone through in many ways."""
    model = language(vocabulary=8, initializer_range=0.2, seed=2)
    prompts = [torch.randint(1, 8, (n,), generator=torch.Generator().manual_seed(n)) for n in range(1, 21)] * 10
    prompts = [torch.cat([torch.tensor([1 + i % 7]), prompt]) for i, prompt in enumerate(prompts)]
    drafter = drafter_of(Chain(proposals=4), model)
    found = speculate(how(model, drafter, Tree(width=2, nodes=9)), prompts, range(200), 24)
    texts = [text.tolist() for text, _, _ in alone(model, prompts, range(200), 24, 0.0)]
    assert [answer.record.response.tolist() for answer in found] == texts
    stood = torch.cat([answer.record.accepted for answer in found])
    assert set(stood.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_depend_on_who_shares_their_batch(temperature):
    model = language(vocabulary=12, initializer_range=0.15)
    settings = how(model, drafter_of(Chain(proposals=4), model), temperature=temperature)
    prompts, seeds = [prompt % 12 for prompt in prompts_of()], [1, 2, 3, 4, 5]
    together = speculate(settings, prompts, seeds, 24)
    for i in range(5):
        (one,) = speculate(settings, prompts[i : i + 1], seeds[i : i + 1], 24)
        assert one.record.response.tolist() == together[i].record.response.tolist()
        assert one.record.accepted.tolist() == together[i].record.accepted.tolist()
        assert one.proposed.tolist() == together[i].proposed.tolist()
        torch.testing.assert_close(one.hidden, together[i].hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_a_budget_cuts_where_it_ends(budget):
    model = language(vocabulary=SMALL, initializer_range=0.1)
    settings = how(model, drafter_of(Chain(proposals=4), model), ends=(), temperature=1.0)
    prompts = [prompt % SMALL for prompt in prompts_of()]
    whole = speculate(settings, prompts, range(5), 8)
    for answer, longer in zip(speculate(settings, prompts, range(5), budget), whole, strict=True):
        record = answer.record
        # What is drawn behind the budget is of no row, so the texts agree as far as both go.
        assert len(record.response) == budget
        assert int(record.committed.sum()) == budget - 1
        assert len(answer.log_p) == budget
        assert (record.committed <= record.accepted + 1).all()
        assert len(longer.record.response) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_its_target_has_all_proposals_accepted(temperature):
    model = language()
    drafter = Knowing(model, first=5, proposals=3)
    prompts = [torch.cat([torch.tensor([5]), prompt]) for prompt in prompts_of(lengths=(3, 1, 6))]
    lengths = {}
    for name, tree in (("tree", TREE), ("line", None)):
        found = speculate(how(model, drafter, tree, (), 3, temperature), prompts, [1, 2, 3], 21)
        lengths[name] = acceptance_length([answer.record for answer in found])
    if temperature == 0:
        assert lengths == {"tree": 4, "line": 4}
    else:
        assert 1 < lengths["line"] < lengths["tree"] < 4


@torch.no_grad()
def lines_at(settings, text, anchors):
    """int64 `[M, K]`: the line of likeliest proposals at each of int64 `[M]` positions of a text."""
    positions, embed, found = torch.arange(len(text) - 1), settings.target.embed, []
    _, features = settings.target.read(text[None, :-1], positions[None], settings.target.begin())
    kept = settings.drafter.read(features, text[None, 1:], positions[None], embed)

    def follow(k, hidden):
        found.append(settings.drafts.vocabulary.named(settings.drafts.logits(hidden[0]).argmax(-1)))
        return found[-1][None]

    before = features[:, anchors - 1]
    settings.drafter.propose(kept, before, text[None, anchors], anchors[None], settings.proposals, follow, embed)
    return torch.stack(found, 1)


def agreement(block, following):
    return [*(a == b for a, b in zip(block, following, strict=False)), False].index(False)


def test_of_the_same_block_never_fewer_proposals_stand_than_without_a_tree():
    model = language(vocabulary=SMALL, initializer_range=0.1)
    settings = how(model, drafter_of(Chain(proposals=4), model), Tree(width=2, nodes=8), ends=())
    prompts, more = [prompt % SMALL for prompt in prompts_of()], 0
    found = speculate(settings, prompts, range(5), 60)
    for prompt, answer in zip(prompts, found, strict=True):
        text, record = torch.cat([prompt, answer.record.response]), answer.record
        lines = lines_at(settings, text, record.anchors).tolist()
        for line, anchor, stood in zip(lines, record.anchors.tolist(), record.accepted.tolist(), strict=True):
            without = agreement(line, text[anchor + 1 :].tolist())
            assert stood >= without
            more += stood > without
    assert more > 0
    lines = speculate(replace(settings, tree=None), prompts, range(5), 60)
    lengths = [acceptance_length([answer.record for answer in answers]) for answers in (found, lines)]
    assert lengths[0] > lengths[1]


# Losslessness by count: three tokens of a target with six ids, against every text's exact probability.

FEW, MANY = 10_000, 50_000


def counts_of_texts(settings, prompt, draws):
    counts = torch.zeros(SMALL**3, dtype=torch.float64)
    for start in range(0, draws, 5000):
        found = speculate(settings, [prompt] * 5000, range(start, start + 5000), 3)
        codes = torch.stack([answer.record.response for answer in found]) @ torch.tensor([SMALL**2, SMALL, 1])
        counts += torch.bincount(codes, minlength=SMALL**3)
    return counts


@pytest.fixture(scope="module")
def small():
    model = language(vocabulary=SMALL, width=16, initializer_range=0.2, seed=4)
    settings = how(
        model, drafter_of(Chain(proposals=2), model, seed=5), Tree(width=2, nodes=5), (), proposals=2, temperature=1.0
    )
    prompt = torch.tensor([1, 4])
    return settings, prompt, exact_texts(model, prompt)


@pytest.mark.parametrize("draws", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_texts_are_distributed_as_the_targets(small, draws):
    settings, prompt, exact = small
    assert p_value(counts_of_texts(settings, prompt, draws), exact) > 1e-3


def test_a_wrong_rule_is_found(small, monkeypatch):
    """Where no child is accepted a token is drawn from the whole distribution, children that were rejected too."""
    settings, prompt, exact = small
    grown, generator = [], torch.Generator().manual_seed(0)
    right_grow, right_draw = opd.drafting.decoding.grow, opd.drafting.decoding._Batch._drawn

    def noted(*args):
        made = right_grow(*args)
        grown[:] = [made, 0]
        return made

    def wrong(self, log_p, uniforms):
        first = right_draw(self, log_p, uniforms)
        if not grown:
            return first
        tree, at = grown
        grown[1] += log_p.shape[1]
        nodes = torch.arange(at, grown[1])[None, :, None]
        child = (tree.parents[:, None] == nodes) & (tree.tokens[:, None] == first[:, :, None])
        child[:, :, 0] = False
        if grown[1] == tree.tokens.shape[1]:
            grown.clear()
        anew = right_draw(self, log_p, torch.rand(uniforms.shape, generator=generator))
        return torch.where(child.any(2), first, anew)

    monkeypatch.setattr(opd.drafting.decoding, "grow", noted)
    monkeypatch.setattr(opd.drafting.decoding._Batch, "_drawn", wrong)
    assert p_value(counts_of_texts(settings, prompt, FEW), exact) < 1e-9


# Trees by hand.


def tree_of(tokens, parents, depths):
    made = (torch.tensor([each]) for each in (tokens, parents, depths))
    return Grown(*made, torch.zeros(1, len(tokens)), max(depths))


def test_children_are_accepted_with_what_is_left_for_them():
    """p = (.5, .3, .2) and the children 1 and 0: rates .3 and 5/7, else token 2; what comes out has p."""
    p, grid = torch.tensor([0.5, 0.3, 0.2]), (torch.arange(1000) + 0.5) / 1000
    children = tree_of([7, 1, 0], [0, 0, 0], [0, 1, 1])
    children = Grown(
        *(x.expand(1000, 3) for x in (children.tokens, children.parents, children.depths, children.log_q)), 1
    )
    own = inverse_cdf(p.log().expand(1000, 3), grid)
    drawn = torch.stack([own, *[torch.zeros_like(own)] * 2], 1)
    line = followed(children, drawn)
    first = (line.accepted == 1) & (line.nodes[:, 1] == 1)
    second = (line.accepted == 1) & (line.nodes[:, 1] == 2)
    assert float(first.float().mean()) == pytest.approx(0.3, abs=2e-3)
    assert float(second.sum() / (~first).sum()) == pytest.approx(5 / 7, abs=2e-3)
    assert set(own[line.accepted == 0].tolist()) == {2}
    taken = torch.where(line.accepted == 1, children.tokens.gather(1, line.nodes[:, 1:])[:, 0], own)
    torch.testing.assert_close(torch.bincount(taken, minlength=3) / 1000, p, atol=2e-3, rtol=0)


#   9 -> 4 -> 5 -> 6
#     |    -> 7
#     -> 3 -> 8
BY_HAND = tree_of([9, 4, 3, 5, 7, 8, 6], [0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3])


@pytest.mark.parametrize(
    ("drawn", "line", "size", "accepted"),
    [
        # What the target draws behind each node; then the line, by nodes.
        ([4, 5, 0, 6, 0, 0, 1], [0, 1, 3, 6], 3, 3),
        ([4, 5, 0, 0, 0, 0, 0], [0, 1, 3, 6], 3, 2),
        ([4, 7, 0, 6, 2, 0, 0], [0, 1, 4, 4], 2, 2),
        ([4, 0, 0, 6, 0, 0, 0], [0, 1, 3, 6], 3, 1),
        ([3, 5, 0, 0, 0, 0, 0], [0, 2, 5, 5], 2, 1),
        ([3, 5, 8, 0, 0, 0, 0], [0, 2, 5, 5], 2, 2),
        ([9, 5, 8, 6, 0, 0, 0], [0, 1, 3, 6], 3, 0),
    ],
)
def test_the_line_through_a_tree_by_hand(drawn, line, size, accepted):
    found = followed(BY_HAND, torch.tensor([drawn]))
    assert found.nodes.tolist() == [line]
    assert (found.sizes.tolist(), found.accepted.tolist()) == ([size], [accepted])


def test_a_node_sees_itself_and_what_it_stands_behind():
    seen = [row.nonzero().flatten().tolist() for row in BY_HAND.seen()[0]]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 1, 3, 6]]


def grown_of(model, drafter, tree, depth=4, prompts=None):
    """Trees behind the last token of each prompt, all of one length."""
    prompts = torch.stack(prompts_of(lengths=(6, 6, 6))) if prompts is None else prompts
    target, positions = Target(model, drafter.taps), torch.arange(prompts.shape[1] - 1).expand(len(prompts), -1)
    with torch.no_grad():
        _, features = target.read(prompts[:, :-1], positions, target.begin())
        kept = drafter.read(features, prompts[:, 1:], positions, target.embed)
        at = torch.full((len(prompts), 1), prompts.shape[1] - 1)
        head = head_of(drafter, model)
        return grow(drafter, tree, head, kept, features[:, -1:], prompts[:, -1:], at, depth, target.embed)


@pytest.mark.parametrize("form", CHAINS)
@pytest.mark.parametrize("tree", [TREE, Tree(width=2, nodes=4), Tree(width=5, nodes=30)])
def test_a_tree_has_the_likeliest_nodes_with_all_that_they_stand_behind(form, tree):
    model = language(initializer_range=0.2)
    drafter = drafter_of(CHAINS[form], model).eval()
    made = grown_of(model, drafter, tree)
    rows = torch.arange(len(made.tokens))[:, None]
    assert made.tokens.shape == (3, tree.nodes + 1)
    assert (made.parents[:, 1:] < torch.arange(1, tree.nodes + 1)).all()
    assert (made.depths[:, 1:] == made.depths[rows, made.parents[:, 1:]] + 1).all()
    for tokens, parents in zip(made.tokens.tolist(), made.parents.tolist(), strict=True):
        pairs = list(zip(parents[1:], tokens[1:], strict=True))
        assert len(set(pairs)) == len(pairs), "no token stands twice behind one"
    # The line of likeliest children, by the drafter alone: it is there, down to the last depth.
    line = followed(made, torch.full_like(made.tokens, -1))
    assert line.sizes.tolist() == [4, 4, 4]
    alone = [lines_at(how(model, drafter), prompt, torch.tensor([5])) for prompt in prompts_of(lengths=(6, 6, 6))]
    assert made.tokens.gather(1, line.nodes[:, 1:]).tolist() == torch.cat(alone).tolist()


def test_a_form_that_keeps_its_rows_drafts_what_is_drafted_anew(monkeypatch):
    model = language(initializer_range=0.2)
    drafter = drafter_of(CHAINS["chain"], model).eval()
    kept = grown_of(model, drafter, Tree(width=4, nodes=20))
    monkeypatch.setattr(type(drafter), "branch", Drafter.branch)
    anew = grown_of(model, drafter, Tree(width=4, nodes=20))
    assert kept.tokens.tolist() == anew.tokens.tolist()
    assert kept.parents.tolist() == anew.parents.tolist()
    torch.testing.assert_close(kept.log_q, anew.log_q, atol=1e-5, rtol=1e-4)


def test_a_tree_of_one_line_is_the_line():
    model = language()
    drafter = drafter_of(CHAINS["chain"], model)
    found = [
        speculate(how(model, drafter, tree, temperature=0.8), prompts_of(), range(5), 20)
        for tree in (None, Tree(width=2, nodes=4))
    ]
    for line, tree in zip(*found, strict=True):
        assert tree.proposed.tolist() == line.proposed.tolist()
        assert tree.record.accepted.tolist() == line.record.accepted.tolist()
        torch.testing.assert_close(tree.log_q, line.log_q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tree.log_p, line.log_p, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tree.record.features, line.record.features, atol=1e-4, rtol=1e-4)


def test_few_ids_make_small_trees():
    model = language(vocabulary=3)
    made = grown_of(
        model, drafter_of(Chain(proposals=2), model).eval(), Tree(width=8, nodes=500), 2, torch.ones(1, 4).long()
    )
    assert made.depths.tolist() == [[0, *[1] * 3, *[2] * 9]]
    total = made.log_q + made.log_q.gather(1, made.parents)
    torch.testing.assert_close(total[made.depths == 2].exp().sum(), torch.tensor(1.0))


# What is recorded.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("form", [Chain(proposals=4), Chain(proposals=4, vocabulary=[1, 3, 4])])
def test_what_is_kept_of_a_tree_is_one_line_that_can_be_drafted_again(form, temperature):
    model = language(vocabulary=SMALL, initializer_range=0.1)
    student = student_of(drafter_of(form, model), model, end_tokens=[2])
    source = {"text_temperature": temperature, "tree": {"width": 2, "nodes": 6}}
    made = drafted(student, ["00112", "1", "2201"], group=4, budget=24, **source)
    again = student(made, student.context)
    log_q = again.log_probs().gather(1, again.vocabulary.columns(made.actions)[:, None])[:, 0]
    torch.testing.assert_close(log_q, made.columns["log_q"], atol=2e-5, rtol=1e-4)
    student.check_outputs(made, 1e-4)
    sizes = set()
    blocks = blocks_of(made.contexts, made.completions(), torch.device("cpu"))
    assert (blocks.proposals[blocks.present] == made.actions).all()
    at = 0
    for record, proposed in zip(made.contexts, made.completions(), strict=True):
        text = torch.cat([record.prompt, record.response]).tolist()
        for anchor, stood, added, size in zip(
            *(x.tolist() for x in (record.anchors, record.accepted, record.committed, record.sizes)), strict=True
        ):
            block = proposed[:size].tolist()
            proposed = proposed[size:]
            of_block = {name: made.columns[name][at : at + size].tolist() for name in made.columns}
            assert of_block["slot"] == list(range(1, size + 1))
            assert block[:stood] == text[anchor + 1 : anchor + 1 + stood]
            whole = added == stood + 1
            assert of_block["accepted"] == [k < stood for k in range(size)]
            assert of_block["rejected"] == [whole and k >= stood for k in range(size)]
            assert of_block["corrected"] == [whole and k == stood for k in range(size)]
            if whole and stood < size:
                assert block[stood] != text[anchor + 1 + stood], "what did not stand is not what was written"
            sizes.add(size)
            at += size
        assert not len(proposed)
    assert 4 in sizes
    assert sizes - {4}, "lines that end before the deepest"
    again.log_probs().sum().backward()
    assert all(p.grad is not None for p in student.module.parameters())


def test_the_targets_answers_come_along_for_the_line():
    model = language(vocabulary=SMALL, initializer_range=0.1)
    student = student_of(drafter_of(Chain(proposals=4), model), model, end_tokens=[2])
    source = {"text_temperature": 0.9, "tree": {"width": 2, "nodes": 6}}
    made = drafted(student, ["00112", "1", "2201"], group=2, budget=20, **source)
    teacher, (answer,) = TargetTeacher().build(student.context, student), made.answers
    (anew,) = teacher.answer(made, teacher.settings, student.context)
    torch.testing.assert_close(answer.distribution.log_probs(), anew.distribution.log_probs(), atol=1e-4, rtol=1e-4)
    teacher.check_outputs(made, "the target")


def test_a_tree_whose_nodes_see_too_much_is_found_out(monkeypatch):
    """What the target found among the other lines is not what it finds of the text alone."""
    model = language(vocabulary=SMALL, initializer_range=0.1)
    student = student_of(drafter_of(Chain(proposals=4), model), model, end_tokens=[2])
    monkeypatch.setattr(Grown, "seen", lambda self: self.depths[:, :, None] >= self.depths[:, None])
    made = drafted(student, ["00112", "1", "2201"], budget=20, tree={"width": 3, "nodes": 12})
    with pytest.raises(SelfTestError, match="read anew"):
        TargetTeacher().build(student.context, student).check_outputs(made, "the target")


def test_slots_are_numbered_by_block():
    of_block, slot = numbered(torch.tensor([3, 1, 0, 2]))
    assert of_block.tolist() == [0, 0, 0, 1, 3, 3]
    assert slot.tolist() == [1, 2, 3, 1, 1, 2]


def test_what_was_saved_by_hand():
    assert saved(4, 10) == {"target_passes": 4, "written_tokens": 10, "passes_saved": 0.6}


# Runs.


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("target"), seed=1, layers=LAYERS, initializer_range=0.15)


def test_a_run_with_trees(target, tmp_path):
    rollout = {"text_temperature": 1.0, "tree": {"width": 3, "nodes": 10}}
    recipe = recipe_for(target, tmp_path, rollout=rollout, steps=12)
    result = execute(recipe, quiet=True)
    assert result.after["reverse_kl"] < result.before["reverse_kl"]
    steps = [record for record in result.history if "train/loss" in record]
    for record in steps:
        passes, tokens = record["train/target_passes"], record["train/written_tokens"]
        assert record["train/passes_saved"] == pytest.approx(1 - passes / tokens)
        # One pass of each answer reads its prompt, and its token is the first.
        assert (tokens - 6) / (passes - 6) == pytest.approx(record["train/acceptance_length"])
        at = [record[f"train/accepted_at/{k}"] for k in range(1, 5)]
        assert at == sorted(at, reverse=True)
        assert sum(at) == pytest.approx(record["train/accepted_proposals"])
    plan, without = make_plan(recipe), make_plan(recipe_for(target, tmp_path))
    assert plan.teraflops["rollout"] > without.teraflops["rollout"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drafter": BLOCK}, r"rollout.tree is set, and the slots of this drafter do not see each other"),
        ({"rollout": {"proposing": "drawn"}}, r"'drawn', and the children in a tree .* remove tree"),
        ({"rollout": {"tree": {"nodes": 3}}}, r"rollout.tree.nodes is 3, and one line has 4 proposals already"),
        ({"rollout": {"tree": {"width": 1}}}, r"rollout.*tree.width"),
    ],
)
def test_mistakes_are_told_of(target, tmp_path, changes, said):
    changes = {**changes, "rollout": {"tree": {}, **changes.get("rollout", {})}}
    with pytest.raises(opd.OpdError, match=said):
        build(recipe_for(target, tmp_path, **changes), tmp_path)
    if "drafter" in changes:
        with pytest.raises(IncompatibleError, match="do not see each other"):
            make_plan(recipe_for(target, tmp_path, **changes))


@on_each_device
def test_a_run_with_trees_on_each_device(target, tmp_path, device):
    rollout = {"text_temperature": 1.0, "tree": {"width": 3, "nodes": 10}}
    result = execute(recipe_for(target, tmp_path, rollout=rollout, hardware={"device": device}), quiet=True)
    assert result.after["reverse_kl"] < result.before["reverse_kl"]


def test_a_step_says_how_much_stood_and_what_was_saved(target, tmp_path, capsys):
    execute(recipe_for(target, tmp_path, rollout={"tree": {}}, steps=1))
    said = " ".join("".join(capsys.readouterr()).split())
    assert re.search(r"acceptance_length [\d.]+ passes_saved [\d.e-]+", said)
