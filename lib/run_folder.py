"""The folder that a run writes to: claimed once, with its settings, so that no other run gets mixed into it."""

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

from lib.files import UserError, git_revision, sha256_file, write_json
from lib.settings import shown

SUM = "sha256 of "  # and a path: a setting that is a checksum
PACKAGES = ("torch", "transformers", "datasets", "numpy")


def checksums(*paths: str | Path) -> dict[str, str]:
    """{"sha256 of FILE": ...} for files, and for the weights in model folders (a name on the hub has none here).

    Among a run's settings, they keep it from going on with other inputs than it began with.
    """
    files = [f for p in map(Path, paths) for f in (sorted(p.glob("*.safetensors")) if p.is_dir() else [p]) if f.is_file()]
    return {f"{SUM}{os.path.normpath(file)}": sha256_file(file)[:32] for file in files}


def stated_reasoning(model: str) -> bool | None:
    """Whether a checkpoint of stage 2 or 3 reasons, as its settings.json says; None for other models."""
    path = Path(model) / "settings.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("reasoning")
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not the settings of a stage; mend or delete it") from None


def reasons(name: str, model: str, direct: Iterable[str]) -> bool:
    """Whether `model`, called `name` on the command line, reasons: as it states; others do unless named in --direct."""
    stated = stated_reasoning(model)
    if stated and name in direct:
        raise UserError(f"--direct: given {name}, which reasons ({model}/settings.json); take it off the list")
    return name not in direct if stated is None else stated


def date_of_run(out: str | Path, date: str) -> str:
    """The day that chat templates are told, "2026-11-26": `date`, else that of the run in `out`, else today.

    Raises UserError for what is no day.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # what is no run is for `claim_folder` to say
        date = date or json.loads((Path(out) / "settings.json").read_text(encoding="utf-8")).get("date") or ""
    try:
        return (datetime.date.fromisoformat(date) if date else datetime.date.today()).isoformat()
    except (ValueError, TypeError):
        raise UserError(f"--date: given {date}; allowed a day, as 2026-11-26") from None


def claim_folder(
    out: Path, settings: dict, *, overwrite: bool, ignore: Iterable[str] = (), inputs: Iterable[str | Path] = ()
) -> None:
    """Make `out` the folder of the run with these settings: new, or the very same run, which may then resume.

    Writes settings.json: the settings, git_revision and the packages' versions. If `out` holds a run in which
    a setting not in `ignore` differs, that is a UserError; with `overwrite` the folder is emptied instead, unless
    it holds what the run reads: a file with a checksum among the settings, or one of `inputs` (names on the hub are
    none). A folder with files but no settings.json is not ours: it is neither used nor emptied.
    """
    out, path = Path(out), Path(out) / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they will be read back: tuples as lists
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: given {out}, a file; allowed a folder, new or of an earlier run")
    if path.exists():
        before = _read_settings(path)
        skip = {*ignore, "overwrite", "out"}
        differing = [k for k in {**before, **settings} if k not in skip and _plain(before.get(k)) != _plain(settings.get(k))]
        if not differing:
            return
        if read := _within(out, [*(k.removeprefix(SUM) for k in settings if k.startswith(SUM)), *inputs]):
            raise UserError(f"--out: {out} holds {read}, which this run reads: give another --out")
        if not overwrite:
            old, new = (shown(run.get(differing[0], "unset")) for run in (before, settings))
            name = differing[0] if " " in differing[0] else f"--{differing[0].replace('_', '-')}"
            change = f"{name} {old}, now {new}"
            raise UserError(f"{out} holds a run with {change}: give another --out, or --overwrite to delete it")
        _empty(out)
    elif out.exists() and any(not child.name.endswith(".tmp") for child in out.iterdir()):
        raise UserError(f"{out} has files but no settings.json, so it is no run of ours: give another --out")
    versions = {name: version(name) for name in PACKAGES}
    write_json(path, {**settings, "git_revision": git_revision(), "versions": versions})


def _plain(value: Any) -> Any:
    """Without what makes no difference between paths: runs/a/ is runs/a."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return os.path.normpath(value) if isinstance(value, str) and "/" in value else value


def _within(out: Path, inputs: Iterable[str | Path]) -> str | None:
    """The first of `inputs` that is `out` or lies below it, by its name or behind links."""
    named = [Path(os.path.abspath(out)), out.resolve()]
    for path in map(str, inputs):
        places = [place for place in (Path(os.path.abspath(path)), Path(path).resolve()) if path and place.exists()]
        if any(place.is_relative_to(folder) for place in places for folder in named):
            return path
    return None


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or "git_revision" not in settings:
        raise UserError(f"{path}: not written by this program: give another --out")
    return {key: value for key, value in settings.items() if key not in ("git_revision", "versions")}


def _empty(folder: Path) -> None:
    """Delete what is in a run's folder; never in the home or working folder, one above it, or a checkout."""
    resolved, here = folder.resolve(), Path.cwd().resolve()
    precious = resolved in (Path.home().resolve(), here, *here.parents) or (resolved / ".git").exists()
    if precious:
        raise UserError(f"--out: {folder} is {resolved}, which --overwrite will not empty: give another --out")
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
