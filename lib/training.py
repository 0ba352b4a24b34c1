"""What chapters 2 and 3 share: micro-batches under a token budget, the learning rate of a step, and resumable progress.

Everything a step depends on is either in the saved state (weights, optimizer) or a function of (seed, step). So there is no
generator and no data loader to restore, and a run that was killed goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib.files import truncate_jsonl
from lib.policy import load_state, save_state
from lib.settings import UserError


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, grouped so that rows x longest row <= max_tokens; longest first, so that memory peaks at once.

    Raises UserError when a single sequence is over the budget.

    >>> micro_batches([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[0]] > max_tokens:
        raise UserError(f"a sequence of {lengths[order[0]]} tokens does not fit --max-batch-tokens {max_tokens}: raise it")
    batches: list[list[int]] = []
    for i in order:  # sorted by length: the first row of a batch is its longest
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `count` items: a function of (seed, epoch) alone."""
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, warmup: int, total: int, decay: bool) -> float:
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


def save_progress(out: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **extra: object) -> None:
    """One atomic file with all that `load_progress` needs. `step` is the number of finished steps."""
    (out / "state").mkdir(parents=True, exist_ok=True)
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}
    save_state(out / "state" / "progress.safetensors", state)


def load_progress(
    out: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    logs: Sequence[str] = (),
    write: bool = True,
) -> dict:
    """Restore model and optimizer in place, drop log lines past the checkpoint; {"step": 0} when there is none.

    `logs` are jsonl files in `out` whose records have a "step"; only the process with `write` (rank 0) touches them.
    """
    path = out / "state" / "progress.safetensors"
    state: dict[str, Any] = load_state(path) if path.exists() else {"step": 0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for log in logs:
        if write and (out / log).exists():
            truncate_jsonl(out / log, lambda record: record["step"] < state["step"])
    return state


def is_finished(out: Path) -> bool:
    """True when `out` holds a finished checkpoint: weights are there and the resume state is gone."""
    return (out / "config.json").exists() and not (out / "state").exists()


def finish(out: Path) -> None:
    """Drop the resume state: from now on the folder is a checkpoint like any other."""
    shutil.rmtree(out / "state", ignore_errors=True)
