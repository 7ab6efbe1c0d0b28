"""A teacher by a server: the same numbers as in this process, and what happens to requests that fail."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import opd
from opd.context import Context
from opd.distributions import Categorical, Sampled, TopK
from opd.errors import IncompatibleError, ModelError, RecipeError, RunError
from opd.language.tokens import Tokens
from opd.prompts import Prompt
from opd.recipe import load_recipe, parse_recipe
from opd.remote.client import Client, Job, RequestError, read_json
from opd.remote.dialects import VLLM, OpenAI, SGLang
from opd.server import Limits
from opd.server.serving import checked_token
from opd.teachers.local import LanguageTeacher, LocalTeacher
from opd.teachers.served import LiveServedTeacher, ServedTeacher
from tests.conftest import said, save_tiny, trajectories_of
from tests.serving import served_model, serving, serving_tiny, silent
from tests.tiny import TEXTS

TEXTS = [text for text in TEXTS if set(text) <= set("0123456789abcdefghijklmnopqrstuvwxyz +-=?.,#")]
CONTEXT = Context(torch.device("cpu"), agreed=Tokens(end_ids=(0,)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a student and of the teacher that `serving_tiny` serves."""
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "student", vocabulary=47, seed=1), save_tiny(root / "teacher", vocabulary=47, seed=7)


@pytest.fixture(scope="module")
def url():
    with serving_tiny() as url:
        yield url


def run(folder, student, teacher, **changes):
    """A run of a few small steps."""
    settings = {
        "steps": 3,
        "batch": {"prompts": 4, "micro": 4},
        "rollout": {"max_new_tokens": 10},
        "evaluation": {"held_out": 2, "samples": 1},
        "checkpoint": {"every": 0},
        "tracking": {"trackers": []},
        "hardware": {"device": "cpu", "threads": 1},
        "update": {"learning_rate": 1e-3},
        "output": str(folder),
        **changes,
    }
    student = {"model": student, "template": "plain"}
    return opd.distill(student, teacher, TEXTS * 2, quiet=True, overwrite=True, **settings)


def losses(result):
    return [row["train/loss"] for row in result.history if "train/loss" in row]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "student" / "model.safetensors")


def teacher_at(url, **settings):
    """A built one, that reads prompts as the tiny models do."""
    from opd.language.engines.transformers import LanguageModel
    from tests.conftest import character_tokenizer

    given = {"url": url, "retries": 2, "backoff": 0.01, **settings}
    return LiveServedTeacher(ServedTeacher(**given), LanguageModel(None, character_tokenizer(), "plain"))


def local_teacher():
    language = served_model().language
    return LanguageTeacher(language, LocalTeacher(model="tiny"), torch.device("cpu"))


