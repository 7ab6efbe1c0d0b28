"""The format of the library speculators, which vLLM serves alone: the folder names the target itself."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from opd.drafting.base import Drafter
from opd.drafting.block import BlockDrafter
from opd.drafting.chain import ChainDrafter
from opd.drafting.formats.base import Format, Made
from opd.errors import ModelError

LAYER = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "layer_types",
    "sliding_window",
)
"""What the native config says of the layers, and this format under `transformer_layer_config`. vLLM takes no default of
the named family for what is left out there."""


class Speculators(Format):
    """Config and weights in one folder with the target's embedding and head, and ids of layers that count as
    transformers does its hidden states: one more than the layer whose output is meant."""

    library: ClassVar[str] = "speculators"
    servers: ClassVar[tuple[str, ...]] = ("vllm",)

    def weights(self, of: Made) -> dict[str, torch.Tensor]:
        """Those of the drafter, its layers in a list; copies of the target's in the target's dtype; and the maps of ids
        where only some may be proposed."""
        drafter = of.drafter
        own = {_renamed(name): value for name, value in drafter.state_dict().items()}
        own |= {"embed_tokens.weight": of.embedding} | (drafter.extras() if drafter.ids is not None else {})
        # A file holds no two tensors that share their storage, as the target's may.
        return own if drafter.own_head() is not None else own | {"lm_head.weight": of.head.clone()}

    def config(self, of: Made) -> dict[str, Any]:
        drafter, native = of.drafter, of.drafter.config()
        if isinstance(drafter, ChainDrafter):
            algorithm, own = "eagle3", self._chain(drafter)
        elif isinstance(drafter, BlockDrafter):
            algorithm, own = "dflash", self._block(drafter)
        else:
            raise self.no_place(of, "leave --as out, which writes its native format")
        layer: dict[str, Any] = {name: native[name] for name in LAYER if name in native}
        layer |= {"mlp_bias": False, "num_aux_hidden_states": len(drafter.taps)}
        dtype = str(next(drafter.parameters()).dtype).removeprefix("torch.")
        _check_named(of)
        proposing = {"proposal_type": "greedy", "speculative_tokens": drafter.proposals}
        return own | {
            "speculators_model_type": algorithm,
            "transformer_layer_config": layer,
            "draft_vocab_size": native["vocab_size"] if drafter.ids is None else len(drafter.ids),
            "tie_word_embeddings": False,
            "dtype": dtype,
            "speculators_config": {
                "algorithm": algorithm,
                "proposal_methods": [proposing],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": of.target, "architectures": list(of.architectures)},
            },
        }

    def _chain(self, drafter: ChainDrafter) -> dict[str, Any]:
        return {
            "architectures": ["Eagle3Speculator"],
            "eagle_aux_hidden_state_layer_ids": _as_hidden_states(drafter),
            # vLLM takes the first for true where it is not said.
            "norm_before_residual": False,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
        }

    def _block(self, drafter: BlockDrafter) -> dict[str, Any]:
        return {
            "architectures": ["DFlashSpeculator"],
            "aux_hidden_state_layer_ids": _as_hidden_states(drafter),
            "mask_token_id": drafter.mask_token,
            "block_size": drafter.proposals + 1,
            "sample_from_anchor": False,
            # It is about layers with a window, and here are none; but where it is false vLLM makes every layer causal.
            "sliding_window_non_causal": True,
        }


def _check_named(of: Made) -> None:
    """Raise `ModelError` for a target that cannot be named as others load it."""
    said = "--as speculators names the target for those who load it, and student.target."
    if of.target.startswith("package:") or of.target.endswith(".gguf"):
        raise ModelError(
            f"{said}model is {of.target!r}, which they do not load; save it as a folder of transformers, and train "
            "with that as student.target.model, or leave --as out"
        )
    if of.revision is not None:
        raise ModelError(
            f"{said}revision {of.revision!r} has no place there; download it into a folder, and train with that as "
            "student.target.model, or leave --as out"
        )


def _as_hidden_states(drafter: Drafter) -> list[int]:
    return [tap + 1 for tap in drafter.taps]


def _renamed(name: str) -> str:
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
