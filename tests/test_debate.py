"""Debates as teachers (MAD-OPD): texts, weights, contexts, the loss of several voices, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from opd.api import execute
from opd.context import Context
from opd.distributions import Categorical, Head, Sampled
from opd.divergences import ForwardKL, JensenShannon, ReverseKL, Target
from opd.errors import DataError, IncompatibleError, RunError
from opd.language.agreement import end_ids
from opd.language.engines.base import Drawing
from opd.language.engines.transformers import LanguageModel
from opd.language.tokens import Tokens
from opd.plan import make_plan
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.report import write_report
from opd.teachers.debate import DebateTeacher, LiveDebate, _row_seed
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.served import LiveServedTeacher, ServedTeacher
from opd.teachers.speaking import shown
from opd.teachers.transcripts import Debate
from opd.teachers.wording import Wording, framed
from tests.conftest import character_tokenizer, tiny_model, trajectories_of
from tests.serving import serving_tiny
from tests.test_loop import build, recipe_for
from tests.test_loop import models as _models
from tests.tiny import CHAT, saved, turn_tokenizer

models = _models
CPU = Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,)))
SHORT = {
    **dict.fromkeys(("role", "confidence", "revise", "focus", "begin", "end", "gap"), ""),
    "label": "{expert}{round}:",
    "identity": "{expert}.",
    "cue": "=",
    "tag": "c{number}",
}
"""A debate in the characters that the tiny models know."""
LIVE = LocalTeacher(model="(live)", template="plain", batch=3)


def settings(names="ab", **changes):
    own = {"wording": SHORT, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, **changes}
    return DebateTeacher(experts=dict.fromkeys(names, LIVE), **own)


def expert(seed):
    return LanguageTeacher(
        LanguageModel(tiny_model(seed=seed).requires_grad_(False), character_tokenizer(), template="plain"),
        LIVE,
        torch.device("cpu"),
    )


def live(names="ab", seeds=(1, 2), **changes):
    own = settings(names, **changes)
    return LiveDebate(own, {name: expert(seed) for name, seed in zip(names, seeds, strict=True)})


def asked(debate, trajectories, context=CPU):
    return debate.answer(trajectories, debate.settings, context)


def rows(*lengths, seed=0, texts="pqrst"):
    prompts = [Prompt(f"p{i}", {"prompt": f"{texts[i % len(texts)]}?"}, where=f"here:{i}") for i in range(len(lengths))]
    return trajectories_of(list(lengths), seed=seed, prompts=prompts, contexts=[torch.tensor([5, 6])] * len(lengths))


def held(debate, prompt, *rounds, context=CPU):
    """Have a debate held already."""
    debate.transcripts.keep(debate.key(prompt, context.seed), Debate(tuple(rounds), 8))


# -- how sure, and what it counts --------------------------------------------------------------------------------------


def test_weights_are_the_softmax_of_confidences_in_hundredths():
    debate = live(rounds=1)

    def weights(*texts, **changes):
        debate.settings = settings(rounds=1, **changes)
        return debate.weights(Debate((texts,), 0))

    assert weights("x c95", "y c80") == pytest.approx([0.5374, 0.4626], abs=1e-4)
    assert weights("x c100", "y c0") == pytest.approx([0.7311, 0.2689], abs=1e-4)
    assert weights("x c95", "no tag") == [0.5, 0.5]
    assert weights("x c950", "y c-5") == weights("x c100", "y c0")
    assert weights("c1 then c95", "y c80") == weights("x c95", "y c80")
    assert weights("x c95", "y c80", tau=0.05)[0] == pytest.approx(1 / (1 + math.exp(-3)))
    assert weights("x c95", "y c80", weighting="uniform") == [0.5, 0.5]
    assert debate.weights(None) == [0.5, 0.5]


def test_a_tag_may_be_any_text_with_a_number_in_it():
    usual = Wording()
    assert usual.sure("so 7. <confidence> 85% </confidence>") == 85
    assert usual.sure("<confidence>high</confidence>") is None
    assert usual.without_tag("so 7.\n<confidence>85</confidence>") == "so 7."
    assert usual.tag.replace("{number}", "NUMBER") in usual.first("x", "a", "code")
    for tag in ("{number}", "none", "{number} of {number}"):
        with pytest.raises(ValueError, match="is no tag"):
            Wording(tag=tag)
    with pytest.raises(ValueError, match="asks for no"):
        Wording(confidence="How sure are you?")


def test_the_last_round_decides_and_all_texts_are_seen():
    debate = live()
    debate.settings = settings(rounds=2)
    assert debate.sure(Debate((("c1", "c2"), ("c30", "c40")), 0)) == [30, 40]
    read = Wording(**SHORT).later("q", "b", "general", ["a", "b"], [("u c1", "v c2")])
    assert read == "qa1:u c1b1:v c2"
    assert Wording(**SHORT).scoring("q", "b", ["a", "b"], [("u", "v"), ("w", "x")]) == "qb.a1:ub1:va2:wb2:x="


def test_only_the_identity_line_differs_between_experts():
    usual, rounds = Wording(), [("one", "two"), ("three", "four")]
    first, second = (usual.scoring("the task", name, ["A", "B"], rounds) for name in "AB")
    assert first.replace("You are expert A", "You are expert B") == second
    assert first.startswith("the task\n\n")
    assert first.index("one") < first.index("two") < first.index("three") < first.index(usual.end)


def test_messages_keep_their_roles_and_the_last_turn_of_the_user_has_the_debate():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert framed(turns, "b", "h", "\n") == [turns[0], {"role": "user", "content": "b\nq\nh"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert framed(parts, "", "h", "\n") == [{"role": "user", "content": "q\nh"}]
    tool = [*turns, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}]
    assert framed(tool, "", "h", "\n") == [*tool, {"role": "user", "content": "h"}]
    assert framed(tool, "", "", "\n") == tool


# -- the debate --------------------------------------------------------------------------------------------------------


def test_every_expert_writes_from_the_rounds_before_and_from_nothing_else():
    debate, trajectories = live(), rows(3, 2)
    asked(debate, trajectories)
    prompt = trajectories.prompts[1]
    (found,) = debate.debates([prompt], CPU)
    assert [len(texts) for texts in found.rounds] == [2, 2]
    key = debate.key(prompt, CPU.seed)
    for r in (0, 1):
        for k, name in enumerate("ab"):
            language = debate.experts[name].language
            view = debate._read(prompt, name, found.rounds[:r])
            assert view == ("q?" if r == 0 else f"q?a1:{found.rounds[0][0]}b1:{found.rounds[0][1]}")
            own = CPU.with_(agreed=Tokens(end_ids=tuple(end_ids(language))))
            ids = language.encode(shown(prompt, view))
            (row,) = language.sample([ids], 1, 4, [_row_seed(key, r, name)], Drawing(own))
            assert language.decode(row.actions) == found.rounds[r][k]


def test_the_debate_is_blind_to_the_reply():
    debate, first, second = live(weighting="uniform"), rows(3, 2, 4), rows(5, 1, 2, seed=9)
    before = asked(debate, first)
    texts = debate.transcripts.state_dict()
    contexts = [context.clone() for context in first.contexts]
    assert debate.tally.held == 3
    after = asked(debate, second)
    assert debate.transcripts.state_dict() == texts
    assert debate.tally.held == 3
    assert [t.weight[0].item() for t in before] == [t.weight[0].item() for t in after] == [0.5, 0.5]
    assert all(torch.equal(a, b) for a, b in zip(contexts, first.contexts, strict=True)), "the student's view stays"
    assert [prompt.view() for prompt in first.prompts] == ["p?", "q?", "r?"]


def test_each_sample_has_its_own_weights_at_all_of_its_positions():
    debate, trajectories = live(rounds=1), rows(3, 2)
    held(debate, trajectories.prompts[0], ("x c95", "y c80"))
    held(debate, trajectories.prompts[1], ("x c0", "y c100"))
    first, second = asked(debate, trajectories)
    assert first.weight.tolist() == pytest.approx([0.5374] * 3 + [0.2689] * 2, abs=1e-4)
    assert (first.weight + second.weight).tolist() == pytest.approx([1.0] * 5)
    assert not first.distribution.hidden.requires_grad
    signals = debate.own_signals(lambda values: values)
    assert signals["debate/weight/a"] == pytest.approx((0.5374 + 0.2689) / 2, abs=1e-4)
    assert signals["debate/sure/b"] == 90
    assert (signals["debate/untagged"], signals["debate/held"], signals["debate/hit_rate"]) == (0, 0, 1)


def test_experts_score_the_exact_ids_under_the_debate():
    debate, trajectories = live(rounds=1), rows(3, 2)
    for prompt in trajectories.prompts:
        held(debate, prompt, ("x c95", "y c80"))
    targets = asked(debate, trajectories)
    for name, target in zip("ab", targets, strict=True):
        language = debate.experts[name].language
        views = [f"{p.view()}{name}.a1:x c95b1:y c80=" for p in trajectories.prompts]
        contexts = [torch.tensor(language.tokenizer(view)["input_ids"]) for view in views]
        expected = language(contexts, trajectories.completions())
        assert torch.allclose(target.distribution.hidden, expected, atol=1e-5)
        assert not torch.allclose(expected, expected.roll(1, 0), atol=1e-2)


def test_without_rounds_it_is_several_teachers_of_equal_weight():
    debate, trajectories = live(rounds=0), rows(3, 2)
    targets = asked(debate, trajectories)
    for name, target in zip("ab", targets, strict=True):
        plain = debate.experts[name].answer(trajectories, LIVE, CPU)[0]
        assert torch.equal(target.distribution.hidden, plain.distribution.hidden)
        assert set(target.weight.tolist()) == {0.5}
    assert not debate.speakers
    assert debate.own_signals(lambda values: values) == {}


def test_a_text_that_asks_for_no_debate_of_its_own_is_debated_about_another():
    """The control: the reply is scored with what was debated about another prompt."""
    debate = live(rounds=1, about="other")
    prompt = Prompt("p", {"prompt": "q?", "other": "z?"})
    assert debate._read(prompt, "a", ()) == "z?"
    assert debate._scored(prompt, "a", Debate((("u", "v"),), 0)) == "q?a.a1:ub1:v="


def test_a_routed_expert_writes_and_scores_by_the_route_of_the_prompt(models):
    routed = {
        "kind": "routed",
        "by": "task",
        "routes": {tag: {"model": models[1], "template": "plain"} for tag in "xy"},
    }
    own = settings(rounds=1).model_dump() | {"experts": {"a": routed, "b": routed}}
    debate = DebateTeacher.model_validate(own).build(CPU, None)
    assert sorted(debate.members()) == ["a x", "a y", "b x", "b y"]
    prompts = [Prompt(f"p{i}", {"prompt": f"{i}", "task": "xyx"[i]}) for i in range(3)]
    targets = asked(debate, trajectories_of([2, 3, 1], prompts=prompts))
    assert [len(target.distribution) for target in targets] == [6, 6]
    assert debate.tally.held == 3


def test_templates_write_the_debate_into_one_turn():
    language = LanguageModel(None, turn_tokenizer(CHAT), template="chat")
    prompt = Prompt("p", {"prompt": [{"role": "user", "content": "add 1"}], "tools": [{"name": "t"}]})
    view = Wording(**SHORT).scoring(prompt.view(), "a", ["a"], [("two",)])
    text = language.tokenizer.decode(language.encode(shown(prompt, view)))
    assert text.startswith("T:1")
    assert text.count("user") == 1
    assert "add 1a.a1:two=" in text


# -- the loss ----------------------------------------------------------------------------------------------------------


def loss_of(objective, student, targets, trajectories, weights=None):
    """Value and the student's gradient, `sequence_mean`."""
    student.module.zero_grad()
    if weights is None:
        weights = 1.0 / (trajectories.lengths.repeat_interleave(trajectories.lengths) * len(trajectories))
    loss = objective(student(trajectories), targets, weights.float(), trajectories)
    loss.total.backward()
    return loss.total.item(), torch.cat([p.grad.flatten() for p in student.module.parameters()])


