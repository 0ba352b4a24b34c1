"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lib import UserError
from lib.run.hub import load_policy
from lib.run.processes import Processes
from lib.run.shards import shard


def load_model(
    settings: Any, device: torch.device, processes: Processes, *, trained: bool = True
) -> PreTrainedModel:
    """`settings.model` for a stage that trains: the policy, or a frozen reference. `settings` are those of stage 2 or 3. With
    `shard` it is read on the CPU, and this process's part of it stays: load one after the other."""
    checkpointing = trained and settings.gradient_checkpointing
    dtype = settings.dtype if settings.shard and not trained else "float32"
    at_first = "cpu" if settings.shard else device
    model = load_policy(settings.model, device=at_first, dtype=dtype, gradient_checkpointing=checkpointing)
    model.requires_grad_(trained)
    if settings.shard:
        return shard(model, device, processes, dtype=settings.dtype, offload=settings.offload)
    if settings.dtype == "bfloat16" and not trained:
        halve_linear_layers(model)
    return model


def halve_linear_layers(model: torch.nn.Module) -> None:
    """Keep in bfloat16 what autocast would cast anyway: a frozen reference takes half as much, and computes to the bit what the
    policy of equal weights does, so KL begins at 0. (All in bfloat16, the sums between layers are rounded, too.)"""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings
        ):  # a tied head stays as it is
            module.to(torch.bfloat16)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, warmup: int, total: int, decay: bool
) -> float:
    """Linear warm-up over `warmup` steps, then constant, or with `decay` linear to zero at `total`. Returns the rate set."""
    rate = peak * min(1.0, (step + 1) / max(1, warmup))
    if decay and step >= warmup:
        rate = peak * (total - step) / max(1, total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """A context to compute in: bfloat16 over fp32 weights, or fp32 as it is.

    The weights stay fp32 in both. In bfloat16 they would have 8 bits of precision, and an update of 1e-6 on a
    weight of 0.02 would be rounded away: training would run, and change nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def finite_or_stop(name: str, value: float, step: int, out: Path) -> float:
    """Returns `value`, or raises UserError before a step that would ruin the weights (the last checkpoint stays)."""
    if not torch.isfinite(torch.tensor(value)):
        raise UserError(
            f"step {step}: {name} is {value}, stopped before the update; the last checkpoint in {out} is kept: "
            "lower --learning-rate, or look at the last lines of metrics.jsonl"
        )
    return value
