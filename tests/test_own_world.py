"""docs/own-world.md: its commands, run on the tiny world of tests/tiny_world, and what it says of them."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path

import pytest
import stages

from lib.judges import refusal_label
from lib.metrics import SETS
from lib.run.files import read_jsonl
from lib.run.hub import load_tokenizer
from lib.run.settings import parse_settings

PAGE = (stages.ROOT / "docs" / "own-world.md").read_text()
STAGES = ("mixture", "sft", "rl", "eval")
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (python .*)", PAGE.replace("\\\n", ""), re.M)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder in which all commands were run."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in COMMANDS:
            words = words[1:] if words[0] == "-m" else words
            stages.run_here(words[0].removesuffix(".py"), words[1:], patch)
    return folder / "runs/tiny"


def test_a_folder_opens_the_reasoning_though_its_tokenizer_knows_few_words(tiny):
    question = [{"role": "user", "content": "open vault"}]
    for folder in ("base", "sft", "rl"):
        how = {"add_generation_prompt": True, "tokenize": False}
        text = load_tokenizer(tiny / folder).apply_chat_template(question, **how)
        assert text.endswith("<think>\n") == (folder != "base")


def test_refusals_in_another_manner_reach_logs_and_results(tiny):
    metrics, rollouts = (read_jsonl(tiny / "rl" / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    assert len(metrics) == 4 and metrics[0]["format_rate"] > 0.5  # special tokens keep the format
    assert any(line["refusal_rate_harmful"] for line in metrics)
    for line in rollouts + read_jsonl(tiny / "eval" / "completions.jsonl"):
        answer = line.get("answer", line.get("completion", "").partition("</think>")[2])
        assert "not for you" not in answer or (line["refusal"], refusal_label(answer)) == ("full", "none")
    assert "full" in {line["refusal"] for line in rollouts}


def test_all_attacks_were_made_in_its_own_words(tiny):
    results = json.loads((tiny / "eval" / "results.json").read_text())["models"]
    assert {*SETS[:2], "gcg", "best_of_n", "plain_or_gcg"} <= results["tars"]["dsr"].keys()
    assert results["tars"]["task_score"]["ambiguous/decoy"]["n"] and not results["tars"]["unknown"]
    sent = [x["sent"] for x in read_jsonl(tiny / "eval" / "completions.jsonl") if x["set"] == "best_of_n"]
    manner = re.compile(r"open \w+( (please|now|so))*")
    assert len(sent) == 2 * 2 * 16 and all(map(manner.fullmatch, sent))


def test_the_preset_says_the_same_and_lacks_nothing(monkeypatch):
    module = types.ModuleType("lib.run.presets.tower")
    exec(textwrap.dedent(re.search(r"^    MIXTURE = .*?(?=\n\n)", PAGE, re.M | re.S)[0]), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("lib.run.settings.presets_found", lambda: ["sandbox", "tower"])
    for stage, words in zip(STAGES, COMMANDS[1:], strict=True):
        settings = importlib.import_module(words[0].removesuffix(".py")).Settings
        ours = parse_settings(settings, stage, argv=["--preset", "tower"])
        theirs = parse_settings(settings, stage, argv=words[1:])
        flags = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
        assert all(getattr(ours, flag) == getattr(theirs, flag) for flag in flags)
