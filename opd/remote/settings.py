"""How a server is reached: what recipes say of it, whoever asks it."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from opd.choice import Settings, as_list
from opd.errors import RecipeError
from opd.remote.client import LOOPBACK, Client
from opd.remote.launch import ServerStart


def same_server(url: str) -> tuple[str, str, int, str]:
    """The same of two addresses under which one server is reached, as far as they say so: this machine has several
    names."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in LOOPBACK else parts.hostname or ""
    return parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


class Reached(Settings):
    """One server or several replicas of it.

    Attributes:
        place: where in a recipe these settings stand, as messages name it.
    """

    place: ClassVar[str] = "server"

    url: Annotated[list[str], BeforeValidator(as_list)] = Field(
        min_length=1, description="The server's address, e.g. http://127.0.0.1:8000; or a list of replicas"
    )
    start: ServerStart | None = Field(
        None, description="Start the server, at `url` on this machine, and end it with the run; default: it is running"
    )
    model: str | None = Field(None, description="Name under which it is served; default the server's first")
    concurrency: int = Field(32, ge=1, le=4096, description="Requests under way at once, over all replicas")
    timeout: float = Field(300.0, gt=0, description="Seconds until an answer must be there")
    retries: int = Field(6, ge=0, le=100, description="Tries after a timeout, a broken connection, 429 or 5xx")
    backoff: float = Field(0.5, ge=0, description="Seconds before the first of them; doubled each time, at most 60")
    key_env: str | None = Field(
        None, pattern=r"^\w+$", description="Environment variable with the key; the key itself is written nowhere"
    )

    @field_validator("url")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        found = []
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address; write http://HOST:PORT")
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    f"the address of {parts.hostname} holds a name, password or query, which would be written down; "
                    "put the key into an environment variable and name it in key_env"
                )
            found.append(url.rstrip("/").removesuffix("/v1"))
        if len({same_server(url) for url in found}) < len(found):
            raise ValueError("an address is listed twice; list each replica once")
        return found

    @field_validator("start")
    @classmethod
    def _here(cls, value: ServerStart | None, info: ValidationInfo) -> ServerStart | None:
        if value is not None and "url" in info.data:
            value.check_address(info.data["url"])
        return value

    def key(self) -> str | None:
        """The key, read where `key_env` says.

        Raises:
            RecipeError: nothing is there.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env)
        if not key:
            raise RecipeError(f"{self.place}.key_env names {self.key_env!r}, and no such variable is set: export it")
        return key

    def client(self, seed: int) -> Client:
        """Who sends the requests; `seed` is that of the jitter in its waits."""
        return Client(
            self.url,
            self.key(),
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
            seed=seed,
        )

    def told_of_key(self) -> list[str]:
        """A sentence where a key would travel unencrypted."""
        outside = [url for url in map(urlsplit, self.url) if url.hostname not in LOOPBACK]
        if self.key_env and any(url.scheme == "http" for url in outside):
            return [f"{self.place}.url is http: the key and all texts travel unencrypted; use https or a tunnel"]
        return []
