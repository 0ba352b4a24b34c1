"""Policies: loading and saving a model, and log-probabilities of tokens without ever holding all logits."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lib import UserError
from lib.cache import context_of, layer_types, repeat_row, table_rows
from lib.chat import THINK_CLOSE, THINK_OPEN, decode, encode_prompt, encode_text, pad_batch, parse_completion
from lib.run.hub import load_weights, quiet
from lib.run.processes import pick_device
from lib.run.shards import call_within_forward
from lib.run.state import disk_errors
from lib.sampler import sample

CHUNK = 2048  # tokens whose logits exist at a time
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
    """A causal language model from a folder or the hub: safetensors, no code of its own; in eval mode, so without dropout.

    `dtype` is float32, bfloat16 or auto (as it was saved). Raises UserError if there is no such model, if weights are
    missing, or if it is of an architecture that is not exact in all that it is used for (`check_model`).
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


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str | Path) -> None:
    """Raise UserError, with the cause, unless all ways in which the stages use the model agree with plain passes.

    A plain pass reads one row, without cache and padding: what the model is by its definition. Architectures differ in
    how they pad, cache, scale and count positions, so each way is tried on two short rows of random tokens.
    """
    refused = f"{name}: {type(model).__name__} cannot be used here"
    if strange := sorted({*layer_types(model)} - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{refused}: it has layers of {', '.join(strange)}, and only key-value attention is known"
        )
    # In standard deviations of the logits. In half precision a batch of another shape is rounded otherwise.
    tolerance = 1e-2 if model.dtype == torch.float32 else 0.3
    rows, device = _random_rows(model), model.device
    doing = "a plain pass"

    def compare(cause: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for a, b, one in zip(found, expected, spread, strict=False):
            if not ((a - b).square().mean().sqrt() / one).item() <= tolerance:
                raise UserError(f"{refused}: {cause}")

    try:
        logits = [
            model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float()
            for row in rows
        ]
        if not all(x.isfinite().all() for x in logits):
            raise UserError(f"{name}: its logits are not finite: broken weights or precision")
        spread = [x.std().clamp(min=1e-6) for x in logits]
        plain = [
            x[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:], device=device)[:, None])[:, 0]
            for x, row in zip(logits, rows, strict=True)
        ]

        doing = "reading rows padded on the right"
        found = _read(model, rows, "right")
        compare("it treats its logits in a way that lib/policy.py does not know", found[:1], plain)
        compare("what it computes depends on padding on the right", found, plain)
        doing = "reading rows padded on the left"
        compare("what it computes depends on padding on the left", _read(model, rows, "left"), plain)

        doing = "sampling from a cache"
        written = sample(model, rows, max_new_tokens=2, temperature=0.0, eos_token_ids=[])
        longer = _read(model, [row + c.token_ids for row, c in zip(rows, written, strict=True)], "right")
        drawn = [torch.tensor(c.logprobs, device=device) for c in written]
        compare("with a key-value cache it computes something else", drawn, [x[-2:] for x in longer])

        doing = "reading suffixes behind a shared prefix"
        cache, ids = DynamicCache(), torch.tensor(rows[0], device=device)
        model(input_ids=ids[None, :5], cache=cache, use_cache=True, logits_to_keep=1)
        two = ids[5:8].repeat(2, 1)
        behind = (
            model(input_ids=two, cache=repeat_row(cache, 2), logits_to_keep=2).logits.float().log_softmax(-1)
        )
        if behind.shape[1] != 2:
            raise UserError(f"{refused}: it does not heed logits_to_keep")
        found = behind.gather(2, ids[7:].expand(2, 2)[..., None])[..., 0]
        compare("behind a shared prefix it computes something else", found, [plain[0][6:]] * 2)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own: whatever it is, it is no bug of the stage
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{refused}: {doing} fails ({type(error).__name__}: {reason})") from error


