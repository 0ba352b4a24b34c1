"""The plumbing behind `run`: settings, ends, files, claims of a folder, devices, processes, the update."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import importlib
import json
import os
import re
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from stages import RL, SFT

from lib import UserError
from lib.run import files, run_main
from lib.run.checkpoint import load_progress, save_progress
from lib.run.command import at_end
from lib.run.files import append_jsonl, read_jsonl, resume_log, write_json, write_jsonl
from lib.run.folder import claim_folder, take_folder
from lib.run.plumbing import Run, set_learning_rate
from lib.run.processes import leave_on_error, pick_device
from lib.run.settings import following, parse_settings, presets_found

STAGES = {"mixture": "01_build_mixture", "sft": SFT, "rl": RL, "eval": "04_attack_eval"}


def parse(line: str, stage: str = "rl"):
    return parse_settings(importlib.import_module(STAGES[stage]).Settings, stage, argv=line.split())


# ---- settings ----


def test_class_then_preset_then_flags():
    assert (parse("").group_size, parse("").learning_rate) == (8, 2e-4)
    paper = parse("--preset paper --group-size=2 --no-reasoning")
    assert (paper.group_size, paper.learning_rate, paper.dtype) == (2, 1e-6, "bfloat16")
    assert not paper.reasoning and parse("--reasoning").reasoning
    assert parse("--learning-rate 0.5 --preset=paper").learning_rate == 0.5  # order does not matter
    assert parse("--attacks pair gcg", "eval").attacks == ["pair", "gcg"] != parse("", "eval").attacks
    rpo = importlib.import_module("lib.compare.rpo").Settings  # a later dict of a preset goes before
    assert parse_settings(rpo, "rl", "rpo", argv=[]).learning_rate == 6e-4
    for preset in ("paper", "open", "sandbox"):  # the paper's 16 pairs an update
        settings = parse_settings(rpo, "rl", "rpo", argv=["--preset", preset])
        assert settings.prompts_per_step * settings.group_size // 2 == 16


MISTAKES = {
    "--group-size 2.5": "--group-size: given 2.5; allowed a whole number from 2",
    "--preset huge": "--preset: invalid choice",
    "--warmup-steps 3": "unrecognized arguments",  # presets alone set it
    "--group 3": "unrecognized arguments",  # nothing is shortened
}


def test_a_mistake_in_flags_or_in_a_preset_is_named(monkeypatch, capsys):
    for words, message in MISTAKES.items():
        with pytest.raises(UserError, match=f"^{message}"):
            parse(words)
    with pytest.raises(SystemExit):
        parse("--preset paper --help")  # has the defaults of that preset
    assert "(default: 1e-06)" in capsys.readouterr().out
    monkeypatch.setattr("lib.run.presets.sandbox.RL", {"nonsense": 1})
    with pytest.raises(UserError, match="lib/run/presets/sandbox.py: RL sets 'nonsense'"):
        parse("")
    wrong = {"group_size": 1, "max_prompt_tokens": 0.5, "decay": "no", "judge": None, "dtype": "float16"}
    for name, value in (wrong | {"warmup_steps": True}).items():  # also where it has no flag
        monkeypatch.setattr("lib.run.presets.sandbox.RL", {name: value})
        with pytest.raises(UserError, match=f"{name}: given"):
            parse("")
    for attacks in ("gcg", ["gcq"], ("gcg", 1)):
        monkeypatch.setattr("lib.run.presets.sandbox.EVAL", {"attacks": attacks})
        with pytest.raises(UserError, match="preset sandbox: attacks: given .*; allowed a list of texts all"):
            parse("", "eval")


@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_fits_its_stage_and_every_number_has_a_range(stage):
    for preset in presets_found():
        parse(f"--preset {preset}", stage)
    for field in dataclasses.fields(importlib.import_module(STAGES[stage]).Settings):
        if field.type in ("int", "float") and field.metadata["flag"]:
            flag = f"--{field.name.replace('_', '-')}"
            for absurd in ("1" + "0" * 30, "nan"):
                with pytest.raises(UserError, match=f"{flag}: given .* from .* to "):
                    parse(f"{flag}={absurd}", stage)


GIVEN = "--preset paper --device cpu --refusals mine --data d --out runs/x"
NEXT = [  # stage, its flags, of the next command; the usual way through the chapters: tests/test_bad_input.py
    ("rl", GIVEN, "04_attack_eval.py .* --models x=runs/x --out runs/eval-x --device cpu --refusals mine$"),
    ("sft", "--traces sft_rl.jsonl", "04_attack_eval.py"),
    ("mixture", "--sft-prompts 0", "03_rl_train.py"),
    ("mixture", "--preset paper --trace-model teacher", "02_.* paper --data [^ ]* --out"),
    ("mixture", "--preset smollm --trace-model m", "02_sft_warmstart.py .* --model m --out"),
    ("mixture", "--rainbow pi --out m", "03_rl_train.py --preset sandbox --data m --model pi"),
]


@pytest.mark.parametrize("stage, words, expected", NEXT)
def test_the_next_command_has_what_was_given_and_not_what_the_preset_has(stage, words, expected):
    assert re.search(expected, following(parse(words, stage), [stage]))


# ---- ends ----

OUT_OF_MEMORY = RuntimeError("[x.cpp:1] . DefaultCPUAllocator: can't")
ENDS = [
    (NotImplementedError("group_advantages"), 2, "error: not implemented yet: group_advantages"),
    (KeyboardInterrupt(), 130, "stopped; what was saved is kept: run the same command again"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
    (OUT_OF_MEMORY, 2, "error: out of memory: lower --max-batch-tokens"),
    (UserError("a\x1b[2J\u202eb\nc: no such file"), 2, "error: a\\u001b[2J\\u202eb\\nc: no such file\n"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS)
def test_run_main_ends_in_one_line_and_lets_bugs_through(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(message) and err.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        run_main(lambda: open("/no/such/file"))


# ---- files ----

RECORDS = [{"id": "a", "n": 1.5}, {"id": "b", "text": "ä line\nand \u2028 another \ud800", "list": [1, None]}]


def test_jsonl_round_trip_readable_with_surrogates_marks_and_other_line_ends(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    write_jsonl(path, RECORDS)
    append_jsonl(path, {"id": "\udfff"})
    assert read_jsonl(path) == [*RECORDS, {"id": "\udfff"}] and "ä" in path.read_text(encoding="utf-8")
    path.write_bytes(
        b'\xef\xbb\xbf{"id": 1}\r\n{"id": 2.5, "t": ["a\\ud83d", {"b\\u0000": "\\ud83d\\ude00"}]}'
    )
    expected = [{"id": "1"}, {"id": "2.5", "t": ["a\ufffd", {"b\ufffd": "\U0001f600"}]}]
    assert read_jsonl(path, required=("id",)) == expected


UNREADABLE = [
    (b"\n \n", "is empty"),
    (b'{"id": 1}\n\n{"id": "\xff"}\n', ":3: not a JSON object in UTF-8"),
    (b'{"id": 1}\n{"ID": 2}\n', ":2: has no key 'id'"),
    (b'{"id": 7}\n\n{"id": "7"}\n', "id '7' stands in lines 1 and 3: give each record an id"),
    (b'{"id": " "}\n', "id is"),
    (b'{"id": "r", "target": 7}\n', ":1: r: target is 7; allowed: some text"),
]


@pytest.mark.parametrize("content, message", UNREADABLE)
def test_read_errors_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_jsonl(path, ("id",), ("target",))
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_text_may_be_empty_only_where_it_is_not_required(tmp_path):
    for value in (" ", None):  # null is as good as missing
        write_jsonl(tmp_path / "x.jsonl", [{"id": "r", "target": value}])
        assert read_jsonl(tmp_path / "x.jsonl", ("id",), ("target",))[0]["target"] == value
        with pytest.raises(UserError, match="r: target is "):
            read_jsonl(tmp_path / "x.jsonl", ("id", "target"))


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_resumed_log_drops_unwanted_malformed_and_half_written_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0,  "odd spacing":1}\n{"step": 1}\nnonsense\n{"step": 5}\n{"step": 1}')
    assert [r["step"] for r in resume_log(path, lambda record: record["step"] < 3)] == [0, 1]
    assert path.read_bytes() == b'{"step": 0,  "odd spacing":1}\n{"step": 1}\n'
    assert resume_log(tmp_path / "none.jsonl") == [] and not (tmp_path / "none.jsonl").exists()


# ---- the folder of a run ----


def claim(out: Path, settings: dict, overwrite: bool = False, inputs=()) -> bool:
    """As a stage does it; whether it resumes."""
    resumes = claim_folder(out, settings, overwrite=overwrite, inputs=inputs)
    if not resumes:
        take_folder(out, settings)
    return resumes


@pytest.fixture
def out(tmp_path) -> Path:
    """A run's folder with work in it."""
    claim(tmp_path / "x", {"n": 1})
    (tmp_path / "x" / "deep").mkdir()
    (tmp_path / "x" / "deep" / "log").write_text("work")
    return tmp_path / "x"


