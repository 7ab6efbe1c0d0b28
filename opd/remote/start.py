"""What is found out about a server before a run rests on it: dialect, model, and whether it scores given ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opd.errors import ModelError, nearest
from opd.remote.client import Client, Job, RequestError, read_json
from opd.remote.dialects import DIALECTS, Dialect, OpenAI
from opd.remote.exact import ModelHeader, about_job
from opd.remote.launch import ended_at

DialectName = Literal["auto", "opd", "vllm", "sglang", "openai"]

ROUTES = (("vllm", "/version"), ("sglang", "/get_model_info"))
"""Routes that one kind of server alone has."""


@dataclass(frozen=True)
class Found:
    """One replica: its kind, the name that its model goes by in requests, the most tokens of one text where it says so,
    and what `opd serve` says of itself."""

    kind: str
    model: str
    longest: int | None
    about: ModelHeader | None = None


def look(client: Client, url: str, dialect: DialectName, model: str | None, place: str = "teacher") -> Found:
    """What answers at an address; `place` is where a recipe names it.

    Raises:
        ModelError: nobody, or not the model that was named.
    """
    about = _opd(client, url, dialect, place)
    if about is not None:
        if model not in (None, about.model):
            raise ModelError(f"{place}.model is {model!r}, and {url} serves {about.model!r}; leave the key out")
        return Found("opd", about.model, about.longest, about)
    kind = dialect if dialect != "auto" else _kind(client, url)
    try:
        cards = _get(client, url, "/v1/models")["data"]
        names = {str(card["id"]): card for card in cards}
    except RequestError as error:
        if error.status != 404 or model is None:
            raise refused(url, error, place=place) from None
        return Found(kind, model, None)
    except (KeyError, TypeError):
        raise ModelError(f"{url}/v1/models lists no models: this is no server that `opd` knows") from None
    if model is not None and model not in names:
        close = nearest(model, names)
        raise ModelError(f"{place}.model is {model!r}{close}, and {url} serves {', '.join(names) or 'nothing'}")
    name = model or next(iter(names), None)
    if name is None:
        raise ModelError(f"{url} serves no model; start it with one")
    longest = names[name].get("max_model_len")
    return Found(kind, name, longest if isinstance(longest, int) else None)


def probe(client: Client, url: str, found: Found, ids: Sequence[int], k: int) -> Dialect:
    """The dialect by which a server's answer about a known text has the right length, the given ids and numbers that
    are log-probabilities.

    Raises:
        ModelError: no such answer came.
    """
    dialects = [OpenAI(0), OpenAI(1)] if found.kind == "openai" else [DIALECTS[found.kind]()]
    for dialect in dialects:
        try:
            client.ask(dialect.job(found.model, ids, 1, k), url)
            return dialect
        except RequestError as error:
            if error.status != 400 or dialect is dialects[-1]:
                raise refused(url, error, k) from None
    raise AssertionError("the last dialect returns or raises")


def split_alike(client: Client, url: str, found: Found, text: str, ids: Sequence[int]) -> bool:
    """Whether a server makes the same ids of a text; True where it does not say."""
    body = {"model": found.model, "prompt": text, "add_special_tokens": False}
    try:
        answer = client.ask(Job("/tokenize", body, read_json), url)
        tokens = answer["tokens"]
    except (RequestError, KeyError, TypeError):
        return True
    return not isinstance(tokens, list) or list(tokens) == list(ids)


def refused(url: str, error: RequestError, k: int = 0, place: str = "teacher") -> ModelError:
    """What is said of a server that cannot be used, with the way out."""
    told = f"{error.reason}{': ' + error.detail if error.detail else ''}"
    if error.status in (401, 403):
        way = f"{place}.key_env must name the environment variable that holds its key"
    elif error.status == 404:
        way = "give the address of a server with /v1/completions (vLLM, opd serve)"
        way += " or set teacher.dialect: sglang" if place == "teacher" else ""
    elif error.status == 400 and k and "logprobs" in error.detail:
        way = f"start it with --max-logprobs {k}, or lower {place}.top_k"
    elif error.status == 400 and ("max-model-len" in error.detail or "context length" in error.detail):
        way = "start it with a larger --max-model-len: the longest prompt with its completion, and one token more"
    elif error.reason in ("timeout", "connection") or (error.status or 0) >= 500:
        way = ended_at(url) or f"start it, wait until it answers at /health, or correct {place}.url"
    else:
        way = f"it must score given token ids ({place}.dialect says how it is asked); vLLM, SGLang and opd serve do"
    return ModelError(f"the server of {place} does not answer as it must ({told}): {way}")


def _opd(client: Client, url: str, dialect: DialectName, place: str) -> ModelHeader | None:
    if dialect not in ("auto", "opd"):
        return None
    try:
        return client.ask(about_job(), url)
    except RequestError as error:
        if dialect == "auto" and error.status is not None and error.status not in (401, 403) and error.status < 500:
            return None
        raise refused(url, error, place=place) from None


def _kind(client: Client, url: str) -> str:
    for kind, path in ROUTES:
        try:
            _get(client, url, path)
            return kind
        except RequestError:
            continue
    return "openai"


def _get(client: Client, url: str, path: str) -> dict[str, Any]:
    return client.ask(Job(path, None, read_json), url)
