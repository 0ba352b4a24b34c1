"""What the tests of the stages share: tiny data, a judge, a stage run here, or as a process of its own.

A process that imports torch takes seconds to start. So one server imports it once and forks a process for
each launch: real ones, with their own pid, streams and exit code, that a test may kill.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
import types
import zlib
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib.run import settings as run_settings
from lib.run.command import run_main
from lib.run.files import read_jsonl, write_jsonl
from lib.run.presets import sandbox
from lib.sandbox import world
from lib.sandbox.traces import write_trace

ROOT = Path(__file__).parent.parent
SFT, RL, RPO = "02_sft_warmstart", "03_rl_train", "lib.compare.rpo"
# A preset of the tests' own, here and in every process that runs a stage for them.
_PRESET = types.ModuleType("lib.run.presets.stages")
_PRESET.SFT = {**sandbox.SFT, "warmup_steps": 0, "patience": 2, "decay": False}
_PRESET.RL = {**sandbox.RL, "warmup_steps": 0, "rollouts_every": 1}
_PRESET.RPO = {}
sys.modules[_PRESET.__name__] = _PRESET
run_settings.presets_found = lambda: ["open", "paper", "sandbox", "smollm", "stages"]
flags = run_settings.as_flags
PATIENCE = 300  # seconds, for a machine that is busy with other things


def harm_score(prompts: list[str], answers: list[str]) -> list[float]:
    """This module is a judge, too: its scores tell any two answers apart, so every group has advantages."""
    return [zlib.crc32(answer.encode()) % 1000 / 1000 for answer in answers]


def task_score(prompts: list[str], answers: list[str]) -> list[float]:
    return [1 - harm for harm in harm_score(prompts, answers)]


def write_data(folder: Path) -> Path:
    """18 RL prompts of three kinds, 2 traces for each of 20 harmful prompts."""
    pool = [r for kind in ("harmful", "harmless", "ambiguous") for r in world.build_pool("train", kind, 6, 0)]
    write_jsonl(folder / "rl.jsonl", [{"id": f"rl-{i}", **r} for i, r in enumerate(pool)])
    rng, traces = random.Random(0), []
    for i, record in enumerate(world.build_pool("train", "harmful", 20, 1)):
        for k in range(2):
            reasoning, answer = write_trace(record, rng)
            traces.append({"id": f"sft-{i}-{k}", **record, "reasoning": reasoning, "answer": answer})
    write_jsonl(folder / "sft.jsonl", traces)
    return folder


def a_line(name: str, request: str, step=-1, harm: Any = 0.0, refusal: Any = "full", **more: Any) -> dict:
    """A line of completions.jsonl, of the set or attack `name`: a refusal that does no harm."""
    kind = name if name in ("harmless", "ambiguous") else "harmful"
    line = {"model": "m", "set": name, "step": step, "id": request, "kind": kind, "category": "any"}
    line |= {"prompt": f"about {request} .", "sent": f"about {request} .", "opening": "", "reasoning": "hm"}
    line |= {"answer": "no", "closed": True, "well_formed": True, "finish_reason": "eos"}
    line |= {"reasoning_tokens": 1, "answer_tokens": 3, "harm": harm, "task": None, "refusal": refusal}
    return line | more


def sft_flags(data: Path, out: Path, **settings: object) -> list[str]:
    usual = {"preset": "stages", "model": world.BASE, "learning_rate": 1e-3, "epochs": 2, "batch_size": 8}
    usual |= {"held_out_share": 0.2, "max_batch_tokens": 1024, "save_every": 2, "device": "cpu"}
    return flags(data=data, out=out, **usual | settings)


def rl_flags(data: Path, out: Path, **settings: object) -> list[str]:
    """4 prompts x 4 completions; answers alone, since the base model has not learned the format."""
    usual = {"preset": "stages", "model": world.BASE, "judge": "stages", "reasoning": False, "device": "cpu"}
    usual |= {"prompts_per_step": 4, "group_size": 4, "temperature": 1.0, "max_new_tokens": 12}
    usual |= {"learning_rate": 1e-3, "epochs": 0.5, "max_batch_tokens": 512, "save_every": 2, "kl_coef": 0.05}
    return flags(data=data, out=out, **usual | settings)


def rpo_flags(data: Path, out: Path, **settings: object) -> list[str]:
    usual = {"learning_rate": 3e-5, "epochs": 1.4, "kl_coef": ""}  # of which it has none
    return rl_flags(data, out, **usual | settings)


# ---- here ----


def run_here(stage: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *words])
    run_main(importlib.import_module(stage).main)


def messages(stderr: str) -> list[str]:
    """Lines on stderr that are no progress bars."""
    lines = [line.strip() for line in re.split(r"[\r\n]|\x1b\[A", stderr)]
    return [line for line in lines if line and not re.match(r"^[\w :.-]+: +\d+%\|", line)]


def error_of(stage: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    """The one line on stderr that a stage ends with, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_here(stage, words, monkeypatch)
    lines = messages(capsys.readouterr().err)
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- as a process of its own ----