def test_equal_experts_are_one_whatever_their_weights(student):
    """And one expert without a debate is a plain teacher."""
    same = {**SHORT, "identity": ""}
    trajectories = rows(3, 2)
    two, one = live(seeds=(1, 1), rounds=1, wording=same), live("a", (1,), rounds=0)
    for prompt in trajectories.prompts:
        held(two, prompt, ("", "c9"))
    plain = expert(1).answer(trajectories, LIVE, CPU)
    for objective in (ReverseKL(), JensenShannon()):
        expected, gradient = loss_of(objective, student, plain, trajectories)
        found, own = loss_of(objective, student, asked(one, trajectories), trajectories)
        assert (found, own.tolist()) == (expected, gradient.tolist())
    targets = asked(two, trajectories)
    first = [Target(targets[0].distribution)]
    for share in (0.5, 0.9):
        weighed = [
            Target(t.distribution, torch.full((5,), w)) for t, w in zip(targets, (share, 1 - share), strict=True)
        ]
        (a, grad_a), (b, grad_b) = (loss_of(ReverseKL(), student, t, trajectories) for t in (first, weighed))
        assert a == pytest.approx(b, rel=1e-5)
        assert torch.allclose(grad_a, grad_b, atol=1e-6)


def test_a_teacher_that_is_the_student_costs_nothing_and_one_position_off_costs_something(student):
    trajectories = rows(4, 3)
    prompts = [Prompt(p.id, {"prompt": "ab"}) for p in trajectories.prompts]
    ids = torch.tensor(student.reader.tokenizer("ab")["input_ids"])
    trajectories = replace(trajectories, prompts=prompts, contexts=[ids, ids])
    itself = LanguageTeacher(student.language, LIVE, torch.device("cpu"))
    debate = LiveDebate(settings("ab", rounds=0), {"a": itself, "b": itself})
    targets = asked(debate, trajectories)
    assert loss_of(ReverseKL(), student, targets, trajectories)[0] == pytest.approx(0, abs=1e-6)
    off = [replace(t, distribution=replace(t.distribution, hidden=t.distribution.hidden.roll(1, 0))) for t in targets]
    assert loss_of(ReverseKL(), student, off, trajectories)[0] > 0.01


