"""What every objective descends, by exact enumeration; `python -m benchmarks.objectives` writes the shipped table.

Goal: cosine of at least 0.999 to the promised gradient, and a bias under 1e-3, for every objective that promises no
bias. Below the table stand controls: losses found in use elsewhere whose gradient is not what their name says.
`--peers` measures the loss functions of other libraries instead, in their own environment.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import peer_objectives
from benchmarks.enumerated import BIAS, COSINE, from_loss
from opd.cli.display import show_objectives
from opd.divergences import ForwardKL, ReverseKL
from opd.truth_table import Row, measure, measure_all, save_table


def _taken(log_probs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(-1, actions[:, None]).squeeze(-1)


def k1_direct(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return _taken(log_q, actions) - _taken(log_p, actions)


def k2_direct(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return 0.5 * (_taken(log_q, actions) - _taken(log_p, actions)) ** 2


def k3_direct(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    ratio = _taken(log_p, actions) - _taken(log_q, actions)
    return ratio.exp() - 1 - ratio


def top_k_renormalised(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    ids = log_p.topk(4, -1).indices
    p, q = log_p.gather(-1, ids).log_softmax(-1), log_q.gather(-1, ids).log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def top_k_truncated(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    ids = log_p.topk(4, -1).indices
    p, q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    return (q.exp() * (q - p)).sum(-1)


def detached_kl_as_reward(log_p: torch.Tensor, log_q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).detach()
    return kl * _taken(log_q, actions)


CONTROLS = {
    "control: k1 differentiated": (k1_direct, ReverseKL()),
    "control: k2 differentiated": (k2_direct, ReverseKL()),
    "control: k3 differentiated, named reverse KL": (k3_direct, ReverseKL()),
    "control: k3 differentiated, seen as forward KL": (k3_direct, ForwardKL()),
    "control: reverse KL, top 4 of both sides renormalised": (top_k_renormalised, ReverseKL()),
    "control: reverse KL, top 4, the rest dropped": (top_k_truncated, ReverseKL()),
    "control: detached state KL as the reward": (detached_kl_as_reward, ReverseKL()),
}


def measure_controls() -> list[Row]:
    rows = [measure(name, from_loss(loss), promise, False) for name, (loss, promise) in CONTROLS.items()]
    return [replace(row, unbiased=row.bias <= BIAS) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table there instead of to its usual place")
    parser.add_argument("--peers", action="store_true", help="measure other libraries' loss functions instead")
    arguments = parser.parse_args()
    if arguments.peers:
        return peer_objectives.run(arguments.json or peer_objectives.TABLE, sys.argv[1:])
    rows = measure_all()
    table = [*rows, *measure_controls()]
    save_table(table, *([arguments.json] if arguments.json else []))
    show_objectives(table)
    promised = [row for row in rows if row.unbiased]
    cosine, bias = min(r.cosine for r in promised), max(r.bias for r in promised)
    met = cosine >= COSINE and bias <= BIAS
    print(
        f"objectives: worst cosine {cosine:.6f} (goal >= {COSINE}), worst bias {bias:.1e} (goal <= {BIAS}) over "
        f"{len(promised)} unbiased objectives: {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