def _random_rows(model: PreTrainedModel) -> list[list[int]]:
    """Rows of 9 and 4 token ids, none of which has a meaning of its own, as padding or an image has."""
    config = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    meant = [value for key, value in config.items() if key.endswith(("token_id", "token_index"))]
    table = table_rows(model)
    ids = torch.randint(table, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [i for i in ids if i not in meant]
    return [ids[:9], ids[9:13]]


def _read(model: PreTrainedModel, rows: list[list[int]], side: str) -> list[Tensor]:
    """Log-probabilities of all tokens of each row but the first."""
    ids, mask = (x.to(model.device) for x in pad_batch(rows, 0, side=side))
    predicted = mask & (mask.cumsum(1) > 1)
    return [
        values[chosen]
        for values, chosen in zip(token_logprobs(model, ids, mask, predicted), predicted, strict=True)
    ]


def _checkpoint_layers(model: PreTrainedModel, name: str | Path) -> None:
    """Let the layers recompute their activations in the backward pass. UserError for an architecture that then adds noise.

    transformers checkpoints only layers in train mode. So the layers themselves are put into it, and nothing in them is:
    attention, experts and routers have their dropout and jitter off, and compute what they do in eval mode.
    """
    row = _random_rows(model)[:1]
    with torch.enable_grad():
        before = _read(model, row, "right")[0]
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
            _read(model, row, "right")[0], before, rtol=0, atol=1e-5
        ):  # on a GPU sums may differ in order
            raise UserError(
                f"{name}: {type(model).__name__} adds noise when it trains: leave out --gradient-checkpointing"
            )


def check_tokenizer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    reasoning: bool,
    system: str = "",
) -> None:
    """Raise UserError unless model and tokenizer belong together: ids and rows, `prompts` (some of the data's) there and back,
    and the markers of `reasoning`. A padding token without a row, which is never learned, gives way to the end of sequence.
    """
    name, table = tokenizer.name_or_path or "the model", table_rows(model)
    if tokenizer.pad_token_id >= table:
        tokenizer.pad_token = tokenizer.eos_token
    added = tokenizer.added_tokens_decoder  # the released Gemma 3 of 1 B has one without a row, for images
    if (last := max(i for i in tokenizer.get_vocab().values() if i not in added)) >= table:
        raise UserError(
            f"{name}: its tokenizer has ids up to {last}, its model {table} rows: they do not belong together"
        )
    check_ids(
        model,
        [encode_prompt(tokenizer, prompt, reasoning=reasoning, system=system) for prompt in prompts],
        name,
    )

    def there_and_back(text: str) -> str:
        return decode(tokenizer, encode_text(tokenizer, text))

    given, read = (
        [Counter(re.findall(r"\w+", text.casefold())) for text in texts]
        for texts in (prompts, map(there_and_back, prompts))
    )
    kept = sum((a & b).total() for a, b in zip(given, read, strict=True))
    if 2 * kept < sum(words.total() for words in given):
        raise UserError(
            f"{name}: its tokenizer loses most words of the prompts: {prompts[0][:40]!r} comes back as "
            f"{there_and_back(prompts[0])[:40]!r}; give it the tokenizer that it was trained with"
        )
    if reasoning and not (
        there_and_back(THINK_OPEN).strip() == "<think>"
        and parse_completion(there_and_back(THINK_CLOSE)).well_formed
    ):
        raise UserError(
            f"{name}: its tokenizer cannot write <think> and </think>: add them to it, or see --no-reasoning"
        )


def check_ids(model: PreTrainedModel, rows: Iterable[Sequence[int]], name: str | Path) -> None:
    """Raise UserError for a token id that the model has no row for."""
    table = table_rows(model)
    if (last := max((max(row, default=0) for row in rows), default=0)) >= table:
        raise UserError(
            f"{name}: a prompt has the token id {last}, the model {table} rows: resize it, or drop the token"
        )


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