def test_whole_distributions_are_bit_for_bit_those_of_a_local_teacher(folders, url, tmp_path):
    student, teacher = folders
    here = run(tmp_path / "local", student, {"model": teacher, "template": "plain"})
    there = run(tmp_path / "served", student, {"kind": "served", "url": url})
    assert losses(here) == losses(there)
    measured = [{k: v for row in r.history for k, v in row.items() if k.startswith("held_out/")} for r in (here, there)]
    assert measured[0]
    assert measured[0] == measured[1]
    mine, theirs = weights_of(tmp_path / "local"), weights_of(tmp_path / "served")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_sampled_tokens_teach_what_a_local_teacher_does(folders, url, tmp_path):
    student, teacher = folders
    changes = {"objective": "reverse_kl_sampled"}
    here = run(tmp_path / "local", student, {"model": teacher, "template": "plain"}, **changes)
    there = run(tmp_path / "served", student, {"kind": "served", "url": url, "answers": "sampled"}, **changes)
    assert losses(there) == pytest.approx(losses(here), abs=1e-5)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_the_likeliest_ids_are_those_of_the_whole_distribution(dialect, url):
    prompts = [Prompt(f"p{i}", {"prompt": text}) for i, text in enumerate(TEXTS[:3])]
    local = local_teacher()
    contexts = [local.language.encode(prompt) for prompt in prompts]
    trajectories = trajectories_of([5, 1, 9], contexts, prompts=prompts)
    whole = said(local, trajectories)
    top = said(teacher_at(url, dialect=dialect, answers="top_k", top_k=6), trajectories)
    assert isinstance(top, TopK)
    expected = TopK.of(whole, 6)
    assert torch.equal(top.ids, expected.ids)
    torch.testing.assert_close(top.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    sampled = said(teacher_at(url, dialect=dialect, answers="sampled"), trajectories)
    assert isinstance(sampled, Sampled)
    torch.testing.assert_close(sampled.log_probs, Sampled.of(whole, trajectories.actions).log_probs, atol=1e-5, rtol=0)
    exact = said(teacher_at(url), trajectories)
    assert isinstance(exact, Categorical)
    assert torch.equal(exact.log_probs(), whole.log_probs())


def test_the_key_is_in_no_file_and_no_message(folders, tmp_path, monkeypatch, capfd):
    student, _ = folders
    key = "sesame-0123456789"
    monkeypatch.setenv("TEACHER_KEY", key)
    with serving_tiny(token=key) as url:
        with pytest.raises(ModelError, match=r"teacher\.key_env"):
            teacher_at(url)
        teacher = {"kind": "served", "url": url, "key_env": "TEACHER_KEY"}
        run(tmp_path / "run", student, teacher, steps=1)
        monkeypatch.setenv("TEACHER_KEY", key + "x")
        with pytest.raises(ModelError, match="HTTP 401"):
            teacher_at(url, key_env="TEACHER_KEY")
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert not found
    assert key not in "".join(capfd.readouterr())
    with pytest.raises(RecipeError, match="no such variable"):
        teacher_at("http://127.0.0.1:1", key_env="NOBODY_SET_THIS")


def test_a_key_that_a_server_repeats_is_left_out():
    async def repeats(scope, receive, send):
        from tests.serving import answer

        sent = dict(scope["headers"])[b"authorization"]
        await answer(send, 400, b'{"error": {"message": "no such key: ' + sent + b'"}}')

    with serving(repeats) as running, pytest.raises(RequestError) as told:
        Client([running.url], "secret-key").ask(Job("/", None, read_json))
    assert "secret-key" not in str(told.value)
    assert "no such key: Bearer ***" in str(told.value)


def test_what_a_server_cannot_give_is_refused_at_the_start(url):
    told = pytest.raises(ModelError, match=r"--max-logprobs 40, or lower teacher\.top_k")
    with serving_tiny(limits=Limits(256, logprobs=20)) as small, told:
        teacher_at(small, answers="top_k", top_k=40)
    with pytest.raises(IncompatibleError, match="opd serve"):
        teacher_at(url, dialect="vllm").check_context(CONTEXT.with_(temperature=0.7))
    teacher_at(url).check_context(CONTEXT.with_(temperature=0.7))
    with pytest.raises(ModelError, match="--max-model-len"):
        teacher_at(url).check_lengths([Prompt("p", {"prompt": "ab"})], 300, "the teacher")
    told = pytest.raises(ModelError, match=r"takes 8 .*start it with a larger --max-model-len")
    with serving_tiny(limits=Limits(8)) as short, told:
        teacher_at(short)
    with pytest.raises(ModelError, match="serves 'tiny-teacher'"):
        teacher_at(url, model="another")
    with pytest.raises(ModelError, match="start it, wait until it answers"):
        teacher_at("http://127.0.0.1:9", retries=0)
    with pytest.raises(ValidationError, match="does not give whole distributions"):
        ServedTeacher(url=url, dialect="vllm", answers="exact")
    with pytest.raises(ValidationError, match="key_env"):
        ServedTeacher(url="http://user:word@127.0.0.1:8000")
    with pytest.raises(ModelError, match="timeout"), serving(silent) as running:
        teacher_at(running.url, timeout=0.2, retries=0)


def test_several_replicas_share_the_work(url):
    with serving_tiny() as other:
        teacher = teacher_at([url, other])
        trajectories = trajectories_of([3, 4, 5], prompts=[Prompt(f"p{i}", {"prompt": "a"}) for i in range(3)])
        assert len(said(teacher, trajectories)) == 12
    with serving_tiny(seed=8) as other, pytest.raises(IncompatibleError, match="no replicas"):
        teacher_at([url, other])


IDS, START = [5, 6, 7, 8], 2
VLLM_ROWS = [
    None,
    {"6": {"logprob": -1.0, "rank": 1, "decoded_token": "d"}, "1": {"logprob": -2.0, "rank": 2}},
    {"7": {"logprob": -3.5, "rank": 9}, "1": {"logprob": -0.5, "rank": 1}, "2": {"logprob": -1.5, "rank": 2}},
    {"8": {"logprob": -0.25, "rank": 1}, "3": {"logprob": -2.5, "rank": 2}},
]
ECHO = {
    "tokens": [f"token_id:{i}" for i in IDS],
    "token_logprobs": [None, -1.0, -3.5, -0.25],
    "top_logprobs": [None, *({f"token_id:{i}": e["logprob"] for i, e in row.items()} for row in VLLM_ROWS[1:])],
}
SGLANG = {
    "input_token_logprobs": [[None, 6, None], [-3.5, 7, None], [-0.25, 8, None]],
    "input_top_logprobs": [None, [[-0.5, 1, None], [-1.5, 2, None]], [[-0.25, 8, None], [-2.5, 3, None]]],
}


def shape_of(dialect):
    if isinstance(dialect, VLLM):
        return {"choices": [{"prompt_logprobs": copy.deepcopy(VLLM_ROWS)}]}
    if isinstance(dialect, OpenAI):
        return {"choices": [{"logprobs": copy.deepcopy(ECHO)}]}
    return {"meta_info": copy.deepcopy(SGLANG)}


@pytest.mark.parametrize("dialect", [VLLM(), OpenAI(0), SGLang()], ids=lambda d: d.kind)
def test_the_shapes_that_servers_answer_are_read(dialect):
    job = dialect.job("m", IDS, START, 2)
    assert IDS in job.body.values()
    scored = job.read(json.dumps(shape_of(dialect)).encode())
    assert scored.log_probs.tolist() == [-3.5, -0.25]
    assert scored.ids.tolist() == [[1, 2], [8, 3]]
    assert scored.top.tolist() == [[-0.5, -1.5], [-0.25, -2.5]]
    with pytest.raises(RequestError, match="too few ids"):
        dialect.job("m", IDS, START, 3).read(json.dumps(shape_of(dialect)).encode())


def test_a_token_that_was_written_behind_an_echo_is_left_out():
    longer = copy.deepcopy(ECHO)
    for rows, last in ((longer["tokens"], "token_id:3"), (longer["token_logprobs"], -1.0)):
        rows.append(last)
    longer["top_logprobs"].append({"token_id:3": -1.0})
    data = json.dumps({"choices": [{"logprobs": longer}]}).encode()
    assert OpenAI(1).job("m", IDS, START, 2).read(data).log_probs.tolist() == [-3.5, -0.25]
    with pytest.raises(RequestError, match="wrong length"):
        OpenAI(0).job("m", IDS, START, 2).read(data)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "NaN"), (-math.inf, "infinite"), (0.5, "positive"), (None, "no number"), ("-1", "no number")],
)
def test_a_number_that_is_no_log_probability_is_a_failure(value, reason):
    data = shape_of(VLLM())
    data["choices"][0]["prompt_logprobs"][2]["7"]["logprob"] = value
    with pytest.raises(RequestError) as told:
        VLLM().job("m", IDS, START, 2).read(json.dumps(data).encode())
    assert told.value.reason == reason
    assert not told.value.again


