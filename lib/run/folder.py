"""The folder that a run writes to: locked while it lives, claimed with its settings."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from lib import UserError
from lib.run.command import at_end
from lib.run.files import git_revision, sha256_file, write_json
from lib.run.settings import MACHINERY, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
SUM = "sha256 of "  # and a path: a setting that is a checksum
PACKAGES = ("torch", "transformers", "datasets", "numpy")
_held: set[tuple[int, int]] = set()  # device and inode of the locks that this process holds


def checksums(*paths: str | Path) -> dict[str, str]:
    """{"sha256 of FILE": ...} for files, and for the weights in model folders (a name on the hub has none
    here).

    Among a run's settings, they keep it from going on with other inputs than it began with.
    """
    sums = {}
    for path in map(Path, paths):
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            if file.is_file():
                sums[f"{SUM}{os.path.normpath(file)}"] = sha256_file(file)[:32]
    return sums


def stated_reasoning(model: str | Path) -> bool | None:
    """Whether a checkpoint of stage 2 or 3 reasons, as its settings.json says; None for other models."""
    path = Path(model) / "settings.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("reasoning")
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not the settings of a stage; mend or delete it") from None


def reasons(name: str, model: str, direct: Iterable[str]) -> bool:
    """Whether `model`, called `name` on the command line, reasons: as it states, else unless in --direct."""
    stated = stated_reasoning(model)
    if stated and name in direct:
        raise UserError(
            f"--direct: given {name}, which reasons ({model}/settings.json); take it off the list"
        )
    return name not in direct if stated is None else stated


def date_of_run(out: str | Path, date: str) -> str:
    """The day that chat templates are told, "2026-11-26": `date`, else that of the run in `out`, else today.

    Raises UserError for what is no day.
    """
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # what is no run is for `claim_folder` to say
        date = date or json.loads((Path(out) / "settings.json").read_text(encoding="utf-8")).get("date") or ""
    try:
        return (datetime.date.fromisoformat(date) if date else datetime.date.today()).isoformat()
    except (ValueError, TypeError):
        raise UserError(f"date: given {date}; allowed a day, as 2026-11-26") from None


def lock_folder(out: str | Path) -> None:
    """Make `out`, and hold OUT/.lock until this command ends (`run_main`); a kill releases it, too.

    Folders in which nothing was written are gone again then. Raises UserError if another process holds the
    lock, or if `out` cannot be written. Where the system has no such locks (Windows, some network disks), it
    says so.
    """
    if not str(out):
        raise UserError("--out: given nothing; allowed a folder, new or of an earlier run")
    out = Path(out)
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    at_end.callback(_remove_empty, made)
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: given {out}, a file; allowed a folder, new or of an earlier run")
        while True:
            out.mkdir(parents=True, exist_ok=True)
            file = (out / LOCK).open("a+", encoding="utf-8")
            status = os.fstat(file.fileno())
            key = status.st_dev, status.st_ino
            if key in _held:
                return file.close()
            _flock(file, out)
            if (out / LOCK).exists() and os.path.samestat(status, (out / LOCK).stat()):
                break
            file.close()  # the run that held it ended in between, and took it along
        _held.add(key)
        at_end.callback(_unlock, file, out / LOCK, key)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:
        raise UserError(
            f"--out: given {out}: {error.strerror}; allowed a folder that can be written"
        ) from error


def _flock(file: TextIO, out: Path) -> None:
    try:
        if fcntl is None:
            raise OSError("no module fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"
        raise UserError(
            f"{out}: a run is writing there ({holder}): wait for its end, or give another --out"
        ) from None
    except OSError as error:
        print(f"{out} cannot be locked ({error}): see to it that no second run writes there", file=sys.stderr)


def _unlock(file: TextIO, path: Path, key: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)  # before it is released: who has opened it will see that it is gone
    with contextlib.suppress(OSError):  # a full disk
        file.close()
    _held.discard(key)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def claim_folder(
    out: str | Path,
    settings: dict,
    *,
    overwrite: bool,
    inputs: Iterable[str | Path] = (),
    begin: bool = True,
) -> bool:
    """Make `out` the folder of the run with these settings, locked: new, or the very same run, which may then
    resume.

    Writes settings.json: the settings, git_revision and the packages' versions. If `out` holds the work of a
    run in which a setting not in MACHINERY differs, that is a UserError; with `overwrite` the folder is
    emptied instead, unless it holds what the run reads (`inputs`, names on the hub are none). A folder with
    files but no settings.json is not ours: it is neither used nor emptied. Not to `begin` is to do all but
    write and empty: what is refused is refused before anything is loaded, and nothing is lost if loading
    fails. Returns whether it is the same run.
    """
    lock_folder(out)
    out, path = Path(out), Path(out) / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they will be read back: tuples as lists
    if path.exists():
        before = _read_settings(path)
        skip = {*MACHINERY, "overwrite", "out"}
        names = [name for name in {**before, **settings} if name not in skip]
        differing = [name for name in names if _plain(before.get(name)) != _plain(settings.get(name))]
        if not differing:
            return True
        if read := _within(out, inputs):
            raise UserError(f"--out: {out} holds {read}, which this run reads: give another --out")
        if _has_work(out):
            if not overwrite:
                raise UserError(f"{out} holds a run with {_change(differing[0], before, settings)}")
            _check_not_precious(out)
            if begin:
                _empty(out)
    elif any(child.name != LOCK and not child.name.endswith(".tmp") for child in out.iterdir()):
        raise UserError(f"{out} has files but no settings.json, so it is no run of ours: give another --out")
    if begin:
        versions = {name: version(name) for name in PACKAGES}
        write_json(path, {**settings, "git_revision": git_revision(), "versions": versions})
    return False


def _change(name: str, before: dict, settings: dict) -> str:
    flag = name if " " in name else f"--{name.replace('_', '-')}"
    old, new = (shown(run.get(name, "unset")) for run in (before, settings))
    return f"{flag} {old}, now {new}: give another --out, or --overwrite to delete it"


def _has_work(out: Path) -> bool:
    """Whether a run has left more than its settings: one that failed at once has not, and is replaced."""
    for path in out.rglob("*"):
        inside = path.relative_to(out)
        begun = str(inside) in ("settings.json", LOCK) or any(part.endswith(".tmp") for part in inside.parts)
        if not begun and (path.is_symlink() or path.is_file() and path.stat().st_size):
            return True
    return False


def _plain(value: Any) -> Any:
    """Without what makes no difference between paths: runs/a/ is runs/a."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.path.normpath(value) if isinstance(value, str) and "/" in value else value


def _within(out: Path, inputs: Iterable[str | Path]) -> str | None:
    """The first of `inputs` that is `out` or lies below it, by its name or behind links."""
    folders = [Path(os.path.abspath(out)), out.resolve()]
    for path in map(str, inputs):
        for place in (Path(os.path.abspath(path)), Path(path).resolve()):
            if path and place.exists() and any(place.is_relative_to(folder) for folder in folders):
                return path
    return None


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict) or "git_revision" not in settings:
        raise UserError(f"{path}: not written by this program: give another --out")
    return {key: value for key, value in settings.items() if key not in ("git_revision", "versions")}


def _check_not_precious(folder: Path) -> None:
    """Raises UserError for the home or working folder, one above it, or a checkout."""
    resolved, here = folder.resolve(), Path.cwd().resolve()
    if resolved in (Path.home().resolve(), here, *here.parents) or (resolved / ".git").exists():
        raise UserError(
            f"--out: {folder} is {resolved}, which --overwrite will not empty: give another --out"
        )


def _empty(folder: Path) -> None:
    """Delete what is in a run's folder; the lock stays held, so that no second run slips in."""
    for child in folder.iterdir():
        if child.name != LOCK:
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
