"""Models and servers for tests of completions that a server writes: one that follows, and what it was asked."""

from __future__ import annotations

import pytest
import torch

from opd.server.serving import application
from tests.conftest import save_tiny
from tests.serving import served_model, serving
from tests.test_served import weights_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "student", vocabulary=47, seed=1), save_tiny(root / "teacher", vocabulary=47, seed=7)


class Seen:
    """In front of an application: counts what is asked, and may do something with it."""

    def __init__(self, app, before=None):
        self.app, self.before, self.paths = app, before, []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        if self.before is not None and self.before(scope["path"], self.paths):
            return await refuse(send)
        await self.app(scope, receive, send)


async def refuse(send, status=500):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"error": {"message": "broken"}}'})


@pytest.fixture
def engine():
    """A server of other weights than the student's, which follows."""
    served = served_model(seed=3, follows=True)
    seen = Seen(application(served))
    with serving(seen) as running:
        seen.url, seen.served = running.url, served
        yield seen
    served.batcher.close()


def by(url, **settings):
    return {
        "kind": "student",
        "max_new_tokens": 10,
        "engine": {"kind": "served", "url": url, "retries": 2, "backoff": 0.01, **settings},
    }


def measured(result, name):
    return [row[f"train/{name}"] for row in result.history if f"train/{name}" in row]


def same(a, b):
    mine, theirs = weights_of(a), weights_of(b)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)