def test_the_sum_of_divergences_is_a_product_of_experts_or_a_mixture(student):
    """Reverse KL: `sum_k w_k KL(q||p_k) = KL(q||g) - log Z`; forward KL: that to the mixture, plus a constant."""
    trajectories = rows(3, 2)
    debate = live(rounds=1)
    for prompt, text in zip(trajectories.prompts, ("c95", "c10"), strict=True):
        held(debate, prompt, (text, "c40"))
    targets = asked(debate, trajectories)
    log_p = torch.stack([t.distribution.head.logits(t.distribution.hidden).log_softmax(-1) for t in targets])
    w = torch.stack([t.weight for t in targets])[..., None]
    geometric = (w * log_p).sum(0)
    log_z = geometric.logsumexp(-1)
    mixture = (w * log_p.exp()).sum(0).log()
    own = student(trajectories).head.logits(student(trajectories).hidden).log_softmax(-1).detach()
    weights = torch.full((5,), 0.2)

    def as_target(log_probs):
        """A distribution of given log-probabilities: hidden states that are the logits themselves."""
        return [Target(Categorical(log_probs, Head(torch.eye(log_probs.shape[1]))))]

    found, gradient = loss_of(ReverseKL(), student, targets, trajectories, weights)
    product, of_product = loss_of(ReverseKL(), student, as_target(geometric - log_z[:, None]), trajectories, weights)
    assert found == pytest.approx(product - float(log_z.mean()), rel=1e-4)
    assert torch.allclose(gradient, of_product, atol=1e-5)
    found, gradient = loss_of(ForwardKL(), student, targets, trajectories, weights)
    mixed, of_mixture = loss_of(ForwardKL(), student, as_target(mixture), trajectories, weights)
    constant = (w * (log_p.exp() * (log_p - mixture)).sum(-1, keepdim=True)).sum(0).mean()
    assert found == pytest.approx(mixed + float(constant), rel=1e-4)
    assert torch.allclose(gradient, of_mixture, atol=1e-5)
    found, _ = loss_of(JensenShannon(beta=0.5), student, targets, trajectories, weights)
    m = (log_p.exp() + own.exp()) / 2
    each = 0.5 * (log_p.exp() * (log_p - m.log())).sum(-1) + 0.5 * (own.exp() * (own - m.log())).sum(-1)
    assert found == pytest.approx(float((w[..., 0] * each).sum(0).mean()), rel=1e-4)


