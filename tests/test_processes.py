"""Devices, the state that a run resumes from, and several processes."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_policy import batch
from transformers import Qwen2ForCausalLM

from lib import UserError
from lib.judges.language_model import existing_device
from lib.policy import token_logprobs
from lib.run.folder import date_of_run
from lib.run.processes import Processes, gather_objects, pick_device, start_processes, sum_gradients
from lib.run.state import load_state, save_state

ROOT = Path(__file__).parents[1]


def test_pick_device():
    assert pick_device("cpu", 3) == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="allowed auto"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 GPUs"):
            pick_device("cuda")


def test_the_attention_of_cudnn_is_off_wherever_a_gpu_is_chosen(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        for choose in (lambda: pick_device("cuda", 1), lambda: existing_device("cuda:1")):
            torch.backends.cuda.enable_cudnn_sdp(True)
            assert choose() == torch.device("cuda:1") and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# ---- resuming ----


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        ids, attention, completion = batch("right")
        loss = -(token_logprobs(model, ids, attention, completion) * torch.rand(ids.shape)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def new(tiny_model):
    model = Qwen2ForCausalLM(tiny_model.config)
    model.load_state_dict(tiny_model.state_dict())
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "lr": 1e-2}]
    return model, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def test_resumed_adamw_training_is_bit_exact(tiny_model, tmp_path):
    straight, optimizer = new(tiny_model)
    train(straight, optimizer, range(6))

    model, optimizer = new(tiny_model)
    train(model, optimizer, range(3))
    path = tmp_path / "state" / "s.safetensors"
    save_state(path, {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed, optimizer = new(tiny_model)
    state = load_state(path)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(state["step"], 6))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_any_nesting_comes_back(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "numbers": {"pi": 0.1 + 0.2, "inf": float("inf"), "yes": True, "none": None, 3: "integer key"},
        "a.b/c": [shared, shared.T, shared[1:], (torch.tensor(5), [])],
        "a": {"b/c": torch.tensor([], dtype=torch.int64)},
        "half": torch.randn(3).bfloat16(),
        "tied": shared,
        "gradient": torch.ones(2, requires_grad=True),
        "text": "é",
    }
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert loaded["numbers"] == state["numbers"] and loaded["text"] == "é" and list(loaded) == list(state)
    first, transposed, tail, (five, empty) = loaded["a.b/c"]
    assert torch.equal(first, shared) and torch.equal(transposed, shared.T) and torch.equal(tail, shared[1:])
    assert five.item() == 5 and empty == [] and isinstance(loaded["a.b/c"][3], tuple)
    assert torch.equal(loaded["half"], state["half"]) and loaded["half"].dtype == torch.bfloat16
    assert loaded["a"]["b/c"].dtype == torch.int64 and len(loaded["a"]["b/c"]) == 0
    assert torch.equal(loaded["tied"], shared)
    with safe_open(tmp_path / "s", framework="pt") as file:
        assert sum(file.get_tensor(k).shape == (2, 3) for k in file.keys()) == 1, "tied: stored once"


def test_a_failed_save_keeps_the_old_state(tmp_path):
    save_state(tmp_path / "s", {"step": 1})
    with pytest.raises(TypeError, match="a/b: a set"):
        save_state(tmp_path / "s", {"step": 2, "a": {"b": {1}}})
    assert load_state(tmp_path / "s") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_state_is_a_user_error(tmp_path):
    (tmp_path / "s").write_bytes(b"nonsense")
    for path in (tmp_path / "s", tmp_path / "none"):
        with pytest.raises(UserError, match="not a saved state") as error:
            load_state(path)
        assert "\n" not in str(error.value)


# ---- several processes ----


WORKER = """
import json, os, torch
from lib.run.processes import gather_objects, start_processes, sum_gradients
from lib.run.settings import run_main

def main():
    processes = start_processes("cpu", timeout_s=60)
    rank = processes.rank
    layers = {"a": torch.nn.Linear(2, 3), "b16": torch.nn.Linear(2, 1).bfloat16()}
    layers["frozen"] = torch.nn.Linear(1, 1)
    layers["frozen"].requires_grad_(False)
    model = torch.nn.ModuleDict(layers)
    layers["a"].weight.grad = torch.full((3, 2), 1.0 + rank)
    if rank == 1:  # only one process has a gradient here
        layers["b16"].bias.grad = torch.full((1,), 5.0, dtype=torch.bfloat16)
    sum_gradients(model, processes)
    objects = gather_objects({"rank": rank, "text": "é" * 1000 * rank, "x": 0.1 + 0.2}, processes)
    gradients = {name: p.grad if p.grad is None else p.grad.flatten().tolist()
                 for name, p in model.named_parameters()}
    print(json.dumps([objects, gradients]), flush=True)
    gather_objects(None, processes)
    if rank == 1:
        os._exit(1)
    gather_objects(None, processes)

run_main(main)
"""


def test_two_processes_sum_and_gather_and_notice_that_one_was_killed():
    port = 20_000 + os.getpid() % 20_000
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, **pipes
        )
        for r in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    for out, err in outputs:
        objects, gradients = json.loads(out or err)
        assert objects == [{"rank": r, "text": "é" * 1000 * r, "x": 0.1 + 0.2} for r in (0, 1)]
        assert gradients == {
            "a.weight": [3.0] * 6,
            "a.bias": [0.0] * 3,
            "b16.weight": [0.0] * 2,
            "b16.bias": [5.0],
            "frozen.weight": None,
            "frozen.bias": None,
        }
    survivor = outputs[0][1]
    assert [rank.returncode for rank in ranks] == [2, 1]
    assert [line for line in survivor.splitlines() if line.startswith("error: lost another process")]
    assert "Traceback" not in survivor


FAILING = """
import time
import torch.distributed as dist
from lib.run.processes import start_processes
from lib import UserError
from lib.run.settings import run_main

def main():
    start_processes("cpu", timeout_s=60)
    dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
    dist.destroy_process_group = lambda: time.sleep(600)  # as nccl's does, which waits for the others
    raise UserError("told before it leaves")

run_main(main)
"""


def test_a_failing_process_on_gpus_leaves_without_waiting_for_the_others():
    port = 20_000 + (os.getpid() + 7) % 20_000
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for r in (0, 1)
    ]
    for rank in ranks:
        assert "error: told before it leaves" in rank.communicate(timeout=120)[1] and rank.returncode == 1


def test_one_process_needs_no_torchrun(monkeypatch, tiny_model):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = start_processes("cpu")
    assert processes == Processes(0, 1, 0)
    assert gather_objects({"a": (1, 2)}, processes) == [{"a": [1, 2]}], (
        "as it would arrive from another process"
    )
    sum_gradients(tiny_model, processes)
    assert all(p.grad is None for p in tiny_model.parameters())


def test_the_date_of_a_run_is_that_in_its_folder(tmp_path):
    today = datetime.date.today().isoformat()
    assert date_of_run(tmp_path, "") == today and date_of_run(tmp_path / "none", "2026-11-26") == "2026-11-26"
    (tmp_path / "settings.json").write_text('{"date": "2026-11-25"}')
    assert date_of_run(tmp_path, "") == "2026-11-25" and date_of_run(tmp_path, "2026-11-26") == "2026-11-26"
    with pytest.raises(UserError, match="--date: given yesterday; allowed a day, as 2026-11-26"):
        date_of_run(tmp_path, "yesterday")
