"""The lessons, each at tiny size: on a run of two steps, made here."""

from __future__ import annotations

import runpy
import sys
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


def test_lesson_1_shows_one_word_that_differs_and_catches_the_leak(tiny, read):
    out, figures = read(LESSONS[0], tiny)
    assert "words that differ between the three prompts: 1" in out
    assert "kept for RL: 16 of 17; left out: {'in evaluation': 1}" in out and "in both files: 0" in out
    assert figures == 1


def test_lesson_2_marks_what_is_learned_and_trains_heavily(tiny, read):
    out, figures = read(LESSONS[1], tiny)
    tokens = [line for line in out.splitlines() if line.endswith(" yes")]
    assert "<think>" in tokens[0] and "<|end|>" in tokens[-1] and "<|user|>" not in "".join(tokens)
    assert "heavy        4" in out and "of 8 distinct" in out  # twice the epochs, two updates each
    assert figures == 1


def test_lesson_3_leads_from_a_group_to_an_update(tiny, read):
    out, figures = read(LESSONS[2], tiny)
    titles = ["r_f", "token", "A ", "step", "variant"]
    found = [line for line in out.splitlines() if line.startswith(tuple(titles))]
    assert [next(t for t in titles if line.startswith(t)) for line in found] == titles
    assert all(out.count(f"\n{name}") == 8 for name in ("first", "middle", "last"))
    assert figures == 1


def test_lesson_4_attacks_and_counts(tiny, read):
    out, figures = read(LESSONS[3], tiny)
    assert all(name in out for name in ("GCG, step 0", "GCG, step 2", "random suffix", "no suffix"))
    assert out.count(" of 2  [") == 3 * 4  # models x attacks
    assert figures == 3


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
