"""Opening a model or tokenizer, a folder or a name on the hub: quietly, and with one line for an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError

from lib.files import UserError


def load_pretrained(load: Callable[..., Any], name_or_path: str | Path, what: str, **options: Any) -> Any:
    """`load` is a from_pretrained; no code of the model's own is run. UserError if there is no such thing.

    The hub is asked first whether it knows the name. If it cannot be reached, only the cache of earlier
    downloads is read, instead of a minute of retries.
    """
    name, unreachable = str(name_or_path), None
    if not Path(name).is_dir():
        try:
            HfApi().model_info(name, timeout=10)
        except Exception as error:  # of the hub's, of the network's, or a name that cannot be one
            unreachable = error
    try:
        with quiet():
            return load(name, trust_remote_code=False, local_files_only=unreachable is not None, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        where = "it is no folder here, and not to be had from the hub" if unreachable else "it has none"
        reason = " ".join(str(unreachable or error).split())[:160]
        raise UserError(f"{name}: cannot load a {what}: {where} ({reason})") from error


def load_weights(load: Callable[..., Any], name: str | Path, what: str, dtype: Any) -> Any:
    """A model from safetensors, with SDPA, as `load_pretrained`. UserError also if its weights are not complete."""
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
    model, info = load_pretrained(load, name, f"{what} with safetensors weights", **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} tensors are missing in its weights, {missing[0]} first")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what matters in them is raised as an error instead."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
