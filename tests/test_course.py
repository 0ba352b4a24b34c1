"""A course of two exercises, from marks to grades; and marks that are wrong, each told in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib import UserError
from lib.tools import course, grade
from lib.tools.marks import check_marks, for_students, parts_of

ROOT = Path(__file__).parent.parent
LINES = ["def f():", "    ### BEGIN SOLUTION kl", "    return 1", "    ### END SOLUTION", "f()", ""]
TEXT, HERE = "\n".join(LINES), Path("a.py")
MARKED = "### BEGIN SOLUTION" in (ROOT / "03_rl_train.py").read_text(encoding="utf-8")  # not in instructor/


def test_a_body_becomes_an_error_that_names_its_exercise():
    text = for_students(parts_of(TEXT, HERE), {"kl"})
    assert text == 'def f():\n    raise NotImplementedError("exercise kl: make grade E=kl")\nf()\n'
    assert for_students(parts_of(TEXT, HERE), set()) == "def f():\n    return 1\nf()\n"


@pytest.mark.parametrize(
    "line, becomes, error",
    [
        (1, "", "a.py:4: END SOLUTION without its BEGIN SOLUTION"),
        (3, "", "a.py:2: BEGIN SOLUTION is never closed"),
        (2, LINES[1], "a.py:3: BEGIN SOLUTION within the mark of line 2"),
        (1, "    ### BEGIN SOLUTION", "a.py:2: BEGIN SOLUTION without a name"),
        (3, "    ### END HIDDEN", "a.py:4: END HIDDEN without its BEGIN HIDDEN"),
    ],
)
def test_marks_that_do_not_pair(line, becomes, error):
    lines = [*LINES[:line], becomes, *LINES[line + 1 :]]
    with pytest.raises(UserError, match=error):
        parts_of("\n".join(lines), HERE)


def test_marks_and_exercises_that_miss_each_other():
    files = {HERE: parts_of(TEXT, HERE)}
    check_marks(files, [{"name": "kl", "files": ["a.py"]}])
    with pytest.raises(UserError, match="a.py: no exercise kl with this file in docs/exercises.json"):
        check_marks(files, [])
    with pytest.raises(UserError, match="docs/exercises.json: exercise kl has no mark in b.py"):
        check_marks(files, [{"name": "kl", "files": ["a.py", "b.py"]}])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A course of the two exercises that need no torch; beside them, the doctests of one file stay green."""
    if not MARKED:
        pytest.skip("no marks here")
    out = tmp_path_factory.mktemp("course") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        course.main([str(out), "--only", "mixture", "wilson", "--tests", "lib/metrics.py"])
    return out


def graded(tree: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lib.tools.grade", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def test_no_answer_is_handed_out(made):
    assert sorted(path.name for path in made.iterdir()) == ["instructor", "student"]
    assert not [path for path in made.rglob("*") if path.name in (".git", ".venv", "runs")]
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
    table = graded(made / "student").stdout.splitlines()
    assert [line.split()[:4] for line in table] == [
        ["mixture", "0", "/", "5"],
        ["wilson", "0", "/", "4"],
        ["total", "0", "/", "9"],
    ]
    assert "to do, in lib/metrics.py: `wilson`" in table[1]
    assert "no exercise 'wilso'; there are mixture, wilson" in graded(made / "student", "wilso").stderr


def test_a_submission_is_graded_for_gradescope(made, tmp_path):
    solution = (made / "instructor/lib/metrics.py").read_text()
    slip = solution.replace(" + Z**2 / (4 * n**2)", "")
    for name, text in (("lib/metrics.py", slip), ("01_build_mixture.py", "import nowhere\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = tmp_path / "source"
    course.shutil.copytree(made / "instructor", source)
    assert (
        graded(source, "--submission", str(tmp_path), "--results", str(tmp_path / "results.json")).returncode
        == 0
    )
    mixture, wilson = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert mixture["score"] == 0 and "No module named 'nowhere'" in mixture["output"]
    assert 0 < wilson["score"] < 4 and wilson["output"] != ""
    (tmp_path / "lib/metrics.py").unlink()
    ended = graded(source, "--submission", str(tmp_path), "--results", str(tmp_path / "results.json"))
    assert ended.returncode == 2 and "lib/metrics.py is missing" in ended.stderr
    assert json.loads((tmp_path / "results.json").read_text())["score"] == 0


def test_a_finished_course_is_not_overwritten(made):
    with pytest.raises(UserError, match="is there already"):
        course.main([str(made)])
    assert grade.chosen([{"name": "a", "week": 1}, {"name": "b", "week": 2}], ["week2"])[0]["name"] == "b"
