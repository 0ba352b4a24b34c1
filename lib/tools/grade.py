"""Grade the exercises of a course: which are solved, and what is wrong with the others.

python -m lib.tools.grade              # all that docs/exercises.json lists
python -m lib.tools.grade advantages   # one; or a week, as in week3

An exercise has the share of its points that passes of its tests. In an instructor's tree, with the files of a
submission in place of its own, it writes what Gradescope reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import UserError
from lib.run.command import Flags, run_main
from lib.run.files import write_json

LIST = "docs/exercises.json"
KEYS = ("name", "week", "files", "points", "minutes", "tests", "public", "hint")
TESTS = "tests/course"


def read_course(root: Path) -> dict:
    """docs/exercises.json. UserError for what is not JSON and for an exercise that lacks a key."""
    try:
        course = json.loads((root / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{LIST}: {error}") from error
    for exercise in course["exercises"]:
        if missing := [key for key in KEYS if key not in exercise]:
            raise UserError(f"{LIST}: exercise {exercise.get('name', '?')} lacks {', '.join(missing)}")
    return course


def chosen(exercises: list[dict], words: Sequence[str]) -> list[dict]:
    """Those of the words, which are names or weeks, as in week3; all without a word."""
    keys = [{e["name"], f"week{e['week']}"} for e in exercises]
    if unknown := {*words} - set().union(*keys):
        raise UserError(f"no exercise {min(unknown)!r}; there are {', '.join(e['name'] for e in exercises)}")
    return [e for e, own in zip(exercises, keys, strict=True) if not words or own & {*words}]


def message_of(name: str) -> str:
    """What the body of an exercise says that is not done."""
    return f"exercise {name}: make grade E={name}"


class Outcomes:
    """A plugin of pytest. `found`: {file: {test: what is wrong, "" if it passed}}."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        file, _, test = report.nodeid.partition("::")
        if report.when == "call" or report.failed:
            self.found[file][test] = self.hint(report) if report.failed else ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid]["import"] = self.hint(report)

    def hint(self, report: Any) -> str:
        """Of a test that says it itself, its words; else the error, and where."""
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is None:
            return str(report.longrepr).strip().splitlines()[-1]
        message = crash.message.splitlines()[0]
        own = message.removeprefix("Failed: ")
        frames = [entry.reprfileloc for entry in report.longrepr.reprtraceback.reprentries]
        here = [frame for frame in frames if frame and "site-packages" not in frame.path]
        path, line = (here[-1].path, here[-1].lineno) if here else (crash.path, crash.lineno)
        return own if own != message else f"{message} ({Path(path).name}:{line})"


def outcomes_of(exercises: list[dict]) -> dict[str, dict[str, str]]:
    """{exercise: {test: what is wrong, "" if it passed}}."""
    import pytest  # here, because students may look at the help without it

    outcomes, files = Outcomes(), [exercise["tests"] for exercise in exercises]
    options = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    options.append("--continue-on-collection-errors")  # one broken file must not hide the others
    pytest.main([*options, *files], plugins=[outcomes])
    return {exercise["name"]: outcomes.found[exercise["tests"]] for exercise in exercises}


def score(exercise: dict, found: dict[str, str]) -> float:
    tests = {*exercise["public"], *exercise.get("hidden", [])}
    return round(exercise["points"] * sum(found.get(test) == "" for test in tests) / len(tests), 1)


def report(exercises: list[dict], results: dict[str, dict[str, str]]) -> list[dict]:
    """Print the table; return the lines of Gradescope's results.json."""
    lines = []
    for exercise in exercises:
        name, found = exercise["name"], results[exercise["name"]]
        hint = next((message for message in found.values() if message), "")
        if message_of(name) in hint:
            hint = f"to do, in {' and '.join(exercise['files'])}: {exercise['hint']}"
        points, most = score(exercise, found), exercise["points"]
        lines.append({"name": name, "score": points, "max_score": most, "output": hint, "extra_data": found})
        print(f"{name:15} {points:>5g} / {most:<3g} {hint}")
    if len(lines) > 1:
        note = "" if any("hidden" in x for x in exercises) else "by the public tests; hidden ones count, too"
        points, most = (sum(x[key] for x in lines) for key in ("score", "max_score"))
        print(f"{'total':15} {points:>5g} / {most:<3g} {note}")
    return lines


def read_results(path: Path) -> dict[str, dict[str, str]]:
    """{exercise: {test: what is wrong}} of a results.json."""
    tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
    return {line["name"]: line["extra_data"] for line in tests}


def main(argv: list[str] | None = None) -> None:
    flags = Flags("lib.tools.grade", __doc__)
    flags.add_argument("exercises", nargs="*", help="names, or weeks as in week3 (default: all)")
    flags.add_argument("--submission", help="a student's tree: its files of the exercises replace those here")
    flags.add_argument("--results", help="write results.json of Gradescope to this file")
    given = flags.parse_intermixed_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: more threads wait for each other
    exercises = chosen(read_course(Path())["exercises"], given.exercises)
    for file in {file for exercise in exercises for file in exercise["files"] if given.submission}:
        if not (Path(given.submission) / file).is_file():
            missing = f"{file} is missing: hand in the whole folder"
            if given.results:
                write_json(given.results, {"score": 0, "output": missing})
            raise UserError(f"{given.submission}: {missing}")
        shutil.copy(Path(given.submission) / file, file)
    lines = report(exercises, outcomes_of(exercises))
    if given.results:
        write_json(given.results, {"tests": lines})


if __name__ == "__main__":
    run_main(main)
