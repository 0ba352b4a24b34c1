"""RL with the rainbow archive against RL without: every command is one that its stage accepts, and differences pair by seed."""

from __future__ import annotations

import importlib
import os

from lib.compare import rainbow_gain
from lib.run.files import write_json
from lib.run.settings import parse_settings

CLASSES = {
    "01": ("Settings", "mixture"),
    "02": ("Settings", "sft"),
    "03": ("Settings", "rl"),
    "04": ("Settings", "eval"),
}


def test_every_job_is_a_command_that_its_stage_accepts_and_comes_after_what_it_reads(tmp_path):
    earlier, commands = {}, {}
    for job in rainbow_gain.GainSeed(tmp_path, 7, []).jobs():
        script, *words = job.command
        stage = importlib.import_module(script.removesuffix(".py"))
        settings = commands[job.name] = parse_settings(
            getattr(stage, CLASSES[script[:2]][0]), CLASSES[script[:2]][1], words
        )
        assert settings.seed == 7 and settings.out == str(tmp_path / job.name) and job.name not in earlier
        known = set(job.after).union(*(earlier[name] for name in job.after))  # what is there when it begins
        reads = [
            getattr(settings, name) for name in ("model", "data", "rainbow") if getattr(settings, name, "")
        ]
        reads += (
            [subject.path for subject in stage.read_subjects(settings)] if script.startswith("04") else []
        )
        assert {os.path.relpath(p, tmp_path) for p in reads if p != "lib/sandbox/base"} <= known
        earlier[job.name] = known
    plain, found = (commands[f"seed-7/{model}"] for model in rainbow_gain.MODELS)
    assert plain.model == found.model and plain.data != found.data  # one pi_SFT; the mixture alone differs
    assert {commands[f"seed-7/{name}"].data for name in rainbow_gain.ATTACKS} == {plain.data}


def test_the_report_pairs_models_by_seed(tmp_path):
    seeds = []
    for i, (without, found) in enumerate(((0.2, 0.5), (0.6, 0.9))):
        seeds.append(tmp_path / f"seed-{i}")
        for name in rainbow_gain.ATTACKS:
            models = {
                model: {
                    "dsr": dict.fromkeys(
                        ("direct", "jailbreak", "pair", "best_of_n", "pap", "plain_or_gcg"), {"mean": mean}
                    ),
                    "plane": {"compliance": {"mean": 1.0}, "task_score": {"mean": 0.5}},
                }
                for model, mean in (("plain", without), ("with", found))
            }
            write_json(seeds[-1] / name / "results.json", {"models": models})
        harm = {key: {"mean": 0.4, "low": 0.3, "high": 0.5, "n": 9} for key in ("plain", "archive")}
        write_json(
            seeds[-1] / "data-rainbow" / "rainbow" / "archive.json",
            {"archives": [{"filled": 120}], "harm": harm},
        )
    text = rainbow_gain.report(seeds)
    assert (
        "| DSR, plain_or_gcg | 0.40 [-2.14, 2.94] | 0.70 [-1.84, 3.24] | +0.30 [+0.30, +0.30] | 0.20 > 0.50, 0.60 > 0.90 |"
        in text
    )
    assert "| seed-1 | 120 | 0.40 [0.30, 0.50] | 0.40 [0.30, 0.50] |" in text
