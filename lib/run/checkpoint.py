"""Saving a model: what a stage leaves behind is an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lib import UserError


def save_policy(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: str | Path, weights: dict | None = None
) -> None:
    """Write it into `folder`, beside what else is there. `weights`: those gathered from a model in shards.

    It is written to a temporary folder, then moved file by file, config.json last: where there is a
    config.json, there is a whole checkpoint. Raises UserError where the disk is full.
    """
    temporary = Path(folder) / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(str(temporary))
        for source in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            with source.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(source, Path(folder) / source.name)
    except SafetensorError as error:  # its own, of a full disk
        raise UserError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