def test_claim_a_new_folder_and_resume_it_wherever_it_is_moved(tmp_path):
    out = tmp_path / "runs" / "x"
    settings = {"attacks": ["gcg"], "data": "runs/data/", "out": "x", "save_every": 1, "seed": 1}
    files.write_text(out / ".settings.json.7.tmp", "half of it")  # all that a kill may leave at first
    assert not claim(out, settings)
    assert settings.items() <= json.loads((out / "settings.json").read_text()).items()
    (out / "model").write_text("work")
    at_end.close()  # the lock of a run that has ended
    out.rename(tmp_path / "y")
    other = {"data": "runs/data", "out": "elsewhere", "save_every": 9, "attacks": ("gcg",)}  # how, not what
    assert claim(tmp_path / "y", {**settings, **other})
    assert claim(tmp_path / "y", {**settings, "overwrite": True}, overwrite=True)
    assert (tmp_path / "y" / "model").read_text() == "work"


def test_a_folder_that_was_being_emptied_is_no_run_that_goes_on_and_may_be_emptied_again(out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            claim(out, {"n": 2}, overwrite=True)
    for n in (1, 2):
        with pytest.raises(UserError, match="or --overwrite to delete it"):
            claim(out, {"n": n})
    assert not claim(out, {"n": 2}, overwrite=True) and not (out / "deep").exists() and claim(out, {"n": 2})


def test_a_run_keeps_its_date_and_an_edited_judge_or_chapter_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chapter = importlib.import_module("03_rl_train")

    def joined(text: str) -> Run:
        at_end.close()
        Path("mine.py").write_text(text)
        run = Run(chapter.Settings(judge="mine", model="none", out="out"), ["rl"])
        run.join()
        return run

    joined("first").begin()
    written = Path("out/settings.json").read_text()
    Path("out/settings.json").write_text(written.replace(datetime.date.today().isoformat(), "2026-11-25"))
    again = joined("first")
    assert again.resumes and again.settings.date == "2026-11-25"
    with pytest.raises(UserError, match="sha256 of mine.py"):
        joined("second")
    Path("03_rl_train.py").write_text("another objective")
    monkeypatch.setattr(chapter, "__file__", str(tmp_path / "03_rl_train.py"))
    with pytest.raises(UserError, match="sha256 of .*03_rl_train.py"):
        joined("first")


@pytest.mark.parametrize("file", ["a.jpg", "settings.json"])
def test_a_folder_that_is_no_run_is_neither_used_nor_emptied(tmp_path, file):
    (tmp_path / file).write_text('{"theme": "dark"}')
    with pytest.raises(UserError, match="no run of ours"):
        claim_folder(tmp_path, {}, overwrite=True)
    assert (tmp_path / file).exists()


def test_a_run_never_deletes_what_it_reads_nor_where_it_stands_nor_behind_links(out, tmp_path, monkeypatch):
    far, log = tmp_path / "far.jsonl", out / "deep" / "log"
    far.write_text("{}")
    (tmp_path / "link").symlink_to(out)
    (out / "far.jsonl").symlink_to(far)
    monkeypatch.chdir(tmp_path)
    for read in (log, "x/deep/log", tmp_path / "link/deep/log", out):
        with pytest.raises(UserError, match=r"--out: .*x holds .*, which this run reads: give another"):
            claim_folder(out, {"n": 2}, overwrite=True, inputs=[read])
    for here, home in ((out / "deep", "/"), (tmp_path, out)):
        monkeypatch.chdir(here)
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(UserError, match="which --overwrite will not empty"):
            claim_folder(out, {"n": 2}, overwrite=True)
    monkeypatch.setenv("HOME", "/")
    claim_folder(out, {"n": 2}, overwrite=True, inputs=[far, "org/name", tmp_path])
    assert log.exists()  # looking empties nothing
    take_folder(out, {"n": 2})
    assert far.exists() and sorted(p.name for p in out.iterdir()) == [".lock", "settings.json"]


# ---- devices and processes: what whole runs (test_rl.py, test_sft.py) do not show ----


def test_a_device_for_each_process_and_no_attention_of_cudnn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert pick_device("cpu", 3) == torch.device("cpu") and pick_device("cuda", 1).index == 1
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    with pytest.raises(UserError, match="2 GPUs found, process 2 has none"):
        pick_device("cuda", 2)


def test_a_failing_process_on_gpus_leaves_without_waiting_for_the_others(monkeypatch):
    """nccl's destroy_process_group waits for all of them."""
    codes, waited = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: not codes)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: waited.append(1))
    monkeypatch.setattr(os, "_exit", codes.append)
    leave_on_error()
    assert codes == [1] and not waited


