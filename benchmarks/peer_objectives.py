"""What peers' loss functions descend, by exact enumeration: `python -m benchmarks.objectives --peers`.

Every peer is called through its own loss function, on the logits of one sequence, with the settings that its trainer
uses. It is measured against the divergence that its documentation names. What is found is a finding about the peer, so
nothing here can fail: a peer that cannot be imported or called is a line with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.enumerated import BIAS, COSINE, from_loss
from opd.cli.display import show_objectives
from opd.divergences import Divergence, JensenShannon, ReverseKL
from opd.scenes import Scene
from opd.truth_table import Row, load_table, measure, save_table

TABLE = Path(__file__).parent / "results" / "peer_objectives.json"
BETAS = (0.0, 0.5, 1.0)
TOP_K = 4

PeerLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`loss(log_p, log_q, actions)`: float64 `[L, V]` teacher and student, int64 `[L]`; the sum over the L tokens."""


@dataclass(frozen=True)
class Case:
    """A peer's loss function under one setting, and the divergence that its documentation names for it."""

    setting: str
    loss: PeerLoss
    promise: Divergence


@dataclass(frozen=True)
class Peer:
    """A library's loss function.

    Attributes:
        name: what stands before the setting in the table.
        distributions: what is installed for it, the library first.
        load: imports it; separate, so that a library that is missing costs its own rows only.
    """

    name: str
    distributions: tuple[str, ...]
    load: Callable[[], Iterable[Case]]


def _by_beta(loss: Callable[[float, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], note: str) -> list[Case]:
    """One case for each beta: TRL, Liger and ms-swift all share opd's convention that the teacher carries beta."""

    def fixed(beta: float) -> PeerLoss:
        return lambda log_p, log_q, actions: loss(beta, log_p.float(), log_q.float(), actions)

    return [Case(f"beta {beta:g}{note}", fixed(beta), JensenShannon(beta=beta)) for beta in BETAS]


def _trl_gkd() -> list[Case]:
    from trl.experimental.gkd import GKDTrainer

    def loss(beta: float, log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        mean = GKDTrainer.generalized_jsd_loss(log_q[None], log_p[None], labels=actions[None], beta=beta)
        return mean * len(actions)

    return _by_beta(loss, "")


def _trl_kernel() -> list[Case]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(beta: float, log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(log_q.shape[-1])
        counts = torch.ones(1, len(actions))
        mean, _, _ = _chunked_divergence_loss(log_q[None], log_p[None], identity, identity, counts, beta)
        return mean * len(actions)

    return _by_beta(loss, "")


def _liger() -> list[Case]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(beta: float, log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(log_q.shape[-1])
        # Its default adds cross-entropy with the sampled tokens, which is no part of the divergence.
        module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
        return module(log_q, identity, log_p, identity, actions) * len(actions)

    return _by_beta(loss, "")


def _torchrl() -> list[Case]:
    from tensordict import TensorDict, lazy_stack
    from torchrl.objectives.llm import DistillationLoss

    class Student(torch.nn.Module):
        """Answers the log-probabilities of the sampled tokens, which is all that the loss asks of a model."""

        log_probs: torch.Tensor

        def forward(self, data: Any) -> Any:
            return lazy_stack([TensorDict({"log_probs": {"full": self.log_probs}})])

    student = Student()
    # The masks are given, so that the tokenizer, which it insists on, stays unused.
    module = DistillationLoss(student, tokenizer=object())

    def loss(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        counts = torch.ones(len(actions), dtype=torch.bool)
        student.log_probs = log_q.gather(-1, actions[:, None]).squeeze(-1)
        data = TensorDict(
            {
                "history": {"full": actions},
                "masks": {"all_assistant_mask": counts, "all_attention_mask": counts},
                "next": {"teacher_log_probs": {"full": log_p.gather(-1, actions[:, None]).squeeze(-1)}},
            }
        )
        return module(lazy_stack([data])).loss_distill * len(actions)

    return [Case("reverse KL", loss, ReverseKL())]


def _ms_swift() -> list[Case]:
    # Its package imports far more than the loss, whose file needs nothing but torch.
    path = Path(str(distribution("ms-swift").locate_file("swift/rlhf_trainers/gkd_loss.py")))
    spec = importlib.util.spec_from_file_location("ms_swift_gkd_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def full(beta: float, log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        labels = actions[None]
        teacher = module.TeacherOutput(full_logits=log_p[None], labels=labels)
        total, _ = module.gkd_loss(log_q[None], teacher, labels, beta, temperature=1.0)
        return total

    def top_k(beta: float, log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        labels = actions[None]
        teacher = module.TeacherOutput(full_logits=log_p[None], labels=labels).to_topk(TOP_K)
        total, _ = module.gkd_loss(log_q[None], teacher, labels, beta, temperature=1.0)
        return total

    return [*_by_beta(full, ""), *_by_beta(top_k, f", top {TOP_K}")]


PEERS = (
    Peer("TRL GKD", ("trl",), _trl_gkd),
    Peer("TRL kernel", ("trl",), _trl_kernel),
    Peer("Liger", ("liger-kernel",), _liger),
    Peer("torchrl", ("torchrl", "tensordict"), _torchrl),
    Peer("ms-swift", ("ms-swift",), _ms_swift),
)


def measure_peers(
    contestants: Sequence[Peer] = PEERS, scenes: Sequence[Scene] | None = None
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows of every peer that could be measured, and the reason for each that could not."""
    found: dict[str, list[Row]] = {}
    skipped: dict[str, str] = {}
    for peer in contestants:
        try:
            rows = [
                measure(f"{peer.name} ({case.setting})", from_loss(case.loss), case.promise, False, scenes)
                for case in peer.load()
            ]
        except Exception as error:  # anything may be wrong with a foreign library: that is what is reported
            skipped[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            found[peer.name] = [replace(row, unbiased=row.bias <= BIAS) for row in rows]
    return found, skipped


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    found = {"python": sys.version.split()[0]}
    for name in ("opd", "torch", *(d for peer in PEERS for d in peer.distributions)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def last_line(found: dict[str, list[Row]], skipped: dict[str, str]) -> str:
    """How many peers were measured, and which of their rows miss what their name promises."""
    rows = [row for of_peer in found.values() for row in of_peer]
    strays = [f"{row.objective} {row.cosine:.3f}" for row in rows if row.cosine < COSINE]
    left_out = f" ({', '.join(skipped)} skipped)" if skipped else ""
    return (
        f"peer objectives: {len(found)} of {len(found) + len(skipped)} peers measured{left_out}, {len(rows)} rows; "
        f"cosine < {COSINE} to the promised gradient: {'; '.join(strays) or 'none'}"
    )


def run(path: Path, arguments: Sequence[str]) -> int:
    """Measure every peer, write the rows to `path` and print them below our own; always 0."""
    if not peers.present():
        peers.reexecute("benchmarks.objectives", list(arguments))
    torch.set_num_threads(1)
    found, skipped = measure_peers()
    rows = [row for of_peer in found.values() for row in of_peer]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_table(rows, path)
    table = json.loads(path.read_text())
    table |= {"command": "python -m benchmarks.objectives --peers", "versions": versions(), "skipped": skipped}
    path.write_text(json.dumps(table, indent=1) + "\n")
    promised = {row.descends for row in rows}
    ours = [row for row in load_table() if row.descends in promised and not row.objective.startswith("control")]
    show_objectives([*ours, *rows])
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")
    print(last_line(found, skipped), flush=True)
    return 0
