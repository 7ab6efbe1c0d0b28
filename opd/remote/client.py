"""Many requests at once to one or several replicas of a server, from one thread in the background."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx2

T = TypeVar("T")

LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever backoff or server say."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class RequestError(Exception):
    """One request that brought no answer.

    Attributes:
        reason: a few words, the same for failures of one kind, by which they are counted.
        detail: what the server or the connection said, in one short line.
        again: whether another try may help.
        wait: seconds that the server asked for, or None.
        status: of HTTP, where an answer came.
        silent: nobody took the request, or nobody answered in time.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        again: bool = False,
        wait: float | None = None,
        status: int | None = None,
        silent: bool = False,
    ):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail, self.again, self.wait, self.status = reason, detail, again, wait, status
        self.silent = silent


@dataclass(frozen=True)
class Job(Generic[T]):
    """One request: a path below the server's address, the JSON that is sent there (None: a GET), and what reads the
    answer's bytes, raising `RequestError` where they are not what was asked for."""

    path: str
    body: dict[str, Any] | None
    read: Callable[[bytes], T]


class Client:
    """Sends jobs to the replicas of a server in turn and tries again where that may help: after a timeout, a broken
    connection, 429 or 5xx, and after JSON that was cut off. The waits double, with a jitter, and a server's Retry-After
    counts. Other answers of 4xx, and answers that say something else than what was asked, are not asked for again.

    Args:
        urls: addresses of the replicas, without `/v1`.
        key: sent as a bearer token; no message of this class holds it.
        concurrency: requests that are under way together.
        timeout: seconds until an answer must be there.
        retries: tries after the first.
        backoff: seconds before the first of them.
        seed: of the jitter.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None = None,
        *,
        concurrency: int = 32,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        seed: int = 0,
    ):
        self.urls, self._key = list(urls), key
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.retried = 0
        self._random = random.Random(f"jitter/{seed}")
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._http: httpx2.AsyncClient | None = None
        self._seats: asyncio.Semaphore | None = None

    def __repr__(self) -> str:
        return f"Client({self.urls})"

    def ask(self, job: Job[T], url: str | None = None) -> T:
        """The answer to one job, of the replica `url` or of whoever is next.

        Raises:
            RequestError: all tries failed.
        """
        work = self._tried(job, url)
        found = self._run(work)
        if isinstance(found, RequestError):
            raise found
        return found

    def submit(self, job: Job[T]) -> Future[T | RequestError]:
        """The answer to come, or why none did."""
        work = self._tried(job, None)
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def ask_all(
        self, jobs: Sequence[Job[T]], told: Callable[[int, T | RequestError], None] | None = None
    ) -> list[T | RequestError]:
        """The answers, in order; in the place of one that did not come, why. `told` hears of each as it comes, with its
        place, in the background."""

        async def one(place: int, job: Job[T]) -> T | RequestError:
            found: T | RequestError = await self._tried(job, None)
            if told is not None:
                told(place, found)
            return found

        async def together() -> list[T | RequestError]:
            return list(await asyncio.gather(*(one(place, job) for place, job in enumerate(jobs))))

        work = together()
        return self._run(work)

    def close(self) -> None:
        """End the thread; another request starts a new one. Whoever waits for an answer yet gets `CancelledError`."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        assert self._thread is not None
        self._thread.join(5)
        if not self._thread.is_alive():
            loop.close()

    async def _end(self) -> None:
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._running()).result()

    def _running(self) -> asyncio.AbstractEventLoop:
        """The thread's loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="opd-client", daemon=True)
                self._thread.start()
                asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
            return self._loop

    async def _open(self) -> None:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        # What goes to this machine goes through no proxy. A redirect is not followed: it would be told the key.
        outside = any(urlsplit(url).hostname not in LOOPBACK for url in self.urls)
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self._http = httpx2.AsyncClient(
            headers=headers, timeout=self.timeout, limits=limits, trust_env=outside, follow_redirects=False
        )
        self._seats = asyncio.Semaphore(self.concurrency)

    async def _tried(self, job: Job[T], url: str | None) -> T | RequestError:
        turn = next(self._turn)
        for attempt in range(self.retries + 1):
            try:
                return await self._once(job, url or self.urls[(turn + attempt) % len(self.urls)])
            except RequestError as error:
                if not error.again or attempt == self.retries:
                    return error
                self.retried += 1
                own = self.backoff * 2**attempt * (0.5 + self._random.random())
                await asyncio.sleep(min(LONGEST_WAIT, own if error.wait is None else max(own, error.wait)))
        raise AssertionError("the last try returns")

    async def _once(self, job: Job[T], url: str) -> T:
        assert self._http is not None
        assert self._seats is not None
        try:
            async with self._seats:
                answer = await (
                    self._http.get(url + job.path)
                    if job.body is None
                    else self._http.post(url + job.path, json=job.body)
                )
        except httpx2.TimeoutException:
            detail = f"{url}: no answer in {self.timeout:g} s"
            raise RequestError("timeout", detail, again=True, silent=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            detail = self._line(f"{url}: {error or type(error).__name__}")
            silent = isinstance(error, httpx2.ConnectError | httpx2.InvalidURL)
            raise RequestError("connection", detail, again=True, silent=silent) from None
        if answer.status_code != 200:
            raise RequestError(
                f"HTTP {answer.status_code}",
                self._line(f"{url}{job.path}: {_said(answer.content)}"),
                again=answer.status_code == 429 or answer.status_code >= 500,
                wait=_retry_after(answer.headers.get("retry-after")),
                status=answer.status_code,
            )
        return job.read(answer.content)

    def _line(self, text: str) -> str:
        """What somebody else wrote, without the key, which some servers repeat."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:300]


def read_json(content: bytes) -> dict[str, Any]:
    """An answer's JSON object; `RequestError` where it is none, which may be for a connection that broke off."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError("not JSON", f"{len(content)} bytes", again=True) from None
    if not isinstance(found, dict):
        raise RequestError("another form", f"{type(found).__name__} where an object was asked for")
    return found


def _said(content: bytes) -> str:
    """The message of an error's answer: that of the JSON that servers write, or its beginning."""
    text = content[:4000].decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text[:200]
    for _ in range(2):
        if isinstance(found, dict):
            found = found.get("error", found.get("message", found.get("detail", found)))
    return str(found)


def _retry_after(header: str | None) -> float | None:
    """Seconds, of a number or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