def test_a_long_reply_weighs_no_more_than_a_short_one(student):
    debate, trajectories = live(rounds=1, weighting="uniform"), rows(6, 2)
    both, gradient = loss_of(ReverseKL(), student, asked(debate, trajectories), trajectories)
    each = []
    for i in (0, 1):
        (alone, _) = trajectories.pick([i])
        each.append(loss_of(ReverseKL(), student, asked(debate, alone), alone))
    assert both == pytest.approx(sum(value for value, _ in each) / 2, rel=1e-5)
    assert torch.allclose(gradient, sum(own for _, own in each) / 2, atol=1e-6)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_debates_are_kept_on_disk_for_the_same_experts_and_settings_alone(tmp_path):
    cache, trajectories = {"path": str(tmp_path)}, rows(3, 2)
    first = live(cache=cache)
    asked(first, trajectories)
    assert first.tally.held == 2
    assert len(list(tmp_path.glob("*/*.json"))) == 2

    def anew(seeds=(1, 2), context=CPU, **changes):
        debate = live(seeds=seeds, cache=cache, **changes)
        asked(debate, trajectories, context)
        return debate.tally.held

    assert anew() == 0
    assert anew(seeds=(1, 3)) == 2
    assert anew(temperature=0.5) == 2
    assert anew(context=CPU.with_(seed=5)) == 2
    assert anew(context=CPU.with_(seed=5), seed=0) == 0
    assert anew(weighting="uniform", tau=3.0) == 0, "weights are made of the texts"
    for file in tmp_path.glob("*/*.json"):
        file.write_text("{}", encoding="utf-8")
    assert anew() == 2


