"""The comparisons over seeds: commands that chapters accept, runs that can be stopped, numbers, tables."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.compare import study, tables
from lib.compare.studies import FINDINGS, STUDIES, TABLES, frontier
from lib.run.files import write_json, write_jsonl
from lib.run.settings import parse_settings

ROOT = Path(__file__).parents[1]
STAGES = {"01": ["mixture"], "02": ["sft"], "03": ["rl"], "04": ["eval"], "lib.compare.rpo": ["rl", "rpo"]}


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_is_a_command_that_its_chapter_accepts_and_comes_after_what_it_reads(name, tmp_path):
    known: dict[Path, set[Path]] = {}  # all that comes before it
    commands = study.commands_of(STUDIES[name], tmp_path, "--preset sandbox --seed 7")
    for out, (script, *words) in commands.items():
        needed = study.needs(out, commands)
        known[out] = needed.union(*(known[path] for path in needed))
        name = words.pop(0) if script == "-m" else script.removesuffix(".py")
        if name == "lib.sandbox.pretrain":  # no run of a stage
            assert words == ["--documents", f"{out}/held_out.jsonl"] and not needed
            continue
        stages = STAGES.get(name if script == "-m" else name[:2], ["none"])
        settings = parse_settings(importlib.import_module(name).Settings, *stages, argv=words)
        assert settings.seed == 7 and settings.out == str(out)
        reads = [getattr(settings, key, "") for key in ("model", "data", "rainbow", "eval")]
        reads += [path.partition("=")[2] for path in getattr(settings, "models", [])]
        reads.append(str(Path(getattr(settings, "file", "")).parent))
        assert {path for path in map(Path, reads) if path.is_relative_to(tmp_path)} <= known[out]


def test_studies_that_share_a_folder_mean_the_same_by_the_same_name():
    shared: dict[tuple[str, str], set[str]] = {}
    for table in STUDIES.values():
        for name, command in table.runs.items():
            shared.setdefault((table.folder, name), set()).add(command)
    assert not {key: commands for key, commands in shared.items() if len(commands) > 1}


# ---- running: a study of programs that write a line every 20 ms and go on where they were

TOY = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
out, seed = (words[words.index(flag) + 1] for flag in ("--out", "--seed"))
out = pathlib.Path(out); out.mkdir(exist_ok=True); steps = out / "steps"; steps.touch()
if "--fail" in words: sys.exit("error: --wings: no such flag")
(out / "begun").write_text(repr(time.monotonic()))
for step in range(len(steps.read_text().split()), 20):
    with steps.open("a") as file: file.write(f"{step}\\n")
    time.sleep(0.02)
(out / "ended").write_text(repr(time.monotonic()))
plane = {key: {"mean": int(seed) / 10} for key in ("task_score", "compliance")}
models = {"x": {"dsr": {"direct": {"mean": 0.5}}, "plane": plane}}
(out / "results.json").write_text(json.dumps({"models": models}))
"""
RUNS = {"a": "", "b": " --data @a", "c": " --data @a", "eval-x": " --models b=@b c=@c"}


