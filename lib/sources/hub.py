"""Rows of a data set on the hub, with one line for an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from huggingface_hub import HfApi

from lib import UserError


@cache
def _ask(name: str) -> tuple[str, Exception | None]:
    """(revision, None), or ("", why the hub does not say): asked once, for ten seconds at most."""
    try:
        return HfApi().dataset_info(name, timeout=10).sha or "", None
    except Exception as error:  # of the hub's, of the network's, or a name that cannot be one
        return "", error


def revision_of(name: str) -> str:
    """The commit of the data set that the hub has now; "unknown" if it cannot be asked."""
    return _ask(name)[0] or "unknown"


def load_rows(
    name: str, config: str, split: str, *, hint: str, only: Sequence[str] = (), **options: Any
) -> Any:
    """The split as a datasets.Dataset, row by row from the disk; of its columns those in `only`, if any are given.

    `options` go to datasets.load_dataset. No code of the data set's own is run. If the hub cannot be reached,
    only the cache of earlier downloads is read, instead of half a minute of retries. Raises UserError, which
    ends in `hint`.
    """
    import datasets  # slow to import, and the sandbox has no need of it

    unreachable = _ask(name)[1]
    datasets.enable_progress_bars()
    try:
        with _offline(unreachable is not None):
            rows = datasets.load_dataset(name, config or None, split=split, **options)
    except Exception as error:  # not there, gated, no such split, malformed: each has its own kind
        reason = " ".join(str(unreachable or error).split())[:160]
        what = ":".join(filter(None, (name, config, split)))
        raise UserError(f"{what}: cannot be read from the hub ({reason}); {hint}") from error
    if only and set(only) & set(rows.column_names):
        rows = rows.select_columns([column for column in rows.column_names if column in only])
    return rows


@contextlib.contextmanager
def _offline(yes: bool) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or yes
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
