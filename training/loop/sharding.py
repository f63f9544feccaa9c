"""Several processes: who this one is, the parameters sharded over all, and activations recomputed to save memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindomni_rt.model.block import Block

from ..stages.base import Stage


def world() -> tuple[int, int]:
    """(rank, processes) as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_processes(device: torch.device) -> None:
    """Joins the process group that torchrun describes; nothing on one process."""
    if world()[1] > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shard(stage: Stage, bf16: bool) -> None:
    """Shards a stage over all processes, one unit a block; in bf16 the gradients are still summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(stage.contexts.device.type, (world()[1],))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for module in reversed(list(stage.model.modules())):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(module, "keys_values")  # the prefix pass calls it
    # The rest stays gathered between forwards: embeddings and norms are used many times a step.
    fully_shard(stage, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def recompute_blocks(stage: Stage) -> None:
    """Blocks keep only their input for the backward pass and run forward again there."""
    from torch.utils.checkpoint import checkpoint

    def again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(*arguments)
            out: Tensor = checkpoint(forward, *arguments, use_reentrant=False)
            return out

        return run

    for module in stage.model.modules():
        if isinstance(module, Block):
            module.forward = again(module.forward)  # type: ignore[method-assign]
