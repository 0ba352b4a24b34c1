"""Several GPUs: a process on each, started by torchrun, that holds the model, or a shard of it (FSDP2).

Shards are weights, gradients and optimizer state in parts, for a model that does not fit one GPU. PyTorch's
`fully_shard` gathers a layer when it is about to compute, and lets go of it afterwards. To do so for every
token would cost far more than to decode it, and processes decode for different numbers of steps: so the whole
model is gathered once for all rollouts (`gathered`), and let go before the update. Every pass gathers, so all
processes need equally many: see `Run.rounds`.

In fp32 the gathered weights are those of the whole model to the bit, and so is what a process samples. What
the number of processes changes, with shards or without, is rounding: a draw on the edge between two tokens
then goes to the other one, and from there on two runs are two samples of the same training. In bfloat16 a
sharded model computes in bfloat16 throughout, where autocast keeps the sums between layers in fp32.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from lib import UserError

FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def pick_device(name: str | torch.device, local_rank: int = 0) -> torch.device:
    """auto: a CUDA GPU (number `local_rank`), else mps, else cpu. UserError if there is no such GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if local_rank >= (found := torch.cuda.device_count()):
        instead = "use --device cpu, or start no more processes than GPUs"
        raise UserError(f"--device cuda: {found} GPUs found, process {local_rank} has none: {instead}")
    # cuDNN's attention makes a plan for each new length, tens of ms a token, and may be wrong (pytorch
    # #193893, #196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # caches of ever other sizes would leave holes in memory
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return torch.device("cuda", local_rank)


def start_processes(settings: Any, waits: bool = False) -> tuple[int, int, int]:
    """Join the processes of this run (torchrun's environment): (rank, size, rank on this machine).

    gloo on cpu, nccl on cuda (and gloo for what lies in the CPU's memory there). A process that waits for
    another for two hours gives up; with `waits`, as in stage 4, where one may search alone, after a week. So
    does one that notices that another has died: gloo by an error (`run_main` makes it one line), nccl by its
    watchdog, which aborts the process.
    """
    rank, size, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    size = max(1, size)
    if getattr(settings, "shard", False) and size == 1:
        several = "start several with torchrun --nproc-per-node N, or leave it out"
        raise UserError(f"--shard: there is one process; {several}")
    if getattr(settings, "offload", False) and not settings.shard:
        raise UserError("--offload: moves shards, so it needs --shard")
    if size > (prompts := getattr(settings, "prompts_per_step", size)):
        raise UserError(f"--prompts-per-step {prompts}: fewer than the {size} processes")
    if size > 1:
        backend = "gloo"
        if pick_device(settings.device, local_rank).type == "cuda":
            torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=7 * 24 if waits else 2))
        atexit.register(leave_on_error)
    return rank, size, local_rank


def stop_processes() -> None:
    """Leave the group that `start_processes` joined, if any. With nccl all must: they wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_on_error() -> None:
    """At the exit of a process that is still in the group, by an error: the others must hear of it."""
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # destroy_process_group would wait for the others, which wait for this process
    stop_processes()  # gloo's threads abort an interpreter that exits while they run


# ---- shards -----------------------------------------------------------------------------------------------


def shard_model(model: PreTrainedModel, device: torch.device, size: int, dtype: str, offload: bool) -> None:
    """Keep this process's part, of `size`, of a model that was loaded on the CPU, each decoder layer a unit.

    dtype "bfloat16": the shards stay as they are, what is gathered is bfloat16, gradients are summed in fp32.
    `offload`: shards, gradients and optimizer state stay in the CPU's memory. Raises UserError for a model
    whose layers are not where Llama, Qwen, Mistral and Gemma have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        name = type(model).__name__
        raise UserError(f"--shard: {name} has no decoder.layers; allowed models built like Llama or Qwen")
    half: dict[str, Any] = {}
    if dtype == "bfloat16":
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    place = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else fsdp.OffloadPolicy()
    how: dict[str, Any] = {"mesh": init_device_mesh(device.type, (size,)), "offload_policy": place}
    for layer in layers:
        fsdp.fully_shard(layer, mp_policy=fsdp.MixedPrecisionPolicy(**half), **how)
    outer = fsdp.MixedPrecisionPolicy(**half, output_dtype=torch.float32 if half else None)
    reshard = None if _is_trained(model) else True  # without a backward pass nothing else lets go of its ends
    fsdp.fully_shard(model, mp_policy=outer, reshard_after_forward=reshard, **how)

    # What `lib.policy.token_logprobs` calls: `function(model, ...)` as if it were the forward pass, with the
    # weights that no layer has gathered, too.
    owner: Any = model
    owner.within_forward = types.MethodType(lambda self, function, *args: function(self, *args), model)
    fsdp.register_fsdp_forward_method(model, "within_forward")


def _is_trained(model: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """All weights on every process while this lasts: each may compute as it likes, without the others."""
    units = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # as in `shard_model`: the backward pass begins with the root, so a trained one is kept until then
            unit.set_reshard_after_forward(unit is not model or not _is_trained(model))


def full_weights(model: torch.nn.Module) -> dict[str, Any]:
    """All weights by name, on the CPU, for rank 0; for others nothing. All ranks have to call it.

    Tied weights stand under one name only.
    """
    weights = states.get_model_state_dict(model, options=FULL)
    tied = getattr(model, "all_tied_weights_keys", {})  # name -> the name under which it is kept
    return {name: value for name, value in weights.items() if name not in tied}
