"""Files: a killed run leaves none half-written, and an error in one is named with its line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """What a user can put right, in one line: what was wrong and what to do. Ends a stage, exit code 2."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; on success it is flushed to the disk and takes its place in one step.

    A reader sees the old file or the new one, never a part of one. If the body raises, `path` stays as it
    was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_jsonl(path: str | Path, required: Sequence[str] = ()) -> list[dict]:
    """All records of a jsonl file; empty lines are skipped.

    Raises UserError for a missing, unreadable or empty file, a line that is not a JSON object, and a record
    without one of the `required` keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            record = _parse(line)
            if record is None:
                raise UserError(f"{path}:{number}: not a JSON object in UTF-8: {line[:60].decode('utf-8', 'replace')!r}")
            for key in required:
                if key not in record:
                    raise UserError(f"{path}:{number}: has no key {key!r}; its keys are {', '.join(record) or 'none'}")
            records.append(record)
    if not records:
        raise UserError(f"{path}: is empty")
    return records


def read_log(path: str | Path) -> list[dict]:
    """All records of a jsonl file that grows as a run goes; none while it has not begun."""
    path = Path(path)
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # JSON, UTF-8, or brackets without end
        return None
    return record if isinstance(record, dict) else None


def resume_log(path: str | Path, keep: Callable[[dict], bool] = lambda record: True) -> list[dict]:
    """The records of a log that a run goes on with; none while it has not begun.

    The file keeps, byte for byte, the whole lines whose record satisfies `keep`: a resumed run drops what was
    logged after its checkpoint, and the half line that a kill may have left.
    """
    path = Path(path)
    if not path.exists():
        return []
    kept, records = [], []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line) if line.endswith(b"\n") else None
        if record is not None and keep(record):
            kept.append(line)
            records.append(record)
    with atomic(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return records


def sha256_file(path: str | Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_revision() -> str:
    """The commit of this checkout, with "-dirty" when files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 else "unknown"
