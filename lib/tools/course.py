"""A course out of this repository: a tree for students and one for instructors, both verified.

python -m lib.tools.course course                       # course/student and course/instructor, all exercises
python -m lib.tools.course course --only week3 wilson   # some of them: the others stay solved

docs/exercises.json says what an exercise is: the files of its marks (lib/tools/marks.py), its tests, a hint,
and slips that the tests must tell apart. Nothing is done before all of that is verified.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib import UserError
from lib.run.command import Flags, run_main
from lib.run.files import write_json, write_text
from lib.tools.grade import LIST, chosen, message_of, read_course, read_results
from lib.tools.marks import check_marks, for_students, parts_of

TEXTS = (".py", ".md", ".ipynb")
TELLING = 30  # characters of a line of a solution: a shorter one may well stand elsewhere
HANDOUT = Path("tests/course/handout")  # what a tree gets besides
SECRETS = ("hidden", "left_out", "slips", "reference")  # keys of an exercise that students do not get


# ---- the trees ---------------------------------------------------------------------------------------------


def files_of(root: Path, but: Sequence[Path]) -> Iterator[Path]:
    """Files of the project, relative to its root: no runs, nothing hidden, as .git is, and not `but`."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = [n for n in folders if n[0] != "." and n not in ("runs", "__pycache__")]
        folders[:] = [n for n in folders if (here / n).resolve() not in but]
        yield from ((here / n).relative_to(root) for n in names if n[0] != "." or n == ".gitignore")


def is_left_out(path: Path, text: str, left_out: list[str]) -> bool:
    """Whether it is one of `left_out` (files, folders), or a test that imports one of them."""
    stems = "|".join(Path(name).stem for name in left_out if name.startswith("tests/"))
    imports = re.search(rf"^(?:import|from) (?:tests\.)?(?:{stems or '-'})\b", text, re.M)
    listed = any(Path(name) in (path, *path.parents) for name in left_out)
    return listed or (path.parts[0] == "tests" and imports is not None)


def write_trees(root: Path, out: Path, but: Sequence[Path], mine: list[dict], course: dict) -> None:
    """OUT/student and OUT/instructor. UserError for wrong marks, and where an answer would be handed out."""
    paths = sorted(files_of(root, but))
    texts = {path: (root / path).read_text(encoding="utf-8") for path in paths if path.suffix in TEXTS}
    files = {path: parts_of(texts[path], path) for path in texts}
    check_marks(files, course["exercises"])
    names = {exercise["name"] for exercise in mine}
    secret: dict[str, str] = {}  # lines of the solutions, and whose they are
    for part in [part for parts in files.values() for part in parts if part.name in names]:
        lines = [line.partition("  #")[0].strip() for line in part.text.splitlines()]
        secret |= {line: part.name for line in lines if len(line) >= TELLING}
    left_out = [*course["left_out"], *(name for exercise in mine for name in exercise["left_out"])]
    left_out += [exercise["tests"] for exercise in course["exercises"] if exercise not in mine]
    for path in paths:
        if path not in files:
            for tree in ("student", "instructor"):
                (out / tree / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / path, out / tree / path)
            continue
        write_text(out / "instructor" / path, "".join(part.text for part in files[path]))
        if not is_left_out(path, texts[path], left_out):
            text = for_students(files[path], names)
            for line in [line for line in secret if path.parts[0] in ("tests", "docs") and line in text]:
                raise UserError(f"{path}: has a line of {secret[line]}'s solution, {line!r}; hide it")
            write_text(out / "student" / path, text)
    shown = [{key: value for key, value in e.items() if key not in SECRETS} for e in mine + course["open"]]
    write_json(out / "student" / LIST, {"exercises": shown[: len(mine)], "open": shown[len(mine) :]})
    write_json(out / "instructor" / LIST, course | {"exercises": mine})
    shutil.rmtree(out / "student" / HANDOUT)
    shutil.copy(root / HANDOUT / "skip_undone.py", out / "student" / "conftest.py")
    for name in ("setup.sh", "run_autograder"):  # Gradescope wants them at the top
        shutil.copy(root / HANDOUT / name, out / "instructor" / name)


# ---- verification ------------------------------------------------------------------------------------------


