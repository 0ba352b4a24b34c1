"""The state that a killed run resumes from: nested values and tensors in one safetensors file.

Everything that a step of stage 2 or 3 depends on is either in it (weights, optimizer) or a function of (seed, step). So there
is no generator and no data loader to restore, and a killed run goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import UserError
from lib.run.files import atomic, resume_log
from lib.run.processes import Processes, gather_objects
from lib.run.shards import full_optimizer, full_weights, set_optimizer, set_weights


def save_progress(
    out: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    **extra: object,
) -> None:
    """One atomic file, by rank 0, with all that `load_progress` needs; all ranks have to call it. `step` is the number of
    finished steps; `extra` is rank 0's. The file does not depend on the number of processes, nor on shards."""
    state = {
        "step": step,
        "model": full_weights(model),
        "optimizer": full_optimizer(model, optimizer),
        **extra,
    }
    if processes.rank == 0:
        (out / "state").mkdir(parents=True, exist_ok=True)
        save_state(out / "state" / "progress.safetensors", state)


def load_progress(
    out: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    logs: Sequence[str] = (),
) -> dict:
    """Restore model and optimizer in place, drop log lines past the checkpoint; {"step": 0} when there is none.

    Returns step and extra; of tensors in it, only rank 0 has any. `logs` are jsonl files in `out` whose records have a "step";
    only rank 0 touches them, and the state's file.
    """
    path, leader = out / "state" / "progress.safetensors", processes.rank == 0
    state: dict[str, Any] = load_state(path) if leader and path.exists() else {"step": 0}
    weights, optimizer_state = state.pop("model", {}), state.pop("optimizer", {})
    plain = {key: value for key, value in state.items() if not isinstance(value, dict)}
    plain, found = gather_objects([plain, bool(weights)], processes)[0]
    if found:
        set_weights(model, weights, processes)
        set_optimizer(model, optimizer, optimizer_state, processes)
    for log in logs:
        if leader:
            resume_log(out / log, lambda record: record["step"] < plain["step"])
    return {**state, **plain}


def is_finished(out: Path) -> bool:
    """True when `out` holds a finished checkpoint: weights are there and the resume state is gone."""
    return (out / "config.json").exists() and not (out / "state").exists()


def finish(out: Path) -> None:
    """Drop the resume state: from now on the folder is a checkpoint like any other."""
    if (out / "state").exists():
        (out / "state").rename(
            out / ".state.tmp"
        )  # at once: a kill in the midst must not leave a run that begins anew
    shutil.rmtree(out / ".state.tmp", ignore_errors=True)


# ---- one file of any state -----------------------------------------------------------------------------------


def save_state(path: str | Path, state: dict) -> None:
    """Nested dicts, lists, tuples, scalars, text and tensors to one safetensors file, atomically; no pickle.

    The tensors are the file's tensors, named by their place ("optimizer/state/0/exp_avg"); everything else is
    JSON in its metadata. Floats and tensors come back bit for bit; tied weights are stored once. Raises
    TypeError for any other kind of object, UserError when the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"state": json.dumps(_encode(state, "", tensors, {}))}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _encode(value: Any, place: str, tensors: dict[str, Tensor], names: dict[tuple, str]) -> Any:
    """`value` as JSON, each container tagged by its kind; its tensors go to `tensors`, each memory once."""
    if isinstance(value, Tensor):
        memory = value.device, value.data_ptr(), value.shape, value.stride(), value.dtype
        key = memory if value.numel() else (place,)  # empty tensors have no memory to be known by
        if key not in names:
            names[key] = place if place not in tensors else f"{place}#{len(tensors)}"
            whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
            tensors[names[key]] = value.detach() if whole else value.detach().contiguous().clone()
        return {"tensor": names[key]}
    if isinstance(value, dict):  # as pairs, since JSON's own keys can only be text
        pairs = ((k, _encode(v, f"{place}/{k}".lstrip("/"), tensors, names)) for k, v in value.items())
        return {"dict": [[k, v] for k, v in pairs if _is_plain(k, place)]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{place}/{i}", tensors, names) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    _is_plain(value, place)
    return value


def _is_plain(value: Any, place: str) -> bool:
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{place}: a {type(value).__name__} cannot be saved")
    return True


def load_state(path: str | Path) -> dict:
    """What `save_state` wrote, tensors on the cpu. UserError if the file is missing or something else."""

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        [(kind, content)] = value.items()
        if kind == "tensor":
            return file.get_tensor(content)
        if kind == "dict":
            return {k: decode(v) for k, v in content}
        return [decode(v) for v in content] if kind == "list" else tuple(decode(v) for v in content)

    try:
        with safe_open(str(path), framework="pt") as file:
            return decode(json.loads(file.metadata()["state"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a saved state ({reason}); delete it to start anew") from error