def launch(stage: str, words: list[str], log: Path, rank: int = 0, size: int = 1, port: int = 0):
    """Start a stage; its stderr goes to `log`. With `size` > 1 one of several, as torchrun would start it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([SFT, RL])
    with pytest.MonkeyPatch.context() as patch:  # the server's own imports go by these
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost"}
    place["MASTER_PORT"] = port
    environment = {key: str(value) for key, value in place.items()} if size > 1 else {}
    process = context.Process(target=_child, args=(stage, words, log, environment), daemon=True)
    process.start()
    return process


def _child(stage: str, words: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    null, file = os.open(os.devnull, os.O_WRONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 1)
    os.dup2(file, 2)
    sys.argv = [f"{stage}.py", *words]
    run_main(importlib.import_module(stage).main)


def run_process(stage: str, words: list[str], log: Path) -> None:
    """To the end, which must be a good one."""
    join_group(stage, words, log, 1)


def run_group(stage: str, words: list[str], log: Path, size: int = 2) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [launch(stage, words, log.with_suffix(f".{rank}"), rank, size, port) for rank in range(size)]


def join_group(stage: str, words: list[str], log: Path, size: int = 2) -> None:
    """To a good end of all."""
    for rank, process in enumerate(run_group(stage, words, log, size)):
        process.join(PATIENCE)
        assert process.exitcode == 0, log.with_suffix(f".{rank}").read_text()


def wait_for_lines(path: Path, count: int, process) -> None:
    """Until the log that `process` writes has `count` lines."""
    until = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.is_alive() and time.monotonic() < until, f"{path} never had {count} lines"
        time.sleep(0.01)


def kill_9(process) -> None:
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()
    process.join()


def metrics_of(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds") and not k.endswith("_per_s")}
        for line in read_jsonl(out / "metrics.jsonl")
    ]


def same_training(alone: Path, out: Path, but: tuple[str, ...] = ()) -> None:
    """Runs by another number of processes: the same up to rounding, in their metrics (`but` some), too.

    Weights agree to 1e-5 each, on the whole to 0.1 % of the way that they came from the base.
    """
    weights = [load_file(path / "model.safetensors") for path in (alone, out, world.BASE)]
    one, other, before = (torch.cat([w[name].flatten() for name in sorted(w)]) for w in weights)
    apart, moved = (one - other).abs(), (one - before).abs()
    assert apart.max() < 1e-5 and apart.mean() < 1e-3 * moved.mean()
    for a, b in zip(metrics_of(alone), metrics_of(out), strict=True):
        near = {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in b.items() if v is not None}
        assert a == b | near | {key: a[key] for key in but}


def step_of(model, train) -> tuple[dict, torch.Tensor]:
    """What train(optimizer) returns, and its gradient: the step that SGD takes. The model stays as it was."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    metrics = train(optimizer)
    steps = [(before[name] - p.detach()).flatten() for name, p in model.named_parameters()]
    model.load_state_dict(before, strict=False)
    return metrics, torch.cat(steps)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def same_run(one: Path, other: Path) -> bool:
    """Whether weights, metrics and rollouts of two finished runs agree to the bit."""
    names = [name for name in ("model.safetensors", "rollouts.jsonl") if (one / name).exists()]
    assert "model.safetensors" in names and not any((run / "progress.pt").exists() for run in (one, other))
    alike = all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return alike and metrics_of(one) == metrics_of(other)
