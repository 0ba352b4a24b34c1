"""The device of a process, and several processes that train one model together (started by torchrun)."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lib import UserError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """auto: a CUDA GPU (number `local_rank`), else mps, else cpu. UserError if the named one is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--device cuda: {torch.cuda.device_count()} GPUs found, process {local_rank} has none: "
                "use --device cpu, or start no more processes than GPUs"
            )
        # cuDNN's attention makes a plan for each new length, tens of ms a token, and may be wrong (pytorch
        # #193893, #196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu")
    if name not in ("cpu", "mps"):
        raise UserError(f"--device: given {name}; allowed auto | cpu | cuda | mps")
    return torch.device(name)


def start_processes(device: str, timeout_s: float = 7200) -> tuple[int, int, int]:
    """Join the processes of this run (torchrun's environment): (rank, size, rank on this machine).

    gloo on cpu, nccl on cuda (and gloo for what lies in the CPU's memory there). A process that waits for
    another for more than `timeout_s` seconds gives up (ranks first meet when all have sampled, and lengths
    differ), and so does one that notices that another has died: gloo with one line, nccl by its watchdog,
    which aborts the process with a message of its own.
    """
    rank, size, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size > 1:
        kind = pick_device(device, local_rank)
        if kind.type == "mps":
            raise UserError("--device mps: one process only; use --device cpu with torchrun")
        if kind.type == "cuda":
            torch.cuda.set_device(kind)
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        with lost_process():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        atexit.register(_leave_on_error)
    return rank, max(1, size), local_rank


def check_processes(settings: Any, size: int) -> None:
    """What settings of several processes may be. Raises UserError."""
    shard, offload = (getattr(settings, name, False) for name in ("shard", "offload"))
    if shard and size == 1:
        raise UserError(
            "--shard: there is one process; start several with torchrun --nproc-per-node N, or leave it out"
        )
    if offload and not shard:
        raise UserError("--offload: moves shards, so it needs --shard")
    prompts = getattr(settings, "prompts_per_step", size)
    if size > prompts:
        raise UserError(f"--prompts-per-step {prompts}: fewer than the {size} processes")


def stop_processes() -> None:
    """Leave the group that `start_processes` joined, if any. With nccl all must: they wait for each other."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_on_error() -> None:
    """At the exit of a process that is still in the group: an error, of which its message tells. The others
    must hear of it. On GPUs the exit code is 1, whatever the error."""
    if dist.is_initialized() and "nccl" in str(dist.get_backend_config()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # destroy_process_group would wait for the others, which wait for this process
    stop_processes()  # gloo's threads abort an interpreter that exits while they run


def sum_gradients(parameters: Iterable[torch.nn.Parameter], size: int) -> None:
    """Replace every gradient by its sum over the `size` processes; a parameter without one counts as zero.

    What DistributedDataParallel does, by hand: that sums in every backward pass, so all processes would need
    equally many micro-batches, and takes the mean, which is not that of completions of different lengths.
    Here it is one sum an update, in place, so that it takes no memory. If each process scales its loss by the
    count over all of them, the sum is the gradient of the mean.
    """
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        with lost_process():
            dist.all_reduce(parameter.grad)


def gather_texts(text: str, size: int) -> list[str]:
    """Every process's text, in the order of ranks, on every process (no pickle)."""
    data = torch.frombuffer(
        bytearray(text.encode()), dtype=torch.uint8
    )  # (bytes,), on the CPU: gloo carries it
    with lost_process():
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [bytes(row[: int(length)].numpy()).decode() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def lost_process(*signs: str) -> Iterator[None]:
    """Turns the many errors of a group with a dead member into one that says so. With `signs`, only an error
    whose text has one of them."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if signs and not any(sign in reason for sign in signs):
            raise
        raise UserError(
            f"lost another process of this run, killed or silent for too long ({reason[:160]}): "
            "see its message, then run the same command again to resume"
        ) from error
