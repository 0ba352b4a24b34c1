"""What a user can get wrong: one line that says what to do, and nothing of an earlier run is touched."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import stages
from stages import RL, SFT, contents, launch, messages, metrics_of, rl_flags, run_here, sft_flags

from lib.run.files import append_jsonl, write_jsonl
from lib.run.folder import lock_folder
from lib.sandbox import world

MIXTURE, EVAL = "01_build_mixture", "04_attack_eval"
FLAGS = {RL: rl_flags, SFT: sft_flags}
FILE = {RL: "rl.jsonl", SFT: "sft.jsonl"}
BASE = f"--models it={world.BASE}"


@pytest.fixture
def fails(monkeypatch, capsys):
    """fails(stage, words, *fragments): it ends in one line that holds the fragments."""

    def check(stage: str, words: list[str], *fragments: object) -> str:
        line = stages.error_of(stage, words, monkeypatch, capsys)
        assert all(str(fragment) in line for fragment in fragments), line
        return line

    return check


# ---- flags: a stage, its words, what the line says ----

WORDS = [
    (RL, "--shard", "--shard: there is one process; start several with torchrun"),
    (RL, "--offload", "--offload: moves shards, so it needs --shard"),
    (MIXTURE, "--source files", "--files"),
    (EVAL, "--models runs/rl", "--models: given runs/rl; allowed NAME=FOLDER"),
    (EVAL, f"{BASE} --no-reasoning other", "--no-reasoning: given other; allowed the names in --models: it"),
    (EVAL, f"{BASE} --data none", "eval_harmful.jsonl: no such file"),
]


@pytest.mark.parametrize("stage, words, fragment", WORDS)
def test_flag(stage, words, fragment, fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(stage, words.split(), fragment)
    assert not contents(tmp_path)


# ---- data: a stage, lines behind a good one, what the error says ----

TRACE = {"id": "x", "prompt": "how ?", "reasoning": "so .", "answer": "so ."}
LONG = [TRACE | {"id": f"x-{i}", "answer": "cake " * 600} for i in range(2)]  # RL's: tests/test_rl.py
LINES = [
    (SFT, LONG, "2 of 3 have more than the 512 tokens that fit, such as x-0 (6"),
    (RL, [{"id": "x", "prompt": "how ?", "kind": "evil"}], "x: kind is 'evil'; allowed: harmful, harmless"),
    (SFT, [TRACE | {"id": 5, "reasoning": 6}], "sft.jsonl:2: 5: reasoning is 6"),
]


@pytest.mark.parametrize("stage, bad, fragment", LINES)
def test_line_of_data(stage, bad, fragment, data, tmp_path, fails):
    good = (data / FILE[stage]).read_text().splitlines()[:1]
    (tmp_path / FILE[stage]).write_text("\n".join(good + [json.dumps(line) for line in bad]))
    before = contents(tmp_path)
    fails(stage, FLAGS[stage](tmp_path, tmp_path / "out"), fragment)
    assert contents(tmp_path) == before
    fails(stage, FLAGS[stage](tmp_path / "absent", tmp_path / "out"), tmp_path / "absent", "no such file")


def test_requests_to_evaluate(tmp_path, fails):
    request = {"id": "a", "prompt": "how ?", "kind": "harmful", "category": "", "target": "so", "twin": []}
    write_jsonl(tmp_path / "eval_harmful.jsonl", [request])
    fails(EVAL, f"--data {tmp_path} --out {tmp_path}/eval {BASE}".split(), "jsonl:1: a: twin is []")
    assert not (tmp_path / "eval").exists()


LIMITS = [(RL, "max_sample_tokens", 30), (RL, "max_new_tokens", 500), (SFT, "max_batch_tokens", 40)]


@pytest.mark.parametrize("stage, name, most", LIMITS)
def test_limits_too_tight_for_the_data(stage, name, most, data, tmp_path, fails):
    words = FLAGS[stage](data, tmp_path / "out", **{name: most})
    fails(stage, words, f"--{name.replace('_', '-')}", "tokens", "fit")
    assert not (tmp_path / "out").exists()


# ---- models ----


MODELS = [(SFT, "config.json", "cannot load a model"), (RL, "chat_template.jinja", "no chat template")]


@pytest.mark.parametrize("stage, without, fragment", MODELS)
def test_model_that_cannot_be_used(stage, without, fragment, data, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("lib.run.hub.HfApi.model_info", Mock(side_effect=OSError("no network")))
    shutil.copytree(world.BASE, model := tmp_path / "model")
    (model / without).unlink()
    fails(stage, FLAGS[stage](data, tmp_path / "out", model=model), model, fragment)
    fails(stage, FLAGS[stage](data, tmp_path / "out", model="me/mine"), "me/mine", "from the hub")
    assert not (tmp_path / "out").exists()


def test_rl_goes_on_as_sft_began(data, tmp_path, fails):
    (tmp_path / "settings.json").write_text('{"reasoning": true}')
    fails(RL, rl_flags(data, tmp_path / "out", model=tmp_path), "--no-reasoning: ", tmp_path)


# ---- output folders ----


@pytest.mark.parametrize("stage, usual", [(RL, {"epochs": 0.25}), (SFT, {"epochs": 1})])
def test_a_finished_run_is_kept_whatever_is_wrong_next(stage, usual, data, tmp_path, fails, monkeypatch):
    copy, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
    words = FLAGS[stage](copy, out, **usual)
    run_here(stage, words, monkeypatch)
    before, anew = contents(out), FLAGS[stage](copy, out, **usual, learning_rate=0.5)
    for mistake in ("--model absent/absent/absent", "--max-batch-tokens 16", "--data absent"):
        fails(stage, [*anew, "--overwrite", *mistake.split()])
    monkeypatch.delattr(importlib.import_module(stage), "load_tokenizer")  # nothing is loaded from here on
    fails(stage, anew, out, "--learning-rate 0.001, now 0.5", "--overwrite")
    with pytest.raises(SystemExit) as end:  # the very same run is finished, and says so
        run_here(stage, words, monkeypatch)
    assert not end.value.code
    lines = (copy / FILE[stage]).read_text().splitlines(keepends=True)
    (copy / FILE[stage]).write_text("".join(lines[::-1]))
    fails(stage, words, f"sha256 of {copy / FILE[stage]}", "--overwrite")  # other inputs
    assert contents(out) == before


def test_a_folder_that_cannot_be_written(tmp_path, fails, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for out, fragment in (("file", "File exists"), ("file/below/it", "Not a directory")):
        fails(MIXTURE, ["--out", out], "--out", fragment)
    assert contents(tmp_path) == {"file": b"mine"}


# ---- disks, and broken numbers on the way ----


def interrupted(out: Path, stage: str, words: list[str], fails, *fragments) -> None:
    """A run that fails on its way: it leaves a resume point, and no half-written file."""
    fails(stage, words, *fragments)
    assert not any(name.endswith(".tmp") for name in contents(out)) and "progress.pt" in contents(out)


def test_disk_fills_up_on_the_way_and_the_run_resumes_when_there_is_room(data, tmp_path, fails, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    run_here(RL, rl_flags(data, one, epochs=0.9, save_every=1), monkeypatch)
    words = rl_flags(data, other, epochs=0.9, save_every=1)

    def full(path, record):
        if record["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append_jsonl(path, record)

    with monkeypatch.context() as patch:
        patch.setattr("lib.run.plumbing.append_jsonl", full)
        interrupted(other, RL, words, fails, "No space left", "metrics.jsonl")

    def full_at_the_end(source, target, replace=os.replace):  # through which all files but logs are written
        if "model.safetensors" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_at_the_end)
        interrupted(other, RL, words, fails, "No space left", "model.safetensors")
    run_here(RL, words, monkeypatch)
    assert stages.same_run(one, other)


@pytest.mark.parametrize("stage, name", [(SFT, "loss is nan"), (RL, "not finite")])
def test_a_rate_that_blows_the_weights_up(stage, name, data, tmp_path, fails, monkeypatch):
    def far_too_high(optimizer, *_):
        optimizer.param_groups[0]["lr"] = 1e30

    monkeypatch.setattr("lib.run.plumbing.set_learning_rate", far_too_high)
    words = FLAGS[stage](data, tmp_path / "out", save_every=1)
    interrupted(tmp_path / "out", stage, words, fails, "step 1", name, "checkpoint", "--learning-rate")
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [0]


# ---- one run at a time ----


def test_torchruns_processes_all_end_when_the_folder_is_taken(data, tmp_path):
    lock_folder(tmp_path / "rl")
    group = stages.run_group(RL, rl_flags(data, tmp_path / "rl"), tmp_path / "log")
    for process in group:
        process.join(stages.PATIENCE)
    assert [process.exitcode for process in group] == [2, 2]
    (leader,), (other,) = (messages((tmp_path / f"log.{rank}").read_text())[-1:] for rank in (0, 1))
    assert "a run is writing there" in leader and "lost another process of this run" in other


# ---- as a user sees it ----


def test_ctrl_c_says_that_the_run_can_go_on_and_a_second_one_changes_nothing(data, tmp_path):
    log = tmp_path / "log"
    process = launch(RL, rl_flags(data, tmp_path / "rl", epochs=9.0), log)
    stages.wait_for_lines(tmp_path / "rl" / "metrics.jsonl", 2, process)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):  # it was quick to end
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)
    process.join(stages.PATIENCE)
    (line,) = messages(log.read_text())
    assert process.exitcode == 130 and "run the same command again" in line


def test_printed_commands_lead_through_the_chapters_and_keep_what_was_given(tmp_path, monkeypatch, capsys):
    """As a shell reads them, which must not run what stands in a name."""
    odd = tmp_path / "my runs $(touch ran) `touch ran`; 'x'"
    small = {"rl_prompts": 16, "sft_prompts": 16, "eval_prompts": 2}
    stage, words = MIXTURE, stages.flags(out=odd / "data", seed=7, **small)
    more = {SFT: [], RL: ["--judge", "stages", "--max-new-tokens", "8"], EVAL: ["--behaviours", "0"]}
    for following, added in more.items():
        capsys.readouterr()
        run_here(stage, words, monkeypatch)
        printed = capsys.readouterr().out.strip().splitlines()[-1].partition("ext: ")[2]
        assert printed.startswith(f"python {following}.py --preset sandbox ")
        echo = ["sh", "-c", f"printf '%s\\n' {printed}"]
        shell = subprocess.run(echo, cwd=tmp_path, capture_output=True, text=True, check=True)
        stage, words = following, [*shell.stdout.splitlines()[2:], *added]
    expected = {"--judge": "stages", "--seed": "7", "--data": f"{odd}/data", "--models": f"rl={odd}/rl"}
    assert {flag: words[words.index(flag) + 1] for flag in expected} == expected
    run_here(EVAL, words, monkeypatch)
    assert (odd / "eval-rl" / "results.json").exists() and not list(tmp_path.glob("**/ran"))
