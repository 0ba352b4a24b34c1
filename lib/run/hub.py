"""Opening a model or tokenizer, a folder or a name on the hub: quietly, and with one line for an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import has_file, logging

from lib import UserError
from lib.chat import encode_text
from lib.run.checks import check_model
from lib.run.processes import pick_device

logging.set_verbosity_error()  # what matters in the warnings of transformers is raised as an error here
logging.disable_progress_bar()


def load_pretrained(load: Callable[..., Any], name_or_path: str | Path, what: str, **options: Any) -> Any:
    """`load` is a from_pretrained; no code of the model's own is run. UserError if it fails, with the cause.

    The hub is asked first: if it cannot be reached, only the cache of earlier downloads is read, instead of a
    minute of retries.
    """
    name, unreachable = str(name_or_path), None
    try:
        if not Path(name).is_dir():
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # of the hub's, of the network's, or a name that cannot be one
        unreachable = error
    try:
        return load(name, trust_remote_code=False, local_files_only=unreachable is not None, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a broken file brings about: tokenizers raises Exception itself
        reason = " ".join(str(unreachable or error).split())[:200]
        if unreachable:
            reason = f"it is no folder here, and not to be had from the hub ({reason})"
        raise UserError(f"{name}: cannot load a {what}: {reason}") from error


def read_tokenizer(name: str, **options: Any) -> Any:
    """AutoTokenizer's from_pretrained; or tokenizer.json as it stands, where that reads text otherwise.

    AutoTokenizer builds those of some families (of every Qwen2) anew from the vocabulary: what is a
    tokenizer's own, such as to split at spaces, is lost without a word.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if not has_file(name, "tokenizer.json", local_files_only=options["local_files_only"]):
        return tokenizer
    as_it_stands = PreTrainedTokenizerFast.from_pretrained(name, **options)
    words = sorted(as_it_stands.get_vocab(), key=as_it_stands.convert_tokens_to_ids)
    text = " ".join(["Hello, world! Tell me 12 of them.\n", *words[:: len(words) // 500 + 1]])
    with contextlib.suppress(UserError):  # a vocabulary of words that has none for the unknown
        if encode_text(tokenizer, text) == encode_text(as_it_stands, text):
            return tokenizer
    return as_it_stands


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a chat model; without a padding token it pads with eos. UserError if it is none."""
    tokenizer = load_pretrained(read_tokenizer, name, "tokenizer")
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; take a chat (instruct) model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no end-of-sequence token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dtype_to_infer(device: str | torch.device) -> str:
    """Of a model that only reads and writes: bfloat16 on a GPU, where it takes half the room and time."""
    return "bfloat16" if pick_device(device).type == "cuda" else "float32"


def load_weights(load: Callable[..., Any], name: str | Path, what: str, dtype: str) -> Any:
    """A model from safetensors, as `load_pretrained`; dtype "auto": as it was saved.

    UserError also if its weights are not complete.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = load_pretrained(load, name, f"{what} with safetensors weights", **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} tensors are missing in its weights, {missing[0]} first")
    return model


def load_policy(
    name: str | Path, *, device: Any = "auto", dtype: str = "float32", gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """A causal language model from a folder or the hub, in eval mode, so without dropout.

    Raises UserError if there is no such model, if weights are missing, or if training and sampling would not
    read it alike (`check_model`).
    """
    model = load_weights(AutoModelForCausalLM.from_pretrained, name, "model", dtype)
    model.to(pick_device(device)).eval()
    if gradient_checkpointing:  # layers recompute their activations in the backward pass
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"{name}: leave out --gradient-checkpointing: {error}") from error
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # transformers heeds it in train mode alone. So the layers are put into it, and nothing
                # inside, where dropout, experts and routers are; if one still adds noise, the check finds it.
                module.training = True
    check_model(model, name)
    return model
