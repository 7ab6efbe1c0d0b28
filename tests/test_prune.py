"""Prune-OPD: signals, weights, window and in-flight pruning, against the specification's vectors and by hand."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console

import opd
from opd.api import execute
from opd.assembly import assemble
from opd.compatibility.decay import decayed, most_events
from opd.compatibility.overlap import Overlap
from opd.compatibility.top_p_acceptance import TopPAcceptance
from opd.compatibility.weighted_overlap import WeightedOverlap
from opd.curricula.window import Window
from opd.distributions import Categorical, Head, Routed, TopK
from opd.divergences.reverse_kl_candidates import ReverseKLCandidates
from opd.jobs.sampling import sample
from opd.jobs.scoring import score
from opd.monitor import Monitor
from opd.objectives import Target
from opd.plan import make_plan
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.reduction import running_sums
from opd.shaping.drift import DriftWeights
from tests.conftest import rolled_out, tiny_model, trajectories_of
from tests.tiny import TEXTS, saved, short_run, turn_tokenizer


def categorical(probabilities):
    """Distributions whose probabilities are given, `[N, V]`."""
    log_probs = torch.tensor(probabilities).log()
    return Categorical(log_probs, Head(torch.eye(log_probs.shape[1])))


STUDENT = [[0.5, 0.3, 0.15, 0.05], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
TEACHER = [[0.3, 0.5, 0.05, 0.15], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]
ACTIONS = torch.tensor([0, 0, 1])


def test_signals_by_hand():
    student, teacher = categorical(STUDENT), categorical(TEACHER)
    overlap = Overlap(k=2, below=0.75)
    signal = overlap.measure(student, teacher, ACTIONS)
    assert signal.tolist() == [1.0, 0.0, 1.0]
    assert overlap.events(signal).tolist() == [False, True, False]
    weighted = WeightedOverlap(k=3).measure(student, teacher, ACTIONS)
    # Shared of three: {0, 1} of {0, 1, 2}; {2, 1} of {0, 1, 2}; all.
    torch.testing.assert_close(weighted, torch.tensor([0.8 / 0.95, 0.5 / 0.9, 1.0]))
    accepts = TopPAcceptance(k=4, p=0.7)
    # 1 (0.5) and 0 (before it 0.5 < 0.7); 3 and 2 reach 0.7 before 1 and 0; 3, 2, and 1 not, since 0.7 is reached.
    assert accepts.measure(student, teacher, ACTIONS).tolist() == [1.0, 0.0, 0.0]
    assert TopPAcceptance(k=2, p=1.0).measure(student, teacher, torch.tensor([1, 3, 0])).tolist() == [1.0, 1.0, 0.0]


def test_signals_do_not_depend_on_how_an_answer_is_held(monkeypatch):
    g = torch.Generator().manual_seed(0)
    student, teacher = (categorical(torch.rand(300, 40, generator=g).softmax(-1).tolist()) for _ in range(2))
    actions = torch.randint(40, (300,), generator=g)
    for signal in (Overlap(k=8), WeightedOverlap(k=8), TopPAcceptance(k=8)):
        whole = signal.measure(student, teacher, actions)
        assert 0 < whole.mean() < 1
        listed = signal.measure(TopK.of(student, 12), TopK.of(teacher, 10), actions)
        torch.testing.assert_close(listed, whole)
        half = torch.arange(300) % 2
        parts = tuple(teacher.select(half == i) for i in (0, 1))
        routed = Routed(parts, half, torch.arange(300) // 2)
        torch.testing.assert_close(signal.measure(student, routed, actions), whole)
        with monkeypatch.context() as patch:
            patch.setattr("opd.compatibility.base.CHUNK_NUMBERS", 40 * 130)
            torch.testing.assert_close(signal.measure(student, teacher, actions), whole)
    with pytest.raises(opd.OpdError, match=r"looks at k=8 ids, and the teacher answers with 5"):
        Overlap(k=8).measure(student, TopK.of(teacher, 5), actions)
    # Cut down to the vocabulary, every state would share all.
    with pytest.raises(
        opd.OpdError, match=r"looks at k=41 ids, and the vocabulary of the student has 40: set signal\.k"
    ):
        Overlap(k=41).measure(student, teacher, actions)


@pytest.mark.parametrize(
    ("drop", "weights", "effective"),
    [(0.4, [1.5, 1.5, 1.1, 1.1, 0.7], 5), (0.5, [1.5, 1.5, 1.0, 1.0, 0.5], 4)],
)
def test_weights_of_the_specification(drop, weights, effective):
    signal = torch.tensor([1.0, 0.75, 0.5, 1.0, 0.5])
    found, lasts = decayed(Overlap(below=0.7).events(signal), torch.tensor([5]), drop)
    torch.testing.assert_close(found + 0.5, torch.tensor(weights))
    assert int(lasts.sum()) == effective


@pytest.mark.parametrize(
    ("drop", "events"), [(0.01, 100), (0.1, 10), (0.3, 4), (1 / 3, 3), (0.07, 15), (1.0, 1), (0.02, 50)]
)
def test_the_effective_length_is_counted_in_whole_events(drop, events):
    """Of drop 0.1 the tenth event uses the weight up, though ten times 0.1 in float32 misses one."""
    assert most_events(drop) == events
    weights, lasts = decayed(torch.ones(120, dtype=torch.bool), torch.tensor([120]), drop)
    assert int(lasts.sum()) == events - 1
    assert bool((weights[lasts] > 1e-8).all())
    assert not weights[~lasts].any()


def test_events_are_counted_within_each_trajectory():
    values, lengths = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool(), torch.tensor([3, 1, 4])
    assert running_sums(values, lengths).tolist() == [1, 2, 2, 1, 0, 0, 1, 2]
    weights, _ = decayed(values, lengths, 0.5)
    assert weights.tolist() == [0.5, 0, 0, 0.5, 1, 1, 0.5, 0]


def test_the_shaping_compares_and_leaves_out_what_is_not_learnt():
    student, teacher = categorical(STUDENT + STUDENT), categorical(TEACHER + TEACHER)
    micro = trajectories_of([3, 3])
    settings = DriftWeights(signal=Overlap(k=2, below=0.75), drop=0.25)
    shaper = settings.build(None)
    shape = shaper(student, [Target(teacher, teacher="a")], micro, settings)
    torch.testing.assert_close(shape.weights, torch.tensor([1.5, 1.25, 1.25] * 2))
    assert shape.measured["drifted"].tolist() == [0, 1, 0, 0, 1, 0]
    assert shape.measured["overlap"].tolist() == [1, 0, 1, 1, 0, 1]
    micro.learn[1] = False
    shape = shaper(student, [Target(teacher)], micro, settings)
    torch.testing.assert_close(shape.weights, torch.tensor([1.5, 1.5, 1.5, 1.5, 1.25, 1.25]))
    # Of two teachers the one that is named; without weights only measured.
    two = [Target(student, teacher="b"), Target(teacher, teacher="a")]
    named = settings.model_copy(update={"teacher": "a", "weigh": False})
    shape = shaper(student, two, micro, named)
    assert shape.weights.tolist() == [1.0] * 6
    assert shape.measured["drifted"].tolist() == [0, 0, 0, 0, 1, 0]


def test_the_window_of_the_specification():
    settings = Window(minimum=10, maximum=40, start=20, by=5, margin=5, hits=0.25, patience=2)
    course = settings.build([Prompt("p", {"prompt": "x"})], 1, type("C", (), {"seed": 0}))
    steps = [
        ([15, 3, 3, 3], 25, 0),
        ([19, 3, 3, 3], 25, 1),
        ([3, 3, 3, 3], 20, 0),
        ([14, 14, 14, 14], 20, 1),
        ([9, 9, 9, 9], 15, 0),
        ([15, 15, 3, 3], 20, 0),
    ]
    for effective, length, missed in steps:
        measured = course.settle(torch.tensor(effective, dtype=torch.float32))
        assert (course.length, course.missed) == (length, missed)
        assert measured["curriculum/effective_length"] == pytest.approx(sum(effective) / 4)
    assert measured["curriculum/hits"] == 0.5
    again = settings.build([Prompt("p", {"prompt": "x"})], 1, type("C", (), {"seed": 0}))
    again.load_state_dict(json.loads(json.dumps(course.state_dict())))
    assert (again.length, again.missed) == (20, 0)
    for _ in range(12):
        course.settle(torch.tensor([40.0]))
    assert course.length == 40
    for _ in range(30):
        course.settle(torch.tensor([0.0]))
    assert course.length == 10


def test_the_reward_of_the_specification():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    student = Categorical(logits, Head(torch.eye(3)))
    teacher = categorical([[0.2, 0.5, 0.3]])
    micro = trajectories_of([1])
    micro.actions[:] = 0
    loss = ReverseKLCandidates(k=2)(student, [Target(teacher)], torch.ones(1), micro)
    torch.testing.assert_close(loss.values, torch.tensor([0.8786 - 0.1921]), atol=1e-4, rtol=0)
    (gradient,) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.4219, -0.3601, -0.0618]]), atol=1e-4, rtol=0)
    # Over all ids it is reverse KL's.
    whole = ReverseKLCandidates(k=3)(student, [Target(teacher)], torch.ones(1), micro)
    q, p = logits.softmax(-1), torch.tensor([[0.2, 0.5, 0.3]])
    kl = (q * (q / p).log()).sum()
    torch.testing.assert_close(torch.autograd.grad(whole.total, logits)[0], torch.autograd.grad(kl, logits)[0])


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        (
            {"kind": "mixture", "first": {"kind": "student", "max_new_tokens": 8}},
            r"maximum goes up to 24 and a source of the mixture to 8 ",
        ),
        ({"kind": "switch", "position": 24}, r"position is 24 and curriculum.maximum goes up to 24: .* never write"),
    ],
)
def test_a_window_beyond_what_sources_write_is_refused(rollout, words):
    data = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "prompts": {"kind": "inline", "prompts": ["a"]},
        "shaping": "drift",
        "curriculum": {"kind": "window", "minimum": 4, "maximum": 24},
    }
    parse_recipe({**data, "rollout": {**rollout, "position": 4} if "position" in rollout else {"kind": "mixture"}})
    with pytest.raises(opd.OpdError, match=words):
        parse_recipe({**data, "rollout": rollout})


DRIFT = {"signal": {"kind": "overlap", "k": 8, "below": 0.5}, "drop": 0.2}


def models(tmp_path):
    tokenizer = turn_tokenizer()
    return [
        {"model": str(saved(tmp_path / name, tiny_model(vocabulary=98, seed=seed), tokenizer)), "template": "plain"}
        for name, seed in (("student", 1), ("teacher", 2))
    ]


def run(tmp_path, name="run", **changes):
    student, teacher = models(tmp_path)
    return short_run(tmp_path / name, student, changes.pop("teacher", teacher), **changes)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_a_run_with_weights_and_a_window(tmp_path):
    result = run(
        tmp_path,
        steps=6,
        shaping={"kind": "drift", **DRIFT},
        curriculum={"kind": "window", "minimum": 8, "maximum": 24, "start": 20, "by": 4, "margin": 2, "patience": 1},
        objective={"kind": "reverse_kl_candidates", "k": 8},
        rollout={"max_new_tokens": 30},
        end_tokens=[89],
    )
    steps = [r for r in result.history if "train/loss" in r]
    window = [r["train/curriculum/window"] for r in steps]
    # Two models that have nothing in common drift at once, and the window shrinks to its least.
    assert window == [20, 16, 12, 8, 8, 8]
    assert all(r["train/length"] <= w for r, w in zip(steps, window, strict=True))
    assert all(r["train/drifted"] > 0.5 for r in steps)
    assert all(r["train/curriculum/hits"] == 0 for r in steps)
    assert steps[0]["train/curriculum/effective_length"] == pytest.approx(
        steps[0]["train/reliable"] * steps[0]["train/length"]
    )
    row = rows_of(tmp_path / "run")[0]
    weights = row["values"]["weight"]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 0.5
    assert {"overlap", "drifted", "reliable"} <= row["values"].keys()


def test_a_window_without_a_shaping_that_measures_is_refused(tmp_path):
    student, teacher = models(tmp_path)
    with pytest.raises(opd.OpdError, match=r"curriculum 'window' follows 'reliable' .* shapings that do: drift"):
        parse_recipe(
            {
                "student": student,
                "teacher": teacher,
                "prompts": {"kind": "inline", "prompts": ["a"]},
                "curriculum": {"kind": "window", "minimum": 8, "maximum": 24},
            }
        )


def test_a_rollout_is_stopped_where_it_drifts_and_no_state_is_scored_twice(tmp_path):
    result = run(
        tmp_path,
        steps=3,
        rollout={"max_new_tokens": 40, "segment": 4, "watch": {"kind": "drift", **DRIFT}},
        end_tokens=[89],
        evaluation={"held_out": 2, "max_new_tokens": 8},
    )
    steps = [r for r in result.history if "train/loss" in r]
    # Five events use the weight up, and every state is one: rows end at the first look behind that.
    assert all(r["train/length"] == 8 for r in steps)
    assert all(r["train/stopped"] == 1.0 for r in steps)
    assert all("drifted" in row["stopped"] for row in rows_of(tmp_path / "run"))
    assert all(r["train/teacher_tokens"] == r["train/positions"] for r in steps)


def test_the_line_of_a_step_shows_window_drift_and_what_was_stopped(tmp_path):
    """What each choice declares as worth it, and what was logged alone."""
    student, teacher = models(tmp_path)
    block = {
        "output": str(tmp_path / "run"),
        "steps": 1,
        "student": student,
        "teacher": teacher,
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "shaping": {"kind": "drift", **DRIFT},
        "curriculum": {"kind": "window", "minimum": 8, "maximum": 24, "start": 20, "by": 4, "margin": 2},
        "rollout": {"segment": 4, "watch": {"kind": "drift", **DRIFT}},
        "end_tokens": [89],
        "batch": {"prompts": 2, "micro": 2},
        "evaluation": {"held_out": 1, "max_new_tokens": 4},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
    }
    console = Console(file=io.StringIO())
    execute(parse_recipe(block), console=console)
    line = next(text for text in console.file.getvalue().splitlines() if text.startswith("step 1/1"))
    assert re.search(r"length 8  window 20  stopped 1  drifted 1(\.00)?  \d+ tok/s", line), line
    block |= {"output": str(tmp_path / "plain"), "shaping": "uniform", "curriculum": "shuffled", "rollout": "student"}
    block["rollout"] = {"max_new_tokens": 4}
    console = Console(file=io.StringIO())
    execute(parse_recipe(block), console=console)
    line = next(text for text in console.file.getvalue().splitlines() if text.startswith("step 1/1"))
    assert re.search(r"length \d  \d+ tok/s", line), line


def test_a_watch_that_ends_no_row_logs_that(tmp_path):
    """Else a mean over the log's steps would leave such steps out."""
    watch = {"kind": "drift", "signal": {"kind": "overlap", "k": 8, "below": 0.01}, "drop": 0.01}
    result = run(tmp_path, rollout={"max_new_tokens": 8, "watch": watch})
    assert [r["train/stopped"] for r in result.history if "train/loss" in r] == [0.0, 0.0]
    plain = run(tmp_path, "plain")
    assert all("train/stopped" not in r for r in plain.history)


