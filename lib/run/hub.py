"""Opening a model or tokenizer, a folder or a name on the hub: quietly, and with one line for an error.

And before the first step: is a model read as it writes (`check_model`), and is the tokenizer its own?
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import has_file, logging

from lib import UserError
from lib.batches import masked_batch
from lib.cache import layer_types
from lib.chat import THINK_CLOSE, THINK_OPEN, decode, encode_prompt, encode_text
from lib.policy import table_rows, token_logprobs
from lib.run.processes import pick_device
from lib.sampler import sample

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
    if isinstance(tokenizer.chat_template, dict):  # others by name, for tools: no checkpoint of ours has them
        tokenizer.chat_template = tokenizer.chat_template.get("default")
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


# ---- checks ----


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError, with the cause, unless training gives tokens the log-probabilities of the sampler.

    Architectures differ in how they pad, cache, scale and count positions. The sampler pads on the left and
    reads from a cache; training pads on the right, and computes once what rows share. Where one of them does
    what the architecture is not made for, they differ.
    """
    checkpointing = " with --gradient-checkpointing" if model.is_activation_checkpointing else ""
    refused = f"{name}: {type(model).__name__} cannot be used here{checkpointing}"
    if strange := sorted({*layer_types(model)} - {"full_attention", "sliding_attention"}):
        raise UserError(f"{refused}: it has layers of {', '.join(strange)}, not of key-value attention alone")
    try:
        prompts = random_prompts(model)
        written = sample(model, prompts, max_new_tokens=3, temperature=0.0, eos_token_ids=[])
        rows = [prompt + x.token_ids for prompt, x in zip(prompts, written, strict=True)]
        masks = [[False] * (len(row) - 3) + [True] * 3 for row in rows]
        ids, attention_mask, mask = masked_batch(rows, masks, 0, model.device)
        found = token_logprobs(model, ids, attention_mask, mask)[mask]
        expected = found.new_tensor([logprob for x in written for logprob in x.logprobs])
        logits = model(input_ids=ids[:1], use_cache=False, logits_to_keep=2).logits
        if logits.shape[1] != 2:
            raise ValueError("it does not heed logits_to_keep")
        gap = (found - expected).square().mean().sqrt() / logits.float().std().clamp(min=1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture's own: whatever it is, it is no bug of the stage
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{refused}: it fails ({type(error).__name__}: {reason})") from error
    # In half precision a batch of another shape is rounded otherwise.
    if not gap.item() <= (1e-2 if model.dtype == torch.float32 else 0.3):  # not a number fails this, too
        raise UserError(f"{refused}: its log-probabilities in training are not those of the sampler")


def random_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Token ids, none of which has a meaning of its own, as padding has. The last two begin alike."""
    config = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    meant = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    ids = torch.randint(table_rows(model), (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in ids if i not in meant]
    return [ids[:9], ids[9:13], ids[9:13] + ids[:9]]


def check_ids(model: PreTrainedModel, ids: Sequence[int], name: str) -> None:
    """Raise UserError, with the name of the text, for a token id that the model has no embedding for, such as
    that of a token which was added to the tokenizer alone."""
    if (last := max(ids, default=0)) >= (table := table_rows(model)):
        raise UserError(
            f"{name}: has the token id {last}, the model {table} rows: drop it, or resize the model"
        )


def check_tokenizer(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], *, reasoning: bool
) -> None:
    """Raise UserError unless model and tokenizer belong together: each id of its words and of `prompts` (some
    of the data's) has a row, most of their words come back, and so do the markers of `reasoning`. A padding
    token without a row, which is never learned, gives way to the end of sequence.
    """
    name, table = tokenizer.name_or_path or "the model", table_rows(model)
    if tokenizer.pad_token_id >= table:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer.added_tokens_decoder  # the released Gemma 3 of 1 B has one without a row, for images
    rows = [encode_prompt(tokenizer, prompt, reasoning=reasoning) for prompt in prompts]
    rows.append([i for i in tokenizer.get_vocab().values() if i not in added])
    if (last := max([tokenizer.pad_token_id, *map(max, rows)])) >= table:
        known = f"its tokenizer has ids up to {last}, its model {table} rows"
        raise UserError(f"{name}: {known}: they do not belong together")
    back = [decode(tokenizer, encode_text(tokenizer, prompt)) for prompt in prompts]
    words, kept = words_of(prompts), words_of(back)
    if 2 * len(words - kept) > len(words):
        found = f"its tokenizer loses most words of the prompts: {prompts[0][:40]!r} becomes {back[0][:40]!r}"
        raise UserError(f"{name}: {found}; give it the tokenizer that it was trained with")
    if reasoning:
        markers = decode(tokenizer, encode_text(tokenizer, THINK_OPEN) + encode_text(tokenizer, THINK_CLOSE))
        if "".join(markers.split()) != "<think></think>":
            raise UserError(f"{name}: its tokenizer cannot write <think> and </think>: see --no-reasoning")


def words_of(texts: Sequence[str]) -> set[str]:
    """In one spelling: some tokenizers compose accents."""
    return set(re.findall(r"\w+", unicodedata.normalize("NFC", " ".join(texts).casefold())))
