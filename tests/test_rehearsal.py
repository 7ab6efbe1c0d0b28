"""`opd check` refuses, and warns of, what a start does once its models are loaded: the same words, and no weights."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from opd.assembly import assemble
from opd.errors import OpdError
from opd.monitor import Monitor
from opd.plan import make_plan
from opd.recipe import parse_recipe
from tests.conftest import character_tokenizer, save_tiny, tiny_model
from tests.tiny import saved, turn_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pair that goes together, a teacher of another tokenizer, and a student with a table of 16 positions."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    table = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, eos_token_id=0, bos_token_id=None))
    other = tiny_model(vocabulary=len(turn_tokenizer()), eos_token_id=1)
    return {
        "student": save_tiny(folder / "student"),
        "teacher": save_tiny(folder / "teacher", seed=1),
        "other": saved(folder / "other", other, turn_tokenizer()),
        "short": saved(folder / "short", table, character_tokenizer()),
        "apart": saved(folder / "apart", tiny_model(eos_token_id=5), _ending_with("2")),
    }


def _ending_with(token):
    tokenizer = character_tokenizer()
    tokenizer.eos_token = token
    return tokenizer


def recipe(models, student=None, teacher=None, **changes):
    """`student` and `teacher` are blocks in which the fixture's models have their names."""
    blocks = {}
    for key, block in (("student", student or {"model": "student"}), ("teacher", teacher or {"model": "teacher"})):
        places = {k: models[v] for k, v in block.items() if k in ("model", "tokenizer") and v in models}
        blocks[key] = {"template": "plain", **block, **places}
    data = {
        **blocks,
        "prompts": {"kind": "inline", "prompts": [f"{a}+1=" for a in "abcdefgh"]},
        "rollout": {"max_new_tokens": 8},
        "batch": {"prompts": 2, "micro": 2},
        "evaluation": {"held_out": 2},
        "hardware": {"device": "cpu", "threads": 1, "precision": "fp32"},
        "tracking": {"trackers": []},
        "steps": 2,
    }
    return parse_recipe({**data, **changes})


REFUSED = {
    "another tokenizer": ({"teacher": {"model": "other"}}, "the teacher has another tokenizer than the student"),
    "another end": ({"teacher": {"model": "apart"}}, "it would unlearn to stop"),
    "imitation of itself": ({"objective": ["reverse_kl", "sft"]}, "objective 'sft' on the student's own samples"),
    "nobody by that name writes": (
        {"objective": {"kind": "reverse_kl", "written_by": ["teacher"]}},
        "written_by names 'teacher', who writes nothing in this rollout",
    ),
    "no column of responses": ({"rollout": {"kind": "data"}, "objective": "sft"}, "no column 'response'"),
    "too few positions": (
        {"student": {"model": "short"}, "rollout": {"max_new_tokens": 20}},
        "the student has 16 positions, and the longest prompt has 4 tokens and a completion up to 20",
    ),
    "a writer of other tokens": (
        {"teacher": {"model": "other", "tokenizer": "own"}, "rollout": {"kind": "teacher", "max_new_tokens": 8}},
        "what it writes are ids of that tokenizer",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_refuses_what_a_start_refuses_in_the_same_words(models, tmp_path, changes, message):
    read = recipe(models, **changes)
    with pytest.raises(OpdError) as planned:
        make_plan(read)
    with pytest.raises(OpdError) as started:
        assemble(read, Monitor(tmp_path, quiet=True))
    assert str(planned.value) == str(started.value)
    assert message in str(planned.value)


def test_a_plan_warns_of_what_a_start_warns_of(models, tmp_path):
    """Every line that a start says is in the plan's notes, the one of positions among them."""
    read = recipe(models, rollout={"max_new_tokens": 300}, student={"model": "student", "lora": {"rank": 2}})
    monitor, said = Monitor(tmp_path, quiet=True), []
    monitor.warn = said.append
    assemble(read, monitor).close()
    assert any("the student was made for 256 positions" in line for line in said)
    assert any("the teacher was made for 256 positions" in line for line in said)
    assert set(said) <= set(make_plan(read).notes)


def test_a_rehearsal_reads_no_weights(models, tmp_path):
    """Files of weights that cannot be read change nothing."""
    empty = {}
    for name in ("student", "teacher"):
        empty[name] = save_tiny(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    assert make_plan(recipe(empty)).student.parameters == sum(p.numel() for p in tiny_model().parameters())
    with pytest.raises(OpdError, match="on the student's own samples"):
        make_plan(recipe(empty, objective=["reverse_kl", "sft"]))


def test_teachers_that_are_asked_elsewhere_are_left_out(models):
    """The rest is checked; a server is not looked for."""
    served = {"kind": "served", "url": "http://127.0.0.1:1", "answers": "sampled", "dialect": "vllm"}
    assert make_plan(recipe(models, teacher=served, objective="reverse_kl_sampled")).teachers == ()
    with pytest.raises(OpdError, match="on the student's own samples"):
        make_plan(recipe(models, teacher=served, objective=["reverse_kl_sampled", "sft"]))
    with pytest.raises(OpdError, match="has another tokenizer than the student"):
        make_plan(recipe(models, teacher={**served, "tokenizer": "other"}, objective="reverse_kl_sampled"))


def test_a_teacher_is_rehearsed_wherever_it_will_be_loaded(models):
    """Neither its device nor its offloading has its weights read."""
    for place in ({"device": "cuda:7"}, {"offload": True}):
        with pytest.raises(OpdError, match="has another tokenizer than the student"):
            make_plan(recipe(models, teacher={"model": "other", **place}))
        assert make_plan(recipe(models, teacher={"model": "teacher", **place})).teachers
