"""What a user can get wrong: one line that says what and what to do, exit code 2, and nothing overwritten."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages
import torch
from safetensors.torch import load_file, save_file
from stages import (
    RL,
    SFT,
    contents,
    error_of,
    flags,
    launch,
    messages,
    metrics_of,
    rl_flags,
    run_here,
    sft_flags,
)

from lib.chat import encode_example, encode_prompt
from lib.run.command import Flags
from lib.run.files import read_jsonl, write_jsonl
from lib.run.hub import load_tokenizer
from lib.run.processes import Processes
from lib.run.settings import model_and_out, next_command, parse_settings
from lib.sandbox import world

MIXTURE, EVAL = "01_build_mixture", "04_attack_eval"
FLAGS = {RL: rl_flags, SFT: sft_flags}
FILE = {RL: "rl.jsonl", SFT: "sft.jsonl"}


@pytest.fixture
def fails(monkeypatch, capsys):
    """fails(stage, words, *fragments): it ends in one line that holds the fragments."""

    def check(stage: str, words: list[str], *fragments: object) -> str:
        line = error_of(stage, words, monkeypatch, capsys)
        assert all(str(fragment) in line for fragment in fragments), line
        return line

    return check


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, words, fragments",
    [
        (RL, "--preset sandbx", ("--preset: given sandbx; allowed", "sandbox")),
        (RL, "--group-size 1", ("--group-size: given 1; allowed a whole number from 2 to 1000",)),
        (RL, "--group-size 4.5", ("--group-size: given 4.5",)),
        (RL, "--temperature 0", ("--temperature: given 0", "0.01")),
        (RL, "--learning-rate -0.5", ("--learning-rate: given -0.5", "from 0 to 1")),
        (RL, "--learning-rate nan", ("--learning-rate: given nan",)),
        (EVAL, "--attacks gcg magic", ("--attacks: given gcg magic; allowed all | random_suffix | gcg",)),
        (RL, "--learning-rate fast", ("--learning-rate: given fast; allowed a number",)),
        (
            RL,
            "--normalisation tokens",
            ("--normalisation: given tokens; allowed token | sequence | constant",),
        ),
        (RL, "--kl-estimator k4", ("--kl-estimator: given k4", "k1 | k2 | k3")),
        (RL, "--group-sise 4", ("--group-sise: no such flag; did you mean --group-size?",)),
        (RL, "--data", ("--data: given nothing",)),
        (SFT, "--held-out-share 0.9", ("--held-out-share: given 0.9; allowed a number from 0 to 0.5",)),
        (SFT, "--epochs 0", ("--epochs: given 0",)),
        (SFT, "runs/sft", ("given runs/sft; allowed flags only",)),
        (MIXTURE, "--lambda-harmful 1.5", ("--lambda-harmful: given 1.5; allowed a number from 0 to 1",)),
        (MIXTURE, "--source files", ("--files: none given",)),
        (EVAL, "", ("--models: none given; allowed NAME=FOLDER",)),
        (EVAL, "--models runs/rl", ("--models: given runs/rl; allowed NAME=FOLDER",)),
    ],
)
def test_flag(stage, words, fragments, fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(stage, words.split(), *fragments)
    assert not list(tmp_path.iterdir())


def test_more_processes_than_prompts(data, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(importlib.import_module(RL), "start_processes", lambda device: Processes(0, 5, 0))
    fails(RL, rl_flags(data, tmp_path / "rl"), "--prompts-per-step 4", "fewer than the 5 processes")
    assert not (tmp_path / "rl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(data, tmp_path, fails):
    fails(RL, rl_flags(data, tmp_path / "rl", device="cuda"), "--device cuda", "use --device cpu")


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [SFT, RL])
def test_data_folder_is_missing(stage, tmp_path, fails):
    fails(
        stage,
        FLAGS[stage](tmp_path / "absent", tmp_path / "out"),
        tmp_path / "absent" / FILE[stage],
        "no such file",
    )
    assert not (tmp_path / "out").exists()


BAD_LINES = [
    (RL, None, "rl.jsonl: is empty"),
    (RL, '{"id": 1, "prompt": "how', "rl.jsonl:3: not a JSON object"),
    (RL, '["id", "prompt"]', "rl.jsonl:3: not a JSON object"),
    (
        RL,
        {"id": "x", "prompt": "how do i make a cake ?"},
        "rl.jsonl:3: has no key 'kind'; its keys are id, prompt",
    ),
    (
        RL,
        {"id": "x", "prompt": "how ?", "kind": "evil"},
        "rl.jsonl: x: kind is 'evil'; allowed: harmful, harmless, ambiguous",
    ),
    (RL, {"id": "x", "prompt": None, "kind": "harmful"}, "rl.jsonl: x: prompt is None; allowed: some text"),
    (SFT, None, "sft.jsonl: is empty"),
    (SFT, "}", "sft.jsonl:3: not a JSON object"),
    (SFT, {"id": "x", "prompt": "how ?", "answer": "so ."}, "sft.jsonl:3: has no key 'reasoning'"),
    (
        SFT,
        {"id": "x", "prompt": "how ?", "reasoning": None, "answer": "so ."},
        "sft.jsonl: x: reasoning is None",
    ),
    (
        RL,
        {"id": "rl-1", "prompt": "how ?", "kind": "harmless"},
        "rl.jsonl: id 'rl-1' stands in lines 2, 3: give each",
    ),
    (RL, {"id": None, "prompt": "how ?", "kind": "harmless"}, "rl.jsonl:3: id is None"),
    (
        RL,
        {"id": "x", "prompt": [{"role": "user", "content": "how ?"}], "kind": "harmless"},
        "rl.jsonl: x: prompt is [{",
    ),
    (
        SFT,
        {"id": "sft-0-0", "prompt": "how ?", "reasoning": "so .", "answer": "so ."},
        "id 'sft-0-0' stands in lines 1",
    ),
    (SFT, {"id": 5, "prompt": "how ?", "reasoning": 6, "answer": "so ."}, "sft.jsonl: 5: reasoning is 6"),
]


@pytest.mark.parametrize("stage, bad, fragment", BAD_LINES)
def test_line_of_data(stage, bad, fragment, data, tmp_path, fails):
    good = (data / FILE[stage]).read_text().splitlines()[:2]
    lines = [] if bad is None else [*good, bad if isinstance(bad, str) else json.dumps(bad)]
    (tmp_path / FILE[stage]).write_text("\n".join(lines))
    before = contents(tmp_path)
    fails(stage, FLAGS[stage](tmp_path, tmp_path / "out"), fragment)
    assert contents(tmp_path) == before  # nor was the folder made


def test_text_that_is_none_reaches_no_tokenizer(data, tmp_path):
    """A lone surrogate, which ended stages 2 to 4 in a TypeError, and a null byte: each is one U+FFFD, in every stage alike."""
    broken, mended = "how \ud800 do\x00 i ?", "how \ufffd do\ufffd i ?"
    for name in ("direct", "harmless"):
        record = {
            "id": "x",
            "prompt": broken,
            "kind": "harmful" if name == "direct" else "harmless",
            "category": broken,
        }
        write_jsonl(tmp_path / importlib.import_module(EVAL).FILES[name], [record | {"target": broken}])
    write_jsonl(tmp_path / "rl.jsonl", [{"id": "x", "prompt": broken, "kind": "harmless"}])
    texts = {"prompt": broken, "reasoning": broken, "answer": broken}
    write_jsonl(tmp_path / "sft.jsonl", [{"id": "x", **texts}, {"id": "y", **texts, "answer": "so ."}])
    tokenizer, rl, sft, evaluation = (
        load_tokenizer(str(world.BASE)),
        *map(importlib.import_module, (RL, SFT, EVAL)),
    )
    [prompt] = rl.load_prompts(rl.Settings(data=str(tmp_path), max_new_tokens=8), tokenizer, 512)
    assert prompt["prompt"] == mended and prompt["prompt_ids"] == encode_prompt(
        tokenizer, mended, reasoning=True
    )
    train, _ = sft.load_examples(sft.Settings(data=str(tmp_path), held_out_share=0.0), tokenizer, 512)
    assert train[0].ids == encode_example(tokenizer, mended, mended, mended)[0] and len(train) == 2
    sets, _ = evaluation.read_sets(evaluation.EvalSettings(data=str(tmp_path)), ["gcg"])
    assert all(
        r[key] == mended
        for records in sets.values()
        for r in records
        for key in ("prompt", "category", "target")
    )


@pytest.mark.parametrize(
    "lines, fragment",
    [
        (
            [{"id": "a", "harm": h} for h in (1, 1, 1, 0)],
            "eval_harmful.jsonl: id 'a' stands in lines 1, 2, 3, 4: give each",
        ),
        ([{"id": 1}, {"id": "1"}], "eval_harmful.jsonl: id '1' stands in lines 1, 2"),
        (
            [{"id": "a", "kind": "evil"}],
            "eval_harmful.jsonl: a: kind is 'evil'; allowed: harmful, harmless, ambiguous",
        ),
        ([{"id": "a", "prompt": " "}], "eval_harmful.jsonl: a: prompt is ' '; allowed: some text"),
        ([{"id": "a", "target": 7}], "eval_harmful.jsonl: a: target is 7; allowed: some text"),
        ([{"id": "a", "twin": ["how ?"]}], "eval_harmful.jsonl: a: twin is ['how ?']"),
        ([{"id": "a", "prefill": 7}], "eval_harmful.jsonl: a: prefill is 7"),
    ],
)
def test_requests_to_evaluate(lines, fragment, tmp_path, fails):
    usual = {"prompt": "how ?", "kind": "harmful", "category": "", "target": "so"}
    write_jsonl(tmp_path / "eval_harmful.jsonl", [usual | line for line in lines])
    write_jsonl(tmp_path / "eval_harmless.jsonl", [usual | {"id": "h", "kind": "harmless"}])
    fails(EVAL, f"--data {tmp_path} --out {tmp_path}/eval --models it={world.BASE}".split(), fragment)
    assert not (tmp_path / "eval").exists()


LONG = [  # of a file in which 2 of 3 are too long
    (
        RL,
        {"prompt": "cake " * 498, "kind": "harmless"},
        "rl.jsonl: prompts: 2 of 3 have more than the 500 tokens",
    ),
    (RL, {"prompt": "cake " * 600, "kind": "harmless"}, "such as x-0 (60"),
    (RL, {"prompt": "cake " * 600, "kind": "harmless"}, "context 512"),
    (
        SFT,
        {"prompt": "how ?", "reasoning": "so .", "answer": "cake " * 600},
        "sft.jsonl: traces: 2 of 3 have more than the 512",
    ),
    (SFT, {"prompt": "how ?", "reasoning": "so .", "answer": "cake " * 600}, "context 512"),
]


@pytest.mark.parametrize("stage, bad, fragment", LONG)
def test_less_than_half_of_the_data_fits(stage, bad, fragment, data, tmp_path, fails):
    good = read_jsonl(data / FILE[stage])[:1]
    write_jsonl(tmp_path / FILE[stage], [*good, *({"id": f"x-{i}", **bad} for i in range(2))])
    before = contents(tmp_path)
    fails(stage, FLAGS[stage](tmp_path, tmp_path / "out"), fragment, "shorten them, or change a limit")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "limits",
    [{"max_prompt_tokens": 9}, {"max_batch_tokens": 30}, {"max_sample_tokens": 30}, {"max_new_tokens": 500}],
)
def test_limits_too_tight_for_the_prompts(limits, data, tmp_path, fails):
    fails(
        RL,
        rl_flags(data, tmp_path / "rl", **limits),
        f"--{next(iter(limits)).replace('_', '-')} ",
        "tokens",
        "fit",
    )


def test_traces_longer_than_a_batch(data, tmp_path, fails):
    fails(
        SFT,
        sft_flags(data, tmp_path / "sft", max_batch_tokens=40),
        "--max-batch-tokens 40",
        "traces: ",
        "sft-",
    )


def test_nothing_left_of_a_kind_that_the_mixture_needs(tmp_path, fails):
    harmless = world.build_pool("train", "harmless", 20, 0)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(i), **r} for i, r in enumerate(harmless)])
    words = f"--source files --files harmless={tmp_path}/prompts.jsonl --sft-prompts 0 --rl-prompts 10 --lambda-harmful 0.5"
    line = fails(MIXTURE, [*words.split(), "--out", str(tmp_path / "data")], "harmful")
    assert "lambda" in line and not (tmp_path / "data" / "rl.jsonl").exists()


BAD_FILES = {  # and what the error says of it
    "deep.jsonl": (b"[" * 10**5 + b"\n", "not a JSON object"),
    "long.jsonl": (b'{"id": ' + b"9" * 5000 + b', "prompt": "x"}\n', "not a JSON object"),
    "quota.jsonl:" + "9" * 5000: (None, "File name too long"),
    "x" * 5000 + ".jsonl": (None, "File name too long"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("flag", ["files", "trace_files"])
def test_file_of_prompts_that_is_none(flag, name, tmp_path, fails):
    content, fragment = BAD_FILES[name]
    if content:
        (tmp_path / name).write_bytes(content)
    more = {"source": "files", "sft_prompts": 0} if flag == "files" else {}
    fails(MIXTURE, flags(out=tmp_path / "data", **more, **{flag: tmp_path / name}), fragment)


def test_a_suffix_beyond_the_context_is_refused_before_it_is_searched(data, tmp_path, fails):
    for name in ("harmful", "harmless"):
        pool = world.build_pool("eval", name, 2, 0)
        write_jsonl(tmp_path / f"eval_{name}.jsonl", [{"id": f"{name}-{i}", **r} for i, r in enumerate(pool)])
    words = flags(
        data=tmp_path, out=tmp_path / "eval", models=f"base={world.BASE}", direct="base", behaviours=1
    )
    fails(
        EVAL,
        [*words, "--gcg-suffix-tokens", "490"],
        "--gcg-suffix-tokens: given 490",
        "can be sent 500 beside its answer",
    )
    run = tmp_path / "eval"
    assert not run.exists() or set(contents(run)) <= {"settings.json"}


# ---- models and judges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [SFT, RL])
def test_model_folder_that_is_none(stage, data, tmp_path, fails):
    (tmp_path / "model").mkdir()
    fails(
        stage,
        FLAGS[stage](data, tmp_path / "out", model=tmp_path / "model"),
        tmp_path / "model",
        "cannot load a tokenizer",
    )
    assert not (tmp_path / "out").exists()


def test_model_that_neither_the_disk_nor_the_hub_has(data, tmp_path, fails, monkeypatch):
    class NoHub:
        def model_info(self, *args, **kwargs):
            raise OSError("no network")

    monkeypatch.setattr("lib.run.hub.HfApi", NoHub)
    fails(
        RL,
        rl_flags(data, tmp_path / "out", model="runs/sftt"),
        "runs/sftt",
        "no folder here",
        "not to be had from the hub",
    )


@pytest.fixture
def model_copy(tmp_path) -> Path:
    return Path(shutil.copytree(world.BASE, tmp_path / "model"))


def test_model_without_weights(data, model_copy, tmp_path, fails):
    (model_copy / "model.safetensors").unlink()
    fails(SFT, sft_flags(data, tmp_path / "out", model=model_copy), model_copy, "safetensors")


def test_tokenizer_without_a_chat_template(data, model_copy, tmp_path, fails):
    (model_copy / "chat_template.jinja").unlink()
    fails(
        RL, rl_flags(data, tmp_path / "out", model=model_copy), model_copy, "no chat template", "take a chat"
    )


@pytest.mark.parametrize(
    "judge, fragments", [("gaurd", ("gaurd", "sandbox, standin")), ("json", ("no function harm_score",))]
)
def test_judge_that_is_none(judge, fragments, data, tmp_path, fails):
    fails(RL, rl_flags(data, tmp_path / "out", judge=judge), "--judge", *fragments)
    assert not (tmp_path / "out").exists()


def test_model_to_evaluate_that_is_none(data, tmp_path, fails):
    for name in ("harmful", "jailbreak", "harmless", "ambiguous"):
        pool = world.build_pool("eval", name, 2, 0)
        write_jsonl(tmp_path / f"eval_{name}.jsonl", [{"id": f"{name}-{i}", **r} for i, r in enumerate(pool)])
    (tmp_path / "model").mkdir()
    words = f"--data {tmp_path} --out {tmp_path}/eval --models it={tmp_path}/model"
    fails(EVAL, words.split(), tmp_path / "model", "cannot load")
    with (tmp_path / "eval_ambiguous.jsonl").open("a") as file:
        file.write('{"id": 7, "prompt": "how ?", "kind": "ambiguous", "category": null}\n')
    fails(EVAL, words.split(), "eval_ambiguous.jsonl: 7: category is None; allowed: some text")


# ---- output folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each stage; tests must leave them as they are."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        run_here(RL, rl_flags(data, folder / RL, epochs=0.25), patch)
        run_here(SFT, sft_flags(data, folder / SFT, epochs=1), patch)
    return {RL: folder / RL, SFT: folder / SFT}


@pytest.mark.parametrize("stage, usual", [(RL, {"epochs": 0.25}), (SFT, {"epochs": 1})])
def test_folder_of_another_run(stage, usual, finished, data, fails):
    out, before = finished[stage], contents(finished[stage])
    fails(
        stage,
        FLAGS[stage](data, out, **usual, learning_rate=0.5),
        out,
        "--learning-rate 0.001, now 0.5",
        "--overwrite",
    )
    assert contents(out) == before


def test_overwrite_with_a_mistake_elsewhere_costs_nothing(finished, data, tmp_path, fails):
    before = contents(finished[RL])
    for mistake in ({"model": tmp_path}, {"judge": "absent"}, {"max_new_tokens": 512}):
        fails(RL, rl_flags(data, finished[RL], epochs=0.25, overwrite=True, **mistake))
        assert contents(finished[RL]) == before
    fails(RL, rl_flags(tmp_path, finished[RL], epochs=0.25, overwrite=True), "no such file")
    assert contents(finished[RL]) == before


@pytest.mark.parametrize("stage, usual", [(RL, {"epochs": 0.25}), (SFT, {"epochs": 1})])
def test_inputs_that_changed_since(stage, usual, data, tmp_path, fails, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "data")
    words = FLAGS[stage](copy, tmp_path / "out", **usual)
    run_here(stage, words, monkeypatch)
    before = contents(tmp_path / "out")
    lines = (copy / FILE[stage]).read_text().splitlines(keepends=True)
    (copy / FILE[stage]).write_text("".join(lines[::-1]))
    fails(stage, words, f"sha256 of {copy / FILE[stage]}", "--overwrite")
    assert contents(tmp_path / "out") == before


def test_mixture_with_a_mistake_costs_no_earlier_one(tmp_path, fails, monkeypatch):
    words = f"--preset sandbox --out {tmp_path}/data --sft-prompts 4 --rl-prompts 8 --eval-prompts 4 --overwrite".split()
    run_here(MIXTURE, words, monkeypatch)
    before = contents(tmp_path / "data")
    for mistake in ("--source files --files harmful=none.csv", "--trace-files none.jsonl"):
        fails(MIXTURE, [*words, *mistake.split()])
        assert contents(tmp_path / "data") == before


def test_start_that_was_trained_the_other_way(data, model_copy, tmp_path, fails):
    (model_copy / "settings.json").write_text('{"reasoning": true}')
    words = rl_flags(data, tmp_path / "rl", model=model_copy)
    fails(RL, words, f"--no-reasoning: {model_copy} was trained the other way")


def test_sandbox_judge_on_other_prompts_and_no_judge_at_all(data, tmp_path, fails):
    copy = shutil.copytree(data, tmp_path / "data")
    write_jsonl(
        copy / "rl.jsonl", [{"id": str(i), "prompt": f"a cake {i} ?", "kind": "harmless"} for i in range(8)]
    )
    fails(
        RL, rl_flags(copy, tmp_path / "rl", judge="sandbox"), "--judge sandbox: not a prompt of the sandbox"
    )
    fails(RL, rl_flags(data, tmp_path / "other", judge=""), "--judge: none given")


def test_folder_that_is_no_run(data, tmp_path, fails):
    (tmp_path / "thesis.tex").write_text("years of work")
    fails(RL, rl_flags(data, tmp_path, overwrite=True), tmp_path, "no run of ours", "--out")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_settings_that_something_else_wrote(data, tmp_path, fails):
    (tmp_path / "settings.json").write_text("{}")
    fails(SFT, sft_flags(data, tmp_path, overwrite=True), "settings.json: not written by this program")
    assert contents(tmp_path) == {"settings.json": b"{}"}


def test_out_is_a_file(data, tmp_path, fails):
    (tmp_path / "out").write_text("mine")
    fails(RL, rl_flags(data, tmp_path / "out"), "--out", "a file")
    assert (tmp_path / "out").read_text() == "mine"


def break_writes(monkeypatch, number: int, names: str) -> None:
    """os.replace, through which every file but logs is written, fails for files of that name."""
    replace = os.replace

    def broken(source, target):
        if names in str(target):
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("stage", [SFT, RL])
def test_disk_that_is_full_or_read_only(stage, number, data, tmp_path, fails, monkeypatch):
    break_writes(monkeypatch, number, "settings.json")
    fails(stage, FLAGS[stage](data, tmp_path / "out"), os.strerror(number), "settings.json")
    assert not contents(tmp_path / "out")


@pytest.mark.skipif(
    os.name != "posix" or os.getuid() == 0, reason="the permissions of a folder do not bind root"
)
def test_read_only_folder(data, tmp_path, fails):
    tmp_path.chmod(0o500)
    try:
        fails(RL, rl_flags(data, tmp_path / "rl"), "Permission denied")
    finally:
        tmp_path.chmod(0o700)


def interrupted(data: Path, out: Path, stage: str, words: list[str], fails, *fragments) -> dict[str, bytes]:
    """A run that fails on its way: what it leaves, which has a checkpoint and no half-written file."""
    fails(stage, words, *fragments)
    left = contents(out)
    assert not any(name.endswith(".tmp") for name in left) and "state/progress.safetensors" in left
    return left


def test_disk_fills_up_on_the_way_and_the_run_resumes_when_there_is_room(data, tmp_path, fails, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    run_here(RL, rl_flags(data, one, epochs=0.9, save_every=1), monkeypatch)
    stage = importlib.import_module(RL)
    append, words = stage.append_jsonl, rl_flags(data, other, epochs=0.9, save_every=1)

    def full_from_step_2(path, record):
        if record["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append(path, record)

    monkeypatch.setattr(stage, "append_jsonl", full_from_step_2)
    interrupted(data, other, RL, words, fails, "No space left", "metrics.jsonl")
    monkeypatch.setattr(stage, "append_jsonl", append)
    with monkeypatch.context() as patch:  # once more at the end, in the midst of the checkpoint
        break_writes(patch, errno.ENOSPC, "model.safetensors")
        interrupted(data, other, RL, words, fails, "No space left", "model.safetensors")
    run_here(RL, words, monkeypatch)
    assert stages.same_run(one, other)


def test_resume_state_that_is_damaged(data, tmp_path, fails, monkeypatch):
    out = tmp_path / "rl"
    break_writes(monkeypatch, errno.ENOSPC, "model.safetensors")
    interrupted(data, out, RL, rl_flags(data, out, epochs=0.25, save_every=1), fails, "No space left")
    (out / "state" / "progress.safetensors").write_bytes(b"\0" * 64)
    fails(
        RL,
        rl_flags(data, out, epochs=0.25, save_every=1),
        "progress.safetensors: not a saved state",
        "delete it",
    )


# ---- one run at a time, and a folder for the one that works ----------------------------------------------------------

HOLD = """
import sys
from lib.run.folder import lock_folder
from lib.run.command import run_main

