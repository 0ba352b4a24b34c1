"""tests/bench/gpu.py still fits the code: each of its checks in small, on the CPU."""

from __future__ import annotations

import json

from tests.bench import gpu


def test_every_check_of_a_gpu_runs_on_the_cpu(tmp_path):
    checks = [name for name in gpu.CHECKS if name != "stages"]
    found = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--scale", "tiny", "--only", *checks])
    assert not {name: check for name, check in found.items() if "error" in check} and [*found] == checks
    assert found["draws"]["uniform_equal"] and found["draws"]["rare_drawn"] == 0
    assert {value for name, value in found["greedy"].items() if "equal" in name} == {1.0}
    assert found["fsdp"]["sharded_sample_equal"] and found["fsdp"]["offloaded_sample_equal"]
    assert [*json.loads((tmp_path / "gpu.json").read_text())] == [*found]
