"""`--preset open`, the recipe for one card: its four stages on tiny random models of its architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stages
from judge_models import QWEN, make_judge, make_model
from transformers import Qwen2Config

MIXTURE, EVAL = "01_build_mixture", "04_attack_eval"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict[str, list[str]]:
    """Flags of each stage: smaller numbers; files and models where the preset has names of the hub."""
    folder = tmp_path_factory.mktemp("open")
    unsafe = {"prompt_label": "unsafe", "violated_categories": "x"}
    files = {
        "aegis.jsonl": [unsafe | {"prompt": f"bad {i}"} for i in range(9)],
        "ultrafeedback.jsonl": [{"prompt": f"good {i}", "prompt_id": f"u{i}"} for i in range(20)],
        "or-bench.jsonl": [{"prompt": f"odd {i}", "category": "x"} for i in range(20)],
        "xstest.jsonl": [{"prompt": f"strange {i}", "type": "homonyms", "label": "safe"} for i in range(4)],
        "star1.jsonl": [
            {"question": f"harm {i}", "response": f"<think>Hm {i}.</think>I can not.", "category": ["x"]}
            for i in range(8)
        ],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "or-bench-hard-1k.csv").write_text("prompt,category\nodd 3,x\n")
    evil = "".join(f"evil {i},x,b{i}\n" for i in range(3))
    (folder / "harmbench_behaviors.csv").write_text(f"Behavior,SemanticCategory,BehaviorID\n{evil}")
    (folder / "harmbench_targets.json").write_text(json.dumps({f"b{i}": "Sure, here is" for i in range(3)}))
    spaced = [("\u0120", letter) for letter in "!?abcdefgh"]  # a suffix is of words, such as " !"
    policy = make_model(folder / "policy", Qwen2Config, QWEN, CHATML, merges=spaced)
    guard = make_judge("qwen3guard", folder / "guard")
    reward = make_judge("skywork", folder / "reward")
    judge, data = f"qwen3guard={guard}+skywork={reward}", folder / "data"
    named = {"harmful": "aegis", "harmless": "ultrafeedback", "ambiguous": "or-bench"}
    sources = [f"{kind}={name}@{folder}/{name}.jsonl" for kind, name in named.items()]
    tests = [
        f"harmful=harmbench@{folder}/harmbench_behaviors.csv",
        f"ambiguous=xstest@{folder}/xstest.jsonl",
    ]
    each = {
        MIXTURE: {"out": data, "files": sources, "eval_files": tests, "rl_prompts": 16, "sft_prompts": 8}
        | {"trace_files": f"star1@{folder}/star1.jsonl"},
        stages.SFT: {"data": data, "model": policy, "out": folder / "sft", "epochs": 1, "batch_size": 8},
        stages.RL: {"data": data, "model": folder / "sft", "out": folder / "rl", "judge": judge}
        | {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 12, "epochs": 0.5},
        EVAL: {"data": data, "out": folder / "eval", "judge": judge, "gcg_steps": 2, "behaviours": 1}
        | {"models": [f"base={policy}", f"tars={folder / 'rl'}"], "max_new_tokens": 12},
    }
    return {stage: stages.flags(preset="open", device="cpu", **values) for stage, values in each.items()}


def test_the_four_stages_run_on_the_architectures_of_the_recipe(words, monkeypatch):
    for stage, flags in words.items():
        stages.run_here(stage, flags, monkeypatch)
    folder = Path(words[EVAL][words[EVAL].index("--out") + 1])
    lines = [json.loads(line) for line in (folder.parent / "rl" / "metrics.jsonl").open()]
    assert len(lines) == 2 and all(line["unknown_verdicts"] == 0 for line in lines)
    results = json.loads((folder / "results.json").read_text())["models"]
    assert set(results) == {"base", "tars"} and "gcg" in results["tars"]["dsr"]
    assert (
        results["tars"]["task_score"]["harmless"]["n"]
        and results["tars"]["compliance"]["ambiguous"]["n"] == 4
    )