def test_a_state_holds_the_debates(tmp_path):
    debate, trajectories = live(), rows(3, 2)
    asked(debate, trajectories)
    other = live()
    other.load_state_dict(json.loads(json.dumps(debate.state_dict())))
    asked(other, trajectories)
    assert other.transcripts.state_dict() == debate.transcripts.state_dict()
    assert other.own_signals(lambda v: v)["debate/held"] == 2, "what was not logged yet is logged by who goes on"


def test_a_server_debates_as_the_same_model_here_and_its_silence_loses_the_rollout():
    trajectories = rows(3, 2)
    here = live(seeds=(7, 7), weighting="uniform")
    asked(here, trajectories)
    with serving_tiny(seed=7) as url:
        served = ServedTeacher(url=url, retries=0, template="plain")
        student = LanguageModel(tiny_model(), character_tokenizer(), template="plain")
        built = {name: LiveServedTeacher(served, served.reader(student)) for name in "ab"}
        debate = LiveDebate(
            settings(weighting="uniform").model_copy(update={"experts": dict.fromkeys("ab", served)}), built
        )
        targets = asked(debate, trajectories)
        texts = [debate.considered(p)["rounds"] for p in trajectories.prompts]
        assert [[len(r) for r in each] for each in texts] == [[2, 2], [2, 2]]
        assert all(target.missing is None for target in targets)
        signals = debate.own_signals(lambda v: v)
        assert signals["debate/tokens"] > 0
        assert signals["debate/read_tokens"] > signals["debate/tokens"]
    lost = asked(debate, rows(2, texts="z"))
    assert all(bool(target.missing.all()) for target in lost)
    assert debate.failures()["debating: connection"] == 1
    debate.close()


def of(*models):
    """A debate's block of models in folders, two experts of one where there is one."""
    experts = {name: {"model": models[i % len(models)], "template": "plain"} for i, name in enumerate("ab")}
    return {**settings(weighting="uniform").model_dump(), "experts": experts}


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(match, experts=None, **changes):
    with pytest.raises(ValueError, match=match):
        DebateTeacher.model_validate({"experts": experts or {"a": {"model": "m"}}, **changes})


def test_what_breaks_a_debate_is_refused():
    refused("blind to answers", sees="answer")
    refused("blind to answers", about="response")
    refused("all debate one thing", {"a": {"model": "m", "sees": "solution"}})
    refused("all debate one thing", {"a": {"kind": "routed", "by": "t", "routes": {"x": {"model": "m", "sees": "s"}}}})
    refused("its key is its name", {"a": {"model": "m", "name": "b"}})
    refused("decides how much each counts", {"a": {"model": "m", "weight": 2.0}})
    refused("experts are frozen models that write", {"a": {"kind": "self"}})
    refused("no dot", {"a.b": {"model": "m"}})
    refused("'batch' is a setting of each expert", batch=4)
    with pytest.raises(ValueError, match="at least 1 item"):
        DebateTeacher(experts={})
    hidden = DebateTeacher(experts={"a": {"model": "m"}}, sees="hint")
    with pytest.raises(DataError, match="holds the same as the column 'answer'"):
        hidden.check_prompts([Prompt("p", {"prompt": "q", "hint": "42", "answer": "42"})])


def test_texts_without_any_tag_end_the_run_before_it_moves():
    debate = live(wording={**SHORT, "tag": "sure-{number}"})
    with pytest.raises(RunError, match=r"none of 10 texts that ended a debate .* teacher\.weighting: uniform"):
        asked(debate, rows(1, 1, 1, 1, 1))
    asked(live(weighting="uniform", wording={**SHORT, "tag": "sure-{number}"}), rows(1, 1, 1, 1, 1))


