"""Verdicts of judges on disk: what was judged once is not judged again, in this run or another.

Off by default. TARS_JUDGE_CACHE=FOLDER turns it on for every judge that is a model of others (`lib.judges.MODELS`). The
folder holds one SQLite database, verdicts.sqlite, which any number of processes may use at once, and which is safe to
delete. It holds no text: a verdict's key is a SHA-256 of the judge, its model, the prompt and the answer. A folder with a
model counts as another when a file in it changes; a model of the hub, or behind an API, that changes under the same name
does not: then delete the cache. "No verdict" is not kept, so it is asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib import UserError
from lib.judges import Score

VERSION = 3  # count up when a judge of this project changes what it asks, or how it reads the reply


def identity(name: str, model: str) -> str:
    """What distinguishes this judge's verdicts from others': its name, its model, and the files of a model that is a folder."""
    folder = Path(model)
    if not folder.is_dir():
        return json.dumps([VERSION, name, model])
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    )
    return json.dumps([VERSION, name, str(folder.resolve()), files])


def cached(score: Score, judge: str, folder: str | Path) -> Score:
    """`score`, asked only for what `folder` has no verdict on, and once for each pair of prompt and answer.

    `judge` is an `identity`. Contexts are a part of the pair, if `score` asks for them. Raises UserError if the folder cannot
    be used. A score outside [0, 1] is passed on, not kept.
    """
    path = Path(folder) / "verdicts.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TARS_JUDGE_CACHE={folder}: {error.strerror}; name a folder that can be written to"
        ) from error
    with _database(path) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"
        )

    def ask(prompts: list[str], answers: list[str], contexts: Sequence[str] = ()) -> list[float | None]:
        keys = [
            _key(judge, *texts)
            for texts in zip(prompts, answers, *([contexts] if contexts else []), strict=True)
        ]
        with _database(path) as database:
            rows = (
                database.execute("SELECT key, score FROM verdicts WHERE key = ?", [key]).fetchone()
                for key in set(keys)
            )
            known: dict[str, float | None] = dict(row for row in rows if row)
        fresh = {key: i for i, key in enumerate(keys) if key not in known}
        if fresh:
            told = {"contexts": [contexts[i] for i in fresh.values()]} if contexts else {}
            scores = score([prompts[i] for i in fresh.values()], [answers[i] for i in fresh.values()], **told)
            if len(scores) != len(fresh):
                raise UserError(f"--judge: gave {len(scores)} scores for {len(fresh)} answers")
            known |= dict(zip(fresh, scores, strict=True))
            new = [(key, known[key]) for key in fresh]
            with _database(path) as database:
                keep = [(key, float(value)) for key, value in new if value is not None and 0 <= value <= 1]
                database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", keep)
        return [known[key] for key in keys]

    if "contexts" in inspect.signature(score).parameters:
        return ask
    return lambda prompts, answers: ask(prompts, answers)


def _key(judge: str, *texts: str) -> str:
    return hashlib.sha256(
        json.dumps([judge, *texts]).encode()
    ).hexdigest()  # ASCII: lone surrogates are escaped


@contextlib.contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one transaction; it waits for other processes up to two minutes."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=120)) as database, database:
            yield database
    except sqlite3.Error as error:
        raise UserError(f"{path}: {error}; delete it, or turn it off (TARS_JUDGE_CACHE)") from error
