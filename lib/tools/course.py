"""A course out of this repository: a tree for students and one for instructors, both verified.

python -m lib.tools.course course                       # course/student and course/instructor, all exercises
python -m lib.tools.course course --only week3 wilson   # some of them: the others stay solved

In the source, lines `### BEGIN SOLUTION name` and `### END SOLUTION` stand around the body of an exercise,
which may have several. In tests, lessons and docs `### BEGIN HIDDEN` and `### END HIDDEN` stand around what
students do not get. docs/exercises.json says the rest of an exercise: the files of its marks, its tests, a
hint, and slips that the tests must tell apart. Nothing is handed out before all of that is verified.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib import UserError
from lib.run.command import Flags, run_main
from lib.run.files import write_json, write_text
from lib.tools.grade import ENVIRONMENT, LIST, NO_END, chosen, message_of, outcomes_of, read_course

BLOCK = re.compile(r"^( *)### BEGIN (SOLUTION|HIDDEN) *(\w*)\n(.*?)^ *### END \2\n", re.M | re.S)
MARK = re.compile(r"^ *### (?:BEGIN|END) (?:SOLUTION|HIDDEN).*", re.M)
TELLING = 30  # characters of a line of a solution: a shorter one may well stand elsewhere
TREES = ("student", "instructor")
HANDOUT = Path("tests/course/handout")  # what a tree gets besides
# An earlier course, too, and its logs; of hidden files only .gitignore and the like stay.
UNWANTED = shutil.ignore_patterns("runs", "__pycache__", ".git", ".[!g]*", *TREES, "*.log")
SECRETS = ("hidden", "left_out", "slips", "reference")  # keys of an exercise that students do not get


# ---- the trees ---------------------------------------------------------------------------------------------


def for_students(text: str, names: set[str]) -> str:
    """Without what is hidden; for the solution of each exercise in `names` an error that says its name."""

    def shown(block: re.Match) -> str:
        indent, kind, name, body = block.groups()
        undone = f'{indent}raise NotImplementedError("{message_of(name)}")\n'
        return "" if kind == "HIDDEN" else undone if name in names else body

    return BLOCK.sub(shown, text)


def for_instructors(text: str) -> str:
    return BLOCK.sub(r"\4", text)


def check_marks(texts: dict[Path, str], exercises: list[dict]) -> None:
    """UserError unless marks pair, and each has an exercise that names its file, and the other way round."""
    marks = set()
    for path, text in texts.items():
        if alone := MARK.search(for_instructors(text)):
            raise UserError(f"{path}: {alone[0].strip()}: BEGIN and END do not pair")
        marks |= {(str(path), block[3]) for block in BLOCK.finditer(text) if block[2] == "SOLUTION"}
    listed = {(file, exercise["name"]) for exercise in exercises for file in exercise["files"]}
    for file, name in sorted(marks ^ listed):
        lacks = f"a mark in {file}" if (file, name) in listed else f"an entry in {LIST} that names {file}"
        raise UserError(f"exercise {name or 'without a name'} lacks {lacks}")


def is_left_out(path: Path, text: str, left_out: list[str]) -> bool:
    """Whether it is one of `left_out` (files, folders), or a test that imports one of them."""
    stems = "|".join(Path(name).stem for name in left_out if name.startswith("tests/"))
    imports = re.search(rf"^(?:import|from) (?:tests\.)?(?:{stems or '-'})\b", text, re.M)
    listed = any(Path(name) in (path, *path.parents) for name in left_out)
    return listed or (path.parts[0] == "tests" and imports is not None)


def left_behind(folder: str, names: list[str]) -> set[str]:
    """What no tree gets: UNWANTED, and a virtual environment by any name."""
    return UNWANTED(folder, names) | {name for name in names if Path(folder, name, "pyvenv.cfg").exists()}


def write_trees(root: Path, out: Path, mine: list[dict], course: dict) -> None:
    """OUT/student and OUT/instructor. UserError for wrong marks, and where an answer would be handed out."""
    student, instructor = (shutil.copytree(root, out / t, ignore=left_behind) for t in TREES)
    paths = [path for path in sorted(instructor.rglob("*")) if path.suffix in (".py", ".md", ".ipynb")]
    texts = {path.relative_to(instructor): path.read_text(encoding="utf-8") for path in paths}
    check_marks(texts, course["exercises"])
    names, secret = {exercise["name"] for exercise in mine}, set[str]()  # lines of the solutions
    for block in [block for text in texts.values() for block in BLOCK.finditer(text) if block[3] in names]:
        lines = [line.partition("  #")[0].strip() for line in block[4].splitlines()]
        secret |= {line for line in lines if len(line) >= TELLING}
    left_out = [*course["left_out"], *(name for exercise in mine for name in exercise["left_out"])]
    left_out += [exercise["tests"] for exercise in course["exercises"] if exercise not in mine]
    for path, text in texts.items():
        write_text(instructor / path, for_instructors(text))
        if is_left_out(path, text, left_out):
            (student / path).unlink()
            continue
        shown = for_students(text, names)
        for line in [line for line in secret if path.parts[0] in ("tests", "docs") and line in shown]:
            raise UserError(f"{path}: has a line of a solution, {line!r}; hide it")
        write_text(student / path, shown)
    told = [{key: value for key, value in e.items() if key not in SECRETS} for e in mine + course["open"]]
    write_json(student / LIST, {"exercises": told[: len(mine)], "open": told[len(mine) :]})
    write_json(instructor / LIST, course | {"exercises": mine})
    shutil.rmtree(student / HANDOUT)
    shutil.copy(root / HANDOUT / "skip_undone.py", student / "conftest.py")
    for name in ("setup.sh", "run_autograder"):  # Gradescope wants them at the top
        shutil.copy(root / HANDOUT / name, instructor / name)


# ---- verification ------------------------------------------------------------------------------------------


def check_exercises(tree: Path, mine: list[dict], solved: bool) -> None:
    """Solved, each passes public and hidden tests; else it fails the public ones, each by its own name."""
    results = outcomes_of(mine, tree)
    for exercise in mine:
        name, found = exercise["name"], results[exercise["name"]]
        if NO_END in found.values():
            raise UserError(f"{tree.name}/: {name}: {NO_END}")
        if {*found} != {*exercise["public"], *(exercise["hidden"] if solved else ())}:
            raise UserError(f"{LIST}: {name}: lists other tests than {tree.name}/ has: {', '.join(found)}")
        for test, message in found.items():
            if message if solved else message_of(name) not in message:
                must = "pass" if solved else "fail by its exercise's name"
                raise UserError(f"{tree.name}/: {name}: {test} must {must}, but: {message or 'it passes'}")


def check_slips(tree: Path, mine: list[dict], number: int) -> None:
    """Slip `number` of each exercise is told. They are put in at once: no test needs another exercise."""
    copy = shutil.copytree(tree, tree.with_name(f"slips_{number}"))
    for exercise, slip in [(e, e["slips"][number]) for e in mine]:
        texts = {copy / file: (copy / file).read_text(encoding="utf-8") for file in exercise["files"]}
        if not any(slip["instead_of"] in text for text in texts.values()):
            raise UserError(f"{LIST}: {exercise['name']}: its solution has no {slip['instead_of']!r}")
        for path, text in texts.items():
            write_text(path, text.replace(slip["instead_of"], slip["write"]))
    results = outcomes_of(mine, copy)
    for exercise in mine:
        name, slip = exercise["name"], exercise["slips"][number]
        hint = next((hint for hint in results[name].values() if hint), "solved")
        if slip["message"] not in hint:
            raise UserError(f"{name}: with {slip['write']!r} it should say {slip['message']!r}, but: {hint}")


def check_suite(tree: Path, tests: Sequence[str], log: str) -> None:
    """All that is no exercise is green or skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--ignore", "tests/course", *tests]
    ended = subprocess.run(command, cwd=tree, env=ENVIRONMENT, capture_output=True, text=True)
    if ended.returncode:
        write_text(log, ended.stdout + ended.stderr)
        last = (ended.stdout.strip() or "?").splitlines()[-1]
        raise UserError(f"{tree.name}/: its tests fail ({last}), see {log}")


