"""Real servers on loopback for tests: the application of `opd serve` in a thread, and faults in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time

import uvicorn

from opd.language.engines.transformers import LanguageModel
from opd.server import ServedModel
from opd.server.serving import application
from tests.conftest import character_tokenizer, tiny_model


def served_model(seed=7, batch=16, limits=None, follows=False, **options):
    language = LanguageModel(tiny_model(seed=seed, vocabulary=47, **options), character_tokenizer(), template="plain")
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


LASTING = ("NaN", "infinite", "positive", "wrong length", "other ids", "HTTP 400")
PASSING = ("HTTP 500", "HTTP 429", "connection", "not JSON")


def fault_of(ids, share=0.3):
    """What happens to a request about these ids, the same in every process: mostly None."""
    number = int.from_bytes(hashlib.sha256(json.dumps(list(ids)).encode()).digest()[:4], "big")
    if number / 2**32 >= share:
        return None
    return (*LASTING, *PASSING)[number % 10]


def is_lost(ids):
    return fault_of(ids) in LASTING


class Faulty:
    """In front of an application: breaks answers of `/v1/completions` about some ids, those that pass only once."""

    def __init__(self, app, spared=1):
        self.app, self.spared = app, spared
        self.seen, self.met = set(), []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/completions" or self.spared > 0:
            self.spared -= scope.get("path") == "/v1/completions"
            return await self.app(scope, receive, send)
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        ids = tuple(json.loads(body)["prompt"])
        fault = fault_of(ids)
        if fault in PASSING:
            fault = None if ids in self.seen else fault
            self.seen.add(ids)
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
        found = []

        async def keep(message):
            found.append(message.get("body", b""))

        await self.app(scope, again, keep)
        whole = b"".join(found)
        if fault == "not JSON":
            return await answer(send, 200, whole[: len(whole) // 2])
        data = json.loads(whole)
        rows = data["choices"][0]["prompt_logprobs"]
        entry = rows[-1][str(ids[-1])]
        if fault == "wrong length":
            rows.pop()
        elif fault == "other ids":
            del rows[-1][str(ids[-1])]
        else:
            entry["logprob"] = {"NaN": float("nan"), "infinite": float("inf"), "positive": 0.5}[fault]
        return await answer(send, 200, json.dumps(data).encode())


async def answer(send, status, body, **headers):
    told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    told += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})


async def silent(scope, receive, send):
    """An application that never answers."""
    await asyncio.sleep(30)
