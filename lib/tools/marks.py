"""Marks in a file: what of it is a solution, what is hidden, what everybody may see.

In the source, lines `### BEGIN SOLUTION name` and `### END SOLUTION` stand around the body of an exercise,
which may have several. In tests, lessons and docs `### BEGIN HIDDEN` and `### END HIDDEN` stand around what
students do not get. A line is a mark only if there is nothing else in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lib import UserError
from lib.tools.grade import LIST, message_of

MARK = re.compile(r"(\s*)### (BEGIN|END) (SOLUTION|HIDDEN) *(\w*)\s*")


@dataclass
class Part:
    """Of a file: what stands between two marks (kind SOLUTION or HIDDEN), or outside of any (kind "")."""

    kind: str = ""
    name: str = ""
    indent: str = ""
    text: str = ""


def parts_of(text: str, path: Path) -> list[Part]:
    """The whole file in parts, without the marks. UserError for marks that do not pair."""
    parts, opened = [Part()], 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not (mark := MARK.fullmatch(line)):
            parts[-1].text += line
            continue
        indent, edge, kind, name = mark.groups()
        where = f"{path}:{number}: {edge} {kind}"
        if edge == "BEGIN" and parts[-1].kind:
            raise UserError(f"{where} within the mark of line {opened}; end that one first")
        if edge == "BEGIN" and kind == "SOLUTION" and not name:
            raise UserError(f"{where} without a name; write the exercise's name behind it")
        if edge == "END" and parts[-1].kind != kind:
            raise UserError(f"{where} without its BEGIN {kind}; add that, or take this away")
        parts.append(Part(kind, name, indent) if edge == "BEGIN" else Part())
        opened = number
    if kind := parts[-1].kind:
        raise UserError(f"{path}:{opened}: BEGIN {kind} is never closed; add END {kind}")
    return parts


def check_marks(files: dict[Path, list[Part]], exercises: list[dict]) -> None:
    """UserError unless each mark has an exercise that names its file, and the other way round."""
    marks = {(str(path), part.name) for path in files for part in files[path] if part.kind == "SOLUTION"}
    listed = {(file, exercise["name"]) for exercise in exercises for file in exercise["files"]}
    for path, name in sorted(marks - listed):
        raise UserError(f"{path}: no exercise {name} with this file in {LIST}; add it, or take the mark away")
    for path, name in sorted(listed - marks):
        raise UserError(f"{LIST}: exercise {name} has no mark in {path}; add BEGIN SOLUTION {name} there")


def for_students(parts: list[Part], names: set[str]) -> str:
    text = ""
    for part in parts:
        if part.kind == "SOLUTION" and part.name in names:
            text += f'{part.indent}raise NotImplementedError("{message_of(part.name)}")\n'
        elif part.kind != "HIDDEN":
            text += part.text
    return text
