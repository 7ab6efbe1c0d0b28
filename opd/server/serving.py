"""A model of `transformers` behind HTTP: `/v1/completions`, which scores and writes, exact answers at `/opd/score`, and
where it `follows` somebody's training the routes by which weights are taken up."""

from __future__ import annotations

import asyncio
import copy
import hmac
import ipaddress
import json
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from opd.errors import OpdError, RunError
from opd.files.whole import told
from opd.language.engines.in_process import InProcess
from opd.language.engines.transformers import LanguageModel
from opd.language.model import ModelSettings, load_model, load_tokenizer
from opd.remote.exact import ABOUT, HEAD, SCORE, ModelHeader
from opd.remote.writing import LABEL, LABELLED, RESET, RPC
from opd.server.answers import completion_answer, exact_answer, head_answer, written_answer
from opd.server.batching import Batcher, Item, Manner, Rows, Task, TooBusyError, Writing
from opd.server.reading import BadRequestError, Completion, Exact, Limits, Rpc, Version, check_rows
from opd.weights import copy_into, weights_hash

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

B = TypeVar("B", bound=BaseModel)

UNKNOWN_LENGTH = 32_768
"""Tokens of a text where a model's configuration does not say how many it was made for."""

WAITING = 4096
"""Rows that may wait for the model."""


