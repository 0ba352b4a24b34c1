"""Policies: loading and saving a model, and log-probabilities of tokens without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lib import UserError
from lib.cache import context_of

CHUNK = 2048  # tokens whose logits exist at a time


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
    within_forward = getattr(
        model, "within_forward", None
    )  # of a model in shards: gathers them around a pass
    if within_forward is None:
        logprobs, entropy = _masked_logprobs(model, *inputs)
    else:
        logprobs, entropy = within_forward(_masked_logprobs, *inputs)
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