def launch(tmp_path: Path, runs: dict[str, str] = RUNS, seeds: int = 2) -> subprocess.Popen:
    (tmp_path / "toy.py").write_text(TOY)
    table = {name: f"{tmp_path}/toy.py{command}" for name, command in runs.items()}
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from lib.compare import study
from lib.compare.studies import Study
from lib.run.command import run_main
study.STUDIES = {{"toy": Study("toy", 2, 1, {table}, {{"DSR": "dsr/direct"}}, "plane/.*", {{}})}}
run_main(study.main)
"""
    words = ["toy", "--jobs", "2", "--seeds", str(seeds), "--out", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, **pipes)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_study_that_was_stopped_ends_its_runs_and_goes_on_where_they_were(tmp_path, how):
    first, until = launch(tmp_path), time.monotonic() + 60
    steps = [tmp_path / "out" / f"seed-{seed}" / "a" / "steps" for seed in (1, 2)]
    while not all(path.exists() and len(path.read_text().split()) > 3 for path in steps):
        assert time.monotonic() < until and first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(how)
    assert "stopped" in first.communicate()[1] and first.returncode == 130
    before = [path.read_text() for path in steps]
    time.sleep(0.2)
    assert [path.read_text() for path in steps] == before and "19" not in before[0].split()
    assert not (tmp_path / "out" / "seed-1" / "b").exists()

    second = launch(tmp_path)
    assert "| DSR | 0.50 [0.50, 0.50]; 0.50 |" in second.communicate()[0] and second.returncode == 0
    kept = json.loads((tmp_path / "out" / "toy.json").read_text())
    assert kept["command"] == "python -m lib.compare.study toy" and kept["seeds"] == [1, 2]
    folders = list((tmp_path / "out").glob("seed-*/*/"))
    times = {f: [float((f / name).read_text()) for name in ("begun", "ended")] for f in folders}
    assert len(times) == 8
    for folder, (begun, _) in times.items():
        assert (folder / "steps").read_text().split() == [str(step) for step in range(20)]
        needs = {"b": "a", "c": "a", "eval-x": "bc"}.get(folder.name, "")
        assert all(times[folder.parent / name][1] <= begun for name in needs)
        assert sum(start <= begun < end for start, end in times.values()) <= 2


def test_a_run_that_fails_ends_the_others_and_is_one_line_with_its_own_last_one(tmp_path):
    process = launch(tmp_path, {"a": "", "b": " --fail", "c": " --data @a"}, seeds=1)
    line = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 2
    assert line.startswith(f"error: {tmp_path}/out/seed-1/b.log: error: --wings: no such flag; then run")
    assert not (tmp_path / "out/seed-1/a/ended").exists() and not (tmp_path / "out/seed-1/c").exists()


# ---- figures

ABOUT = {"command": "python -m ...", "seeds": [7, 8, 9], "date": "2026-11-27", "hardware": "2 CPU cores"}


def results(dsr: float, task: float) -> dict:
    """What stage 4 says of a model; the mean of its three DSRs is `dsr`."""
    means = {"direct": dsr, "jailbreak": dsr + 0.1, "plain_or_gcg": dsr - 0.1}
    plane = {"task_score": {"mean": task}, "compliance": {"mean": 0.5}}
    return {"dsr": {attack: {"mean": mean} for attack, mean in means.items()}, "plane": plane}


def write_seed(folder: Path, **evaluations: dict[str, dict]) -> Path:
    for name, models in evaluations.items():
        write_json(folder / f"eval-{name}" / "results.json", {"models": models})
    return folder


def test_the_frontier_is_paired_by_seed_and_lambda_and_written_as_table_json_and_figure(tmp_path):
    """tars is better by 0.1, 0.2, 0.3 in DSR at both lambdas; task scores are equal."""
    table, seeds = frontier((0.5, 0.9), ("tars", "rpo")), []
    for i in range(3):
        evaluations = {"references": {"base": results(0.0, 0.9), "sft": results(0.4, 0.5)}}
        for share, dsr, task in (("0.5", 0.4, 0.8), ("0.9", 0.6, 0.4)):
            evaluations[f"rpo-{share}"] = {f"rpo-{share}": results(dsr, task)}
            evaluations[f"tars-{share}"] = {f"tars-{share}": results(dsr + 0.1 * (i + 1), task)}
        seeds.append(study.read_seed(table, write_seed(tmp_path / f"seed-{i}", **evaluations)))
    text = study.write("frontier", table, tmp_path, seeds, ABOUT)
    lines = (tmp_path / "frontier.json").read_text()
    kept = json.loads(lines, parse_constant=pytest.fail)
    cells = {(row["model"], row["figure"]): row for row in kept["rows"]}
    assert kept | ABOUT == kept and len(lines.splitlines()) == len(cells) + 2  # a row a line
    gap = cells["tars - rpo", "DSR"]
    half = 4.303 * 0.1 / math.sqrt(3)  # Student's t of three seeds: mean 0.2, standard deviation 0.1
    assert (gap["mean"], gap["low"], gap["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    area = 0.4 * 0.8 + 0.2 * 0.4  # of rpo: what is below its first point, and what the second adds
    each = {
        ("tars - rpo", "DSR"): [0.1, 0.2, 0.3],
        ("tars - base", "DSR"): [0.6, 0.7, 0.8],  # the same base at either lambda
        ("rpo", "area, plane/task_score"): [area] * 3,
        ("tars - rpo", "area, plane/task_score"): [0.08, 0.16, 0.24],
    }
    assert {key: cells[key]["each"] for key in each} == {key: pytest.approx(each[key]) for key in each}
    assert "| tars-0.5 | 0.60 [0.35, 0.85]; 0.50 |" in text and "+0.20 [-0.05, +0.45]; +0.10 |" in text
    assert not study.write("frontier", table, tmp_path, seeds[:1], ABOUT).count("[0")  # of one: no interval
    pytest.importorskip("matplotlib")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    study.write("attacks", STUDIES["attacks"], tmp_path, [{("tars", "dsr/gcg"): 0.5}], ABOUT)
    assert not (tmp_path / "attacks.png").exists()  # it shows nothing of help


def test_of_two_evaluations_the_first_counts_and_the_archive_is_read(tmp_path):
    first = {name: results(dsr, 0.5) for name, dsr in (("without", 0.2), ("with", 0.6))}
    for found in first.values():
        del found["dsr"]["plain_or_gcg"]
    folder = write_seed(tmp_path, asking=first, gcg=dict.fromkeys(first, results(0.9, 0.1)))
    harm = {"plain": {"mean": 0.4}, "archive": {"mean": 0.7}}
    write_json(folder / "mixture" / "rainbow" / "archive.json", {"filled": 0.9, "harm": harm})
    seed = study.read_seed(STUDIES["rainbow"], folder)
    assert seed["with", "plane/task_score"] == 0.5 and seed["with", "dsr/direct"] == 0.6
    assert seed["with", "dsr/plain_or_gcg"] == pytest.approx(0.8)  # which the second alone has
    assert (seed["mixture", "rainbow/harm/archive"], seed["mixture", "rainbow/filled"]) == (0.7, 0.9)


def test_training_is_told_by_quarters_and_by_the_tokens_sampled_and_trained_on(tmp_path):
    speed = {"sample_tokens_per_s": 300 / 0.7, "seconds_sample": 0.7}
    speed |= {"train_tokens_per_s": 300 / 1.3, "seconds_train": 1.3}
    lines = [{"step": i, "reward": i / 10, "kl": 1.0, **speed} for i in range(8)]
    lines[2]["reward_harmful"] = 0.5  # a step without a harmful prompt has no such key
    lines[2]["reasoning_tokens_harmful"] = None  # nor has one a length, if no completion came to its end
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    means = {f"training/reward/quarter {i}": mean for i, mean in enumerate((0.05, 0.25, 0.45, 0.65), start=1)}
    assert study.over_steps(tmp_path) == pytest.approx(means | {"training/reward_harmful/quarter 2": 0.5})
    assert study.training_tokens(tmp_path) == 8 * (300 + 300)
    write_jsonl(tmp_path / "metrics.jsonl", [{**speed, "pairs": 16, "tied_pairs": 48}] * 4)
    assert study.training_tokens(tmp_path) == 4 * (300 + 75)  # RPO: three pairs of four say nothing
    traces = [{"reasoning": "maybe " * n, "answer": "green soup"} for n in (1, 3)]
    write_jsonl(tmp_path / "sft_rl.jsonl", traces)
    write_json(tmp_path / "settings.json", {"data": str(tmp_path), "traces": "sft_rl.jsonl", "batch_size": 2})
    write_jsonl(tmp_path / "metrics.jsonl", [{"loss": 1.0}] * 5)
    assert study.training_tokens(tmp_path) == 5 * 2 * (2 + 2 + 2 + 1)  # reasoning, answer, markers, the end


# ---- the tables of README and docs: each number comes from docs/results, findings follow from intervals


def test_pages_are_what_write_docs_makes_of_the_results_that_are_kept():
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page}: python -m lib.compare.study --write-docs"
    files = list((ROOT / "docs/results").glob("*.json"))
    assert {path.stem for path in files} <= STUDIES.keys()
    assert sum(path.stat().st_size for path in files) <= 300_000


def test_tables_and_claims_name_models_that_their_study_has():
    known = {}
    for name, chosen in STUDIES.items():
        models, claims = chosen.runs.keys() | chosen.curves.keys() | {"base"}, chosen.claims
        assert {claim.ours for claim in claims} | {claim.other for claim in claims} <= models | {""}
        known[name] = models | {claim.key[0] for claim in claims}
    for name, (study_, models, figures) in TABLES.items():
        assert {*models} <= known[study_], name
        assert models or {figure.partition(": ")[0] for figure in figures.values()} <= known[study_]
    assert FINDINGS.keys() == {claim.finding for chosen in STUDIES.values() for claim in chosen.claims} - {""}


def test_a_findings_verdict_follows_from_its_intervals():
    """F6: compliance with ambiguous prompts is higher, DSR is equal. F1: what is missing is told."""
    up, down, either = ({"mean": 0.0, "low": low, "high": low + 0.1} for low in (0.1, -0.2, -0.06))
    rows = {
        ("tars-0.5 - plain-only", "DSR"): {"mean": 0.0, "low": -0.02, "high": 0.02},  # as good as equal
        ("tars-0.5 - plain-only", "compliance/ambiguous"): up,
        ("harmful-only - tars-0.5", "compliance/ambiguous"): either,
        ("heavy - tars", "area, plane/task_score"): up,
        ("heavy - tars", "area, plane/compliance"): down,
        ("tars - one-reward", "area, plane/task_score"): down,
    }
    kept = ABOUT | {"rows": {key: ci | {"n": 2, "each": [0.0, 0.0]} for key, ci in rows.items()}}
    lines = [line.strip("| ").split(" | ") for line in tables.findings({"ablations": kept})[1]]
    verdicts = {line[0]: line[-1] for line in lines}
    found = [verdicts[f"F{number}"].strip("|* ") for number in (1, 4, 5, 6, 7)]
    assert found == ["not measured", "open", "in part", "reproduced", "not reproduced"]
