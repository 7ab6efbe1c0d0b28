"""Which way the student moves: comparisons of two distributions at one state, whose chunks the operator computes."""

from opd.distributions import Target
from opd.divergences.base import CategoricalDivergence, Divergence
from opd.divergences.forward_kl import ForwardKL
from opd.divergences.jensen_shannon import JensenShannon
from opd.divergences.mixture import Mixture
from opd.divergences.on_action import OnAction
from opd.divergences.on_support import OnSupport
from opd.divergences.reverse_kl import ReverseKL
from opd.divergences.reverse_kl_sampled import ReverseKLSampled
from opd.divergences.statistics import Comparison, compare
from opd.operator import Loss, divergence_loss

__all__ = [
    "CategoricalDivergence",
    "Comparison",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "Loss",
    "Mixture",
    "OnAction",
    "OnSupport",
    "ReverseKL",
    "ReverseKLSampled",
    "Target",
    "compare",
    "divergence_loss",
]
