"""What a user can get wrong: one line that says what and what to do, exit code 2, and nothing overwritten."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stages
import torch
from safetensors.torch import load_file, save_file
from stages import RL, SFT, contents, error_of, launch, messages, metrics_of, rl_flags, run_here, sft_flags

from lib.chat import encode_example, encode_prompt, load_tokenizer
from lib.files import read_jsonl, write_jsonl
from lib.processes import Processes
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
        (RL, "--group-size 1", ("--group-size: given 1; allowed a whole number >= 2",)),
        (RL, "--group-size 4.5", ("--group-size: given 4.5",)),
        (RL, "--temperature 0", ("--temperature: given 0", "0.01")),
        (RL, "--learning-rate -0.5", ("--learning-rate: given -0.5", ">= 0")),
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
    (RL, {"id": "rl-1", "prompt": "how ?", "kind": "harmless"}, "rl.jsonl: id 'rl-1' stands in lines 2, 3: give each"),
    (RL, {"id": None, "prompt": "how ?", "kind": "harmless"}, "rl.jsonl:3: id is None"),
    (RL, {"id": "x", "prompt": [{"role": "user", "content": "how ?"}], "kind": "harmless"}, "rl.jsonl: x: prompt is [{"),
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
        record = {"id": "x", "prompt": broken, "kind": "harmful" if name == "direct" else "harmless", "category": broken}
        write_jsonl(tmp_path / importlib.import_module(EVAL).FILES[name], [record | {"target": broken}])
    write_jsonl(tmp_path / "rl.jsonl", [{"id": "x", "prompt": broken, "kind": "harmless"}])
    texts = {"prompt": broken, "reasoning": broken, "answer": broken}
    write_jsonl(tmp_path / "sft.jsonl", [{"id": "x", **texts}, {"id": "y", **texts, "answer": "so ."}])
    tokenizer, rl, sft, evaluation = load_tokenizer(str(world.BASE)), *map(importlib.import_module, (RL, SFT, EVAL))
    [prompt] = rl.load_prompts(rl.Settings(data=str(tmp_path), max_new_tokens=8), tokenizer, 512)
    assert prompt["prompt"] == mended and prompt["prompt_ids"] == encode_prompt(tokenizer, mended, reasoning=True)
    train, _ = sft.load_examples(sft.Settings(data=str(tmp_path), held_out_share=0.0), tokenizer, 512)
    assert train[0].ids == encode_example(tokenizer, mended, mended, mended)[0] and len(train) == 2
    sets, _ = evaluation.read_sets(evaluation.EvalSettings(data=str(tmp_path)), ["gcg"])
    assert all(r[key] == mended for records in sets.values() for r in records for key in ("prompt", "category", "target"))


@pytest.mark.parametrize(
    "lines, fragment",
    [
        ([{"id": "a", "harm": h} for h in (1, 1, 1, 0)], "eval_harmful.jsonl: id 'a' stands in lines 1, 2, 3, 4: give each"),
        ([{"id": 1}, {"id": "1"}], "eval_harmful.jsonl: id '1' stands in lines 1, 2"),
        ([{"id": "a", "kind": "evil"}], "eval_harmful.jsonl: a: kind is 'evil'; allowed: harmful, harmless, ambiguous"),
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
    (RL, {"prompt": "cake " * 498, "kind": "harmless"}, "rl.jsonl: prompts: 2 of 3 have more than the 500 tokens"),
    (RL, {"prompt": "cake " * 600, "kind": "harmless"}, "such as x-0 (60"),
    (RL, {"prompt": "cake " * 600, "kind": "harmless"}, "context 512"),
    (SFT, {"prompt": "how ?", "reasoning": "so .", "answer": "cake " * 600}, "sft.jsonl: traces: 2 of 3 have more than the 512"),
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
    fails(SFT, sft_flags(data, tmp_path / "sft", max_batch_tokens=40), "--max-batch-tokens 40", "traces: ", "sft-")


def test_nothing_left_of_a_kind_that_the_mixture_needs(tmp_path, fails):
    harmless = world.build_pool("train", "harmless", 20, 0)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(i), **r} for i, r in enumerate(harmless)])
    words = f"--source files --files harmless={tmp_path}/prompts.jsonl --sft-prompts 0 --rl-prompts 10 --lambda-harmful 0.5"
    line = fails(MIXTURE, [*words.split(), "--out", str(tmp_path / "data")], "harmful")
    assert "lambda" in line and not (tmp_path / "data" / "rl.jsonl").exists()


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

    monkeypatch.setattr("lib.hub.HfApi", NoHub)
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
    fails(RL, rl_flags(data, tmp_path / "out", model=model_copy), model_copy, "no chat template", "take a chat")


@pytest.mark.parametrize("judge, fragments", [("gaurd", ("gaurd", "sandbox, standin")), ("json", ("no function harm_score",))])
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
    fails(stage, FLAGS[stage](data, out, **usual, learning_rate=0.5), out, "--learning-rate 0.001, now 0.5", "--overwrite")
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
    write_jsonl(copy / "rl.jsonl", [{"id": str(i), "prompt": f"a cake {i} ?", "kind": "harmless"} for i in range(8)])
    fails(RL, rl_flags(copy, tmp_path / "rl", judge="sandbox"), "--judge sandbox: not a prompt of the sandbox")
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


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="the permissions of a folder do not bind root")
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
    left = interrupted(data, out, RL, words, fails, "step 2, prompt rl-", "nan", "--judge nan_judge", "checkpoint is kept")
    assert [line["step"] for line in metrics_of(out)] == [0, 1]
    assert "config.json" not in left
    run_here(RL, words, monkeypatch)  # the judge has come to its senses: the run goes on at step 2
    assert [line["step"] for line in metrics_of(out)] == [0, 1, 2, 3]


def test_judge_with_too_few_scores(data, tmp_path, fails, monkeypatch):
    (tmp_path / "short_judge.py").write_text("def harm_score(p, a):\n    return [0.5]\n\ntask_score = harm_score\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    fails(RL, rl_flags(data, tmp_path / "rl", judge="short_judge"), "short_judge gave 1 scores for 16 answers")


@pytest.mark.parametrize("stage, name", [(SFT, "loss is nan"), (RL, "not finite")])
def test_a_rate_that_blows_the_weights_up(stage, name, data, tmp_path, fails):
    out = tmp_path / "out"
    words = FLAGS[stage](data, out, learning_rate=1e30, save_every=1)
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
    run = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"error: {tmp_path / 'rl.jsonl'}: no such file\n"


def test_ctrl_c_says_that_the_run_can_go_on(data, tmp_path):
    log = tmp_path / "log"
    process = launch(RL, rl_flags(data, tmp_path / "rl", epochs=9.0), log)
    stages.wait_for_lines(tmp_path / "rl" / "metrics.jsonl", 2, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(stages.PATIENCE)
    assert process.exitcode == 130
    assert messages(log.read_text()) == ["stopped; finished work is kept, run the same command again to resume"]
