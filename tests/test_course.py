"""A course of two exercises, from marks to grades; and marks that are wrong, each told in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stages import ROOT

from lib import UserError
from lib.tools import course

LINES = ["def f():", "    ### BEGIN SOLUTION kl", "    return 1", "    ### END SOLUTION", "f()", ""]
TEXT = "\n".join(LINES)
ENDS = "raise SystemExit\n"  # at the end of a module
MARKED = "### BEGIN SOLUTION" in (ROOT / "03_rl_train.py").read_text(encoding="utf-8")  # not in instructor/


def test_a_body_becomes_an_error_that_names_its_exercise():
    hidden = "### BEGIN HIDDEN\ng()\n### END HIDDEN\n"
    text = course.for_students(TEXT + hidden, {"kl"})
    assert text == 'def f():\n    raise NotImplementedError("exercise kl: make grade E=kl")\nf()\n'
    assert course.for_students(TEXT, set()) == "def f():\n    return 1\nf()\n"
    assert course.for_instructors(TEXT + hidden) == "def f():\n    return 1\nf()\ng()\n"


WRONG = [
    (LINES[1], "", "a.py: ### END SOLUTION: BEGIN and END do not pair"),
    (LINES[3], "", "a.py: ### BEGIN SOLUTION kl: BEGIN and END do not pair"),
    (LINES[2], LINES[1], "do not pair"),  # one within another
    ("SOLUTION kl", "SOLUTION", "exercise without a name lacks an entry in docs/exercises.json"),
    ("kl", "zz", "exercise kl lacks a mark in a.py"),
]


def test_marks_pair_and_have_an_exercise():
    exercises = [{"name": "kl", "files": ["a.py"]}]
    course.check_marks({Path("a.py"): TEXT}, exercises)
    for old, new, error in WRONG:
        with pytest.raises(UserError, match=error):
            course.check_marks({Path("a.py"): TEXT.replace(old, new)}, exercises)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A course of the two exercises that need no torch; beside them, the doctests of one file stay green."""
    if not MARKED:
        pytest.skip("no marks here")
    out = tmp_path_factory.mktemp("course") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        course.main([str(out), "--only", "mixture", "wilson", "--tests", "lib/metrics.py"])
        with pytest.raises(UserError, match="is there already"):
            course.main([str(out)])
    return out


def graded(tree: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lib.tools.grade", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_no_answer_is_handed_out(made, tmp_path):
    assert sorted(path.name for path in made.iterdir()) == ["instructor", "student"]
    assert not [path for path in made.rglob("*") if path.name in (".git", ".venv", "runs")]
    left = {"student", ".venv", "env", "course.instructor.log"}  # which may show a solution
    (tmp_path / "env").mkdir()
    (tmp_path / "env/pyvenv.cfg").touch()
    assert course.left_behind(str(tmp_path), ["lib", ".gitignore", *left]) == left
    student, instructor = made / "student", made / "instructor"
    assert "raise NotImplementedError" in (student / "lib/metrics.py").read_text()
    assert (instructor / "03_rl_train.py").read_text() == (student / "03_rl_train.py").read_text()
    for path in student.rglob("*.py"):
        assert not re.search(r"^\s*### |centre - half", path.read_text(), re.M), path
    exercises = json.loads((student / "docs/exercises.json").read_text())["exercises"]
    assert [e["name"] for e in exercises] == ["mixture", "wilson"]
    assert not {"slips", "hidden"} & set(exercises[0])
    assert not (student / "tests/course/test_3_kl.py").exists()


def test_grades(made):
    table = graded(made / "student", "week1", "wilson").stdout.splitlines()
    scores = [" ".join(line.split()[:4]) for line in table]
    assert scores == ["mixture 0 / 5", "wilson 0 / 4", "total 0 / 9"]
    assert "to do, in lib/metrics.py: `wilson`" in table[1]
    assert "no exercise 'wilso'; there are mixture, wilson" in graded(made / "student", "wilso").stderr


@pytest.mark.parametrize("body", ["import os; os._exit(0)", "import pytest; pytest.skip('later')", ENDS])
def test_what_ends_or_skips_its_tests_costs_its_own_exercise(made, tmp_path, body):
    tree = shutil.copytree(made / "instructor", tmp_path / "tree")
    path = tree / "lib/metrics.py"
    text = path.read_text().replace("    centre = ", f"    {body}\n    centre = ", 1)
    path.write_text(text if body != ENDS else text + ENDS)
    mixture, wilson, _ = graded(tree).stdout.splitlines()
    assert " ".join(mixture.split()) == "mixture 5 / 5" and wilson.split()[1:3] == ["0", "/"]
    assert "came to no end" in wilson or "skipped" in wilson


def test_a_submission_is_graded_for_gradescope(made, tmp_path):
    solution = (made / "instructor/lib/metrics.py").read_text()
    texts = {"lib/metrics.py": solution.replace(" + Z**2 / (4 * n**2)", "")}
    texts["01_build_mixture.py"] = "import nowhere\n"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source, results = shutil.copytree(made / "instructor", tmp_path / "source"), tmp_path / "results.json"
    (source / "lib/rewards.py").write_text("def (\n")  # another exercise: it stops neither grader nor others
    words = ["--submission", str(tmp_path), "--results", str(results)]
    assert graded(source, *words).returncode == 0
    mixture, wilson = json.loads(results.read_text())["tests"]
    assert mixture["score"] == 0 and "No module named 'nowhere'" in mixture["output"]
    assert 0 < wilson["score"] < 4 and wilson["output"] != ""
    assert graded(source, "--submission", ".", "wilson").returncode == 0  # its own files
    (tmp_path / "lib/metrics.py").unlink()
    ended = graded(source, *words)
    assert ended.returncode == 2 and "lib/metrics.py is missing" in ended.stderr
    assert json.loads(results.read_text())["score"] == 0
