"""Weights that several processes hold together: `accelerate`'s FSDP2, and the few places that need them whole.

`accelerate launch --use_fsdp` (or its environment variables) turns it on. Every decoder layer is a group of its own;
the embeddings, the final norm and the head are the root's, which stays gathered from the forward pass to the end of the
backward pass, so the loss operator finds the whole head. Rollouts and evaluations gather all weights for their time:
their number of forward passes differs from process to process, and a gather that one process leaves out hangs the rest.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from opd.errors import RunError

UNSUPPORTED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "set student.gradient_checkpointing=true in the recipe instead",
    "FSDP_OFFLOAD_PARAMS": "leave it off",
}


def plugin() -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as the launcher's environment asks for it, or None where it does not.

    Raises:
        RunError: it asks for FSDP 1 or for an option that is not supported.
    """
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise RunError(
            f"FSDP_VERSION is {os.environ.get('FSDP_VERSION', '1 (the default)')}; sharded training needs FSDP2: "
            "accelerate launch --use_fsdp --fsdp_version 2, or fsdp_version: 2 in its configuration"
        )
    for name, fix in UNSUPPORTED.items():
        if _is_set(name):
            raise RunError(f"{name} is on, and sharded training does not support it; {fix}")
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        # Else only the first process would read weights from the disk, the teachers' too, and nobody would send those.
        cpu_ram_efficient_loading=False,
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def settle(accelerator: Accelerator, wanted: FullyShardedDataParallelPlugin | None) -> None:
    """Have FSDP2 on CPUs too, and refuse what this loop cannot be trained with.

    `accelerate` takes the plugin up for accelerators only and would fall back to plain data parallelism without a word;
    its FSDP2 itself runs over gloo as it is.
    """
    if wanted is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if accelerator.mixed_precision != "no":
            wanted.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = wanted
        PartialState().distributed_type = DistributedType.FSDP
    kind = accelerator.distributed_type
    if not (kind == DistributedType.NO or kind.value.startswith("MULTI_") or accelerator.is_fsdp2):
        raise RunError(f"training with {kind.value} is not supported; take plain data parallelism or FSDP2")


def skeleton(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters take no memory: what `fill` makes whole again."""
    empty = {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(empty))


def settle_root(module: torch.nn.Module) -> None:
    """Make `module` the root of its groups. The first one that runs forward would be it, and a rollout starts below."""
    module._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def fill(bones: torch.nn.Module, sharded: torch.nn.Module, here: bool) -> torch.nn.Module | None:
    """The `skeleton` with the weights of its sharded self, on the CPU, where `here`; all processes must call."""
    names = {id(p): name for name, p in bones.named_parameters()}
    weights = {}
    for name, parameter in sharded.named_parameters():
        whole_one = full(parameter.detach())
        if here:
            weights[name] = torch.nn.Parameter(whole_one.cpu(), parameter.requires_grad)
    if not here:
        return None
    for part in bones.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, weights[names[id(parameter)]])
    return bones.cpu()


@contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """All weights of a sharded `module` in every process: forward passes inside need no other process.

    For passes without a gradient, between steps. Weights are in the dtype that FSDP computes in. All processes must
    enter; inside another such block, and for a module that is not sharded, this does nothing.
    """
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        yield
        return
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        after_forward = bool(AcceleratorState().fsdp_plugin.reshard_after_forward)
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(after_forward and part is not module, recurse=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, in every process, and all must ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tree: object, here: bool) -> object:
    """Nested dicts, lists and tuples with every sharded tensor whole on the CPU where `here`, elsewhere None."""
    if isinstance(tree, DTensor):
        tensor = full(tree.detach())
        return tensor.cpu() if here else None
    if isinstance(tree, dict):
        return {key: gathered(value, here) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, here) for value in tree)
    return tree


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole `tensor`, the same in every process, cut as `model` is where that is sharded."""
    if not isinstance(model, DTensor) or isinstance(tensor, DTensor):
        return tensor
    local = tensor.to(model.device)
    return distribute_tensor(local, model.device_mesh, model.placements, src_data_rank=None)
