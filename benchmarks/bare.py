"""The floor of a distillation step: only what cannot be left out, in plain torch, for Llama models.

Sampling with a cache, the teacher's and the student's body without padding, both heads at completion positions alone,
one backward pass, AdamW. No framework, no modules, no logging; nothing here is used by `opd`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

from benchmarks.session import LEARNING_RATE, AfterStep, Job, Score, Session

CHUNK = 2**22
"""Entries of one chunk of logits."""

Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Llama:
    """The weights of a Llama and its two ways to run: whole sequences without padding, and one token a row."""

    def __init__(self, config: Any, weights: dict[str, torch.Tensor]):
        self.weights, self.eps = weights, config.rms_norm_eps
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = range(config.num_hidden_layers)
        self.head = weights["lm_head.weight"]
        self.config = config
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = 1.0 / theta ** (torch.arange(0, self.size, 2).float() / self.size)

    @staticmethod
    def load(folder: Any, trained: bool) -> Llama:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        weights = {name: p.requires_grad_(trained) for name, p in model.named_parameters()}
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        return Llama(model.config, weights)

    def cast(self, dtype: torch.dtype) -> Llama:
        """Detached weights in `dtype`; those that have it already are not copied."""
        return Llama(self.config, {name: p.detach().to(dtype) for name, p in self.weights.items()})

    def prefill(self, sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Cache]:
        """Final hidden states `[N, D]` of all tokens, packed, and each layer's keys and values `[N, K, size]`."""
        lengths = [len(s) for s in sequences]
        ids = torch.cat(list(sequences))
        rotation = self._rotation(torch.cat([torch.arange(n) for n in lengths]))
        cache: Cache = []
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for i in self.layers:
            q, k, v = self._project(i, hidden, rotation)
            cache.append((k, v))
            parts = zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True)
            seen = [
                scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=self.groups < self.heads
                )[0].transpose(0, 1)
                for part in parts
            ]
            hidden = self._rest(i, hidden, torch.cat(seen))
        return self._norm("model.norm", hidden), cache

    def step(self, ids: torch.Tensor, position: torch.Tensor, room: Cache, place: int, seen: torch.Tensor) -> Any:
        """Final hidden states `[B, D]` of one new token a row, written at `place` of the caches `[B, K, L, size]`."""
        rotation = self._rotation(position)
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for i in self.layers:
            q, k, v = self._project(i, hidden, rotation)
            keys, values = room[i]
            keys[:, :, place], values[:, :, place] = k, v
            # The heads of one group stand beside each other as if they were queries.
            q = q.reshape(len(ids), self.groups, -1, self.size)
            out = scaled_dot_product_attention(q, keys[:, :, : place + 1], values[:, :, : place + 1], attn_mask=seen)
            hidden = self._rest(i, hidden, out.reshape(len(ids), self.heads, self.size))
        return self._norm("model.norm", hidden)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        return rms_norm(x, weight.shape, weight, self.eps)

    def _project(self, i: int, hidden: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, ...]:
        x = self._norm(f"model.layers.{i}.input_layernorm", hidden)
        q, k, v = (
            linear(x, self.weights[f"model.layers.{i}.self_attn.{name}_proj.weight"]).view(len(x), -1, self.size)
            for name in "qkv"
        )
        return _rotate(q, rotation), _rotate(k, rotation), v

    def _rest(self, i: int, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        layer = f"model.layers.{i}."
        hidden = hidden + linear(attended.flatten(1), self.weights[layer + "self_attn.o_proj.weight"])
        x = self._norm(layer + "post_attention_layernorm", hidden)
        gate = silu(linear(x, self.weights[layer + "mlp.gate_proj.weight"]))
        up = linear(x, self.weights[layer + "mlp.up_proj.weight"])
        return hidden + linear(gate * up, self.weights[layer + "mlp.down_proj.weight"])

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None].float() * self.frequencies
        return angles.cos()[:, None], angles.sin()[:, None]


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = (r.to(x.dtype) for r in rotation)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class FloorSession(Session):
    """The bare step on the same prompts and lengths."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
        self.student = Llama.load(self.folder / "student", trained=True)
        self.teacher = Llama.load(self.folder / "teacher", trained=False).cast(self.dtype)
        self.encoded = [torch.tensor(p) for p in self.forced.by_prompt]
        unique = {id(p): p for p in self.student.weights.values()}
        self.trained = list(unique.values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def train(self, after_step: AfterStep) -> None:
        batch, number = self.job.size.batch, 0
        self.phases.restart()
        while True:
            first = number * batch % len(self.encoded)
            prompts = [p for p in self.encoded[first : first + batch] for _ in range(self.job.size.group)]
            with self.phases("rollout"):
                completions = self.sample(prompts)
            self.sampled += sum(map(len, completions))
            self.descend(prompts, completions)
            with self.phases("optimizer"):
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            number += 1
            if not after_step():
                return

    @torch.no_grad()
    def sample(self, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One completion of each prompt."""
        model = self.student.cast(self.dtype)
        lengths = torch.tensor([len(p) for p in prompts])
        wanted, width = self.forced.wanted(prompts), int(lengths.max())
        longest, rows = int(wanted.max()), len(prompts)
        hidden, packed = model.prefill(prompts)
        present = torch.arange(width) >= width - lengths[:, None]
        room = []
        for pair in packed:
            buffers = tuple(x.new_zeros(rows, x.shape[1], width + longest, x.shape[2]) for x in pair)
            for buffer, x in zip(buffers, pair, strict=True):
                buffer.transpose(1, 2)[:, :width][present] = x
            room.append(buffers)
        seen = torch.cat([present, torch.ones(rows, longest, dtype=torch.bool)], 1)[:, None, None]
        hidden, alive = hidden[lengths.cumsum(0) - 1], torch.arange(rows)
        drawn, ends = torch.zeros(rows, longest, dtype=torch.int64), torch.tensor(self.ends)
        for t in range(longest):
            scores = self.forced.apply(linear(hidden, model.head).float(), wanted[alive], t)
            cdf = torch.softmax(scores, -1).cumsum(-1)
            token = torch.searchsorted(cdf, torch.rand(len(alive), 1) * cdf[:, -1:]).squeeze(1)
            drawn[alive, t] = token
            going = ~torch.isin(token, ends)
            if not bool(going.all()):
                alive, token, seen = alive[going], token[going], seen[going]
                room = [tuple(x[going] for x in pair) for pair in room]
            if len(alive) == 0:
                break
            place = width + t
            hidden = model.step(token, lengths[alive] + t, room, place, seen[..., : place + 1])
        return [drawn[i, :n] for i, n in enumerate(wanted.tolist())]

    def descend(self, prompts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor]) -> float:
        """Reverse KL, a mean over tokens, and its gradients."""
        fed = [torch.cat([p, y[:-1]]) for p, y in zip(prompts, completions, strict=True)]
        where, start = [], 0
        for prompt, tokens in zip(prompts, fed, strict=True):
            where.append(torch.arange(start + len(prompt) - 1, start + len(tokens)))
            start += len(tokens)
        scored = torch.cat(where)
        with self.phases("teacher"), torch.no_grad():
            theirs = self.teacher.prefill(fed)[0][scored]
        with self.phases("student"), torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            own = self.student.prefill(fed)[0][scored]
        with self.phases("loss"), torch.no_grad():
            loss, grad_hidden, grad_head = self._loss(own.detach().to(self.dtype), theirs)
        with self.phases("backward"):
            own.backward(grad_hidden.to(own.dtype))
            head = self.student.head
            head.grad = grad_head if head.grad is None else head.grad.add_(grad_head)
        return loss

    def _loss(self, own: torch.Tensor, theirs: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Four products a chunk: both heads, and the gradients of hidden states and head."""
        matrix, rows = self.student.head.detach().to(self.dtype), max(64, CHUNK // len(self.student.head))
        grad_hidden, grad_head, total = torch.empty_like(own), torch.zeros(matrix.shape), 0.0
        for start in range(0, len(own), rows):
            here = slice(start, start + rows)
            log_q = torch.log_softmax(linear(own[here], matrix).float(), -1)
            gap = log_q - torch.log_softmax(linear(theirs[here], self.teacher.head).float(), -1)
            q = log_q.exp_()
            value = torch.linalg.vecdot(q, gap)
            total += float(value.sum())
            grad = gap.sub_(value[:, None]).mul_(q).div_(len(own)).to(self.dtype)
            grad_hidden[here] = grad @ matrix
            if self.dtype == torch.float32:
                grad_head.addmm_(grad.T, own[here])
            else:
                grad_head += grad.T @ own[here]
        return total / len(own), grad_hidden, grad_head

    def score(self, completions: Sequence[Sequence[int]]) -> Score:
        loss = self.descend(self.encoded[: len(completions)], [torch.tensor(y) for y in completions])
        score = Score.of(loss, self.trained)
        self.optimizer.zero_grad()
        return score