def token_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = CHUNK,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Any:
    """log p(token t | tokens before t) at `temperature`, (B, T) fp32, zero where completion_mask is False.

    input_ids (B, T) int64; attention_mask, completion_mask (B, T) bool; rows may be padded left or right. The
    result has a gradient. `with_entropy` makes it a pair: the entropy in nats of each of those predictions
    comes with it, (B, T) fp32, at `temperature` too, and with a gradient only if `entropy_gradient`: that costs
    two more tensors of a chunk's logits.

    All the logits of a batch, (B, T, vocab), would be the memory peak of training. Here the decoder gives
    hidden states, and the head sees masked positions only, `chunk_size` at a time; of more than one chunk the
    backward pass computes each again instead of keeping it. So (chunk_size, vocab) logits are all that ever
    exist.

    Raises ValueError if the mask holds a token that has nothing before it: it has no conditional probability.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be > 0")
    attention_mask, completion_mask = attention_mask.bool(), completion_mask.bool()
    row, column = completion_mask.nonzero(as_tuple=True)  # (N,) each
    if not bool((column > 0).all() & attention_mask[row, column - 1].all()):
        raise ValueError("completion_mask is True on a token with none before it")
    inputs = (input_ids, attention_mask, row, column, temperature, chunk_size, with_entropy, entropy_gradient)
    logprobs, entropy = call_within_forward(_masked_logprobs, model, *inputs)
    zeros = torch.zeros(input_ids.shape, dtype=torch.float32, device=logprobs.device)
    logprobs, entropy = (zeros.index_put((row, column), part) for part in (logprobs, entropy))
    return (logprobs, entropy) if with_entropy else logprobs


def k3(gap: Tensor) -> Tensor:
    """Per-token estimate of KL(p || q) from samples of p, gap = log q - log p of any shape: e^gap - gap - 1 (Schulman).

    Clamped to at most 10 (it is never negative), with no gradient beyond, as in verl: at a gap of 15.5 the term would be
    5.4e6, and after clipping the gradient nothing else would be learned. (The inner clamp keeps e^gap finite.)
    """
    gap = gap.clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(max=10)


def _masked_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor,  # (B, T)
    row: Tensor,  # (N,) where the masked tokens stand
    column: Tensor,  # (N,)
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the masked tokens, (N,) fp32 each."""
    # The state at t - 1 predicts token t.
    hidden = hidden_states(model, input_ids, attention_mask)[row, column - 1]  # (N, H)
    targets = input_ids[row, column]  # (N,)
    recompute = torch.is_grad_enabled() and len(targets) > chunk_size
    parts = []
    for begin in range(
        0, max(1, len(targets)), chunk_size
    ):  # one round for an empty mask: its gradient is zero
        end = begin + chunk_size
        inputs = (model, hidden[begin:end], targets[begin:end], temperature, with_entropy, entropy_gradient)
        if recompute:
            parts.append(checkpoint(_chunk_logprobs, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_chunk_logprobs(*inputs))
    logprobs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, entropy


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, T, H). Every row counts its positions from its own first token.

    Raises UserError for rows that are longer than the model's context.
    """
    if input_ids.shape[1] > (context := context_of(model.config)):
        raise UserError(
            f"a row of {input_ids.shape[1]} tokens exceeds the model's context, {context} tokens: shorten it"
        )
    inputs = {"input_ids": input_ids}
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):  # padding on the left of some row
        inputs["attention_mask"] = attention_mask.long()
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    # Padding on the right is seen by no real token (attention is causal), and SDPA is fastest without a mask.
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


def _chunk_logprobs(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """hidden (n, H), targets (n,) -> log-probability and entropy, (n,) fp32; entropy 0 if not asked for."""
    logits = head_logits(model, hidden)
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # (n, vocab)
    entropy = torch.zeros(len(targets), device=hidden.device)
    if with_entropy:
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states (..., H) -> logits (..., vocab) fp32: the head, and what some models do after it."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits
