"""`generate` of transformers: block drafters, one text at a time."""

from __future__ import annotations

from opd.drafting.servers.base import Served, Server, dropped_layers, last_tap


class Transformers(Server):
    """Hands over hidden states as its models return them, the last behind the final norm, and embeds mask tokens by the
    target's whole embedding."""

    def misreads(self, served: Served) -> str | None:
        if not served.drafter.parallel:
            return (
                "student.drafter is a chain, and generate() drafts blocks alone; take student.drafter block, or serve "
                "the chain by vllm or sglang"
            )
        if not served.plain_embedding:
            name = type(served.target.get_input_embeddings()).__name__
            return (
                f"the target's embedding is {name}, which changes its rows, and a drafter is trained on the rows as "
                "they are; serve it by vllm or sglang"
            )
        return dropped_layers(served) or last_tap(served, "which generate() hands over behind the final norm")

    def launch(self, served: Served) -> str:
        return 'opd export RUN FOLDER --as transformers, then generate(assistant_model=..., speculation_type="dflash")'
