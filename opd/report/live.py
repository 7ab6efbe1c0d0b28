"""Serves one run's page on loopback while the run trains."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
import threading
import webbrowser
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from opd.errors import RunError
from opd.files.run_directory import check_run
from opd.report.page import page, updates
from opd.report.rows import finite

OFFSETS = ("metrics", "samples", "rollouts")


def watch(
    run: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    open_browser: bool = True,
    seconds: float | None = None,
) -> None:
    """Serve the page of `run` until interrupted, or for `seconds`. The run may still be loading its models.

    Raises:
        RunError: no such run directory, or an address that cannot be listened on.
    """
    check_run(run, needs_metrics=False)
    server = make_server(run, host, port)
    url = address(server)
    print(f"watching {run} at {url} (Ctrl-C ends this, not the run)", flush=True)
    if not _is_loopback(host):
        print(f"note: {host} is not loopback: whoever reaches this machine can read the run", file=sys.stderr)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    if open_browser and _has_display():
        webbrowser.open(url)
    try:
        thread.join(seconds)
    except KeyboardInterrupt:
        print()
    finally:
        server.shutdown()
        server.server_close()


def make_server(run: Path, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server, listening; `serve_forever` is the caller's."""
    try:
        return Server((host, port), partial(Handler, run, host))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot listen on {host}:{port} ({reason}); --port 0 takes a free port") from None


def address(server: ThreadingHTTPServer) -> str:
    host, port = server.server_address[:2]
    return f"http://{host!s}:{port}/"


class Server(ThreadingHTTPServer):
    """A server that is quiet about browsers that leave in the middle of an answer."""

    daemon_threads = True

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers two addresses, the page and its data, and nothing else."""

    timeout = 10
    server_version = "opd"
    sys_version = ""

    def __init__(self, run: Path, host: str, *arguments: Any):
        self.run, self.host = run, host
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if not self._host_accepted():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this host name is not served\n")
            return
        parts = urlsplit(self.path)
        try:
            if parts.path == "/":
                self._answer(HTTPStatus.OK, "text/html", page([self.run], live=True))
            elif parts.path == "/data.json":
                self._data(parts.query)
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "only / and /data.json are served\n")
        except (RunError, OSError) as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")

    def _data(self, query: str) -> None:
        asked = parse_qs(query)
        try:
            offsets = {name: int(asked[name][-1]) for name in OFFSETS}
        except (KeyError, ValueError):
            offsets = {"metrics": -1}
        if min(offsets.values()) < 0:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", f"give byte offsets for {', '.join(OFFSETS)}\n")
            return
        body = json.dumps(finite(updates(self.run, offsets)), allow_nan=False)
        self._answer(HTTPStatus.OK, "application/json", body)

    def _host_accepted(self) -> bool:
        """Only names that this server was asked to listen on.

        A page of another site can point its own name at this machine; its requests then carry that name.
        """
        try:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return False
        everywhere = self.host in {"0.0.0.0", ""}
        return name == self.host.lower() or _is_loopback(name) or (everywhere and _is_address(name))

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a request every two seconds would bury the address."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _has_display() -> bool:
    """Whether a browser would open a window; without one it could take over the terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
