"""Answers that mean the same are equal, and nothing that a model writes can run, hang or fill the memory."""

from __future__ import annotations

import functools
import json
import os
import threading
import time

import pytest
import torch

from opd.context import Context
from opd.errors import RecipeError
from opd.prompts import Prompt
from opd.recipe import parse_recipe
from opd.verifiers import math_verify as module
from opd.verifiers.math_verify import MathVerify
from opd.verifiers.math_verify_worker import last_boxed

pytest.importorskip("math_verify")


@functools.cache
def scorer(**settings):
    """One process for all tests of the same settings."""
    return MathVerify(**settings).build(Context(torch.device("cpu")))


def row(answer):
    return Prompt("a", {"prompt": "?", "answer": answer})


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("1/2", r"so it is \boxed{\frac{2}{4}}.", 1.0),
        (r"\frac{1}{2}", "The answer is 0.5", 1.0),
        ("(x+1)^2", r"\boxed{x^2 + 2x + 1}", 1.0),
        ("(x+1)^2", r"\boxed{x^2 + 2x - 1}", 0.0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1.0),
        (r"\{1, 2\}", r"\boxed{2, 1}", 1.0),
        ("50%", r"\boxed{0.5}", 1.0),
        (18, "first 17, then 18", 1.0),
        (18, r"\boxed{17}, or rather 18", 0.0),
        (r"$x = 3$", r"\boxed{3}", 1.0),
        ("12", "I do not know", 0.0),
        ("12", "", 0.0),
    ],
)
def test_what_means_the_same_is_equal(answer, completion, score):
    assert scorer().verdict(row(answer), completion) == score


def test_without_an_answer_there_is_no_verdict():
    assert scorer().verdict(Prompt("a", {"prompt": "?"}), r"\boxed{3}") is None
    assert scorer().verdict(row(None), r"\boxed{3}") is None
    assert scorer().verdict(row("  "), r"\boxed{3}") is None


def test_a_box_can_be_demanded():
    assert scorer().verdict(row("3"), "It is 3") == 1.0
    assert scorer(boxed=True).verdict(row("3"), "It is 3") == 0.0
    assert scorer(boxed=True).verdict(row("1/2"), r"\boxed{5}, no, \boxed{\frac{1}{2}}, not 7") == 1.0
    assert scorer(boxed=True).verdict(row("3"), r"\boxed{3") == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no", ""),
        (r"\boxed{1} \boxed{\frac{1}{2}} x", r"\boxed{\frac{1}{2}}"),
        (r"\boxed{1} \boxed{2", ""),
        (r"\boxed{{a}}}", r"\boxed{{a}}"),
    ],
)
def test_the_last_box_has_matching_braces(text, found):
    assert last_boxed(text) == found


@pytest.mark.parametrize("form", ["{}", r"\boxed{{{}}}", "${}$", "The answer is {}", "3 + {}"])
def test_what_a_model_wrote_is_never_executed(form, tmp_path):
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path('{trace}').touch()"
    assert scorer().verdict(row("x"), form.format(code)) == 0.0
    assert not trace.exists()


def test_a_comparison_that_takes_too_long_is_wrong_and_the_next_one_works():
    start = time.monotonic()
    assert scorer(seconds=1).verdict(row("3"), r"\boxed{9^{9^{9^9}}}") == 0.0
    assert time.monotonic() - start < 30
    assert scorer().verdict(row("3"), "3") == 1.0


def test_a_process_that_does_not_answer_in_time_is_replaced():
    judge = module.Judge()
    request = '{"answer": "3", "completion": "3", "boxed": false, "seconds": 5}'
    assert judge.ask(request, 30) is True
    first = judge.process.pid
    endless = json.dumps({"answer": "3", "completion": r"\boxed{9^{9^{9^9}}}", "boxed": False, "seconds": 60})
    assert judge.ask(endless, 1) is False
    assert judge.ask(request, 30) is True
    assert judge.process.pid != first
    # Ended by somebody else: asked again, not taken for the completion's fault.
    judge.process.kill()
    assert judge.ask(request, 30) is True


def test_it_works_outside_the_main_thread():
    found = []
    threads = [
        threading.Thread(target=lambda text=text: found.append((text, scorer().verdict(row("0.5"), text))))
        for text in (r"\boxed{\frac{1}{2}}", "3")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(found) == {r"\boxed{\frac{1}{2}}": 1.0, "3": 0.0}


def test_a_missing_package_is_told_with_the_fix_before_anything_loads(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    data = {
        "student": {"model": os.devnull},
        "teacher": {"model": os.devnull},
        "prompts": {"kind": "inline", "prompts": ["a"]},
        "verifier": "math_verify",
    }
    with pytest.raises(RecipeError, match=r"verifier: needs .*pip install 'opd\[tasks\]'"):
        parse_recipe(data)