def run(tree: Path, *words: object) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def graded(tree: Path, *names: str) -> dict[str, dict[str, str]]:
    """What `make grade` finds in a tree: {exercise: {test: what is wrong, "" if it passed}}."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run(tree, "-m", "lib.tools.grade", *names, "--results", Path(folder) / "results.json")
        if ended.returncode:
            raise UserError(f"{tree.name}/: grading failed: {(ended.stderr.strip() or '?').splitlines()[-1]}")
        return read_results(Path(folder) / "results.json")


def check_exercises(tree: Path, mine: list[dict], solved: bool) -> None:
    """Solved, each passes public and hidden tests; else it fails the public ones, each by its own name."""
    results = graded(tree)
    for exercise in mine:
        name, found = exercise["name"], results[exercise["name"]]
        for test, message in found.items():
            if message if solved else message_of(name) not in message:
                must = "pass" if solved else "fail by its exercise's name"
                raise UserError(f"{tree.name}/: {name}: {test} must {must}, but: {message or 'it passes'}")
        if {*found} != {*exercise["public"], *(exercise["hidden"] if solved else ())}:
            raise UserError(f"{LIST}: {name}: lists other tests than {tree.name}/ has: {', '.join(found)}")


def check_suite(tree: Path, tests: Sequence[str]) -> None:
    """All that is no exercise is green or skipped."""
    ended = run(tree, "-m", "pytest", "-p", "no:cacheprovider", "--ignore", "tests/course", *tests)
    if ended.returncode:
        write_text(tree.with_name(f"{tree.name}.log"), ended.stdout + ended.stderr)
        last = (ended.stdout.strip() or "?").splitlines()[-1]
        raise UserError(f"{tree}: its tests fail ({last}), see {tree.name}.log beside it")


def check_slips(tree: Path, mine: list[dict], number: int) -> None:
    """Slip `number` of each exercise is told. They are put in at once: no test needs another exercise."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(tree, Path(folder) / "slips")
        for exercise, slip in [(e, e["slips"][number]) for e in mine]:
            texts = {copy / file: (copy / file).read_text(encoding="utf-8") for file in exercise["files"]}
            if not any(slip["instead_of"] in text for text in texts.values()):
                raise UserError(f"{LIST}: {exercise['name']}: its solution has no {slip['instead_of']!r}")
            for path, text in texts.items():
                write_text(path, text.replace(slip["instead_of"], slip["write"]))
        results = graded(copy)
    for exercise in mine:
        name, slip = exercise["name"], exercise["slips"][number]
        hint = next((hint for hint in results[name].values() if hint), "solved")
        if slip["message"] not in hint:
            raise UserError(f"{name}: with {slip['write']!r} it should say {slip['message']!r}, but: {hint}")


def main(argv: list[str] | None = None) -> None:
    flags = Flags("lib.tools.course", __doc__)
    flags.add_argument("out", help="a new folder")
    flags.add_argument("--only", nargs="+", default=[], help="exercises, or weeks as in week3 (default: all)")
    flags.add_argument("--tests", nargs="+", default=[], help="what must stay green besides (default: all)")
    given = flags.parse_args(argv)
    root, out, work = Path.cwd(), Path(given.out).resolve(), Path(f"{given.out}.unverified").resolve()
    if out.exists():
        raise UserError(f"{given.out}: is there already; give a new folder")
    course = read_course(root)
    mine = chosen(course["exercises"], given.only)
    shutil.rmtree(work, ignore_errors=True)
    write_trees(root, work, (out, work), mine, course)
    student, instructor = work / "student", work / "instructor"
    jobs: list[Callable[[], None]] = [partial(check_exercises, instructor, mine, solved=True)]
    jobs.append(partial(check_exercises, student, mine, solved=False))
    for number in range(max(len(exercise["slips"]) for exercise in mine)):
        slipping = [exercise for exercise in mine if len(exercise["slips"]) > number]
        jobs.append(partial(check_slips, instructor, slipping, number))
    jobs += [
        partial(check_suite, tree, given.tests) for tree in (instructor, student)
    ]  # last: they take minutes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            done = as_completed([pool.submit(job) for job in jobs])
            for job in tqdm(done, "verifying", len(jobs)):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    work.rename(out)
    print(f"verified: {len(mine)} exercises. Hand out {given.out}/student, keep {given.out}/instructor")


if __name__ == "__main__":
    run_main(main)