# ---- an update ----


RATES = {
    (2, False): [1.0, 2.0, 2.0, 2.0, 2.0],
    (1, True): [2.0, 2.0, 1.5, 1.0, 0.5],
    (8, True): [0.25, 0.5, 0.75, 1.0, 1.25],  # it ends before it is warm
}


def test_learning_rate_of_each_step():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    for (warmup, decay), rates in RATES.items():
        settings = types.SimpleNamespace(learning_rate=2.0, warmup_steps=warmup, decay=decay)
        assert [set_learning_rate(optimizer, settings, step, 5) for step in range(5)] == pytest.approx(rates)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


def test_a_damaged_state_is_one_line(tmp_path):
    (tmp_path / "progress.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match="progress.pt: not a saved state; delete it"):
        load_progress(Run(types.SimpleNamespace(out=str(tmp_path))), None, None)


def test_to_save_before_the_first_update_is_no_step_of_the_optimizer(tmp_path):
    """RPO takes none while no two rewards differ."""
    model, run = torch.nn.Linear(2, 2), Run(types.SimpleNamespace(out=str(tmp_path)))
    for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())):
        save_progress(run, 3, model, optimizer)
        assert load_progress(run, model, optimizer) == 3 and not optimizer.state


def test_no_step_is_taken_with_a_gradient_that_is_not_finite(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), float("inf"))
    run = Run(types.SimpleNamespace(out=str(tmp_path), max_grad_norm=0.0, shard=False))
    with pytest.raises(UserError, match="step 0: gradient norm is inf, stopped before the update"):
        run.clip_and_step(torch.optim.SGD([weight], lr=1.0), 1.0)
    assert torch.equal(weight, torch.ones(4))
