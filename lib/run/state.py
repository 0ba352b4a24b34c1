"""The state that a killed run resumes from.

Everything that a step of stage 2 or 3 depends on is either in it (weights, optimizer, `run.state`) or a
function of (seed, step). So there is no generator and no data loader to restore, and a killed run goes on
exactly where its last resume point was. The file does not depend on the number of processes, nor on shards.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lib import UserError
from lib.run.files import atomic, resume_log
from lib.run.shards import full_optimizer, full_weights, set_full


def save_progress(run: Any, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One atomic file, by rank 0; all ranks have to call it. `step` is the number of finished steps."""
    state = {"model": full_weights(model), "optimizer": full_optimizer(model, optimizer)}
    if run.leader:
        (run.out / "state").mkdir(exist_ok=True)
        write_state(run.out / "state" / "progress.pt", {**state, "step": step, "extra": run.state})


def load_progress(run: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore model, optimizer and `run.state`, drop what logs have beyond; the number of finished steps."""
    path = run.out / "state" / "progress.pt"
    state: dict[str, Any] = read_state(path) if run.leader and path.exists() else {"step": 0}
    step = run.gather(state["step"])[0]
    if step:
        set_full(model, state.get("model", {}), optimizer, state.get("optimizer", {}), run.size)
        run.state |= state.get("extra", {})
        plain = {key: value for key, value in run.state.items() if isinstance(value, int | float)}
        run.state |= run.gather(plain)[0]  # tensors stay with the leader
    if run.leader:
        for log in ("metrics.jsonl", "rollouts.jsonl"):
            resume_log(run.out / log, lambda record: record["step"] < step)
    return step


def write_state(path: Path, state: dict) -> None:
    """Nested dicts of tensors and plain values, atomically. UserError if the disk is full."""
    with atomic(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch's own, when it cannot go on writing
            raise UserError(f"cannot write {path}: {' '.join(str(error).split())[:120]}") from error


def read_state(path: Path) -> dict:
    """What `write_state` wrote, tensors on the CPU; runs no code of the file. UserError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle's, of zip's, of torch's
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a saved state ({reason}); delete it to start anew") from error


def drop_progress(out: Path) -> None:
    """From now on the folder is a checkpoint like any other."""
    if (out / "state").exists():
        (out / "state").rename(
            out / ".state.tmp"
        )  # at once: a kill in the midst must not leave a run that begins anew
    shutil.rmtree(out / ".state.tmp", ignore_errors=True)
