"""vLLM: both forms, native and in the format of speculators."""

from __future__ import annotations

import json

from opd.drafting.servers.base import Served, Server, dropped_layers, head_bias


class VLLM(Server):
    """Counts hidden states of all layers, the last among them."""

    def misreads(self, served: Served) -> str | None:
        return dropped_layers(served) or head_bias(served)

    def launch(self, served: Served) -> str:
        drafter = served.drafter
        method = "dflash" if drafter.parallel else "eagle3"
        told = {"method": method, "model": "STUDENT", "num_speculative_tokens": drafter.proposals}
        return f"vllm serve TARGET{served.dtype_option} --speculative-config '{json.dumps(told)}'"
