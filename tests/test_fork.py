"""The worked examples of docs/course.md, "to change X, edit Y", as they stand there: short, and they run."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from stages import RL, flags, metrics_of, rl_flags, run_here

from lib.attacks import asking, table
from lib.run.files import read_jsonl
from lib.sandbox import world
from lib.sources import known

PAGE = (Path(__file__).parent.parent / "docs/course.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.S))


def add(module, name: str, code: str, monkeypatch) -> None:
    """As if the code stood at the end of the module, until the test ends."""
    monkeypatch.setattr(module, name, None, raising=False)
    exec(code, vars(module))


def test_each_is_short():
    own = {"lib/sources/known.py", "lib/attacks/asking.py", "lib/attacks/table.py"}
    assert set(BLOCKS) == own | {"my_judge.py", f"{RL}.py"}
    assert all(code.count("\n") <= 20 for code in BLOCKS.values())


def test_another_reward(data, tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(BLOCKS["my_judge.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    run_here(RL, rl_flags(data, tmp_path / "rl", judge="my_judge", epochs=0.2), monkeypatch)
    assert 0 < metrics_of(tmp_path / "rl")[0]["reward"] < 1


def test_another_objective(data, tmp_path, monkeypatch):
    stage = importlib.import_module(RL)
    source = inspect.getsource(stage.grpo_loss)
    changed = re.sub(r"    ratio = .*\n", lambda _: BLOCKS[f"{RL}.py"], source)
    assert changed != source
    add(stage, "grpo_loss", changed, monkeypatch)
    logprobs, zeros = torch.tensor([[0.3, 0.0], [0.1, 0.0]], requires_grad=True), torch.zeros(2, 2)
    mask, ones = torch.tensor([[True, True], [True, False]]), torch.ones(2)
    stage.grpo_loss(logprobs, zeros, zeros, ones, mask, ones, stage.Settings(kl_coef=0.0)).backward()
    slopes = logprobs.grad.flatten().tolist()  # 0.3 alone would be clipped; both have the mean, 0.15
    assert slopes == pytest.approx([-1.16183, -1.16183, -1.10517, 0.0], abs=1e-4)
    run_here(RL, rl_flags(data, tmp_path / "rl", epochs=0.2, updates_per_batch=2), monkeypatch)
    assert metrics_of(tmp_path / "rl")


def test_another_data_set(tmp_path, monkeypatch):
    monkeypatch.setitem(known.KNOWN, "tickets", None)
    add(known, "tickets", BLOCKS["lib/sources/known.py"], monkeypatch)
    rows = [f"en,{'yes' if i % 2 else 'no'},my number {i} is lost" for i in range(40)]
    (tmp_path / "tickets.csv").write_text("\n".join(["language,refused,text", *rows, "de,no,hallo"]))
    command = next(line for line in PAGE.splitlines() if "tickets@tickets.csv" in line).split()
    monkeypatch.chdir(tmp_path)
    words = [*command[2:], *flags(out=tmp_path / "data", rl_prompts=8, eval_prompts=4)]
    run_here("01_build_mixture", words, monkeypatch)
    kinds = [record["kind"] for record in read_jsonl(tmp_path / "data/rl.jsonl")]
    assert sorted(kinds) == ["harmful"] * 4 + ["harmless"] * 4


def test_another_attack(tmp_path, monkeypatch):
    monkeypatch.setitem(table.ATTACKS, "twice", None)
    add(asking, "twice", BLOCKS["lib/attacks/asking.py"], monkeypatch)
    exec(BLOCKS["lib/attacks/table.py"], vars(table))
    small = flags(preset="sandbox", rl_prompts=8, sft_prompts=2, eval_prompts=3, out=tmp_path / "data")
    run_here("01_build_mixture", small, monkeypatch)
    monkeypatch.delitem(sys.modules, "04_attack_eval", raising=False)  # it is read anew, with the attack
    stage = importlib.import_module("04_attack_eval")
    monkeypatch.setattr(stage, "write_report", lambda *given: None)
    words = flags(
        attacks="twice", models=f"base={world.BASE}", no_reasoning="base", behaviours=2, device="cpu"
    )
    words += flags(data=tmp_path / "data", out=tmp_path / "eval", max_new_tokens=8, preset="sandbox")
    run_here("04_attack_eval", words, monkeypatch)
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results["models"]["base"]["dsr"]["twice"]["n"] == 2