def main():
    lock_folder(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()

run_main(main)
"""


@pytest.fixture
def held(tmp_path):
    """A folder in which another process writes; it has one file of that run's."""
    environment = {**os.environ, "PYTHONPATH": str(stages.ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "held"], env=environment, **pipes
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "held" / "log").write_text("work")
        yield tmp_path / "held", holder
        holder.kill()


COMMANDS = {  # every command that writes to OUT
    MIXTURE: "--preset sandbox",
    SFT: f"--model {world.BASE}",
    RL: f"--model {world.BASE} --no-reasoning",
    EVAL: f"--models base={world.BASE}",
    "lib.tools.capability": f"--models base={world.BASE} --direct base --file DATA/questions.jsonl",
    "lib.tools.export": "FINISHED --licence mit",
    "lib.compare.replicate": "",
    "lib.compare.frontier": "",
    "lib.compare.rainbow_gain": "",
    "lib.sandbox.pretrain": "",
}


def words_of(command: str, data: Path, finished: dict[str, Path], *more: object) -> list[str]:
    (data / "questions.jsonl").write_text('{"question": "how ?", "answer": "so"}\n')
    words = COMMANDS[command].replace("DATA", str(data)).replace("FINISHED", str(finished[RL])).split()
    words += ["--data", str(data)] if command in (SFT, RL, EVAL) else []
    return [*words, *map(str, more)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_in_which_another_process_writes_is_refused(
    command, held, data, finished, fails, monkeypatch
):
    folder, holder = held
    before = contents(folder)
    words = words_of(command, data, finished, "--out", folder)
    fails(command, words, folder, f"a run is writing there (process {holder.pid} on", "give another --out")
    assert contents(folder) == before and before["log"] == b"work"


def test_a_killed_run_lets_go_of_its_folder_and_a_second_one_meanwhile_is_refused(data, tmp_path):
    out, logs = tmp_path / "rl", [tmp_path / "one.log", tmp_path / "two.log"]
    words = rl_flags(data, out, epochs=2.0)
    first = launch(RL, words, logs[0])
    stages.wait_for_lines(out / "metrics.jsonl", 2, first)
    for more in ([], ["--overwrite"], ["--learning-rate", "0.5", "--overwrite"]):
        second = launch(RL, [*words, *more], logs[1])
        second.join(stages.PATIENCE)
        said = messages(logs[1].read_text())
        assert (
            second.exitcode == 2
            and len(said) == 1
            and f"a run is writing there (process {first.pid} on" in said[0]
        )
    stages.kill_9(first)
    assert (out / ".lock").exists()
    stages.run_process(RL, words, logs[0])
    assert [line["step"] for line in metrics_of(out)] == list(range(len(metrics_of(out)))) and not (
        out / ".lock"
    ).exists()


def test_torchruns_processes_all_end_when_the_folder_is_taken(held, data, tmp_path):
    group = stages.run_group(RL, rl_flags(data, held[0]), tmp_path / "log")
    for process in group:
        process.join(stages.PATIENCE)
    assert [process.exitcode for process in group] == [2, 2]
    (leader,), (other,) = (messages((tmp_path / f"log.{rank}").read_text())[-1:] for rank in (0, 1))
    assert "a run is writing there" in leader and "lost another process of this run" in other


def test_a_lock_that_a_kill_left_is_none_and_two_at_once_leave_one(tmp_path):
    """Many processes, one folder, again and again: never two inside, and none refused for a lock that nobody holds."""
    script = tmp_path / "race.py"
    script.write_text(
        "import os, sys, time\nfrom lib.run.folder import lock_folder\nfrom lib.run.settings import UserError, at_end\n"
        "inside = sys.argv[1] + '/inside'\n"
        "for _ in range(200):\n"
        "    try:\n"
        "        lock_folder(sys.argv[1])\n"
        "    except UserError as error:\n"
        "        assert 'a run is writing there' in str(error) or 'No such file' in str(error), error\n"
        "    else:\n"
        "        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))\n"  # fails if there is another
        "        time.sleep(0.001)\n"
        "        os.unlink(inside)\n"
        "        print('in')\n"
        "    at_end.close()\n"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("process 1 on nowhere")
    environment, command = (
        {**os.environ, "PYTHONPATH": str(stages.ROOT)},
        [sys.executable, script, tmp_path / "out"],
    )
    group = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    came_in = [process.communicate(timeout=120)[0].count("in") for process in group]
    assert [process.returncode for process in group] == [0, 0, 0] and all(came_in), came_in


@pytest.mark.parametrize("stage", [SFT, RL])
def test_a_run_that_failed_at_once_does_not_keep_its_folder(stage, data, tmp_path, fails, monkeypatch):
    """The judge is wrong, or the disk is full when the first log line is due: the corrected command starts in the same folder."""
    module, out = importlib.import_module(stage), tmp_path / "out"

    def full(path, record):
        path.write_bytes(b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "append_jsonl", full)
        fails(stage, FLAGS[stage](data, out, epochs=1), "No space left")
    (out / "state").mkdir()
    (out / ".model.7.tmp").write_text("half")
    assert {"settings.json", "metrics.jsonl"} <= contents(out).keys()
    run_here(stage, FLAGS[stage](data, out, epochs=1, learning_rate=0.5), monkeypatch)
    assert json.loads((out / "settings.json").read_text())["learning_rate"] == 0.5
    fails(
        stage,
        FLAGS[stage](data, out, epochs=1, learning_rate=0.25),
        "--learning-rate 0.5, now 0.25",
        "--overwrite",
    )


OUTS = [  # and what the error says of it
    ("", "given nothing"),
    ("FILE", "a file"),
    ("FILE/below/it", "Not a directory"),
    ("x" * 300, "File name too long"),
    ("/".join(["x" * 200] * 30), "File name too long"),
    ("/proc/none/of/ours", "No such file"),
    ("READONLY/out", "Read-only file system"),
]


@pytest.mark.parametrize("out, fragment", OUTS)
@pytest.mark.parametrize("stage", [MIXTURE, SFT, RL, EVAL])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_loaded(
    stage, out, fragment, data, tmp_path, finished, fails, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    mkdir = Path.mkdir

    def read_only(path, *args, **keywords):
        if "readonly" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **keywords)

    monkeypatch.setattr(Path, "mkdir", read_only)
    module = importlib.import_module(stage)
    for name in {"load_tokenizer", "load_model", "rehearse", "sandbox_prompts", "read_sets"} & vars(
        module
    ).keys():
        monkeypatch.setattr(module, name, lambda *args, **keywords: pytest.fail("something was loaded"))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    out = out.replace("FILE", "file").replace("READONLY", "readonly")
    fails(stage, words_of(stage, data, finished, f"--out={out}"), "--out", fragment)
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("stage", [SFT, RL])
def test_a_folder_of_another_run_is_refused_before_anything_is_loaded(
    stage, data, finished, fails, monkeypatch
):
    module = importlib.import_module(stage)
    for name in ("load_tokenizer", "load_model", "rehearse"):
        monkeypatch.setattr(module, name, lambda *args, **keywords: pytest.fail("something was loaded"))
    fails(stage, FLAGS[stage](data, finished[stage], learning_rate=0.5), "--learning-rate 0.001, now 0.5")


# ---- numbers out of range ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, settings, section",
    [
        (MIXTURE, "Settings", "mixture"),
        (SFT, "Settings", "sft"),
        (RL, "Settings", "rl"),
        (EVAL, "EvalSettings", "eval"),
    ],
)
def test_every_number_of_a_stage_has_a_range(stage, settings, section, capsys):
    cls = getattr(importlib.import_module(stage), settings)
    numbers = [field for field in dataclasses.fields(cls) if field.type in ("int", "float")]
    assert len(numbers) >= 10
    for field in numbers:
        for absurd in ("1" + "0" * 30, "1e308", "-1e300", "inf", "nan", "-" + "9" * 30):
            with pytest.raises(SystemExit) as end:
                parse_settings(cls, section, [f"--{field.name.replace('_', '-')}={absurd}"])
            line = capsys.readouterr().err
            assert end.value.code == 2 and line.count("\n") == 1
            assert (
                line.startswith(f"error: --{field.name.replace('_', '-')}: given ")
                and " from " in line
                and " to " in line
            )


@pytest.mark.parametrize("command", ["lib.chat", *(name for name in COMMANDS if name.startswith("lib."))])
def test_every_number_of_the_other_commands_has_a_range(command, monkeypatch):
    parsers = []
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Flags, name, lambda self, *args: parsers.append(self) or sys.exit())
    main = importlib.import_module("lib.tools.terminal" if command == "lib.chat" else command).main
    with pytest.raises(SystemExit):
        main()
    for action in parsers[0]._actions:
        if (
            action.type is not None
            or isinstance(action.default, (int, float))
            and not isinstance(action.default, bool)
        ):
            for absurd in ("1" + "0" * 30, "1e308", "-1e300", "inf", "nan", "-" + "9" * 30):
                with pytest.raises(
                    argparse.ArgumentTypeError, match=r"given .*; allowed a .*number from .* to .*"
                ):
                    action.type(absurd)


# ---- the next command -------------------------------------------------------------------------------------------------


def test_printed_commands_lead_through_the_chapters_and_keep_what_was_given(tmp_path, monkeypatch, capsys):
    """As a shell reads them, which must not run what stands in a name."""
    odd = tmp_path / "my runs $(touch ran) `touch ran`; 'x'"
    small = {"rl_prompts": 16, "sft_prompts": 16, "traces_per_prompt": 1, "eval_prompts": 2}
    words = flags(out=odd / "data", seed=7, **small)
    more = {
        SFT: ["--model", str(world.BASE)],
        RL: ["--judge", "stages", "--max-new-tokens", "8"],
        EVAL: ["--attacks", "best_of_n", "--behaviours", "1"],
    }
    stage = MIXTURE
    for following in more:
        capsys.readouterr()
        run_here(stage, words, monkeypatch)
        printed = capsys.readouterr().out.strip().splitlines()[-1].lower().partition("next: ")[2]
        assert printed.startswith(f"python {following}.py --preset sandbox ")
        shell = subprocess.run(
            ["sh", "-c", f"printf '%s\\n' {printed}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        stage, words = following, [*shell.stdout.splitlines()[2:], *more[following]]
    assert (
        "--judge" in words
        and words[words.index("--judge") + 1] == "stages"
        and words[words.index("--seed") + 1] == "7"
    )
    assert (
        words[words.index("--data") + 1] == str(odd / "data")
        and words[words.index("--models") + 1] == f"rl={odd / 'rl'}"
    )
    run_here(EVAL, words, monkeypatch)
    assert (
        (odd / "eval-rl" / "results.json").exists()
        and not list(tmp_path.glob("**/ran"))
        and [odd] == list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(
    "out, name, beside_it",
    [
        ("runs/$(x)", "x", "runs/eval-x"),
        (".", "here", "../eval-here"),
        ("-x", "x", "eval-x"),
        ("a/..", "here", "../eval-here"),
    ],
)
def test_a_model_is_called_as_its_folder_is_as_far_as_stage_4_allows(
    out, name, beside_it, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert model_and_out(out)["models"] == [f"{name}={out}"] and model_and_out(out)["out"].endswith(beside_it)


def test_the_next_command_leaves_out_what_the_preset_has():
    cls = importlib.import_module(RL).Settings
    settings = parse_settings(cls, "rl", flags(preset="paper", device="cpu", shard=True))
    command = next_command("04_attack_eval.py", settings, "rl", data="-d")
    assert command == "python 04_attack_eval.py --preset paper --data=-d --device cpu"
    cls = importlib.import_module(SFT).Settings
    settings = parse_settings(
        cls, "sft", flags(preset="paper", dtype="float32", gradient_checkpointing=False, reasoning=False)
    )
    command = next_command("03_rl_train.py", settings, "sft", model="m")
    assert command.endswith(
        "--preset paper --model m --dtype float32 --no-gradient-checkpointing --no-reasoning"
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------

NAN_JUDGE = """
calls = 0  # the first is the rehearsal's

def harm_score(prompts, answers):
    global calls
    calls += 1
    return [float("nan") if calls == 4 else 0.5 for _ in answers]

def task_score(prompts, answers):
    return [i / len(answers) for i, _ in enumerate(answers)]
"""


def test_nan_from_the_judge_stops_before_the_step(data, tmp_path, fails, monkeypatch):
    (tmp_path / "nan_judge.py").write_text(NAN_JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "rl"
    words = rl_flags(data, out, epochs=0.9, judge="nan_judge", save_every=1)
    left = interrupted(
        data, out, RL, words, fails, "step 2, prompt rl-", "nan", "--judge nan_judge", "checkpoint is kept"
    )
    assert [line["step"] for line in metrics_of(out)] == [0, 1]
    assert "config.json" not in left
    run_here(RL, words, monkeypatch)  # the judge has come to its senses: the run goes on at step 2
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3]


def test_judge_with_too_few_scores(data, tmp_path, fails, monkeypatch):
    (tmp_path / "short_judge.py").write_text(
        "def harm_score(p, a):\n    return [0.5]\n\ntask_score = harm_score\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fails(
        RL, rl_flags(data, tmp_path / "rl", judge="short_judge"), "short_judge gave 1 scores for 16 answers"
    )


@pytest.mark.parametrize("stage, name", [(SFT, "loss is nan"), (RL, "not finite")])
def test_a_rate_that_blows_the_weights_up(stage, name, data, tmp_path, fails, monkeypatch):
    out, module = tmp_path / "out", importlib.import_module(stage)
    set_rate = module.set_learning_rate
    monkeypatch.setattr(
        module, "set_learning_rate", lambda optimizer, peak, *rest: set_rate(optimizer, 1e30 * peak, *rest)
    )
    words = FLAGS[stage](data, out, learning_rate=1.0, save_every=1)
    interrupted(data, out, stage, words, fails, "step 1", name, "checkpoint", "--learning-rate")
    assert [line["step"] for line in metrics_of(out)] == [0]


def test_nan_in_the_loss_alone_stops_before_the_update(data, tmp_path, fails, monkeypatch):
    stage, out = importlib.import_module(RL), tmp_path / "rl"
    loss, log = stage.grpo_loss, out / "metrics.jsonl"

    def poisoned(*args):
        return loss(*args) * (float("nan") if log.exists() and log.read_bytes().count(b"\n") == 2 else 1)

    monkeypatch.setattr(stage, "grpo_loss", poisoned)
    words = rl_flags(data, out, epochs=0.9, save_every=1)
    left = interrupted(data, out, RL, words, fails, "loss is nan, stopped before the update", str(out))
    assert left["metrics.jsonl"].count(b"\n") == 2 and b"NaN" not in left["metrics.jsonl"]


def test_weights_that_are_not_numbers(data, model_copy, tmp_path, fails):
    path = model_copy / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    fails(RL, rl_flags(data, tmp_path / "out", model=model_copy), model_copy)
    assert not (tmp_path / "out").exists()


# ---- as a user starts it ---------------------------------------------------------------------------------------------


def test_the_script_itself_prints_one_line_and_exits_with_2(tmp_path):
    command = [
        sys.executable,
        stages.ROOT / f"{RL}.py",
        "--data",
        tmp_path,
        "--model",
        world.BASE,
        "--out",
        tmp_path / "rl",
    ]
    run = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: {tmp_path / 'rl.jsonl'}: no such file\n"


def test_ctrl_c_says_that_the_run_can_go_on(data, tmp_path):
    log = tmp_path / "log"
    process = launch(RL, rl_flags(data, tmp_path / "rl", epochs=9.0), log)
    stages.wait_for_lines(tmp_path / "rl" / "metrics.jsonl", 2, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(stages.PATIENCE)
    assert process.exitcode == 130
    assert messages(log.read_text()) == [
        "stopped; finished work is kept, run the same command again to resume"
    ]


@pytest.mark.parametrize("gap", [0.0, 0.002, 0.02])
def test_a_second_ctrl_c_right_after_the_first_changes_nothing(gap, data, tmp_path):
    log = tmp_path / "log"
    process = launch(RL, rl_flags(data, tmp_path / "rl", epochs=9.0), log)
    stages.wait_for_lines(tmp_path / "rl" / "metrics.jsonl", 2, process)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):  # it was quick to end
            os.kill(process.pid, signal.SIGINT)
        time.sleep(gap)
    process.join(stages.PATIENCE)
    assert process.exitcode == 130
    assert messages(log.read_text()) == [
        "stopped; finished work is kept, run the same command again to resume"
    ]
