"""`opd serve` as what writes completions: seeds, what it does not do, and weights from safetensors alone."""

from __future__ import annotations

import httpx2
import pytest

from tests.engines import engine  # noqa: F401


def ask(url, **body):
    answer = httpx2.post(f"{url}/v1/completions", json=body)
    return answer.status_code, answer.json()


def test_what_is_written_depends_on_its_seed_alone(engine):  # noqa: F811
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "logprobs": 2, "return_token_ids": True}
    first, again, other = (ask(engine.url, seed=seed, **body)[1]["choices"][0] for seed in (1, 1, 2))
    assert first["token_ids"] == again["token_ids"]
    assert first["token_ids"] != other["token_ids"]
    assert len(first["logprobs"]["top_logprobs"][0]) in (2, 3)
    greedy = [ask(engine.url, temperature=0, seed=seed, **body)[1]["choices"][0]["token_ids"] for seed in (1, 2)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n=2 is not done here"),
        ({"stop": ["a"]}, "stop="),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"stream": True}, "stream"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 100_000}, "--max-model-len"),
        ({"prompt": [[1], [2]]}, "2 prompts"),
        ({"prompt": [1, 470]}, "id 470"),
    ],
)
def test_what_is_not_done_is_refused(body, message, engine):  # noqa: F811
    status, answer = ask(engine.url, **{"prompt": [5, 6], "max_tokens": 4, **body})
    assert status == 400
    assert message in answer["error"]["message"]


def test_weights_are_read_from_safetensors_alone(engine, tmp_path):  # noqa: F811
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    answer = httpx2.post(f"{engine.url}/collective_rpc", json=body)
    assert answer.status_code == 400
    assert "safetensors" in answer.text
    answer = httpx2.post(f"{engine.url}/collective_rpc", json={"method": "eval", "kwargs": {"weights_path": "/"}})
    assert answer.status_code == 400
