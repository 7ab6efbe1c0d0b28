"""SGLang: both forms in their native formats."""

from __future__ import annotations

from opd.drafting.servers.base import Served, Server, dropped_layers, head_bias, last_tap


class SGLang(Server):
    """Takes what stands before a layer, so that nothing is taken behind the last; slots of a block are counted with the
    anchor's."""

    def misreads(self, served: Served) -> str | None:
        return (
            dropped_layers(served)
            or head_bias(served)
            or last_tap(served, "and sglang takes hidden states before layers, none behind the last")
        )

    def launch(self, served: Served) -> str:
        drafter = served.drafter
        told = f"sglang serve --model-path TARGET{served.dtype_option} --speculative-draft-model-path STUDENT "
        told += "--speculative-algorithm "
        slots = f"--speculative-num-draft-tokens {drafter.proposals + 1}"
        if drafter.parallel:
            return f"{told}DFLASH {slots}"
        return f"{told}EAGLE3 --speculative-num-steps {drafter.proposals} --speculative-eagle-topk 1 {slots}"
