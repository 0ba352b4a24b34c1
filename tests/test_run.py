"""The plumbing behind `run`: settings, files, claims of a folder, the state of a resumed run, ends."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

import lib.run.settings
from lib import UserError
from lib.run import run_main
from lib.run.checkpoint import read_state
from lib.run.command import at_end
from lib.run.files import (
    append_jsonl,
    atomic,
    git_revision,
    read_jsonl,
    resume_log,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)
from lib.run.folder import claim_folder
from lib.run.plumbing import Run
from lib.run.settings import beside, following, model_name, parse_settings, presets_found, setting
from lib.run.training import set_learning_rate

ROOT = Path(__file__).parents[1]


@dataclass
class Settings:
    preset: str = setting("small", "where the defaults come from")
    learning_rate: float = setting(3e-5, "peak rate, 100% of it", low=0.0)
    batch_size: int = setting(4, "rows", low=1, high=64)
    reasoning: bool = setting(True, "think first")
    device: str = setting("auto", "where", choices=("auto", "cpu"))
    attacks: list[str] = setting(["gcg"], "which", choices=("gcg", "pair"))
    out: str = setting("", "folder")
    warmup: int = setting(5, "hidden", low=0, flag=False)


@pytest.fixture
def presets(monkeypatch):
    """Two presets: small, and paper."""
    small = {"batch_size": 8, "learning_rate": 1, "warmup": 7}
    paper = {"learning_rate": 1e-4, "reasoning": False, "attacks": ["gcg", "pair"]}
    for name, values in {"small": small, "paper": paper}.items():
        module = types.ModuleType(name)
        module.SFT, module.RPO = values, {"batch_size": 16}
        monkeypatch.setitem(sys.modules, f"lib.run.presets.{name}", module)
    monkeypatch.setattr(lib.run.settings, "presets_found", lambda: ["paper", "small"])


def parse(line: str = "", *stages: str) -> Settings:
    return parse_settings(Settings, "sft", *stages, argv=line.split())


# ---- settings ----


def test_class_then_preset_then_flags(presets):
    assert parse() == Settings(learning_rate=1.0, batch_size=8, warmup=7)
    assert type(parse().learning_rate) is float
    paper = Settings("paper", 1e-4, 2, False, attacks=["gcg", "pair"])
    assert parse("--preset paper --batch-size=2") == paper
    assert parse("--learning-rate 2 --preset=paper").learning_rate == 2.0  # order does not matter
    assert parse("", "rpo").batch_size == 16 and parse("--batch-size 3", "rpo").batch_size == 3
    assert parse("--attacks pair gcg --out x").attacks == ["pair", "gcg"] and Settings().attacks == ["gcg"]
    assert parse("--preset paper --reasoning").reasoning and not parse("--no-reasoning").reasoning


MISTAKES = [
    ("--learning-rate abc", "--learning-rate: given abc; allowed a number from 0 to 1e+06"),
    ("--learning-rate=-1e-3", "--learning-rate: given -1e-3; allowed a number from 0 to 1e+06"),
    ("--learning-rate nan", "--learning-rate: given nan; allowed"),
    ("--learning-rate", "--learning-rate: expected one argument"),
    ("--batch-size 2.5", "--batch-size: given 2.5; allowed a whole number from 1 to 64"),
    ("--batch-size 65", "--batch-size: given 65; allowed a whole number from 1 to 64"),
    ("--device tpu", "--device: given tpu; allowed auto | cpu"),
    ("--attacks gcg none", "--attacks: given none; allowed gcg | pair"),
    ("--preset huge", "--preset: given huge; allowed paper | small (lib/run/presets)"),
    ("--learnin-rate 1", "unrecognized arguments: --learnin-rate"),
    ("--warmup 3", "unrecognized arguments: --warmup"),  # presets alone set it
    ("--batch 3", "unrecognized arguments: --batch"),  # nothing is shortened
    ("stray", "unrecognized arguments: stray"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_a_mistake_says_what_is_allowed(line, message, presets):
    with pytest.raises(UserError) as error:
        parse(line)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


WRONG = [
    ({"batch_size": 0}, "SFT: batch_size: given 0; allowed"),
    ({"batch_size": 2.5}, "SFT: batch_size: given 2.5; allowed"),
    ({"nonsense": 1}, "SFT sets 'nonsense', no setting"),
]


@pytest.mark.parametrize("values, message", WRONG)
def test_a_wrong_preset_is_named(values, message, presets, monkeypatch):
    monkeypatch.setattr(sys.modules["lib.run.presets.small"], "SFT", values)
    with pytest.raises(UserError, match="lib/run/presets/small.py: ") as error:
        parse()
    assert message in str(error.value)


def test_help_shows_the_chosen_presets_defaults(presets, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset paper --help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--learning-rate N peak rate, 100% of it (default: 0.0001)" in text
    assert "--reasoning, --no-reasoning think first (default: false)" in text and "--warmup" not in text
    assert "--device TEXT where (auto | cpu) (default: auto)" in text


STAGES = {"mixture": "01_build_mixture", "sft": "02_sft_warmstart", "rl": "03_rl_train"}
STAGES["eval"] = "04_attack_eval"


@pytest.mark.parametrize("stage", STAGES)
def test_every_preset_fits_its_stage_and_every_number_has_a_range(stage):
    module = importlib.import_module(STAGES[stage])
    for preset in presets_found():
        parse_settings(module.Settings, stage, argv=["--preset", preset])
    for field in dataclasses.fields(module.Settings):
        if field.type in ("int", "float") and field.metadata["flag"]:
            for absurd in ("1" + "0" * 30, "1e308", "-1e300", "inf", "nan"):
                flag = f"--{field.name.replace('_', '-')}"
                with pytest.raises(UserError, match=f"{flag}: given .* from .* to "):
                    parse_settings(module.Settings, stage, argv=[f"{flag}={absurd}"])


@pytest.mark.parametrize("command", ["lib.tools.chat", "lib.compare.study"])
def test_every_number_of_the_other_commands_has_a_range(command, monkeypatch):
    parsers = []
    keep = lambda self, *args: parsers.append(self) or sys.exit()  # noqa: E731
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(f"lib.run.command.Flags.{name}", keep)
    with pytest.raises(SystemExit):
        importlib.import_module(command).main()
    for action in parsers[0]._actions:
        if action.type is not None and action.type is not str:
            for absurd in ("1" + "0" * 30, "1e308", "-1e300", "nan"):
                with pytest.raises(Exception, match="given .*; allowed a .*number from .* to "):
                    action.type(absurd)


def test_the_next_command_leaves_out_what_the_preset_has(tmp_path, monkeypatch):
    def command(stage: str, line: str) -> str:
        cls = importlib.import_module(STAGES[stage]).Settings
        return following(parse_settings(cls, stage, argv=line.split()), [stage])

    expected = "--preset paper --data d --models x=runs/x --out runs/eval-x --device cpu"
    found = command("rl", "--preset paper --device cpu --shard --data d --out runs/x")
    assert found == f"python 04_attack_eval.py {expected}"
    words = "--seed 7 --dtype float32 --no-gradient-checkpointing --no-reasoning"
    found = command("sft", f"--preset paper --out a/sft {words}")
    assert f"--model a/sft --out a/rl {words}" in found
    assert "04_attack_eval" in command("sft", "--traces sft_rl.jsonl")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = {"runs/$(x)": "-x-", ".": "here", "a/..": "here"}
    assert {out: model_name(out) for out in names} == names and beside(".", "eval-here") == "../eval-here"


# ---- ends ----

MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ENDS = [
    (UserError("x is wrong: do y"), 2, "error: x is wrong: do y"),
    (NotImplementedError("group_advantages"), 2, "error: not implemented yet: group_advantages"),
    (KeyboardInterrupt(), 130, "stopped; finished work is kept, run the same command again to resume"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "error: a/b: Read-only file system"),
    (RuntimeError(f"[enforce fail at x.cpp:1] . {MEMORY}. E"), 2, f"error: {MEMORY[21:]}: lower the tok"),
    (UserError("a\x1b[2J\u202eb\nc: no such file"), 2, "error: a\\u001b[2J\\u202eb\\nc: no such file\n"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS)
def test_run_main_ends_in_one_line(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(message) and err.count("\n") == 1


def test_run_main_lets_bugs_through():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        run_main(lambda: open("/no/such/file"))


def test_a_reader_that_has_enough_is_one_line(tmp_path):
    script = tmp_path / "talk.py"
    loop = "def main():\n    while True:\n        print('word ' * 99, flush=True)\n"
    script.write_text(f"from lib.run.command import run_main\n{loop}run_main(main)\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", f"{sys.executable} {script} | head -c 1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    closed = "error: output: its reader has closed it; what was written before is whole\n"
    assert (done.stdout, done.stderr) == ("w", closed)


# ---- files ----

RECORDS = [{"id": "a", "n": 1.5}, {"id": "b", "text": "ä line\nand \u2028 another \ud800", "list": [1, None]}]


def test_jsonl_round_trip_readable_with_surrogates_marks_and_other_line_ends(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    write_jsonl(path, RECORDS)
    append_jsonl(path, {"id": "\udfff"})
    assert read_jsonl(path) == [*RECORDS, {"id": "\udfff"}] and "ä" in path.read_text(encoding="utf-8")
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n{"id": 2}\r\n')
    assert read_jsonl(path, required=("id",)) == [{"id": "1"}, {"id": "2"}]
    write_text(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"


UNREADABLE = [
    (b"\n \n", "is empty"),
    (b'{"id": 1}\n\n{"id": \n', ":3: not a JSON object"),
    (b'{"id": 1}\n[1]\n', ":2: not a JSON object"),
    (b'{"id": "\xff"}\n', ":1: not a JSON object in UTF-8"),
    (b'{"id": 1}\n{"ID": 2}\n', ":2: has no key 'id'"),
    (
        b'{"id": "a"}\n{"id": "b"}\n\n{"id": "a"}\n',
        "id 'a' stands in lines 1 and 4: give each record an id",
    ),
    (b'{"id": 7}\n{"id": "7"}\n', "id '7' stands in lines 1 and 2"),
    (b'{"id": "a\\ud800"}\n{"id": "a\\udfff"}\n', "stands in lines 1 and 2"),
    (b'{"id": null}\n', ":1: id is None; allowed: some text, or a number"),
    (b'{"id": " "}\n', ":1: id is ' '"),
    (b'{"id": ["a"]}\n', ":1: id is ['a']"),
]


@pytest.mark.parametrize("content, message", UNREADABLE)
def test_read_errors_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_jsonl(path, required=("id",))
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_records_have_ids_as_they_stand_and_text_that_is_text(tmp_path):
    path = tmp_path / "x.jsonl"
    texts = '"t": ["a\\ud83d", {"b\\u0000": "\\ud83d\\ude00"}]'
    path.write_text('{"id": 1e5, "n": 1e5}\n{"id": 1.0}\n{"id": "007", ' + texts + "}")
    records = read_jsonl(path, required=("id",))
    assert [r["id"] for r in records] == ["1e5", "1.0", "007"] and records[0]["n"] == 100000.0
    assert records[2]["t"] == ["a\ufffd", {"b\ufffd": "\U0001f600"}]
    for value in (None, 7, ["x"], True, "", " "):
        write_jsonl(path, [{"id": "r", "prompt": value, "target": value}])
        with pytest.raises(UserError, match="x.jsonl: r: prompt is .*; allowed: some text"):
            read_jsonl(path, ("id", "prompt"))
        if value in ("", " ", None):  # null is as good as missing
            assert read_jsonl(path, ("id",), ("target",))[0]["target"] == value
        else:
            with pytest.raises(UserError, match="r: target is"):
                read_jsonl(path, ("id",), ("target",))
    for missing, message in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=message):
            read_jsonl(missing)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_resumed_log_drops_unwanted_malformed_and_half_written_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0,  "odd spacing":1}\n{"step": 1}\nnonsense\n{"step": 5}\n{"step": 1}')
    assert [r["step"] for r in resume_log(path, lambda record: record["step"] < 3)] == [0, 1]
    assert path.read_bytes() == b'{"step": 0,  "odd spacing":1}\n{"step": 1}\n'
    assert resume_log(tmp_path / "none.jsonl") == [] and not (tmp_path / "none.jsonl").exists()


def test_checksums_and_the_commit(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"ab" * 700_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"ab" * 700_000).hexdigest()
    assert git_revision() == "unknown" or len(git_revision().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert git_revision() == "unknown"


# ---- the folder of a run ----


def test_claim_a_new_folder_and_resume_it_wherever_it_is_moved(tmp_path):
    out, settings = tmp_path / "runs" / "x", {**asdict(Settings()), "data": "runs/data/", "save_every": 1}
    write_text(out / ".settings.json.7.tmp", "half of it")  # all that a kill may leave at first
    assert not claim_folder(out, settings, overwrite=False)
    written = json.loads((out / "settings.json").read_text())
    assert settings.items() <= written.items() and written["git_revision"] and "torch" in written["versions"]
    (out / "model").write_text("work")
    at_end.close()  # the lock of a run that has ended
    out.rename(tmp_path / "y")
    other = {"data": "./runs/data", "out": "elsewhere", "save_every": 9}  # how to compute is not what
    same = {**settings, **other}
    assert claim_folder(tmp_path / "y", same, overwrite=False)
    assert claim_folder(tmp_path / "y", {**settings, "overwrite": True}, overwrite=True)
    assert (tmp_path / "y" / "model").read_text() == "work"


HALF = ["state/", "metrics.jsonl", ".model.safetensors.7.tmp", ".checkpoint.tmp/model.safetensors", ".lock"]


@pytest.mark.parametrize("left", HALF)
def test_a_folder_with_nothing_but_settings_is_taken_over(tmp_path, left):
    """Of a run that failed at once, whatever it had begun to write; a byte of its work keeps the folder."""
    out = tmp_path / "x"
    claim_folder(out, {"n": 1}, overwrite=False)
    path = out / left
    path.parent.mkdir(exist_ok=True)
    if not left.endswith("/"):
        path.write_text("" if left == "metrics.jsonl" else "half")
    claim_folder(out, {"n": 2}, overwrite=False, begin=False)
    assert json.loads((out / "settings.json").read_text())["n"] == 1  # only looked at
    claim_folder(out, {"n": 2}, overwrite=False)
    (out / "deep").mkdir()
    (out / "deep" / "log").write_text("{")
    for begin in (True, False):
        with pytest.raises(UserError, match="--n 2, now 3: .*--overwrite"):
            claim_folder(out, {"n": 3}, overwrite=False, begin=begin)
    with pytest.raises(UserError, match="--steps unset, now 3"):
        claim_folder(out, {"n": 2, "steps": 3}, overwrite=False)
    claim_folder(out, {"n": 3}, overwrite=True, begin=False)
    assert (out / "deep" / "log").exists()  # looking empties nothing
    claim_folder(out, {"n": 3}, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [".lock", "settings.json"]  # the lock stays held


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_neither_used_nor_emptied(tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        claim_folder(tmp_path / "photos", {}, overwrite=overwrite)
    (tmp_path / "photos" / "settings.json").write_text('{"theme": "dark"}')
    with pytest.raises(UserError, match="not written by this program"):
        claim_folder(tmp_path / "photos", {}, overwrite=overwrite)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_overwrite_spares_home_the_working_folder_and_what_a_link_points_to(tmp_path, monkeypatch):
    out, elsewhere = tmp_path / "x", tmp_path / "elsewhere"
    claim_folder(out, {"n": 1}, overwrite=False)
    (out / "inner").mkdir()
    (out / "inner" / "log").write_text("work")
    monkeypatch.chdir(out / "inner")
    with pytest.raises(UserError, match="will not empty"):
        claim_folder(out, {"n": 2}, overwrite=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(out))
    with pytest.raises(UserError, match="will not empty"):
        claim_folder(out, {"n": 2}, overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    (out / "link").symlink_to(elsewhere)
    claim_folder(out, {"n": 2}, overwrite=True)
    assert (elsewhere / "kept").exists() and not (out / "link").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_never_deletes_what_it_reads(tmp_path, monkeypatch, overwrite):
    out, far = tmp_path / "rl", tmp_path / "far.jsonl"
    claim_folder(out, {"n": 1}, overwrite=False)
    (out / "model.safetensors").write_text("work")
    far.write_text("{}")
    (tmp_path / "link").symlink_to(out)
    (out / "far.jsonl").symlink_to(far)
    monkeypatch.chdir(tmp_path)
    weights = [out / "model.safetensors", "rl/model.safetensors", tmp_path / "link/model.safetensors"]
    for read in (*weights, out, out / "far.jsonl"):
        with pytest.raises(UserError, match=r"--out: .*rl holds .*, which this run reads: give another"):
            claim_folder(out, {"n": 2}, overwrite=overwrite, inputs=[read])
    assert weights[0].read_text() == "work"
    claim_folder(out, {"n": 2}, overwrite=True, inputs=[far, "org/name", "", tmp_path])
    assert not weights[0].exists() and far.exists()


# ---- training ----


RATES = [
    (0, False, [2.0, 2.0, 2.0, 2.0, 2.0]),
    (2, False, [1.0, 2.0, 2.0, 2.0, 2.0]),
    (0, True, [2.0, 1.6, 1.2, 0.8, 0.4]),
    (1, True, [2.0, 2.0, 1.5, 1.0, 0.5]),
    (8, True, [0.25, 0.5, 0.75, 1.0, 1.25]),  # it ends before it is warm
]


@pytest.mark.parametrize("warmup, decay, rates", RATES)
def test_learning_rate_of_each_step(warmup, decay, rates):
    settings = types.SimpleNamespace(learning_rate=2.0, warmup_steps=warmup, decay=decay)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    assert [set_learning_rate(optimizer, settings, step, 5) for step in range(5)] == pytest.approx(rates)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stops_before_the_step(value, tmp_path):
    run, weight = (
        Run(types.SimpleNamespace(out=tmp_path, max_grad_norm=1.0)),
        torch.ones(1, requires_grad=True),
    )
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for loss, gradient in ((value, 1.0), (1.0, value)):
        weight.grad = torch.tensor([gradient])
        with pytest.raises(UserError, match="(loss|norm) is .*before the update.*learning-rate"):
            run.clip_and_step(optimizer, loss)
    assert weight.item() == 1.0


@pytest.mark.parametrize("content", [b"\0" * 64, b"", b"PK\x03\x04 and no more"])
def test_a_damaged_state_is_one_line(content, tmp_path):
    (tmp_path / "progress.pt").write_bytes(content)
    with pytest.raises(UserError, match="progress.pt: not a saved state .*delete it"):
        read_state(tmp_path / "progress.pt")


@pytest.mark.parametrize("loss, slope", [(float("nan"), 1.0), (1.0, float("inf")), (1.0, 1.0)])
def test_no_step_is_taken_with_a_loss_or_a_gradient_that_is_not_finite(loss, slope, tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), slope)
    run = Run(types.SimpleNamespace(out=str(tmp_path), max_grad_norm=0.0, shard=False))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if loss == slope == 1.0:
        assert run.clip_and_step(optimizer, loss) == pytest.approx(3**0.5) and not weight.any()
        return
    with pytest.raises(UserError, match="step 0: .*stopped before the update.*--learning-rate"):
        run.clip_and_step(optimizer, loss)
    assert torch.equal(weight, torch.ones(3))
