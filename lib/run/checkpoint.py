"""TODO."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import UserError
from lib.run.hub import quiet


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict | None = None,
) -> None:
    """An ordinary Hugging Face checkpoint in `folder`, beside whatever else lies there. Rank 0 only.

    `weights`: of a sharded model, those that `lib.run.shards.full_weights` gathered.

    It is written to a temporary folder, then moved file by file, config.json last: where there is a
    config.json, there is a whole checkpoint.
    """
    folder = Path(folder)
    temporary = folder / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with quiet(), disk_errors(folder):
            model.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(str(temporary))
        for source in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            with source.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(source, folder / source.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """safetensors reports a full disk as an exception of its own."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}") from error
