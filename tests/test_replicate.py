"""The replication: every command that it would run is one that its stage accepts, and its report pairs models by seed."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from lib.compare import replicate
from lib.run.settings import parse_settings

CLASSES = {
    "01": ("Settings", "mixture"),
    "02": ("Settings", "sft"),
    "03": ("Settings", "rl"),
    "04": ("Settings", "eval"),
}


def test_every_job_is_a_command_that_its_stage_accepts_and_reads_what_an_earlier_one_wrote(tmp_path):
    seed = replicate.Seed(tmp_path, 7, [])
    made = {"lib/sandbox/base"}
    for script, *words in [*seed.main(), *seed.ablations()]:
        stage = importlib.import_module(script.removesuffix(".py"))
        name, section = CLASSES[script[:2]]
        settings = parse_settings(getattr(stage, name), section, words)
        assert settings.seed == 7
        reads = [settings.model] if hasattr(settings, "model") else []
        if script.startswith("04"):
            subjects = stage.read_subjects(settings)
            reads = [subject.path for subject in subjects]
            assert [subject.name for subject in subjects if not subject.reasoning] == ["base"][
                : "base" in settings.models[0]
            ]
        assert {*reads, *([settings.data] if hasattr(settings, "data") else [])} <= made
        made.add(settings.out)
    assert len(made) == len(seed.main()) + len(seed.ablations()) + 1  # nobody writes where another wrote


def results(safety: float) -> dict:
    ci = {"mean": safety, "low": 0.0, "high": 1.0, "n": 9}
    return {
        "dsr": {"direct": ci, "jailbreak": ci},
        "task_score": dict.fromkeys(("harmless", *replicate.AMBIGUOUS), ci),
    }


def test_the_report_pairs_by_seed_and_an_ablation_may_have_fewer(tmp_path: Path):
    runs = {model: [results(0.1 * i) for i in range(3)] for model in replicate.MODELS["main"]}
    later = (*replicate.MODELS["ablations"], *replicate.MODELS["ambiguity"])
    runs |= {model: [results(0.1 * i + 0.5) for i in range(2)] for model in later}
    text = replicate.report(runs)
    assert "tars (3 seeds)" in text and "heavy (2 seeds)" in text
    assert "| F4 help: harmful only - tars | +0.50 [+0.50, +0.50] | +0.50, +0.50 |" in text
    assert "| DSR direct | 0.10 [" in text
    assert math.isnan(replicate.COLUMNS["DSR GCG"](runs["sft"][0]))
    pytest.importorskip("matplotlib")
    assert (
        "plane.png" in replicate.draw_plane(tmp_path, runs) and (tmp_path / "plane.png").stat().st_size > 1000
    )
