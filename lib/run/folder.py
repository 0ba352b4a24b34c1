"""The folder that a run writes to: locked while it lives, claimed with its settings."""

from __future__ import annotations

import contextlib
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
from lib.run.settings import MACHINERY

LOCK = ".lock"
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


def reasons(name: str, model: str, without: Iterable[str], given: bool = True) -> bool:
    """Whether `model`, called `name`, reasons: as its settings.json says, else if not in `without`.

    `given`: these are of --no-reasoning, not of a preset. UserError then for one that says otherwise.
    """
    stated = read_settings(model).get("reasoning")
    if stated and given and name in without:
        where = f"{model}/settings.json"
        raise UserError(f"--no-reasoning: given {name}, which reasons ({where}); take it off the list")
    return name not in without if stated is None else stated


def lock_folder(out: str | Path) -> None:
    """Make `out`, and hold OUT/.lock until this command ends (`run_main`); a kill releases it, too.

    UserError if another process holds the lock, or if `out` cannot be written.
    """
    out = Path(out)
    lock = FileLock(out / LOCK, timeout=0, is_singleton=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{out}: a run is writing there: wait for its end, or give another --out") from None
    except OSError as error:
        raise UserError(f"--out: given {out}: {error.strerror}; allowed a folder to write to") from error
    at_end.callback(_leave, out, lock)


def _leave(out: Path, lock: Any) -> None:
    (out / LOCK).unlink(missing_ok=True)  # before its release: who opened it sees it gone
    lock.release()
    with contextlib.suppress(OSError):  # it is not empty
        out.rmdir()


def claim_folder(out: str | Path, settings: dict, *, overwrite: bool, inputs: Iterable[str] = ()) -> bool:
    """Lock `out` for the run with these settings; whether it holds that very run, which may resume.

    UserError if a setting not in MACHINERY differs from those of the run in it. With `overwrite` that may be
    emptied (`take_folder`), unless it holds what the run reads (`inputs`), or you are in it. One with files
    but no settings.json is not ours: neither used nor emptied.
    """
    lock_folder(out)
    out = Path(out)
    # As they are read back from a file; and the slash behind a folder makes no difference.
    before, now = (json.loads(json.dumps(x).replace('/"', '"')) for x in (read_settings(out), settings))
    if "git_revision" not in before:
        if any(child.name != LOCK and not child.name.endswith(".tmp") for child in out.iterdir()):
            raise UserError(f"{out} has files, and is no run of ours: give another --out")
        return False
    names = (name for name in {**before, **now} if name not in NOT_COMPARED)
    differing = [name for name in names if before.get(name) != now.get(name)]
    if not differing:
        return True
    if read := [path for path in inputs if Path(path).resolve().is_relative_to(out.resolve())]:
        raise UserError(f"--out: {out} holds {read[0]}, which this run reads: give another --out")
    if not overwrite:
        name = differing[0]
        flag = name if " " in name else f"--{name.replace('_', '-')}"
        found = f"{flag} {before.get(name, 'unset')}, now {now.get(name, 'unset')}"
        raise UserError(f"{out} holds a run with {found}: give another --out, or --overwrite to delete it")
    folder, here = out.resolve(), Path.cwd().resolve()
    if folder in (Path.home().resolve(), here, *here.parents) or (folder / ".git").exists():
        raise UserError(f"--out: {out} is {folder}, which --overwrite will not empty: give another --out")
    return False


def take_folder(out: str | Path, settings: dict) -> None:
    """Empty a claimed folder, and write settings.json: these, git_revision and the packages' versions."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    about, path = {"git_revision": git_revision(), "versions": versions}, Path(out) / "settings.json"
    if path.exists():
        write_json(path, about)  # of no run that could go on, should this be stopped in the midst
    for child in Path(out).iterdir():
        if child.name not in (LOCK, path.name):  # the lock stays held, so that no second run slips in
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    write_json(path, {**settings, **about})
