"""Opening a model or tokenizer, a folder or a name on the hub: quietly, and with one line for an error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from lib import UserError
from lib.run.checks import check_model, random_rows, read_rows
from lib.run.processes import pick_device

OLDEST = (
    5,
    24,
)  # transformers before it take no `cache=`, and ignore it without a word: the sampler would write garbage
if Version(transformers.__version__).release < OLDEST:
    found, needed = transformers.__version__, ".".join(map(str, OLDEST))
    print(f"error: transformers {found} is too old: pip install 'transformers>={needed}'", file=sys.stderr)
    raise SystemExit(2)


def load_pretrained(load: Callable[..., Any], name_or_path: str | Path, what: str, **options: Any) -> Any:
    """`load` is a from_pretrained; no code of the model's own is run. UserError if it fails, with the cause.

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
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever a broken file brings about: tokenizers, for one, raises Exception itself
        reason = " ".join(str(unreachable or error).split())[:200]
        if unreachable:
            reason = f"it is no folder here, and not to be had from the hub ({reason})"
        elif isinstance(error, SafetensorError):
            reason = (
                f"{_broken_file(Path(name))} is damaged or cut short ({reason}): copy or download it again"
            )
        raise UserError(f"{name}: cannot load a {what}: {reason}") from error


def _broken_file(folder: Path) -> str:
    """The first file of weights that cannot be opened."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(file, "pt")
        except SafetensorError:
            return file.name
    return "a file of its weights"


def read_tokenizer(name: str, **options: Any) -> Any:
    """AutoTokenizer's from_pretrained; or tokenizer.json as it stands, where that reads text otherwise.

    AutoTokenizer builds the tokenizers of some families (of every Qwen2, whatever its files claim) anew from
    the vocabulary: what is a tokenizer's own, such as to split at spaces, is lost without a word.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    try:
        cached_file(name, "tokenizer.json", local_files_only=options["local_files_only"])
    except OSError:
        return tokenizer
    as_it_stands = PreTrainedTokenizerFast.from_pretrained(name, **options)
    vocabulary = sorted(as_it_stands.get_vocab().items(), key=lambda item: item[1])
    text = "Hello, world! Tell me 12 of them.\n" + " ".join(
        token for token, _ in vocabulary[:: len(vocabulary) // 500 + 1]
    )

    def ids(one: Any) -> Any:
        try:
            return one(text, add_special_tokens=False)["input_ids"]
        except Exception:  # tokenizers' own: a vocabulary of words that has none for the unknown
            return None

    return tokenizer if ids(tokenizer) == ids(as_it_stands) else as_it_stands


def load_weights(load: Callable[..., Any], name: str | Path, what: str, dtype: Any) -> Any:
    """A model from safetensors, as `load_pretrained`. UserError also if its weights are not complete.

    Its attention is SDPA, or eager for an architecture that has no other: the choice of transformers.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
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


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a chat model, a folder or a hub name, as its tokenizer.json stands. Without a padding
    token it pads with eos.

    Raises UserError if there is no such model, or it has no chat template or no end-of-sequence token.
    """
    tokenizer = load_pretrained(read_tokenizer, name_or_path, "tokenizer")
    if not tokenizer.chat_template:
        raise UserError(f"{name_or_path}: its tokenizer has no chat template; take a chat (instruct) model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name_or_path}: its tokenizer has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


def dtype_to_infer(device: str | torch.device) -> str:
    """What a model that only reads and writes computes in: bfloat16 on a GPU, where it takes half the room and time."""
    device = pick_device(device) if isinstance(device, str) else device
    return "bfloat16" if device.type == "cuda" else "float32"


def load_policy(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """A causal language model from a folder or the hub: safetensors, no code of its own; in eval mode, so
    without dropout.

    `dtype` is float32, bfloat16 or auto (as it was saved). Raises UserError if there is no such model, if
    weights are missing, or if it is of an architecture that is not exact in all that it is used for
    (`check_model`).
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: given {dtype}; allowed {' | '.join(DTYPES)}")
    device = pick_device(device) if isinstance(device, str) else device
    model = load_weights(AutoModelForCausalLM.from_pretrained, name_or_path, "model", DTYPES[dtype])
    model.to(device).eval()
    check_model(model, name_or_path)
    if gradient_checkpointing:
        _checkpoint_layers(model, name_or_path)
    return model


def _checkpoint_layers(model: PreTrainedModel, name: str | Path) -> None:
    """Let the layers recompute their activations in the backward pass. UserError for an architecture that
    then adds noise.

    transformers checkpoints only layers in train mode. So the layers themselves are put into it, and nothing
    in them is: attention, experts and routers have their dropout and jitter off, and compute what they do in
    eval mode.
    """
    row = random_rows(model)[:1]
    with torch.enable_grad():
        before = read_rows(model, row, "right")[0]
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"{name}: {type(model).__name__} has no gradient checkpointing: leave out --gradient-checkpointing"
            ) from error
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
        if not torch.allclose(
            read_rows(model, row, "right")[0], before, rtol=0, atol=1e-5
        ):  # on a GPU sums may differ in order
            raise UserError(
                f"{name}: {type(model).__name__} adds noise when it trains: leave out --gradient-checkpointing"
            )
