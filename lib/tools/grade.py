"""Grade the exercises of a course: which are solved, and what is wrong with the others.

python -m lib.tools.grade              # all that docs/exercises.json lists
python -m lib.tools.grade advantages   # one; or a week, as in week3

An exercise has the share of its points that passes of its tests. In an instructor's tree, with the files of a
submission in place of its own, it writes what Gradescope reads.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from lib import UserError
from lib.run.command import Flags, run_main
from lib.run.files import write_json

LIST = "docs/exercises.json"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # of a process of tests

SECONDS = 240  # of the processor, for a process of tests; all of the course's take a tenth of it
NO_END = f"its tests came to no end: they took more than {SECONDS} s, or the code ended Python itself"
LIMIT = f"resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))"
PYTEST = f"import resource, sys, pytest; {LIMIT}; sys.exit(pytest.main(sys.argv[1:]))"


def read_course() -> dict:
    return json.loads(Path(LIST).read_text(encoding="utf-8"))


def chosen(exercises: list[dict], words: Sequence[str]) -> list[dict]:
    """Those of the words, which are names or weeks, as in week3; all without a word."""
    keys = [{e["name"], f"week{e['week']}"} for e in exercises]
    if unknown := {*words} - set().union(*keys):
        raise UserError(f"no exercise {min(unknown)!r}; there are {', '.join(e['name'] for e in exercises)}")
    return [e for e, own in zip(exercises, keys, strict=True) if not words or own & {*words}]


def message_of(name: str) -> str:
    """What the body of an exercise says that is not done."""
    return f"exercise {name}: make grade E={name}"


def outcomes_of(exercises: list[dict], tree: Path) -> dict[str, dict[str, str]]:
    """{exercise: {test: what is wrong, "" if it passed}} of the exercises' tests in a tree.

    What is wrong: of a test that says it itself, its words; else the error, and where. All run in one
    process. If that finds no end, or the code under test ends it, each exercise gets one of its own.
    """
    cases = cases_of([exercise["tests"] for exercise in exercises], tree)
    if cases is None and len(exercises) > 1:
        return {name: found for e in exercises for name, found in outcomes_of([e], tree).items()}
    if cases is None:
        return {exercise["name"]: dict.fromkeys(exercise["public"], NO_END) for exercise in exercises}
    results: dict[str, dict[str, str]] = {}
    for exercise in exercises:
        module = exercise["tests"].removesuffix(".py").replace("/", ".")
        own = [case for case in cases if module in (case.get("classname"), case.get("name"))]
        results[exercise["name"]] = {case.get("name", ""): hint_of(case) for case in own}
    return results


def cases_of(files: list[str], tree: Path) -> list[ElementTree.Element] | None:
    """What pytest says of each test in these files; None if it was stopped before it had come to its end."""
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--confcutdir=tests/course"]
    options.append("--continue-on-collection-errors")  # one broken file must not hide the others
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PYTEST, *options, f"--junitxml={folder}/found.xml", *files]
        ended = subprocess.run(command, cwd=tree, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        found = Path(folder) / "found.xml"
        if ended.returncode not in (0, 1) or not found.exists():  # neither all passed nor some failed
            return None
        return list(ElementTree.parse(found).iter("testcase"))


def hint_of(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "the test was skipped"
    for wrong in (*case.iter("failure"), *case.iter("error")):
        message, text = wrong.get("message", "").split("\n")[0], wrong.text or ""
        if message.startswith("Failed: "):  # pytest.fail
            return message.removeprefix("Failed: ")
        if message == "collection failure":  # the file cannot be imported
            return text.strip().split("\n")[-1]
        places = re.findall(r"^(\S+\.py:\d+): ", text, re.M)
        return f"{message} ({[place for place in places if 'site-packages' not in place][-1]})"
    return ""


def report(exercises: list[dict], results: dict[str, dict[str, str]]) -> list[dict]:
    """Print the table; return the lines of Gradescope's results.json."""
    lines = []
    for exercise in exercises:
        name, most, found = exercise["name"], exercise["points"], results[exercise["name"]]
        hint = next((message for message in found.values() if message), "")
        if message_of(name) in hint:
            hint = f"to do, in {' and '.join(exercise['files'])}: {exercise['hint']}"
        tests = [*exercise["public"], *exercise.get("hidden", [])]
        points = round(most * sum(found.get(test) == "" for test in tests) / len(tests), 1)
        lines.append({"name": name, "score": points, "max_score": most, "output": hint})
        print(f"{name:15} {points:>5g} / {most:<3g} {hint}")
    points, most = (sum(x[key] for x in lines) for key in ("score", "max_score"))
    note = "" if any("hidden" in x for x in exercises) else "by the public tests: hidden ones will count, too"
    print(f"{'total':15} {points:>5g} / {most:<3g} {note}")
    return lines


def main(argv: list[str] | None = None) -> None:
    flags = Flags("lib.tools.grade", __doc__)
    flags.add_argument("exercises", nargs="*", help="names, or weeks as in week3 (default: all)")
    flags.add_argument("--submission", help="a student's tree: its files of the exercises replace those here")
    flags.add_argument("--results", help="write results.json of Gradescope to this file")
    given = flags.parse_intermixed_args(argv)
    exercises = chosen(read_course()["exercises"], given.exercises)
    for file in {file for exercise in exercises for file in exercise["files"] if given.submission}:
        if not (Path(given.submission) / file).is_file():
            missing = f"{file} is missing: hand in the whole folder"
            if given.results:
                write_json(given.results, {"score": 0, "output": missing})
            raise UserError(f"{given.submission}: {missing}")
        Path(file).write_bytes((Path(given.submission) / file).read_bytes())  # maybe the very file
    lines = report(exercises, outcomes_of(exercises, Path()))
    if given.results:
        write_json(given.results, {"tests": lines})


if __name__ == "__main__":
    run_main(main)
