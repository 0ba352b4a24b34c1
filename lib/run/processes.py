"""The device of a process, and several processes that train one model together (started by torchrun)."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lib import UserError


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
    another for hours gives up (ranks first meet when all have sampled, and lengths differ; with `waits`, as
    in stage 4, where one may search alone, for a week). So does one that notices that another has died: gloo
    by an error (`run_main` makes it one line), nccl by its watchdog, which aborts the process.
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
        atexit.register(_leave_on_error)
    return rank, size, local_rank


def stop_processes() -> None:
    """Leave the group that `start_processes` joined, if any. With nccl all must: they wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_on_error() -> None:
    """At the exit of a process that is still in the group, by an error: the others must hear of it."""
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # destroy_process_group would wait for the others, which wait for this process
    stop_processes()  # gloo's threads abort an interpreter that exits while they run
