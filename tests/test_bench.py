"""tests/bench still fits the code: each benchmark in small, on the CPU."""

from __future__ import annotations

import json

from tests.bench import families, gpu


def test_every_check_of_a_gpu_runs_on_the_cpu(tmp_path):
    found = gpu.main(["--out", str(tmp_path), "--device", "cpu", "--scale", "tiny", "--skip", "stages"])
    errors = {name: check for name, check in found.items() if "error" in check}
    assert not errors and [*found] == [name for name in gpu.CHECKS if name != "stages"]
    assert found["draws"]["uniform_equal"] and found["draws"]["rare_drawn"] == 0
    assert {value for name, value in found["greedy"].items() if "equal" in name} == {1.0}
    assert found["fsdp"]["sharded_sample_equal"] and found["fsdp"]["offloaded_sample_equal"]
    assert [*json.loads((tmp_path / "gpu.json").read_text())] == [*found]


def test_a_family_that_is_exact_and_one_that_is_refused(monkeypatch):
    monkeypatch.setattr(families, "NEW", 3)
    assert families.examine("qwen2") == dict.fromkeys(families.CHECKS, "ok")
    assert families.examine("jamba")["load"].startswith("REFUSED: ")
