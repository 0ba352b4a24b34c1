"""What a run leaves: the state that a killed one resumes from, at the end a Hugging Face checkpoint.

Everything that a step of stage 2 or 3 depends on is either in the state (weights, optimizer, `run.state`) or
a function of (seed, step). So there is no generator and no data loader to restore, and a killed run goes on
exactly where its last resume point was. The file does not depend on the number of processes, nor on shards.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict as states
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib import UserError
from lib.run.files import atomic, resume_log
from lib.run.shards import FULL, full_weights

PROGRESS = "progress.pt"  # in OUT, until the run is finished


def save_progress(run: Any, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One atomic file, by rank 0; all ranks have to call it. `step` is the number of finished steps."""
    weights = full_weights(model)
    moments = states.get_optimizer_state_dict(model, optimizer, options=FULL)
    if run.leader:
        try:
            with atomic(run.out / PROGRESS) as path:
                torch.save({"model": weights, "optimizer": moments, "step": step, "extra": run.state}, path)
        except RuntimeError as error:  # torch's own, when it cannot go on writing
            raise UserError(f"cannot write {run.out / PROGRESS}: {error}") from error


def load_progress(run: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore model, optimizer and `run.state`, drop what logs have beyond; the number of finished steps."""
    path = run.out / PROGRESS
    state: dict[str, Any] = read_state(path) if run.leader and path.exists() else {"step": 0}
    step = run.gather(state["step"])[0]
    if step:
        whole = {"full_state_dict": True, "broadcast_from_rank0": run.size > 1, "strict": False}
        options = states.StateDictOptions(**whole)  # from rank 0; the others bring nothing
        states.set_model_state_dict(model, state.get("model", {}), options=options)
        states.set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=options)
        run.state |= state.get("extra", {})
        plain = {key: value for key, value in run.state.items() if isinstance(value, int | float)}
        run.state |= run.gather(plain)[0]  # tensors stay with the leader
    if run.leader:
        for log in ("metrics.jsonl", "rollouts.jsonl"):
            resume_log(run.out / log, lambda record: record["step"] < step)
    return step


def read_state(path: Path) -> dict:
    """A resume point, tensors on the CPU; runs no code of the file. UserError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle's, of zip's, of torch's
        raise UserError(f"{path}: not a saved state; delete it to start anew") from error


def save_policy(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path, weights: dict | None = None
) -> None:
    """Write it into `folder`, beside what else is there. `weights`: those gathered from a model in shards.

    First to a temporary folder, then moved file by file, config.json last: where that is, all is.
    """
    temporary = Path(folder) / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(str(temporary))
        for source in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            with source.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(source, Path(folder) / source.name)
    except SafetensorError as error:  # its own, of a full disk
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