def test_experts_with_another_tokenizer_or_other_answers_are_refused(models, tmp_path):
    other = saved(tmp_path / "other", tiny_model(vocabulary=96), turn_tokenizer())
    recipe = recipe_for(models, tmp_path)
    recipe = parse_recipe({**recipe.model_dump(), "teacher": of(models[1], other)})
    with pytest.raises(IncompatibleError, match="expert 'b' has another tokenizer than the student"):
        build(recipe, tmp_path)
    first, second = expert(1), expert(2)
    second.answers = Sampled
    with pytest.raises(IncompatibleError, match="must answer alike, and these do not: a categorical, b sampled"):
        LiveDebate(settings(), {"a": first, "b": second})


def test_a_debate_neither_watches_nor_writes_rollouts(models, tmp_path):
    base = recipe_for(models, tmp_path).model_dump()
    with pytest.raises(IncompatibleError, match="several experts answer together"):
        build(parse_recipe({**base, "teacher": of(models[1]), "rollout": {"kind": "teacher"}}), tmp_path)


# -- in a run ----------------------------------------------------------------------------------------------------------


def run_of(models, tmp_path, name="run", **changes):
    asked = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(6)]
    own = {
        "prompts": {"kind": "inline", "prompts": asked, "answer": "answer"},
        "objective": ["jensen_shannon"],
        "reduction": "sequence_mean",
        "verifier": "exact_match",
        "batch": {"prompts": 2, "group": 2, "micro": 4},
        "evaluation": {"held_out": 2, "samples": 2, "every": 0},
        "output": str(tmp_path / name),
        "steps": 4,
    }
    data = {**recipe_for(models, tmp_path).model_dump(), "teacher": of(models[1])}
    return parse_recipe({**data, **own, **changes})


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "train/tokens_per_second"} for line in lines]


def test_a_second_epoch_asks_nobody_and_the_report_shows_who_was_right(models, tmp_path):
    result = execute(run_of(models, tmp_path), quiet=True)
    steps = [line for line in result.history if "train/debate/tokens" in line]
    assert sum(line["train/debate/held"] for line in steps) == 6, "every prompt once, two of them held out"
    assert steps[-1]["train/debate/held"] == 0
    assert steps[-1]["train/debate/tokens"] == 0
    assert steps[-1]["train/debate/hit_rate"] == 1
    scored = [line["train/teacher_tokens"] for line in steps]
    assert scored == [2 * line["train/positions"] for line in steps], "each expert scores every position"
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text("utf-8").splitlines()]
    debate = rows[-1]["debate"]
    assert debate["experts"] == ["a", "b"]
    assert [len(texts) for texts in debate["rounds"]] == [2, 2]
    assert [len(right) for right in debate["right"]] == [2, 2]
    assert sum(debate["weights"]) == pytest.approx(1)
    page = write_report([tmp_path / "run"], tmp_path / "report.html")
    assert "rowRenderers.debate" in page.read_text("utf-8")


def test_a_run_with_a_debate_goes_on_as_if_it_had_never_stopped(models, tmp_path):
    whole = run_of(models, tmp_path, "whole", checkpoint={"every": 0}, evaluation={"held_out": 2, "every": 2})
    execute(whole, quiet=True)
    first = run_of(models, tmp_path, "parts", checkpoint={"every": 2}, evaluation={"held_out": 2, "every": 2}, steps=2)
    execute(first, quiet=True)
    second = run_of(models, tmp_path, "parts", checkpoint={"every": 2}, evaluation={"held_out": 2, "every": 2})
    execute(second, quiet=True, resume=True, force_changed=True)
    a, b = ([line for line in log(tmp_path / n) if line["step"] > 2] for n in ("whole", "parts"))
    assert a == b


def test_a_plan_counts_every_voice_and_the_debate(models, tmp_path):
    recipe = run_of(models, tmp_path)
    plan = make_plan(recipe)
    assert [shape.name.rpartition(", ")[2] for shape in plan.teachers] == ["expert a", "expert b"]
    none = make_plan(parse_recipe({**recipe.model_dump(), "teacher": {**recipe.teacher[0].model_dump(), "rounds": 0}}))
    one = make_plan(parse_recipe({**recipe.model_dump(), "teacher": {"model": models[1], "template": "plain"}}))
    assert none.teraflops["teachers"] == pytest.approx(2 * one.teraflops["teachers"])
    assert "debates" not in none.teraflops
    assert plan.teraflops["debates"] > 0
    assert plan.teraflops["teachers"] > none.teraflops["teachers"]
    assert plan.memory["teacher 1 answers (hidden states)"] == one.memory["teacher 0 answers (hidden states)"]
