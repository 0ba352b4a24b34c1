from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

import lib.run.settings
from lib import UserError
from lib.run.command import run_main
from lib.run.folder import claim_folder
from lib.run.settings import parse_settings, presets_found, setting

ROOT = Path(__file__).parents[1]
STAGES = {
    "mixture": "01_build_mixture.py",
    "sft": "02_sft_warmstart.py",
    "rl": "03_rl_train.py",
    "eval": "04_attack_eval.py",
}


@dataclass
class Settings:
    preset: str = setting("small", "where the defaults come from")
    learning_rate: float = setting(3e-5, "peak rate, 100% of it", low=0.0)
    batch_size: int = setting(4, "rows", low=1, high=64)
    reasoning: bool = setting(True, "think first")
    over_write: bool = setting(False, "delete")
    device: str = setting("auto", "where", choices=("auto", "cpu"))
    attacks: list[str] = setting(["gcg"], "which", choices=("gcg", "pair"))
    out: str = setting("", "folder")


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    """Two presets: small, and paper."""
    small = {"batch_size": 8, "learning_rate": 1}
    paper = {"learning_rate": 1e-4, "reasoning": False, "attacks": ["gcg", "pair"]}
    for name, values in {"small": small, "paper": paper}.items():
        module = types.ModuleType(name)
        module.SFT = values
        monkeypatch.setitem(sys.modules, f"lib.run.presets.{name}", module)
    monkeypatch.setattr(lib.run.settings, "presets_found", lambda: ["paper", "small"])


def parse(line: str = "") -> Settings:
    return parse_settings(Settings, "sft", line.split())


def test_dataclass_then_preset_then_flags():
    assert parse() == Settings(learning_rate=1.0, batch_size=8)
    assert type(parse().learning_rate) is float
    paper = parse("--preset paper --batch-size 2")
    assert paper == Settings("paper", 1e-4, 2, False, attacks=["gcg", "pair"])
    assert parse("--learning-rate 2 --preset=paper").learning_rate == 2.0, "order does not matter"
    assert Settings().attacks == ["gcg"], "the class's own defaults stay"


def test_dashes_underscores_equals_and_lists():
    assert parse("--batch-size 3") == parse("--batch_size 3") == parse("--batch_size=3")
    assert parse("--attacks pair gcg --out x").attacks == ["pair", "gcg"]
    assert parse("--learning_rate 1e-3").learning_rate == 1e-3


def test_bools_from_either_default():
    assert not parse("--no-reasoning").reasoning and not parse("--reasoning false").reasoning
    assert parse("--preset paper --reasoning").reasoning
    assert not parse("--preset paper --no-reasoning").reasoning
    assert parse("--over-write").over_write and parse("--over_write").over_write
    assert not parse("--over-write --no-over-write").over_write
    assert parse("--no_over_write --over-write").over_write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning-rate abc", "--learning-rate: given abc; allowed a number from 0 to 1e+06"),
        ("--learning_rate=-1e-3", "--learning-rate: given -0.001; allowed a number from 0 to 1e+06"),
        ("--learning-rate -1", "--learning-rate: given -1.0; allowed a number from 0 to 1e+06"),
        ("--learning-rate nan", "--learning-rate: given nan; allowed a number from 0 to 1e+06"),
        ("--learning-rate", "--learning-rate: given nothing; allowed a number from 0 to 1e+06"),
        ("--batch-size 2.5", "--batch-size: given 2.5; allowed a whole number from 1 to 64"),
        ("--batch-size 65", "--batch-size: given 65; allowed a whole number from 1 to 64"),
        ("--reasoning perhaps", "--reasoning: given perhaps; allowed true | false"),
        ("--device tpu", "--device: given tpu; allowed auto | cpu"),
        ("--attacks gcg none", "--attacks: given gcg none; allowed gcg | pair"),
        ("--preset huge", "--preset: given huge; allowed paper | small (lib/run/presets)"),
        ("--preset", "--preset: given nothing; allowed paper | small (lib/run/presets)"),
        ("--learnin-rate 1", "--learnin-rate: no such flag; did you mean --learning-rate?"),
        ("--no-reasonin", "--no-reasonin: no such flag; did you mean --no-reasoning?"),
        ("--zzz=1", "--zzz: no such flag; see --help"),
        ("--batch 3", "--batch: no such flag"),
        ("stray", "given stray; allowed flags only"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size: given 0; allowed"),
        ({"batch_size": 2.5}, "--batch-size: given 2.5; allowed"),
        ({"nonsense": 1}, "SFT sets 'nonsense', no setting"),
    ],
)
def test_a_wrong_preset_is_named(values, message, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["lib.run.presets.small"], "SFT", values)
    with pytest.raises(SystemExit):
        parse()
    assert message in capsys.readouterr().err


