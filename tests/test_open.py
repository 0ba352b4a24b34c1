"""`--preset open`, the recipe for one card: its four stages on tiny random models of its architectures."""

from __future__ import annotations

import json
from pathlib import Path

import stages
from judge_models import QWEN, make_judge, make_model
from transformers import Qwen2Config

from lib.rewards import KINDS
from lib.run.files import read_jsonl, write_jsonl

MIXTURE, EVAL = "01_build_mixture", "04_attack_eval"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def flags_of_stages(folder: Path) -> dict[str, list[str]]:
    """Smaller numbers; files and models where the preset has names of the hub."""
    rows = [{"prompt": f"{kind} {i}", "kind": kind} for kind in KINDS for i in range(20)]
    asked = [{"prompt": f"evil {i}", "kind": "harmful", "target": "Sure, here is"} for i in range(3)]
    asked += [{"prompt": f"strange {i}", "kind": "ambiguous"} for i in range(4)]
    traces = [{"prompt": f"harm {i}", "reasoning": f"Hm {i}.", "answer": "I can not."} for i in range(8)]
    files = {name: folder / f"{name}.jsonl" for name in ("files", "eval_files", "trace_files")}
    for path, lines in zip(files.values(), (rows, asked, traces), strict=True):
        write_jsonl(path, lines)
    spaced = [("\u0120", letter) for letter in "!?abcdefgh"]  # a suffix is of words, such as " !"
    policy = make_model(folder / "policy", Qwen2Config, QWEN, CHATML, merges=spaced)
    guard = make_judge("qwen3guard", folder / "guard")
    reward = make_judge("skywork", folder / "reward")
    judge, data = f"qwen3guard={guard}+skywork={reward}", folder / "data"
    each = {
        MIXTURE: {"out": data, **files, "rl_prompts": 16, "sft_prompts": 8},
        stages.SFT: {"data": data, "model": policy, "out": folder / "sft", "epochs": 1, "batch_size": 8},
        stages.RL: {"data": data, "model": folder / "sft", "out": folder / "rl", "judge": judge}
        | {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 12, "epochs": 0.5},
        EVAL: {"data": data, "out": folder / "eval", "judge": judge, "gcg_steps": 2, "behaviours": 1}
        | {"models": [f"base={policy}", f"tars={folder / 'rl'}"], "max_new_tokens": 12},
    }
    return {stage: stages.flags(preset="open", device="cpu", **values) for stage, values in each.items()}


def test_the_four_stages_run_on_the_architectures_of_the_recipe(tmp_path, monkeypatch):
    for stage, flags in flags_of_stages(tmp_path).items():
        stages.run_here(stage, flags, monkeypatch)
    lines = read_jsonl(tmp_path / "rl" / "metrics.jsonl")
    assert len(lines) == 2 and all(line["unknown_verdicts"] == 0 for line in lines)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())["models"]
    assert set(results) == {"base", "tars"} and "gcg" in results["tars"]["dsr"]
    assert results["tars"]["task_score"]["harmless"]["n"]
    assert results["tars"]["compliance"]["ambiguous"]["n"] == 4
