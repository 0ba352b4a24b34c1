"""The folder that a run writes to: locked while it lives, claimed with its settings."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib import UserError
from lib.run.command import at_end
from lib.run.files import git_revision, sha256_file, write_json
from lib.run.settings import MACHINERY, shown

LOCK = ".lock"
PACKAGES = ("torch", "transformers", "datasets", "numpy")
NOT_COMPARED = {*MACHINERY, "overwrite", "out", "git_revision", "versions"}


def checksums(*paths: str | Path) -> dict[str, str]:
    """{"sha256 of FILE": ...} for files, and for the weights in model folders (a name on the hub has none).

    Among a run's settings, they keep it from going on with other inputs than it began with.
    """
    sums = {}
    for path in map(Path, paths):
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            if file.is_file():
                sums[f"sha256 of {os.path.normpath(file)}"] = sha256_file(file)[:32]
    return sums


def read_settings(folder: str | Path) -> dict[str, Any]:
    """settings.json of a run's folder; {} where there is none."""
    try:
        settings = json.loads((Path(folder) / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def stated_reasoning(model: str | Path) -> bool | None:
    """Whether a checkpoint of stage 2 or 3 reasons, as its settings.json says; None for other models."""
    return read_settings(model).get("reasoning")


def reasons(name: str, model: str, direct: Iterable[str]) -> bool:
    """Whether `model`, called `name` on the command line, reasons: as it states, else unless in --direct."""
    stated = stated_reasoning(model)
    if stated and name in direct:
        where = f"{model}/settings.json"
        raise UserError(f"--direct: given {name}, which reasons ({where}); take it off the list")
    return name not in direct if stated is None else stated


def date_of_run(out: str | Path, date: str) -> str:
    """The day that chat templates are told, "2026-11-26": `date`, else that of the run in `out`, or today."""
    return date or read_settings(out).get("date") or datetime.date.today().isoformat()


def lock_folder(out: str | Path) -> None:
    """Make `out`, and hold OUT/.lock until this command ends (`run_main`); a kill releases it, too.

    Folders in which nothing was written are gone again then. Raises UserError if another process holds the
    lock, or if `out` cannot be written.
    """
    out = Path(out)
    lock = FileLock(out / LOCK, timeout=0, is_singleton=True)
    if lock.is_locked:
        return
    try:
        made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
        at_end.callback(_remove_empty, made)
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{out}: a run is writing there: wait for its end, or give another --out") from None
    except OSError as error:
        raise UserError(f"--out: given {out}: {error.strerror}; allowed a folder to write to") from error
    at_end.callback(lock.release)
    at_end.callback((out / LOCK).unlink, missing_ok=True)  # before its release: who opened it sees it gone


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def claim_folder(
    out: str | Path, settings: dict, *, overwrite: bool, inputs: Iterable[str] = (), begin: bool = True
) -> bool:
    """Make `out` the folder of the run with these settings, locked: a new one, or the very same run's.

    Writes settings.json: the settings, git_revision and the packages' versions. If `out` holds the work of a
    run in which a setting not in MACHINERY differs, that is a UserError; with `overwrite` the folder is
    emptied instead, unless it holds what the run reads (`inputs`, names on the hub are none). A folder with
    files but no settings.json is not ours: it is neither used nor emptied. Not to `begin` is to do all but
    write and empty: what is refused is refused before anything is loaded, and nothing is lost if loading
    fails. Returns whether it is the same run, which may resume.
    """
    lock_folder(out)
    out, path = Path(out), Path(out) / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they will be read back: tuples as lists
    if path.exists():
        before = read_settings(out)
        if "git_revision" not in before:
            raise UserError(f"{path}: not written by this program: give another --out")
        names = [name for name in {**before, **settings} if name not in NOT_COMPARED]
        differing = [name for name in names if _plain(before.get(name)) != _plain(settings.get(name))]
        if not differing:
            return True
        if read := _within(out, inputs):
            raise UserError(f"--out: {out} holds {read}, which this run reads: give another --out")
        if _has_work(out):
            _may_empty(out, differing[0], before, settings, overwrite)
            for child in out.iterdir() if begin else ():
                if child.name != LOCK:  # which stays held, so that no second run slips in
                    shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    elif any(child.name != LOCK and not child.name.endswith(".tmp") for child in out.iterdir()):
        raise UserError(f"{out} has files but no settings.json, so it is no run of ours: give another --out")
    if begin:
        versions = {name: version(name) for name in PACKAGES}
        write_json(path, {**settings, "git_revision": git_revision(), "versions": versions})
    return False


def _has_work(out: Path) -> bool:
    """Whether a run has left more than its settings: one that failed at once has not, and is replaced."""
    files = [path for path in out.rglob("*") if path.is_symlink() or path.is_file() and path.stat().st_size]
    inside = [path.relative_to(out) for path in files if path.name not in ("settings.json", LOCK)]
    return any(".tmp" not in {Path(part).suffix for part in path.parts} for path in inside)


def _may_empty(out: Path, name: str, before: dict, settings: dict, overwrite: bool) -> None:
    """UserError without --overwrite, and for the home or working folder, one above it, or a checkout."""
    if not overwrite:
        flag = name if " " in name else f"--{name.replace('_', '-')}"
        old, new = (shown(run.get(name, "unset")) for run in (before, settings))
        instead = "give another --out, or --overwrite to delete it"
        raise UserError(f"{out} holds a run with {flag} {old}, now {new}: {instead}")
    folder, here = out.resolve(), Path.cwd().resolve()
    if folder in (Path.home().resolve(), here, *here.parents) or (folder / ".git").exists():
        raise UserError(f"--out: {out} is {folder}, which --overwrite will not empty: give another --out")


def _plain(value: Any) -> Any:
    """Without what makes no difference between paths: runs/a/ is runs/a."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.path.normpath(value) if isinstance(value, str) and "/" in value else value


def _within(out: Path, inputs: Iterable[str]) -> str | None:
    """The first of `inputs` that is `out` or lies below it, by its name or behind links."""
    folders = [Path(os.path.abspath(out)), out.resolve()]
    for path in map(str, inputs):
        for place in (Path(os.path.abspath(path)), Path(path).resolve()):
            if path and place.exists() and any(place.is_relative_to(folder) for folder in folders):
                return path
    return None
