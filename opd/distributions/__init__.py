"""What a policy or a teacher believes at each state: the one currency that every axis trades in."""

from opd.distributions.aligned import Aligned, Common, Listed, Told, compared_in, spans_in
from opd.distributions.base import Distribution
from opd.distributions.categorical import Categorical, Head
from opd.distributions.gaussian import Gaussian
from opd.distributions.routed import Routed, joined
from opd.distributions.sampled import Sampled
from opd.distributions.spans import Spans
from opd.distributions.target import Target, joined_targets
from opd.distributions.top_k import TopK, append_tail
from opd.distributions.vocabulary import EVERY_ID, Vocabulary

__all__ = [
    "EVERY_ID",
    "Aligned",
    "Categorical",
    "Common",
    "Distribution",
    "Gaussian",
    "Head",
    "Listed",
    "Routed",
    "Sampled",
    "Spans",
    "Target",
    "Told",
    "TopK",
    "Vocabulary",
    "append_tail",
    "compared_in",
    "joined",
    "joined_targets",
    "spans_in",
]
