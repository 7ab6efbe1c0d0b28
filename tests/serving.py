"""Real servers on loopback for tests: the application of `opd serve` in a thread, and faults in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time

import torch
import uvicorn
from safetensors.torch import load, save

from opd.language.engines.transformers import LanguageModel
from opd.remote.exact import SCORE
from opd.server import ServedModel
from opd.server.serving import application
from tests.conftest import character_tokenizer, tiny_model


class RowByRow(LanguageModel):
    """One whose numbers are the same whichever rows share a pass."""

    def forward(self, contexts, completions, layout="auto"):
        rows = zip(contexts, completions, strict=True)
        return torch.cat([super(RowByRow, self).forward([c], [y], layout) for c, y in rows])


def served_model(seed=7, batch=16, limits=None, vocabulary=47, kind=LanguageModel, follows=False, **options):
    language = kind(tiny_model(seed=seed, vocabulary=vocabulary, **options), character_tokenizer(), template="plain")
    return ServedModel(language, "tiny-teacher", batch, limits, follows)


class Running:
    """An application that answers at `url` until `stop`."""

    def __init__(self, app, port=0):
        self.socket = socket.create_server(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)
        self.socket.close()


@contextlib.contextmanager
def serving(app, port=0):
    running = Running(app, port)
    try:
        yield running
    finally:
        running.stop()


@contextlib.contextmanager
def serving_tiny(token=None, **options):
    served = served_model(**options)
    with serving(application(served, token)) as running:
        yield running.url
    served.batcher.close()


COMPLETIONS = "/v1/completions"
LASTING = {
    COMPLETIONS: ("NaN", "infinite", "positive", "wrong length", "other ids", "HTTP 400"),
    SCORE: ("NaN", "infinite", "HTTP 503", "wrong length", "always cut off", "HTTP 400"),
}
PASSING = ("HTTP 500", "HTTP 429", "connection", "cut off", "too late")


def fault_of(ids, path=COMPLETIONS, share=0.3):
    """What happens to a request about these ids, the same in every process: mostly None."""
    number = int.from_bytes(hashlib.sha256(json.dumps(list(ids)).encode()).digest()[:4], "big")
    if number / 2**32 >= share:
        return None
    return (*LASTING[path], *PASSING)[number % 11]


def is_lost(ids):
    return fault_of(ids) in LASTING[COMPLETIONS]


class Faulty:
    """In front of an application: breaks answers of `/v1/completions` and `/opd/score` about some ids, those that pass
    only once. A fault of one of a request's rows is that of all of them.

    Args:
        spared: requests that meet no fault first, those of the start.
        fault: which one, of ids and route; None for none.
    """

    def __init__(self, app, spared=1, fault=fault_of):
        self.app, self.spared, self.fault = app, spared, fault
        self.seen, self.met, self.asked = set(), [], 0

    async def __call__(self, scope, receive, send):
        path = scope.get("path")
        if scope["type"] != "http" or path not in LASTING or self.spared > 0:
            self.spared -= path in LASTING
            return await self.app(scope, receive, send)
        self.asked += 1
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        sent = json.loads(body)
        rows = [(r["prompt"], r["completion"]) for r in sent["rows"]] if path == SCORE else [(sent["prompt"], [])]
        faults = [self.fault(prompt + completion, path) for prompt, completion in rows]
        place = next((i for i, fault in enumerate(faults) if fault in LASTING[path]), None)
        if place is None:
            texts = [tuple(prompt + completion) for prompt, completion in rows]
            place = next((i for i, text in enumerate(texts) if faults[i] and text not in self.seen), None)
            self.seen.update(texts)
        fault = None if place is None else faults[place]
        if fault is not None:
            self.met.append(fault)

        async def again():
            return {"type": "http.request", "body": body, "more_body": False}

        if fault is None:
            return await self.app(scope, again, send)
        if fault.startswith("HTTP"):
            return await answer(send, int(fault.split()[1]), b'{"error": {"message": "broken"}}', retry_after="0.01")
        if fault == "connection":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            return await send({"type": "http.response.body", "body": b"{"})
        if fault == "too late":
            # Nothing is said until the client has given up.
            while (await receive())["type"] != "http.disconnect":
                continue
            return None
        found = []

        async def keep(message):
            found.append(message.get("body", b""))

        await self.app(scope, again, keep)
        whole = b"".join(found)
        if fault.endswith("cut off"):
            return await answer(send, 200, whole[: len(whole) // 2])
        if path == SCORE:
            before = sum(len(completion) for _, completion in rows[:place])
            return await answer(send, 200, spoilt_states(whole, fault, before))
        return await answer(send, 200, spoilt_scores(whole, fault, str(sent["prompt"][-1])))


def spoilt_states(whole, fault, position):
    """An answer of `/opd/score` with a fault at one position."""
    hidden = load(whole)["hidden"]
    if fault == "wrong length":
        hidden = hidden[:-1].contiguous()
    else:
        hidden[position, 0] = float("nan" if fault == "NaN" else "inf")
    return save({"hidden": hidden})


def spoilt_scores(whole, fault, token):
    """An answer of `/v1/completions` with a fault at its last token."""
    data = json.loads(whole)
    rows = data["choices"][0]["prompt_logprobs"]
    entry = rows[-1][token]
    if fault == "wrong length":
        rows.pop()
    elif fault == "other ids":
        del rows[-1][token]
    else:
        entry["logprob"] = {"NaN": float("nan"), "infinite": float("inf"), "positive": 0.5}[fault]
    return json.dumps(data).encode()


async def answer(send, status, body, **headers):
    told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    told += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})


async def silent(scope, receive, send):
    """An application that never answers."""
    await asyncio.sleep(30)
