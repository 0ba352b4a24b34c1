"""What a causal language model computes: hidden states, logits, and log-probabilities of tokens.

All the logits of a batch, (B, T, vocab), would be the memory peak of training: 40 GB for 64 k tokens of
Qwen2.5. So here the decoder gives hidden states, and the head is applied to the tokens that count, a chunk of
them at a time.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from lib import UserError

CHUNK = 2048  # tokens whose logits exist at a time


def token_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T) int64; rows may be padded on the left or on the right
    attention_mask: Tensor,  # (B, T) bool
    completion_mask: Tensor,  # (B, T) bool
    *,
    temperature: float = 1.0,
    chunk_size: int = CHUNK,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Any:
    """log p(token t | tokens before t) at `temperature`, (B, T) fp32, 0 where completion_mask is False.

    It has a gradient. `with_entropy` makes it a pair: the entropy of each of those predictions in nats, at
    `temperature` too, comes with it, (B, T) fp32. It has a gradient only if `entropy_gradient`: that costs
    two more tensors of a chunk's logits.

    The logits of no more than chunk_size tokens ever exist: of several chunks none is kept for the backward
    pass, which computes each again. Raises ValueError if the mask holds a token that has nothing before it:
    such a token has no conditional probability.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be > 0")
    attention_mask, completion_mask = attention_mask.bool(), completion_mask.bool()
    row, column = completion_mask.nonzero(as_tuple=True)  # (N,) each: where the N masked tokens stand
    if not bool((column > 0).all() & attention_mask[row, column - 1].all()):
        raise ValueError("completion_mask is True on a token with none before it")

    def of_masked(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(model, input_ids, attention_mask)[row, column - 1]  # (N, H): t - 1 predicts t
        targets, head = input_ids[row, column], partial(_head_logprobs, model)  # (N,)
        if torch.is_grad_enabled() and len(targets) > chunk_size:
            head = partial(checkpoint, head, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        pairs = [head(*chunk, temperature, with_entropy, entropy_gradient) for chunk in chunks]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return logprobs, entropy

    within_forward = getattr(model, "within_forward", None)  # shards (FSDP) are gathered for a pass
    logprobs, entropy = within_forward(of_masked) if within_forward else of_masked(model)  # (N,) each
    zeros = torch.zeros(input_ids.shape, dtype=torch.float32, device=logprobs.device)
    logprobs, entropy = (zeros.index_put((row, column), part) for part in (logprobs, entropy))
    return (logprobs, entropy) if with_entropy else logprobs


def _head_logprobs(
    model: PreTrainedModel,
    hidden: Tensor,  # (n, H)
    targets: Tensor,  # (n,) int64
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets, entropy of their predictions (0 if not asked for), (n,) fp32 each."""
    logits = head_logits(model, hidden)
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # (n, vocab)
    entropy = torch.zeros(len(targets), device=hidden.device)
    if with_entropy:
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, T, H). Every row counts its positions from its own first token.

    Raises UserError for rows that are longer than the model's context.
    """
    if input_ids.shape[1] > (context := context_of(model.config)):
        found = f"a row of {input_ids.shape[1]} tokens exceeds the model's context, {context} tokens"
        raise UserError(f"{found}: shorten it")
    inputs = {"input_ids": input_ids}
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):  # padding on the left of some row
        inputs["attention_mask"] = attention_mask.long()
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    # Padding on the right is seen by no real token (attention is causal), and SDPA is fastest without a mask.
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


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


def k3(gap: Tensor) -> Tensor:
    """KL(p || q) by token, from samples of p; gap = log q - log p: e^gap - gap - 1 (Schulman), any shape.

    Clamped to at most 10, with no gradient beyond, as in verl: at a gap of 15.5 the term would be 5.4e6, and
    after clipping the gradient nothing else would be learned. (The inner clamp keeps e^gap finite.)
    """
    gap = gap.clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(max=10)


def context_of(config: PreTrainedConfig) -> int:
    """The longest row, in tokens, that is computed alike whatever else is in the batch; sys.maxsize: any.

    That is the model's context. But two kinds of rotary embeddings change all positions as soon as a batch's
    longest row is over another length (longrope: Phi-3, Phi-4-mini; dynamic NTK): with them it is this one.
    """
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [part for part in rope.values() if isinstance(part, dict)]  # one for each kind of layer
    for kind in [rope, *by_layer]:
        if kind.get("rope_type") in ("longrope", "dynamic"):
            context = min(context, kind.get("original_max_position_embeddings") or context)
    return context


def table_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for. A tokenizer may know more, or fewer."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return len(table)
