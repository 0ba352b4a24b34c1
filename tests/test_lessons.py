"""The lessons, each at tiny size: on a run of two steps, made here."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
import pytest
import stages
from stages import ROOT, flags, run_here

from lib.sandbox.world import BASE

HERE = ROOT / "docs/lessons"
LESSONS = sorted(HERE.glob("[1-9]_*.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A run of all four chapters, two steps of SFT and of RL, two requests under two steps of GCG."""
    run = tmp_path_factory.mktemp("tiny")
    data, sft, rl = run / "data", run / "sft", run / "rl"
    words = {
        "01_build_mixture": {"out": data, "rl_prompts": 16, "sft_prompts": 20, "eval_prompts": 4},
        stages.SFT: {"data": data, "out": sft, "batch_size": 40},
        stages.RL: {"data": data, "model": sft, "out": rl, "prompts_per_step": 8, "max_new_tokens": 24},
        "04_attack_eval": {"data": data, "out": run / "eval", "gcg_steps": 2, "behaviours": 2}
        | {"models": [f"base={BASE}", f"sft={sft}", f"tars={rl}"], "no_reasoning": ["base"]}
        | {"max_new_tokens": 24},
    }
    with pytest.MonkeyPatch.context() as patch:
        for stage, settings in words.items():
            run_here(stage, flags(preset="sandbox", **settings), patch)
    return run


@pytest.fixture
def read(monkeypatch, capsys):
    """Runs a lesson on the run in a folder: what it prints, and how many figures it shows."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    def run(lesson: Path, folder: Path) -> tuple[str, int]:
        shown = []
        monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()) or plt.close("all"))
        monkeypatch.setenv("LESSON_RUN", str(folder))
        monkeypatch.chdir(ROOT)  # a lesson goes there itself, and this goes back
        monkeypatch.syspath_prepend(HERE)
        capsys.readouterr()
        runpy.run_path(str(lesson))
        return capsys.readouterr().out, len(shown)

    yield run
    sys.modules.pop("lesson", None)
    plt.close("all")


SHOWN = [  # what each prints
    ["differ between the three prompts: 1\n", "16 of 17; left out: {'in evaluation': 1}", "in both files: 0"],
    ["<think>", "<|end|>", "heavy        4", "of 8 distinct"],  # twice the epochs, two updates each
    ["\nr_f", "\ntoken", "\nA ", "\nstep", "\nvariant", *8 * ["\nfirst"]],
    ["GCG, step 0", "GCG, step 2", "random suffix", "no suffix", *3 * 4 * [" of 2  ["]],  # models x attacks
]


@pytest.mark.parametrize("number", range(4))
def test_a_lesson_runs_and_shows_what_it_is_about(tiny, read, number):
    out, figures = read(LESSONS[number], tiny)
    assert not {text: count for text, count in Counter(SHOWN[number]).items() if out.count(text) < count}
    assert figures == (3 if number == 3 else 1)


def test_without_a_run_a_lesson_says_what_makes_one(tmp_path, read):
    with pytest.raises(SystemExit, match=r"holds no finished run: make demo$"):
        read(LESSONS[0], tmp_path)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_is_short_and_its_notebook_is_of_its_present_text(lesson):
    assert len(lesson.read_text().splitlines()) <= 90
    notebook = lesson.with_suffix(".ipynb")
    if not notebook.exists():
        pytest.skip("make lessons has not been run")
    cells, made = jupytext.read(lesson).cells, nbformat.read(notebook, as_version=4).cells
    assert [cell.source for cell in made] == [cell.source for cell in cells], "make lessons"
    assert notebook.stat().st_size <= 300_000