def test_other_forms_are_failures_of_their_own():
    job = VLLM().job("m", IDS, START, 2)
    for data, reason, again in [
        (b'{"choices": [', "not JSON", True),
        (b'{"choices": []}', "another form", False),
        (b"[]", "another form", False),
    ]:
        with pytest.raises(RequestError) as told:
            job.read(data)
        assert (told.value.reason, told.value.again) == (reason, again)
    echo = shape_of(OpenAI())
    echo["choices"][0]["logprobs"]["tokens"][2] = "hello"
    with pytest.raises(RequestError, match="texts for ids"):
        OpenAI().job("m", IDS, START, 2).read(json.dumps(echo).encode())
    sglang = shape_of(SGLang())
    sglang["meta_info"]["input_token_logprobs"][1][1] = 4
    with pytest.raises(RequestError, match="other ids"):
        SGLang().job("m", IDS, START, 2).read(json.dumps(sglang).encode())


def test_other_machines_need_a_token(monkeypatch):
    assert checked_token("127.0.0.1", None) is None
    with pytest.raises(RunError, match="--token-env"):
        checked_token("0.0.0.0", None)
    with pytest.raises(RunError, match="no such variable"):
        checked_token("0.0.0.0", "NOBODY_SET_THIS")
    monkeypatch.setenv("SERVE_TOKEN", "x")
    assert checked_token("0.0.0.0", "SERVE_TOKEN") == "x"


