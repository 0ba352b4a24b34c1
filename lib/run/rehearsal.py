"""Before step 1: print what a run will take, and compute its largest batch once (`--dry-run`, and the rehearsal of every run)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel

from lib import UserError
from lib.policy import token_logprobs
from lib.run.plan import (
    GB,
    SPARE,
    Need,
    kv_cache_bytes,
    memory,
    read_machine,
    shape_of,
    shape_of_model,
    smallest_change,
    width,
)
from lib.run.processes import Processes
from lib.run.shards import backward, device_of, gathered
from lib.run.training import precision

HELP = "print memory and downloads for GPUSxGIGABYTES, e.g. 4x80, and stop"
HELP_HERE = "print memory and downloads for GPUSxGIGABYTES, e.g. 4x80, and stop; here: measure one step on this machine"


def plan(
    machine: str, model: str, need_of: Callable[[int], Need], judges: Sequence[str], disk: float
) -> None:
    """Print what a run would take on `machine`, "GPUSxGIGABYTES". `need_of` the number of GPUs; `judges`: models beside it, in
    bfloat16; `disk`: copies of the weights in fp32 that it writes at most."""
    gpus, limit = read_machine(machine)
    if gpus == 1 and need_of(gpus).shard:
        raise UserError(f"--dry-run: given {machine} with --shard, which needs several GPUs")
    beside, unknown = weights_of(judges, 2)
    shape, need = shape_of(model), replace(need_of(gpus), beside=beside)
    sizes = memory(shape, need)
    print(f"{model}: {shape.parameters / 1e6:,.0f} M parameters, on {gpus} x {limit / GB:g} GB, {need.dtype}")
    for name, size in sizes.items():
        if size and name not in ("sampling", "training", "peak"):
            print(f"  {name:12}{size / GB:8.2f} GB")
    for name in ("sampling", "training"):
        if sizes[name]:
            print(f"  {'peak of ' + name:20}{sizes[name] / GB:6.2f} GB of {limit / GB:g}")
    usable = (1 - SPARE) * limit
    if sizes["peak"] <= usable:
        print(f"  fits, with {(limit - sizes['peak']) / GB:.1f} GB to spare")
    else:
        print(
            f"  does not fit ({SPARE:.0%} are left for fragments). Smallest change: {smallest_change(shape, need, usable)}"
        )
    print(f"  on disk: {disk * 4 * shape.parameters / GB:.1f} GB at most")
    if need.shard:
        loading = 4 * shape.parameters * gpus / GB
        print(
            f"  in the CPU's memory: {loading:.0f} GB, while each of {gpus} processes reads the whole model"
        )
    for name in unknown:
        print(f"  {name}: its configuration cannot be read here, so it is not counted")
    for name in dict.fromkeys([model, *judges]):
        print(f"  {on_the_hub(name)}")


def weights_of(models: Sequence[str], bytes_each: int) -> tuple[float, list[str]]:
    """Bytes of the weights of all of them, `bytes_each` a number, and the names of those that cannot be looked at."""
    total, unknown = 0.0, []
    for name in dict.fromkeys(models):
        try:
            total += bytes_each * shape_of(name).parameters
        except UserError:
            unknown.append(name)
    return total, unknown


def plan_inference(
    machine: str,
    models: Sequence[str],
    sample_tokens: int,
    dtype: str,
    together: Sequence[str] = (),
    flags: str = "--max-batch-tokens, or --dtype bfloat16",
) -> None:
    """Print what asking each of `models` takes, one at a time, beside those that stay loaded with it (`together`).

    `flags`: of this stage, which take less memory when lowered.
    """
    _, limit = read_machine(machine)
    low = width(dtype)
    beside, unknown = weights_of(together, low)
    for name in unknown:
        print(f"{name}: its configuration cannot be read here, so it is not counted")
    for name in models:
        shape = shape_of(name)
        weights, cache = low * shape.parameters, kv_cache_bytes(shape, sample_tokens, dtype)
        sizes = f"weights {weights / GB:.1f} GB, KV cache {cache / GB:.1f} GB" + (
            f", beside {beside / GB:.1f} GB" * bool(beside)
        )
        total = weights + cache + beside
        room = (1 - SPARE) * limit
        smaller = (
            "take smaller judges and attackers, put judges elsewhere (NAME@cuda:1)"
            if beside
            else "take a smaller model"
        )
        halved = (weights + beside) / 2 if low == 4 and "--dtype" in flags else weights + beside
        change = f"lower {flags}" if halved < room else f"{smaller} or larger GPUs"
        fits = "fits" if total <= room else f"does not fit: {change}"
        print(
            f"{name}: {shape.parameters / 1e6:,.0f} M parameters, {sizes}: {total / GB:.1f} of {limit / GB:g} GB: {fits}"
        )
    for name in dict.fromkeys([*models, *together]):
        print(f"  {on_the_hub(name)}")


def on_the_hub(name: str) -> str:
    """One line on a model: its size and whether it is gated, or that it is a folder here."""
    if Path(name).is_dir():
        return f"{name}: a folder here"
    try:
        info = HfApi().model_info(name, timeout=10, files_metadata=True)
    except Exception as error:  # of the hub's, of the network's
        return f"{name}: the hub cannot be asked ({' '.join(str(error).split())[:60]})"
    size = sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))
    return (
        f"{name}: {size / GB:.1f} GB to download{', gated: ask for access on its page' if info.gated else ''}"
    )


def rehearse(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    need: Need,
    prompt_tokens: int,
    processes: Processes,
) -> None:
    """Compute the largest micro-batch there may be, with room taken for the optimizer and the KV cache, and forget it.

    So a run that does not fit ends before step 1, and not when the longest completions happen to come. Call it before the
    optimizer has its state. prompt_tokens: of the longest sequence.
    """
    shape, device = shape_of_model(policy), device_of(policy)
    if processes.rank == 0:
        print(f"rehearsing the largest batch: {need.batch_tokens} tokens")
    own = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in policy.parameters())
    moments = torch.empty(8 * own, dtype=torch.uint8, device="cpu" if need.offload else device)
    if need.sample_tokens:
        with gathered(policy):
            casts = 2 * shape.parameters if need.dtype == "bfloat16" and not need.shard else 0
            torch.empty(
                kv_cache_bytes(shape, need.sample_tokens, need.dtype) + casts,
                dtype=torch.uint8,
                device=device,
            )
    rows = max(
        1, -(-need.batch_tokens // need.longest)
    )  # of the largest batch: the longest sequences might leave some room
    columns = need.batch_tokens // rows
    if columns <= prompt_tokens:
        rows, columns = max(1, need.batch_tokens // need.longest), need.longest
    ids = torch.full((rows, columns), 1, device=device)
    everything = torch.ones_like(ids, dtype=torch.bool)
    completion = everything.clone()
    completion[:, : max(1, prompt_tokens)] = False
    with precision(device, need.dtype):
        how = {"with_entropy": True, "entropy_gradient": need.entropy_gradient}
        logprobs, entropy = token_logprobs(policy, ids, everything, completion, **how)
    if reference is not None:
        with torch.no_grad(), precision(device, need.dtype):
            token_logprobs(reference, ids, everything, completion)
    backward(0.0 * (logprobs + entropy).sum(), policy, processes)
    policy.zero_grad(set_to_none=True)
    del moments