def test_what_was_said_in_flight_is_what_the_teacher_says(tmp_path):
    """Also of rows that other places began or that end at other times; routed and alone."""
    student, teacher = models(tmp_path)
    routed = {
        "kind": "routed",
        "by": "side",
        "routes": {"a": {"kind": "local", **teacher}, "b": {"kind": "local", **student}},
    }
    rows = [{"prompt": f"{i}+1=", "side": "ab"[i % 2]} for i in range(8)]
    for name, who in (("alone", teacher), ("routed", routed)):
        data = {
            "output": str(tmp_path / name),
            "student": student,
            "teacher": who,
            "prompts": {"kind": "inline", "prompts": rows},
            "rollout": {
                "max_new_tokens": 24,
                "segment": 3,
                "batch": 6,
                "watch": {"kind": "drift", "signal": {"kind": "overlap", "k": 8, "below": 0.3}, "drop": 0.34},
            },
            "batch": {"prompts": 4, "group": 2, "micro": 8},
            "evaluation": {"held_out": 2},
            "end_tokens": list(range(0, 90, 6)),
            "hardware": {"device": "cpu", "threads": 1},
            "tracking": {"trackers": []},
        }
        (tmp_path / name).mkdir()
        made = assemble(parse_recipe(data), Monitor(tmp_path / name, quiet=True))
        now = made.at(0)
        written = rolled_out(made, made.course.next(0, {}, None).prompts, 2, 24)
        assert len(set(written.lengths.tolist())) > 1
        (said,) = made.ask(written, now)
        (asked,) = made.teachers[0].answer(written, made.teachers[0].settings, now.context)
        torch.testing.assert_close(said.distribution.log_probs(), asked.distribution.log_probs(), atol=1e-4, rtol=1e-4)
        if name == "routed":
            # The student's own copy never drifts.
            own = [p.fields["side"] == "b" for p in written.prompts]
            assert not any(s for s, mine in zip(written.stopped, own, strict=True) if mine)
            assert any(s for s, mine in zip(written.stopped, own, strict=True) if not mine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shaping": {"kind": "drift", "teacher": "x"}}, r"shaping 'drift' compares .* 'x' names none of \[None\]"),
        ({"rollout": {"watch": {"kind": "drift", "teacher": "x"}}}, r"rollout.watch 'drift' compares .* names none"),
        ({"teacher_offload": True, "rollout": {"watch": "drift"}}, r"teacher.offload keeps it away"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_the_start(changes, words, tmp_path):
    _, teacher = models(tmp_path)
    teacher = {**teacher, "offload": True} if changes.pop("teacher_offload", False) else teacher
    with pytest.raises(opd.OpdError, match=words) as error:
        run(tmp_path, teacher=teacher, **changes)
    assert len(str(error.value).splitlines()) <= 2


def test_what_a_store_serves(tmp_path):
    """Weights and a window, from the whole distribution or from enough ids; nothing in flight."""
    student, teacher = models(tmp_path)
    shared = {
        "student": student,
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "rollout": {"max_new_tokens": 12},
        "batch": {"prompts": 4, "micro": 4},
        "hardware": {"device": "cpu", "threads": 1},
    }
    recipe = parse_recipe({**shared, "teacher": teacher})
    path = sample(recipe, tmp_path / "store", quiet=True).path
    score(recipe, path, "exact", name="exact", dtype="float32", quiet=True)
    score(recipe, path, "top_k", name="top_k", top_k=8, quiet=True)
    score(recipe, path, "sampled", name="sampled", quiet=True)

    def stored(name, kind, objective, k=8, **rollout):
        return run(
            tmp_path,
            name,
            teacher={"kind": "stored", "path": str(path), "targets": kind, "consistency": "ignored"},
            rollout={"kind": "stored", "path": str(path), **rollout},
            shaping={"kind": "drift", "signal": {"kind": "overlap", "k": k, "below": 0.5}, "drop": 0.2},
            curriculum={"kind": "window", "minimum": 4, "maximum": 12, "start": 8, "by": 2, "margin": 1},
            objective=objective,
        )

    exact = stored("a", "exact", {"kind": "reverse_kl_candidates", "k": 8})
    listed = stored("b", "top_k", "reverse_kl")
    first, second = (next(r for r in each.history if "train/loss" in r) for each in (exact, listed))
    assert first["train/curriculum/window"] == 8
    assert first["train/length"] <= 8
    assert first["train/overlap"] == pytest.approx(second["train/overlap"])
    with pytest.raises(opd.OpdError, match=r"looks at k=9 ids, and the teacher answers with 8"):
        stored("c", "top_k", "reverse_kl", k=9)
    with pytest.raises(opd.OpdError, match=r"shaping 'drift' with signal 'overlap' needs .* answers 'sampled'"):
        stored("d", "sampled", "lightning")
    with pytest.raises(opd.OpdError, match=r"'stored' answers only at trajectories of .* take rollout: stored"):
        run(
            tmp_path,
            "e",
            teacher={"kind": "stored", "path": str(path), "targets": "exact"},
            rollout={"max_new_tokens": 12, "watch": "drift"},
        )

    def planned(targets, k=8, **changes):
        teacher = {"kind": "stored", "path": str(path), "targets": targets, "consistency": "ignored"}
        shaping = {"kind": "drift", "signal": {"kind": "overlap", "k": k}}
        held_out = {"evaluation": {"held_out": 2}}
        own = {"teacher": teacher, "shaping": shaping, "rollout": {"kind": "stored", "path": str(path)}}
        return parse_recipe({**shared, **held_out, **own, **changes})

    make_plan(planned("top_k"))
    for recipe, words in (
        (planned("top_k", k=9), r"looks at k=9 ids, and the teacher answers with 8: set signal\.k"),
        (planned("sampled", objective="lightning"), r"shaping 'drift' with signal 'overlap' needs"),
        (planned("exact", k=99), r"looks at k=99 ids, and student and teacher have 98 in common: set signal\.k"),
    ):
        with pytest.raises(opd.OpdError, match=words) as error:
            make_plan(recipe)
        assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(opd.OpdError, match=r"'stored' answers only at trajectories of .* take rollout: stored"):
        planned("exact", rollout={"watch": "drift"})
    # What the curriculum may ask for, no row has.
    for curriculum, words in (
        ({"kind": "window", "minimum": 4, "maximum": 13}, r"curriculum\.maximum goes up to 13 and the rows of .* 12"),
        ({"kind": "length_ladder", "lengths": [4, 13], "steps_per_rung": 1}, r"curriculum\.lengths goes up to 13 and"),
    ):
        for rollout in ({}, {"kind": "mixture", "second": {"kind": "stored", "path": str(path)}}):
            block = {"kind": "stored", "path": str(path), **rollout}
            block = {"kind": "mixture", "second": rollout["second"]} if rollout else block
            # Only a live one answers to what the student writes beside the store.
            live = {"teacher": teacher} if rollout else {}
            with pytest.raises(opd.OpdError, match=words):
                planned("exact", curriculum=curriculum, rollout=block, **live)
    with pytest.raises(opd.OpdError, match=r"rollout\.max_new_tokens cuts stored trajectories at 10; raise it"):
        planned(
            "exact",
            curriculum={"kind": "window", "minimum": 4, "maximum": 12},
            rollout={"kind": "stored", "path": str(path), "max_new_tokens": 10},
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "reverse_kl", "top_k": 98}}, "top_k is 98, and student and teacher have 9. ids"),
        ({"objective": {"kind": "forward_kl", "top_k": [[0, 4], [1, 99]]}}, "objective 'forward_kl': top_k is 99"),
        ({"objective": {"kind": "reverse_kl_candidates", "k": 99}}, "k is 99, and student and teacher have 9. ids"),
        ({"shaping": {"kind": "drift", "signal": {"kind": "overlap", "k": 99}}}, "signal .overlap. looks at k=99 ids"),
        ({"rollout": {"watch": {"kind": "drift", "signal": {"k": 99, "kind": "overlap"}}}}, "looks at k=99 ids"),
    ],
)
def test_more_ids_than_there_are_is_refused_at_the_start_and_in_a_plan(changes, words, tmp_path):
    """Cut down to the vocabulary it would be another objective, or a signal that is always 1."""
    student, teacher = models(tmp_path)
    block = {"student": student, "teacher": teacher, "prompts": {"kind": "inline", "prompts": TEXTS}, **changes}
    with pytest.raises(opd.OpdError, match=words) as error:
        make_plan(parse_recipe(block))
    assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(opd.OpdError, match=words):
        run(tmp_path, **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