class ServedModel:
    """A frozen model and what is said of it.

    Args:
        name: by which clients ask for it.
        batch: rows of one forward pass.
        limits: of a request; None for the model's own length.
    """

    def __init__(
        self, language: InProcess, name: str, batch: int = 16, limits: Limits | None = None, follows: bool = False
    ):
        self.language, self.name, self.batch = language.eval().requires_grad_(False), name, batch
        made_for = getattr(language.base.config, "max_position_embeddings", None)
        length = made_for if isinstance(made_for, int) and made_for > 0 else UNKNOWN_LENGTH
        self.limits = limits or Limits(length, rows=max(256, batch))
        self.head = language.head(1.0).detach()
        self.batcher = Batcher(self.language, batch, WAITING)
        self.follows, self.version = follows, "default"

    @classmethod
    def load(
        cls, settings: ModelSettings, device: torch.device, name: str | None, batch: int = 16, follows: bool = False
    ) -> ServedModel:
        """The model that settings name, its chat template where it has one."""
        tokenizer = load_tokenizer(settings.model_copy(update={"template": "plain"}))
        template = "chat" if tokenizer.chat_template else "plain"
        language = LanguageModel(load_model(settings, device), tokenizer, template)
        return cls(language, name or settings.model, batch, follows=follows)

    @cached_property
    def about(self) -> ModelHeader:
        weight = self.head.weight
        return ModelHeader(
            model=self.name,
            weights=weights_hash(self.language.model),
            tokenizer=self.language.tokenizer_hash,
            template=self.language.template_hash,
            width=weight.shape[1],
            rows=weight.shape[0],
            dtype=str(weight.dtype).removeprefix("torch."),
            scale=self.head.scale,
            softcap=self.head.softcap,
            longest=self.limits.length,
            batch=min(self.batch, self.limits.rows),
        )

    @cached_property
    def head_bytes(self) -> bytes:
        return head_answer(self.head)

    def completion(self, asked: Completion) -> Rows | Writing:
        """What `/v1/completions` asks the model.

        Raises:
            BadRequestError: it asks for something that is not given here.
        """
        if asked.model not in (None, self.name):
            raise BadRequestError(f"the model {asked.model!r} is not served here; {self.name!r} is")
        most = max(asked.prompt_logprobs or 0, asked.logprobs or 0)
        if most > min(self.limits.logprobs, self.head.size):
            raise BadRequestError(
                f"logprobs of {most} ids, and this server gives {self.limits.logprobs} (--max-logprobs)"
            )
        prompt = asked.prompt
        if isinstance(prompt, str):
            prompt = list(self.language.tokenizer(prompt)["input_ids"])
        prompts: list[list[int]] = prompt if prompt and isinstance(prompt[0], list) else [prompt]  # type: ignore[list-item]
        return self._scoring(asked, prompts) if asked.scores else self._writing(asked, prompts)

    def _writing(self, asked: Completion, prompts: list[list[int]]) -> Writing:
        if unknown := asked.unknown():
            raise BadRequestError(f"{unknown[0]}={getattr(asked, unknown[0])!r} is not done here; leave it out")
        if len(prompts) != 1 or not prompts[0]:
            raise BadRequestError(f"{len(prompts)} prompts, and one request writes behind one that is not empty")
        budget = 16 if asked.max_tokens is None else asked.max_tokens
        if budget < 1:
            raise BadRequestError("max_tokens is 0 and nothing is scored: pass prompt_logprobs, or write 1 or more")
        ids = prompts[0]
        check_rows(prompts, self.limits, self.head.size)
        if len(ids) + budget > self.limits.length:
            raise BadRequestError(
                f"a text of {len(ids)} tokens with {budget} more, and this server takes {self.limits.length} "
                "(--max-model-len)"
            )
        ends = set(asked.stop_token_ids or ()) | (set() if asked.ignore_eos else set(self._own_ends))
        temperature = 1.0 if asked.temperature is None else asked.temperature
        top_k = max(0, asked.top_k or 0)
        if temperature == 0:
            temperature, top_k = 1.0, 1
        manner = Manner(
            budget, temperature, 1.0 if asked.top_p is None else asked.top_p, top_k, tuple(sorted(ends)),
            asked.logprobs or 0,
        )  # fmt: skip
        seed = secrets.randbits(62) if asked.seed is None else asked.seed % 2**63
        finish = partial(
            written_answer, asked=asked, prompt=len(ids), tokenizer=self.language.tokenizer, name=self.name
        )
        return Writing(torch.tensor(ids, dtype=torch.int64), seed, manner, finish)

    @cached_property
    def _own_ends(self) -> tuple[int, ...]:
        """Ids with which the model itself ends."""
        own = getattr(self.language.base.generation_config, "eos_token_id", None)
        found = own if own is not None else self.language.tokenizer.eos_token_id
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    def reload(self, asked: Rpc) -> Task:
        """Take up the weights in a folder, between passes.

        Raises:
            BadRequestError: none are there.
        """
        folder = Path(asked.where.weights_path)
        if not folder.is_dir() or not list(folder.glob("*.safetensors")):
            raise BadRequestError(f"{folder} holds no weights (*.safetensors)")
        if (folder / "adapter_config.json").exists():
            raise BadRequestError(f"{folder} holds an adapter, which names its model itself; send whole weights")

        def work() -> bytes:
            own = self.language.base
            try:
                with torch.no_grad():
                    copy_into(own.state_dict(), _weights_in(folder, own), "served model")
            except (OSError, ValueError, RuntimeError, SafetensorError, OpdError) as error:
                raise BadRequestError(f"the weights in {folder} are not this model's ({told(error)})") from None
            for name in ("about", "head_bytes"):
                self.__dict__.pop(name, None)
            self.version = "default"
            return b'{"results": [null]}'

        return Task(work)

    def rename(self, asked: Version) -> Task:
        """Name the weights."""

        def work() -> bytes:
            self.version = asked.new_version
            return json.dumps({"success": True, "new_version": self.version}).encode()

        return Task(work)

    def _scoring(self, asked: Completion, prompts: list[list[int]]) -> Rows:
        if asked.prompt_logprobs is None and asked.logprobs is None:
            raise BadRequestError("echo without logprobs scores nothing: pass logprobs too")
        if (asked.max_tokens or 0) > 1:
            raise BadRequestError("a request that scores writes nothing: pass max_tokens 0 (or 1, where 0 is refused)")
        if asked.temperature not in (None, 0.0, 1.0):
            raise BadRequestError("log-probabilities of a prompt are those of temperature 1")
        if any(len(ids) < 2 for ids in prompts):
            raise BadRequestError("a prompt of fewer than two tokens has nothing to score")
        check_rows(prompts, self.limits, self.head.size)
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in prompts]
        finish = partial(
            completion_answer,
            prompts=prompts,
            asked=asked,
            head=self.head,
            tokenizer=self.language.tokenizer,
            name=self.name,
        )
        return Rows([row[:1] for row in rows], [row[1:] for row in rows], finish)

    def exact(self, asked: Exact) -> Rows:
        """What `/opd/score` asks the model."""
        check_rows([row.prompt + row.completion for row in asked.rows], self.limits, self.head.size)
        contexts = [torch.tensor(row.prompt, dtype=torch.int64) for row in asked.rows]
        completions = [torch.tensor(row.completion, dtype=torch.int64) for row in asked.rows]
        return Rows(contexts, completions, partial(exact_answer, dtype=asked.dtype))


