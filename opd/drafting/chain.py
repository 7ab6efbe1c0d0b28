"""Chain drafting: one decoder layer whose own output takes the place of the target's features, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch.nn import Linear, RMSNorm

from opd.distributions import Head
from opd.drafting.base import Choose, Drafter, DrafterSettings, Embed, Follow, Outline, Pair, check_taps
from opd.drafting.layers import FeedForward, in_heads, of_blocks, rotate
from opd.drafting.structure import check_structure
from opd.drafting.vocabulary import Frequent
from opd.errors import ModelError


class Chain(DrafterSettings):
    """EAGLE-3: features of three layers of the target are fused, and one layer over `[embedding, feature]` proposes one
    token after the other, each time reading its own last output as the next feature (arXiv 2503.01840)."""

    kind: Literal["chain"] = "chain"
    architecture: ClassVar[str] = "LlamaForCausalLMEagle3"
    taps: list[int] = Field(
        [], description="0-based layers of the target whose outputs it reads; default 1, n/2 - 1 and n - 4 of n"
    )
    proposals: int = Field(7, ge=1, le=64, description="Tokens of a block")
    vocabulary: list[int] | Frequent = Field(
        [], description="The ids that it may propose, or how many of the most frequent; default all of the target's"
    )
    mlp: int | None = Field(None, ge=1, description="Width within its feed-forward part; default the target's")

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _ids_or_their_number(cls, value: object) -> object:
        if isinstance(value, Frequent):
            return value
        ids = isinstance(value, list | tuple) and all(type(i) is int for i in value)
        if not ids and not (isinstance(value, dict) and set(value) == {"size", "store"}):
            raise ValueError(
                "give the ids, ascending ([3, 4, 9]), or {size: 32000, store: FOLDER}, so many of a store's most "
                "frequent; leave it out for all of the target's"
            )
        return value

    @field_validator("vocabulary")
    @classmethod
    def _ids(cls, value: list[int] | Frequent) -> list[int] | Frequent:
        if isinstance(value, list) and value and (value[0] < 0 or value != sorted(set(value))):
            raise ValueError("give ids ascending, each once, none negative")
        return value

    def settled(self, target: Outline) -> Self:
        if isinstance(self.vocabulary, list):
            return self
        return self.model_copy(update={"vocabulary": self.vocabulary.ids(target.vocabulary)})

    def build(self, target: Outline, head: Head) -> ChainDrafter:
        taps = check_taps(self.taps, target, _default_taps(target))
        ids = self.settled(target).vocabulary
        assert isinstance(ids, list)
        if ids and ids[-1] >= target.vocabulary:
            raise ModelError(
                f"student.drafter.vocabulary names {ids[-1]}, and the target's ids end at {target.vocabulary - 1}"
            )
        if len(ids) == 1 and target.vocabulary > 1:
            raise ModelError(
                "student.drafter.vocabulary is one id: drafter and target are compared over what may be proposed, and "
                "over one id there is nothing to learn; take two or more"
            )
        # A list of all ids is none: servers want no maps then.
        proposed = tuple(ids) if 0 < len(ids) < target.vocabulary else None
        return ChainDrafter(target, taps, self.proposals, proposed, self.mlp or target.mlp, head)

    @classmethod
    def of_config(cls, config: dict[str, Any], weights: Mapping[str, torch.Tensor], target: Outline) -> Chain:
        if config.get("hidden_size") != target.width or config.get("vocab_size") != target.vocabulary:
            raise ModelError(
                f"the drafter is for a target of width {config.get('hidden_size')} with {config.get('vocab_size')} "
                f"ids, and this target has width {target.width} and {target.vocabulary} ids"
            )
        check_structure(config, target)
        layers = config.get("opd_target_layers", target.layers)
        if layers != target.layers:
            raise ModelError(f"the drafter is for a target of {layers} layers, and this target has {target.layers}")
        outputs = config.get("eagle_aux_hidden_state_layer_ids")
        return cls(
            # The format counts as transformers does its hidden states, of which the first is the embedding.
            taps=[i - 1 for i in outputs] if outputs else list(_default_taps(target)),
            proposals=int(config.get("opd_proposals", 7)),
            vocabulary=_proposed(weights),
            mlp=config["intermediate_size"],
        )


def _proposed(weights: Mapping[str, torch.Tensor]) -> list[int]:
    """The ids that a saved drafter may propose; empty for all."""
    which = weights.get("t2d")
    return [] if which is None or bool(which.all()) else which.nonzero().flatten().tolist()


def _default_taps(target: Outline) -> tuple[int, ...]:
    return (1, target.layers // 2 - 1, target.layers - 4)


class _Attention(torch.nn.Module):
    def __init__(self, target: Outline):
        super().__init__()
        both, d = 2 * target.width, target.head_dim
        self.q_proj = Linear(both, target.heads * d, bias=False)
        self.k_proj = Linear(both, target.key_heads * d, bias=False)
        self.v_proj = Linear(both, target.key_heads * d, bias=False)
        self.o_proj = Linear(target.heads * d, target.width, bias=False)


class _Layer(torch.nn.Module):
    def __init__(self, target: Outline, mlp: int):
        super().__init__()
        self.input_layernorm = RMSNorm(target.width, target.eps)
        self.hidden_norm = RMSNorm(target.width, target.eps)
        self.self_attn = _Attention(target)
        self.post_attention_layernorm = RMSNorm(target.width, target.eps)
        self.mlp = FeedForward(target.width, mlp)


class ChainDrafter(Drafter):
    """The built form. Its head is its own and begins as the target's; the embedding is the target's.

    Row t of its layer holds the feature of position t and the embedding of the token at t + 1, and predicts the token
    at t + 2; so the row before an anchor proposes slot 1. Behind it the rows hold proposed tokens and the layer's own
    outputs, which see all that stands and the rows of their own block.
    """

    ships_embedding: ClassVar[bool] = True

    def __init__(
        self, target: Outline, taps: tuple[int, ...], proposals: int, ids: tuple[int, ...] | None, mlp: int, head: Head
    ):
        super().__init__()
        self.target, self.taps, self.proposals, self.ids = target, taps, proposals, ids
        self.fc = Linear(len(taps) * target.width, target.width, bias=False)
        self.midlayer = _Layer(target, mlp)
        self.norm = RMSNorm(target.width, target.eps)
        rows = head.weight.detach() if ids is None else head.weight.detach()[list(ids)]
        self.lm_head = Linear(target.width, len(rows), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(rows * head.scale)

    def own_head(self) -> torch.Tensor:
        return self.lm_head.weight

    def read(
        self, features: torch.Tensor, following: torch.Tensor, positions: torch.Tensor, embed: Embed
    ) -> list[Pair]:
        return [self._keys_and_values(self._inputs(embed(following), self.fc(features)), positions)]

    def propose(
        self,
        kept: Sequence[Pair],
        before: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        proposals: int,
        follow: Follow,
        embed: Embed,
    ) -> torch.Tensor:
        feature, own, found = self.fc(before), self._nothing(kept, anchors), []
        for k in range(1, proposals + 1):
            feature, own = self._row(k, kept, feature, own, embed(tokens), anchors)
            found.append(self.norm(feature))
            tokens = follow(k, found[-1])
        return torch.stack(found, 2)

    def branch(
        self,
        kept: Sequence[Pair],
        before: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        proposals: int,
        choose: Choose,
        embed: Embed,
    ) -> None:
        feature, own = self.fc(before), self._nothing(kept, anchors)
        for k in range(1, proposals + 1):
            lines = anchors.expand(-1, tokens.shape[1])
            feature, own = self._row(k, kept, feature, own, embed(tokens), lines)
            tokens, origins = choose(k, self.norm(feature))
            # Each line takes along the rows of that on which it stands.
            rows = torch.arange(len(origins), device=origins.device)[:, None]
            feature = feature[rows, origins]
            keys, values = (each.transpose(1, 2)[rows, origins].transpose(1, 2) for each in own)
            own = (keys, values)

    def _nothing(self, kept: Sequence[Pair], anchors: torch.Tensor) -> Pair:
        """Keys and values `[B, key heads, M, 0, d]` of blocks without a row of their own."""
        ((keys, _),) = kept
        made = keys.new_zeros(len(keys), keys.shape[1], anchors.shape[1], 0, self.target.head_dim)
        return made, made

    def _row(
        self,
        k: int,
        kept: Sequence[Pair],
        feature: torch.Tensor,
        own: Pair,
        embedded: torch.Tensor,
        anchors: torch.Tensor,
    ) -> tuple[torch.Tensor, Pair]:
        """The layer's output `[B, M, D]` that proposes slot k of M blocks, and the keys and values of all rows of each
        block so far.

        Args:
            feature: `[B, M, D]`, of the row: fused from the target at slot 1, then the output before.
            own: `[B, key heads, M, k - 2, d]`, of the rows before; of none at slots 1 and 2.
            embedded: `[B, M, D]`, the token before the slot.
        """
        (stands,), attention, width = kept, self.midlayer.self_attn, self.target
        position = anchors + (k - 2)
        inputs = self._inputs(embedded, feature)
        if k > 1:  # the row of slot 1 stands: it is among those before the anchor
            new = self._keys_and_values(inputs, position)
            own = (torch.cat([own[0], new[0][:, :, :, None]], 3), torch.cat([own[1], new[1][:, :, :, None]], 3))
        query = rotate(in_heads(attention.q_proj(inputs), width.heads), position, width.theta)
        mixed = of_blocks(query[:, :, :, None], stands, own, anchors)
        feature = feature + attention.o_proj(mixed[:, :, 0])
        return feature + self.midlayer.mlp(self.midlayer.post_attention_layernorm(feature)), own

    def _inputs(self, embedded: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embedded.to(feature.dtype)), layer.hidden_norm(feature)], -1)

    def _keys_and_values(self, inputs: torch.Tensor, positions: torch.Tensor) -> Pair:
        attention, heads = self.midlayer.self_attn, self.target.key_heads
        keys = rotate(in_heads(attention.k_proj(inputs), heads), positions, self.target.theta)
        return keys, in_heads(attention.v_proj(inputs), heads)

    def config(self) -> dict[str, Any]:
        target = self.target
        made = {
            "architectures": [Chain.architecture],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": target.width,
            "intermediate_size": self.midlayer.mlp.up_proj.out_features,
            "num_attention_heads": target.heads,
            "num_key_value_heads": target.key_heads,
            "head_dim": target.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": target.eps,
            "rope_theta": target.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": target.theta},
            "max_position_embeddings": target.positions,
            "vocab_size": target.vocabulary,
            "draft_vocab_size": self.lm_head.out_features,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "norm_before_residual": False,
            "opd_proposals": self.proposals,
            # Servers do not ask; the default taps would be other layers of another target.
            "opd_target_layers": target.layers,
        }
        if self.taps != _default_taps(target):
            # Servers take the default by themselves, and do not count alike: vLLM reads the first and counts hidden
            # states, of which the embedding is one; SGLang reads the second and counts layers.
            made["eagle_aux_hidden_state_layer_ids"] = [tap + 1 for tap in self.taps]
            made["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": list(self.taps),
                "use_aux_hidden_state": True,
            }
            made["num_aux_hidden_states"] = len(self.taps)
        return made

    def extras(self) -> dict[str, torch.Tensor]:
        """`t2d` bool `[V]`, which ids it may propose; `d2t` int64 `[V_d]`, what the place of one in its head lacks to
        be the target's id. Nothing where it may propose all: vLLM refuses the maps then."""
        if self.ids is None:
            return {}
        ids = torch.tensor(self.ids)
        t2d = torch.zeros(self.target.vocabulary, dtype=torch.bool)
        t2d[ids] = True
        return {"t2d": t2d, "d2t": ids - torch.arange(len(ids))}