def test_requests_beyond_the_limits_are_refused():
    import httpx2

    limits = Limits(length=8, rows=2, logprobs=3, body=2000)
    with serving_tiny(limits=limits) as url, httpx2.Client(base_url=url, trust_env=False) as http:
        for body, status, told in [
            ({"prompt": [3] * 9, "prompt_logprobs": 1}, 400, "takes 8"),
            ({"prompt": [[3, 4]] * 3, "prompt_logprobs": 1}, 400, "may have 2"),
            ({"prompt": [3, 99], "prompt_logprobs": 1}, 400, "id 99"),
            ({"prompt": [3, 4], "prompt_logprobs": 4}, 400, "--max-logprobs"),
            ({"prompt": [3, 4], "echo": True}, 400, "echo without logprobs"),
            ({"prompt": [3, 4], "max_tokens": 7}, 400, "--max-model-len"),
            ({"prompt": [3, 4] * 2000, "prompt_logprobs": 1}, 413, "2000 bytes"),
            ({"prompt": "ab", "prompt_logprobs": 1}, 200, ""),
        ]:
            found = http.post("/v1/completions", json=body)
            assert (found.status_code, told in found.text) == (status, True), found.text
        assert http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert http.get("/health").status_code == 200


def test_a_store_that_a_server_scored_holds_what_a_local_teacher_says(folders, url, tmp_path):
    from opd.jobs.sampling import sample
    from opd.jobs.scoring import score

    student, teacher = folders
    recipe = {
        "student": {"model": student, "template": "plain"},
        "prompts": {"kind": "inline", "prompts": TEXTS},
        "rollout": {"max_new_tokens": 6},
        "hardware": {"device": "cpu", "threads": 1},
        "evaluation": {"held_out": 1},
        "name": "store",
    }
    here = parse_recipe({**recipe, "teacher": {"model": teacher, "template": "plain"}})
    there = parse_recipe({**recipe, "teacher": {"kind": "served", "url": url, "dialect": "vllm"}})
    sample(here, tmp_path / "store", quiet=True)
    for kind in ("top_k", "sampled"):
        found = [
            score(
                each,
                tmp_path / "store",
                kind,
                quiet=True,
                name=f"{kind}-{i}",
                **({"top_k": 5} if kind == "top_k" else {}),
            )
            for i, each in enumerate((here, there))
        ]
        rows = list(range(len(TEXTS)))
        lengths = [len(found[0].store.actions(row)) for row in rows]
        mine, theirs = (targets.answer(rows, lengths) for targets in found)
        torch.testing.assert_close(mine.log_probs, theirs.log_probs, atol=1e-5, rtol=0)
    whole = parse_recipe({**recipe, "teacher": {"kind": "served", "url": url}})
    exact = [score(each, tmp_path / "store", "exact", quiet=True, name=f"e{i}") for i, each in enumerate((here, whole))]
    assert torch.equal(*(targets.answer(rows, lengths).hidden for targets in exact))


def test_the_shipped_recipe_is_planned_without_its_server():
    from opd.plan import make_plan

    found = make_plan(load_recipe("qwen3_8b_served_to_1p7b"))
    assert not found.teachers
    assert any("takes no memory here" in note for note in found.notes)