def _weights_in(folder: Path, own: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights in a folder by the model's names for them. Nothing but numbers is read there: a configuration of
    somebody else's may name code.

    Raises:
        RunError: some are lacking, or are none of this model's.
    """
    # What it returns depends on an argument, which its types do not say.
    both: Any = type(own).from_pretrained(
        folder,
        config=copy.deepcopy(own.config),
        dtype=own.dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    found, said = both
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, said.get(what) or ())):
            raise RunError(f"{what.replace('_', ' ')}: {', '.join(names[:3])}")
    return dict(found.state_dict())


def application(served: ServedModel, token: str | None = None) -> Starlette:
    """The routes; with a token none but `/health` answers without it, and without a token none to a page of the web
    that had its own name resolved to this machine: its requests say that name."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def problem(status: int, text: str, **headers: str) -> Response:
        return JSONResponse({"error": {"message": text, "code": status}}, status, headers=headers)

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def checked(request: Request) -> Response:
            if token is None and not is_loopback(request.url.hostname or ""):
                return problem(403, f"this server is called 127.0.0.1 or localhost, not {request.url.hostname!r}")
            given = request.headers.get("authorization", "").encode()
            if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
                return problem(401, "no valid key")
            return await answer(request)

        return checked

    def asking(kind: type[B], ask: Callable[[B], Item], media: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            # What a web page may send unasked has another type.
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return problem(415, "send JSON, with content-type application/json")
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > served.limits.body:
                    return problem(413, f"the request has more than {served.limits.body} bytes")
            try:
                item = ask(kind.model_validate_json(bytes(body)))
                found = await asyncio.wrap_future(served.batcher.submit(item))
            except ValidationError as error:
                first = error.errors()[0]
                return problem(400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}")
            except BadRequestError as error:
                return problem(400, str(error))
            except TooBusyError:
                return problem(503, "too many rows wait", **{"retry-after": "1"})
            except Exception as error:
                print(f"opd serve: {type(error).__name__}: {error}", file=sys.stderr)
                return problem(500, f"the model failed: {type(error).__name__}")
            return Response(found, media_type=media)

        return answer

    async def health(request: Request) -> Response:
        return Response(b"")

    async def models(request: Request) -> Response:
        card = {"id": served.name, "object": "model", "owned_by": "opd", "max_model_len": served.limits.length}
        return JSONResponse({"object": "list", "data": [card]})

    async def about(request: Request) -> Response:
        return JSONResponse(served.about.model_dump())

    async def head(request: Request) -> Response:
        return Response(served.head_bytes, media_type="application/octet-stream")

    async def version(request: Request) -> Response:
        return JSONResponse({"weight_version": served.version})

    async def nothing(request: Request) -> Response:
        # Keys and values are kept for no longer than a request.
        return JSONResponse({"success": True})

    following = [
        Route(RPC, guarded(asking(Rpc, served.reload, "application/json")), methods=["POST"]),
        Route(LABEL, guarded(asking(Version, served.rename, "application/json")), methods=["POST"]),
        Route(LABELLED, guarded(version)),
        Route(RESET, guarded(nothing), methods=["POST"]),
    ]
    complete = asking(Completion, served.completion, "application/json")
    score = asking(Exact, served.exact, "application/octet-stream")
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", guarded(models)),
            Route("/v1/completions", guarded(complete), methods=["POST"]),
            Route(ABOUT, guarded(about)),
            Route(HEAD, guarded(head)),
            Route(SCORE, guarded(score), methods=["POST"]),
            *(following if served.follows else ()),
        ]
    )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_token(host: str, token_env: str | None) -> str | None:
    """The token that clients must send, read from a variable of the environment; None where none is wanted.

    Raises:
        RunError: others may reach this address and no token is named, or the variable is not set.
    """
    if token_env is None:
        if not is_loopback(host):
            raise RunError(
                f"--host {host} is reached from other machines: name a variable that holds a token in --token-env, or "
                "serve on 127.0.0.1"
            )
        return None
    token = os.environ.get(token_env)
    if not token:
        raise RunError(f"--token-env names {token_env!r}, and no such variable is set: export it")
    return token


def serve(
    load: Callable[[], ServedModel], host: str = "127.0.0.1", port: int = 8000, token_env: str | None = None
) -> None:
    """Serve until interrupted; `load` is called when the address is free.

    Raises:
        RunError: without the packages, for an address that is taken, or one that needs a token.
    """
    token = checked_token(host, token_env)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise RunError(f"opd serve needs {error.name}: pip install 'opd[serve]'") from None
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RunError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None
    with bound:
        served = load()
        about = served.about
        size = torch.finfo(getattr(torch, about.dtype)).bits // 8
        print(
            f"serving {served.name} at http://{host}:{bound.getsockname()[1]} (texts of {about.longest} tokens; exact "
            f"answers take {2 * about.width} bytes a token in bfloat16, {4 * about.width} in float32, and the head "
            f"{about.rows * about.width * size / 1e6:.4g} MB once)",
            flush=True,
        )
        config = uvicorn.Config(application(served, token), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[bound])
        served.batcher.close()
