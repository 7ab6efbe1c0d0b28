"""OpenVLA-OFT's layout for common public checkpoints, so that `opd check` works without a network. It holds no
weights."""

from __future__ import annotations

from opd.acting.layout import Layout, Tower
from opd.acting.seeing import Statistics

OPENVLA_OFT = Layout(
    width=4096,
    layers=32,
    heads=32,
    feed_forward=11_008,
    vocabulary=32_064,
    words=32_000,
    chunk=8,
    dimensions=7,
    bins=256,
    cameras=1,
    pixels=224,
    patch=14,
    towers=(
        Tower("dinov2", width=1024, layers=24, heads=16, feed_forward=4096),
        Tower("siglip", width=1152, layers=27, heads=16, feed_forward=4304),
    ),
)
"""Of LIBERO with one camera and without proprioception, as the paper's teacher reads it: Llama 2 of 7 billion
parameters behind DINOv2 and SigLIP."""

KNOWN: dict[str, Layout] = {
    "openvla/openvla-7b": OPENVLA_OFT,
    **{f"Haozhan72/Openvla-oft-SFT-libero-{suite}-traj1": OPENVLA_OFT for suite in ("spatial", "object", "goal", "10")},
    **{f"Haozhan72/openvla-oft-libero-{suite}-traj1-rl": OPENVLA_OFT for suite in ("spatial", "object", "goal", "10")},
}


def statistics_of_known(key: str) -> Statistics:
    """A stand-in of the right size: the numbers themselves lie beside the weights."""
    dimensions = OPENVLA_OFT.dimensions
    # The gripper's is not scaled.
    return Statistics(key, (-1.0,) * dimensions, (1.0,) * dimensions, (True,) * (dimensions - 1) + (False,))
