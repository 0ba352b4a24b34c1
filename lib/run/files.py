"""Files: a killed run leaves none half-written, and an error in one is named with its line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lib import UserError
from lib.run.text import readable


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; on success it is flushed to the disk and takes its place in one step.

    A reader sees the old file or the new one, never a part of one. If the body raises, `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        settle(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def settle(temporary: Path, path: Path) -> None:
    """Flush a file to the disk, and let it take the place of `path`."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8, atomically; makes the folder. A lone surrogate, not UTF-8, is written as JSON's escape."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, obj: object) -> None:
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """One object a line."""
    write_text(path, "".join(_line(record) for record in records))


def append_jsonl(path: str | Path, record: dict) -> None:
    """Add one line in a single write. `resume_log` mends what a kill in its midst would leave."""
    with Path(path).open("ab") as file:
        file.write(_line(record).encode("utf-8", errors="backslashreplace"))


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # JSON, UTF-8, or brackets without end
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(path: str | Path, required: Sequence[str] = (), maybe_empty: Sequence[str] = ()) -> list[dict]:
    """All records of a jsonl file; empty lines are skipped. UserError for what breaks a rule.

    With `required` these are the records that stages hand on, and it names their keys, "id" among them. Each
    must be there and hold text. Those of `maybe_empty` may hold an empty one, and be missing or null unless
    they are required. An id becomes text (7 is "7"), and two records never share one: all that is counted
    later is counted by id. In every text U+FFFD stands for what tokenizers do not take, see `readable`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    records: list[dict] = []
    lines: dict[str, int] = {}  # by id
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where, record = f"{path}:{number}", _parse(line)
        if record is None:
            raise UserError(f"{where}: not a JSON object in UTF-8: {line[:60].decode('utf-8', 'replace')!r}")
        if required:
            record = _checked(readable(record), where, required, maybe_empty)
            first = lines.setdefault(record["id"], number)
            if first != number:
                same = f"id {record['id']!r} stands in lines {first} and {number}"
                raise UserError(f"{path}: {same}: give each record an id, drop copies")
        records.append(record)
    if not records:
        raise UserError(f"{path}: is empty")
    return records


def _checked(record: dict, where: str, required: Sequence[str], maybe_empty: Sequence[str]) -> dict:
    from lib.rewards import KINDS  # an exercise; the grader, which needs no records, must outlive its errors

    if missing := [key for key in required if key not in record]:
        raise UserError(f"{where}: has no key {missing[0]!r}; its keys are {', '.join(record) or 'none'}")
    if isinstance(record["id"], int | float) and not isinstance(record["id"], bool):
        record["id"] = str(record["id"])
    for key in (*required, *(key for key in maybe_empty if record.get(key) is not None)):
        value = record[key]
        good = isinstance(value, str) and (value.strip() or key in maybe_empty)
        if not good or key == "kind" and value not in KINDS:
            allowed = ", ".join(KINDS) if key == "kind" else "some text"
            raise UserError(f"{where}: {record['id']}: {key} is {value!r}; allowed: {allowed}")
    return record


def read_log(path: str | Path) -> list[dict]:
    """All records of a jsonl file that grows as a run goes; none while it has not begun."""
    path = Path(path)
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []


def resume_log(path: str | Path, keep: Callable[[dict], bool] = lambda record: True) -> list[dict]:
    """The records of a log that a run goes on with; none while it has not begun.

    The file keeps, byte for byte, the whole lines whose record satisfies `keep`: a resumed run drops what was
    logged after its checkpoint, and the half line that a kill may have left.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = [(line, _parse(line)) for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
    kept = [(line, record) for line, record in lines if record is not None and keep(record)]
    with atomic(path) as temporary:
        temporary.write_bytes(b"".join(line for line, _ in kept))
    return [record for _, record in kept]


def sha256_file(path: str | Path) -> str:
    """Hex digest of the file's bytes, read in parts."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_revision() -> str:
    """The commit of this checkout, with "-dirty" when files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here = Path(__file__).parent
    try:
        return subprocess.check_output(command, cwd=here, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