def test_help_shows_the_chosen_presets_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset paper --help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert (
        "--learning-rate LEARNING_RATE peak rate, 100% of it (a number from 0 to 1e+06; default: 0.0001)"
        in text
    )
    assert "--[no-]reasoning think first (default: false)" in text
    assert "--device DEVICE where (auto | cpu; default: auto)" in text
    assert "--over_write" not in text and "--no-over-write" not in text, "each flag once"


def test_every_preset_sets_only_what_its_stage_has(monkeypatch):
    monkeypatch.undo()  # the real presets
    monkeypatch.syspath_prepend(str(ROOT))
    if not presets_found():
        pytest.skip("no presets yet")
    missing = [file for file in STAGES.values() if not (ROOT / file).exists()]
    for stage, file in STAGES.items():
        if file in missing:
            continue
        spec = importlib.util.spec_from_file_location(f"stage_{stage}", ROOT / file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        cls = next(
            v for k, v in vars(module).items() if k.endswith("Settings") and dataclasses.is_dataclass(v)
        )
        names = {field.name for field in dataclasses.fields(cls)}
        for preset in presets_found():
            values = getattr(importlib.import_module(f"lib.run.presets.{preset}"), stage.upper())
            assert set(values) <= names, f"{preset}, {stage}: {set(values) - names}"
            parse_settings(cls, stage, ["--preset", preset])
    if missing:
        pytest.skip(f"not there yet: {missing}")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x is wrong: do y"), 2, "error: x is wrong: do y"),
        (KeyboardInterrupt(), 130, "stopped; finished work is kept, run the same command again to resume"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "error: a/b: Read-only file system"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), 2, "error: a/b: File name too long"),
        (
            RuntimeError(
                "[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. E"
            ),
            2,
            "error: can't allocate memory: you tried to allocate 9 bytes: lower the tokens of a batch",
        ),
    ],
)
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
    run_main(lambda: None)


def test_claim_a_new_folder_and_resume_it(tmp_path):
    out, settings = tmp_path / "runs" / "x", asdict(Settings())
    claim_folder(out, settings, overwrite=False)
    written = json.loads((out / "settings.json").read_text())
    assert settings.items() <= written.items()
    assert written["git_revision"] and "torch" in written["versions"]
    (out / "model").write_text("work")
    for overwrite in (False, True):  # the same settings: a resume
        claim_folder(out, {**settings, "overwrite": overwrite}, overwrite=overwrite)
    assert (out / "model").read_text() == "work"


@pytest.mark.parametrize(
    "left",
    ["state/", "metrics.jsonl", ".model.safetensors.7.tmp", ".checkpoint.tmp/model.safetensors", ".lock"],
)
def test_a_folder_with_nothing_but_settings_is_taken_over(tmp_path, left):
    """Of a run that failed at once, whatever it had begun to write; a byte of its work keeps the folder."""
    claim_folder(tmp_path / "x", {"n": 1}, overwrite=False)
    path = tmp_path / "x" / left
    path.parent.mkdir(exist_ok=True)
    if not left.endswith("/"):
        path.write_text("" if left == "metrics.jsonl" else "half")
    claim_folder(tmp_path / "x", {"n": 2}, overwrite=False, begin=False)
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["n"] == 1, "only looked at"
    claim_folder(tmp_path / "x", {"n": 2}, overwrite=False)
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["n"] == 2
    (tmp_path / "x" / "deep").mkdir()
    (tmp_path / "x" / "deep" / "log").write_text("{")
    for begin in (True, False):
        with pytest.raises(UserError, match="--n 2, now 3"):
            claim_folder(tmp_path / "x", {"n": 3}, overwrite=False, begin=begin)
    claim_folder(tmp_path / "x", {"n": 3}, overwrite=True, begin=False)
    assert (tmp_path / "x" / "deep" / "log").exists(), "looking empties nothing"


