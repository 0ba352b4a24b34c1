"""A model that does not fit one GPU: its weights, gradients and optimizer state in shards, one a process (FSDP2).

By default every process holds the whole model, and gradients are summed once an update (`lib.run.processes`). With
`--shard` each keeps 1/N of it; PyTorch's `fully_shard` gathers a layer when it is about to compute, and lets go
of it afterwards. Two things need care:

- **Sampling.** A decoding step computes little, so gathering every layer for every token would cost far more
  than the step; and processes decode for different numbers of steps, while gathering needs all of them at the
  same time. So the whole model is gathered once for all rollouts (`gathered`), and let go before the update. In
  that phase a GPU holds all weights and the key-value cache, but no activations: see `--dry-run` for which is more.
- **Uneven work.** Every pass gathers, so all processes need equally many: see `lib.run.shards.even_rounds`.

What is saved is the same with and without shards, so a run may go on with another number of processes. In fp32 the
gathered weights are those of the whole model to the bit, and so is what a process samples from them. What the number of
processes changes, with shards or without, is rounding: rows are computed beside fewer others, and gradients are summed in
another order. A draw that falls on the edge between two tokens then goes to the other one, and from there on two runs are
two samples of the same training. (Sandbox, same weights: 4 of 15,360 completions differed, of 365,000 tokens.)
In bfloat16 a sharded model computes in bfloat16 throughout, where autocast keeps the sums between layers in fp32.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from lib import UserError
from lib.run.processes import Processes, gather_objects, lost_process, sum_gradients

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
LOST = "gloo", "NCCL", "Connection"  # in the texts of errors that come of a dead process


def check_shards(shard: bool, offload: bool, processes: Processes) -> None:
    """What two settings may be. Raises UserError."""
    if shard and processes.size == 1:
        raise UserError(
            "--shard: there is one process; start several with torchrun --nproc-per-node N, or leave it out"
        )
    if offload and not shard:
        raise UserError("--offload: moves shards, so it needs --shard")


def shard(
    model: PreTrainedModel, device: torch.device, processes: Processes, *, dtype: str, offload: bool
) -> PreTrainedModel:
    """Keep this process's part of a model that was loaded on the CPU, each decoder layer a unit, in place.

    dtype "bfloat16": the shards stay as they are, what is gathered is bfloat16, gradients are summed in fp32.
    `offload`: shards, gradients and optimizer state stay in the CPU's memory. Raises UserError for a model whose layers
    are not where Llama, Qwen, Mistral and Gemma have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UserError(
            f"--shard: {type(model).__name__} has no decoder.layers; allowed models built like Llama or Qwen"
        )
    half: dict[str, Any] = (
        {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if dtype == "bfloat16" else {}
    )
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (processes.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half), offload_policy=place)
    outer = MixedPrecisionPolicy(**half, output_dtype=torch.float32 if half else None)
    frozen = not any(p.requires_grad for p in model.parameters())  # no backward pass would let go of its ends
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=outer,
        offload_policy=place,
        reshard_after_forward=True if frozen else None,
    )
    model.compute_device = device  # type: ignore[assignment]
    model.within_forward = types.MethodType(_within_forward, model)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "within_forward")
    gathering = model.within_forward

    def within_forward(function, *args):  # what `lib.policy.token_logprobs` calls
        with lost_process(*LOST):
            return gathering(function, *args)  # type: ignore[operator]

    model.within_forward = within_forward  # type: ignore[assignment]
    return model


def device_of(model: PreTrainedModel) -> torch.device:
    """Where it computes: with `offload`, not where its weights are."""
    return getattr(model, "compute_device", model.device)


def _within_forward(model: PreTrainedModel, function, *args, **kwargs):
    """`function(model, ...)` as if it were the model's forward pass: with the weights that no layer has, gathered."""
    return function(model, *args, **kwargs)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def backward(loss: torch.Tensor, model: torch.nn.Module, processes: Processes) -> None:
    """Add the gradient of a loss whose sum over all processes is meant. (Shards get the mean, hence the factor.)"""
    with lost_process(*LOST):
        (loss * processes.size if is_sharded(model) else loss).backward()


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """All weights on every process while this lasts, so that each may compute as often as it likes, without the others."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with lost_process(*LOST):
        for unit in units:
            unit.set_reshard_after_forward(False)
            unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # as in `shard`: the backward pass begins with the root, so a trained one is kept until then
            unit.set_reshard_after_forward(
                unit is not model or not any(p.requires_grad for p in model.parameters())
            )


def sum_and_clip(model: torch.nn.Module, limit: float, processes: Processes) -> float:
    """The gradients of all processes, summed (those of shards are already) and clipped to the L2 norm `limit`, all of them
    together; 0: not clipped. The norm before."""
    if not is_sharded(model):
        sum_gradients(model, processes)
    with lost_process(*LOST):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def full_weights(model: torch.nn.Module) -> dict[str, Any]:
    """All weights by name, on the CPU, for rank 0; for others nothing. All ranks have to call it.

    Tied weights stand under one name only.
    """
    with lost_process(*LOST):
        weights = get_model_state_dict(model, options=FULL)
    tied = getattr(model, "all_tied_weights_keys", {})  # name -> the name under which it is kept
    return {name: value for name, value in weights.items() if name not in tied}


def full_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Likewise the optimizer's state, by the names of the weights."""
    with lost_process(*LOST):
        return get_optimizer_state_dict(model, optimizer, options=FULL)


def set_weights(model: torch.nn.Module, weights: dict[str, Any], processes: Processes) -> None:
    """Put back what `full_weights` gave, from rank 0; others bring nothing."""
    with lost_process(*LOST):
        set_model_state_dict(model, weights, options=_from_rank_0(processes))


def set_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], processes: Processes
) -> None:
    """Put back what `full_optimizer` gave, likewise."""
    with lost_process(*LOST):
        set_optimizer_state_dict(model, optimizer, state, options=_from_rank_0(processes))


def _from_rank_0(processes: Processes) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=processes.size > 1, strict=False)


def even_rounds(batches: list[list[int]], model: torch.nn.Module, processes: Processes) -> list[list[int]]:
    """Micro-batches, with empty ones behind where a sharded model needs equally many on all processes."""
    rounds = max(gather_objects(len(batches), processes)) if is_sharded(model) else len(batches)
    return batches + [[]] * (rounds - len(batches))