def in_parallel(what: str, jobs: Sequence[Callable[[], None]]) -> None:
    """Run all; after the first error no other begins."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for ended in tqdm(as_completed([pool.submit(job) for job in jobs]), what, len(jobs)):
            ended.result()
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: list[str] | None = None) -> None:
    flags = Flags("lib.tools.course", __doc__)
    flags.add_argument("out", help="a new folder")
    flags.add_argument("--only", nargs="+", default=[], help="exercises, or weeks as in week3 (default: all)")
    flags.add_argument("--tests", nargs="+", default=[], help="what must stay green besides (default: all)")
    given = flags.parse_args(argv)
    if Path(given.out).exists():
        raise UserError(f"{given.out}: is there already; give a new folder")
    course = read_course()
    mine = chosen(course["exercises"], given.only)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_trees(Path.cwd(), work, mine, course)
        student, instructor = (work / tree for tree in TREES)
        fast = [partial(check_exercises, instructor, mine, solved=True)]
        fast.append(partial(check_exercises, student, mine, solved=False))
        for number in range(max(len(exercise["slips"]) for exercise in mine)):
            slipping = [exercise for exercise in mine if len(exercise["slips"]) > number]
            fast.append(partial(check_slips, instructor, slipping, number))
        out = Path(given.out)  # without a slash behind it: the logs stand beside it
        slow = [partial(check_suite, t, given.tests, f"{out}.{t.name}.log") for t in (instructor, student)]
        in_parallel("exercises and slips", fast)
        in_parallel("all other tests, in both trees", slow)
        for tree in (student, instructor):
            shutil.move(tree, Path(given.out) / tree.name)
    print(f"verified: {len(mine)} exercises. Hand out {given.out}/student, keep {given.out}/instructor")


if __name__ == "__main__":
    run_main(main)
