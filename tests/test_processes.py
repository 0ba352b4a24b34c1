"""Devices, precision, the date of a run, and what whole runs of several processes do not show."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import UserError
from lib.run.folder import date_of_run
from lib.run.processes import pick_device, start_processes
from lib.run.settings import Training
from lib.run.training import precision

ROOT = Path(__file__).parents[1]


def test_pick_device():
    assert pick_device("cpu", 3) == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 GPUs"):
            pick_device("cuda")


def test_the_attention_of_cudnn_is_off_wherever_a_gpu_is_chosen(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert pick_device("cuda", 1) == torch.device("cuda:1")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_one_process_needs_no_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_processes(Training(device="cpu")) == (0, 1, 0)


FAILING = """
import time
import torch.distributed as dist
from lib import UserError
from lib.run.command import run_main
from lib.run.processes import start_processes
from lib.run.settings import Common

def main():
    start_processes(Common(device="cpu"))
    dist.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
    dist.destroy_process_group = lambda: time.sleep(600)  # as nccl's does, which waits for the others
    raise UserError("told before it leaves")

run_main(main)
"""


def test_a_failing_process_on_gpus_leaves_without_waiting_for_the_others():
    port = 20_000 + os.getpid() % 20_000
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    how = dict(stderr=subprocess.PIPE, text=True, cwd=ROOT)
    places = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    for rank in [subprocess.Popen([sys.executable, "-c", FAILING], env=place, **how) for place in places]:
        assert "error: told before it leaves" in rank.communicate(timeout=120)[1] and rank.returncode == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_in_it_and_leaves_weights_in_single_precision(dtype):
    layer = torch.nn.Linear(4, 4)
    with precision(torch.device("cpu"), dtype):
        out = layer(torch.ones(1, 4))
    out.sum().backward()
    assert out.dtype == getattr(torch, dtype) and layer.weight.grad.dtype == torch.float32


def test_the_date_of_a_run_is_that_in_its_folder(tmp_path):
    today = datetime.date.today().isoformat()
    assert date_of_run(tmp_path, "") == today and date_of_run(tmp_path / "none", "2026-11-26") == "2026-11-26"
    (tmp_path / "settings.json").write_text('{"date": "2026-11-25"}')
    assert date_of_run(tmp_path, "") == "2026-11-25" and date_of_run(tmp_path, "2026-11-26") == "2026-11-26"