def test_claim_a_folder_of_another_run(tmp_path):
    settings = asdict(Settings())
    claim_folder(tmp_path / "x", settings, overwrite=False)
    (tmp_path / "x" / "deep").mkdir()
    (tmp_path / "x" / "deep" / "model").write_text("work")
    other = {**settings, "batch_size": 9}
    claim_folder(tmp_path / "x", other, overwrite=False, ignore=("batch_size",))
    with pytest.raises(UserError, match="--batch-size 4, now 9: .*--overwrite"):
        claim_folder(tmp_path / "x", other, overwrite=False)
    with pytest.raises(UserError, match="--steps unset, now 3"):
        claim_folder(tmp_path / "x", {**settings, "steps": 3}, overwrite=False)
    assert (tmp_path / "x" / "deep" / "model").exists()
    claim_folder(tmp_path / "x", other, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [".lock", "settings.json"], (
        "the lock stays held"
    )
    assert json.loads((tmp_path / "x" / "settings.json").read_text())["batch_size"] == 9


def test_another_spelling_of_a_path_or_another_place_of_the_folder_is_the_same_run(tmp_path):
    claim_folder(
        tmp_path / "x", {"out": f"{tmp_path}/x/", "data": "runs/data/", "model": "me/model"}, overwrite=False
    )
    (tmp_path / "x" / "log").write_text("work")
    (tmp_path / "x").rename(tmp_path / "y")
    claim_folder(
        tmp_path / "y", {"out": f"{tmp_path}/y", "data": "./runs/data", "model": "me/model"}, overwrite=False
    )
    with pytest.raises(UserError, match="--data"):
        claim_folder(
            tmp_path / "y",
            {"out": f"{tmp_path}/y", "data": "runs/other", "model": "me/model"},
            overwrite=False,
        )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_run_is_neither_used_nor_emptied(tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    with pytest.raises(UserError, match="no run of ours"):
        claim_folder(tmp_path / "photos", {}, overwrite=overwrite)
    (tmp_path / "photos" / "settings.json").write_text('{"theme": "dark"}')
    with pytest.raises(UserError, match="not written by this program"):
        claim_folder(tmp_path / "photos", {}, overwrite=overwrite)
    with pytest.raises(UserError, match="a file"):
        claim_folder(tmp_path / "photos" / "a.jpg", {}, overwrite=overwrite)
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_overwrite_spares_home_the_working_folder_and_what_a_link_points_to(tmp_path, monkeypatch):
    out = tmp_path / "x"
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
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    claim_folder(out, {"n": 2}, overwrite=True)
    assert (tmp_path / "elsewhere" / "kept").exists() and not (out / "link").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_never_deletes_what_it_reads(tmp_path, monkeypatch, overwrite):
    out = tmp_path / "rl"
    claim_folder(out, {"n": 1}, overwrite=False)
    weights, far = out / "model.safetensors", tmp_path / "far.jsonl"
    weights.write_text("work")
    far.write_text("{}")
    (tmp_path / "link").symlink_to(out)
    (out / "far.jsonl").symlink_to(far)
    monkeypatch.chdir(tmp_path)
    for read in (
        weights,
        "rl/model.safetensors",
        tmp_path / "link/model.safetensors",
        out,
        out / "far.jsonl",
    ):
        for keywords in (
            {"settings": {"n": 2, f"sha256 of {read}": "0"}},
            {"settings": {"n": 2}, "inputs": [read]},
        ):
            with pytest.raises(
                UserError, match=r"--out: .*rl holds .*, which this run reads: give another --out"
            ):
                claim_folder(out, overwrite=overwrite, **keywords)
    assert weights.read_text() == "work"
    elsewhere = [far, "org/name", "", tmp_path]
    claim_folder(out, {"n": 2, f"sha256 of {far}": "0"}, overwrite=True, inputs=elsewhere)
    assert not weights.exists() and far.exists()


def test_an_error_is_one_line_whatever_is_in_its_names(capsys):
    def main():
        raise UserError("a\x1b[2J\u202eb\nc: no such file")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "error: a\\u001b[2J\\u202eb\\nc: no such file\n"


def test_a_reader_that_has_enough_is_one_line(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        "from lib.run.settings import run_main\n"
        "def main():\n    while True:\n        print('word ' * 99, flush=True)\n"
        "run_main(main)\n"
    )
    command = f"{sys.executable} {script} | head -c 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, timeout=60)
    assert (
        done.stdout == "w"
        and done.stderr == "error: output: its reader has closed it; what was written before is whole\n"
    )


def test_exit_code_of_a_script(tmp_path):
    script = (
        "from lib.run.settings import UserError, run_main\ndef main(): raise UserError('no')\nrun_main(main)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "error: no\n")
