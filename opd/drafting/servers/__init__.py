"""Programs that load drafters: how each is started, and what it would read otherwise than it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from opd.drafting.servers.base import Served, Server, own_form
from opd.drafting.servers.sglang import SGLang
from opd.drafting.servers.transformers import Transformers
from opd.drafting.servers.vllm import VLLM
from opd.errors import ModelError

__all__ = ["NATIVE_SERVERS", "SERVERS", "Served", "Server", "ServerName", "check_served", "own_form"]

ServerName = Literal["vllm", "sglang", "transformers"]

SERVERS: dict[str, Server] = dict(zip(get_args(ServerName), (VLLM(), SGLang(), Transformers()), strict=True))

NATIVE_SERVERS: tuple[ServerName, ...] = ("vllm", "sglang")
"""Those that load a drafter in its native format."""


def check_served(names: Sequence[str], served: Served, key: str) -> None:
    """Refuse a drafter that a server would read otherwise than it was trained; `key` is where a person named the
    server.

    Raises:
        ModelError: a server reads something else, which is said, with what it accepts.
    """
    for name in names:
        why = own_form(served) or SERVERS[name].misreads(served)
        if why is not None:
            raise ModelError(f"{key} {name!r}: {why}")
