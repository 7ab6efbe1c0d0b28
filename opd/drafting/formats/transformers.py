"""The format of transformers' own block drafters: `AutoModel` loads it, `generate` takes it as `assistant_model`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from opd.drafting.block import BlockDrafter
from opd.drafting.formats.base import Format, Made

FROM_TARGET = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
"""Where the model of transformers has what reads the target's features."""


class Assistant(Format):
    """A block drafter as transformers' `MuseGlimmerAssistantModel`, whose layers are the same;
    `generate(assistant_model=..., speculation_type="dflash")` asks it with the target's features, and uses the target's
    embedding and head. Its weights have the target's dtype, since they meet the target's numbers as they are."""

    library: ClassVar[str] = "transformers"
    servers: ClassVar[tuple[str, ...]] = ("transformers",)

    def weights(self, of: Made) -> dict[str, torch.Tensor]:
        return {_renamed(name): value.to(of.head.dtype) for name, value in of.drafter.state_dict().items()}

    def config(self, of: Made) -> dict[str, Any]:
        drafter = of.drafter
        if not isinstance(drafter, BlockDrafter):
            raise self.no_place(of, "transformers drafts blocks alone; take --as speculators, or leave --as out")
        native = drafter.config()
        kept = {name: value for name, value in native.items() if name not in ("dflash_config", "num_target_layers")}
        kept |= {"architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant"}
        return kept | {
            "block_size": drafter.proposals + 1,
            "mask_token_id": drafter.mask_token,
            "target_layer_ids": list(drafter.taps),
            # Of no layer here; the masks are made for all kinds of layers.
            "sliding_window": native["max_position_embeddings"],
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": str(of.head.dtype).removeprefix("torch."),
        }


def _renamed(name: str) -> str:
    for ours, theirs in FROM_TARGET.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
