"""What a causal language model computes: hidden states, logits, and log-probabilities of tokens.

All the logits of a batch, (B, T, vocab), would be the memory peak of training: 40 GB for 64 k tokens of
Qwen2.5. So here the decoder gives hidden states, and the head is applied to the tokens that count, a chunk of
them at a time.

The completions of a group share their prompt. What a model computes at a token depends on the tokens before
it alone: where two rows begin alike it is the same, and is computed once (`states_once`). Everything in a
transformer but attention treats each token for itself. There the tokens stand in one line, with no padding;
for attention, and for nothing else, they are laid out in rows again, by their numbers:

    row 0   p q r a b .      numbers  0 1 2 3 4 .      in one line   p q r a b c d e
    row 1   p q r c d e               0 1 2 5 6 7      position      0 1 2 3 4 3 4 5

So each row attends to what it would attend to alone, and all numbers that come out are those of plain rows.
In the backward pass the gradients of all completions add up in the states of their prompt.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lib import UserError
from lib.cache import layer_types


def token_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T) int64, padded on the right
    attention_mask: Tensor,  # (B, T) bool
    completion_mask: Tensor,  # (B, T) bool
    *,
    temperature: float = 1.0,
    chunk_size: int = 2048,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Any:
    """log p(token t | tokens before t) at `temperature`, (B, T) fp32, 0 where completion_mask is False.

    `with_entropy` makes it a pair: with the entropy of each of those predictions, in nats, (B, T) fp32, which
    has a gradient only if `entropy_gradient`: that costs two more tensors of a chunk's logits.

    The logits of no more than chunk_size tokens ever exist: of several chunks none is kept for the backward
    pass, which computes each again. Raises ValueError unless temperature > 0, and if the mask holds a token
    that has nothing before it: such a token has no conditional probability.
    """
    ### BEGIN SOLUTION token_logprobs
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be > 0")
    attention_mask, completion_mask = attention_mask.bool(), completion_mask.bool()
    row, column = completion_mask.nonzero(as_tuple=True)  # (N,) each: where the N masked tokens stand
    if not bool((column > 0).all() & attention_mask[row, column - 1].all()):
        raise ValueError("completion_mask is True on a token with none before it")

    def of_masked(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        states, number = states_once(model, input_ids, attention_mask)
        hidden = F.embedding(number[row, column - 1], states)  # (N, H), a fast states[...]; t - 1 predicts t
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
    ### END SOLUTION


def _head_logprobs(
    model, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """hidden (n, H), targets (n,) int64 -> their log-probabilities, and entropies (or zeros), (n,) fp32."""
    logits = head_logits(model, hidden)
    logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # (n, vocab)
    entropy = torch.zeros(len(targets), device=hidden.device)
    if with_entropy:
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def states_once(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Last hidden states (N, H), each computed once, and the number (B, T) int64 of each token's among them.

    A model that cannot share prompts computes rows plainly, a state for each token. Raises UserError for rows
    that are longer than the model's context, ValueError for padding on the left.
    """
    if input_ids.shape[1] > (context := context_of(model.config)):
        raise UserError(f"a row of {input_ids.shape[1]} tokens exceeds the model's context, {context}")
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError("rows must be padded on the right")
    inputs = {"input_ids": input_ids}
    number = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    if shares_prompts(model):
        number, place = number_tokens(input_ids, attention_mask)
        inputs = {"input_ids": input_ids.flatten()[place][None]}
        inputs["position_ids"] = place[None] % input_ids.shape[1]
        rest = F.pad(place, (0, number.numel() - len(place)))  # in the shape of `number`
        inputs["attention_mask"] = torch.stack([number, rest.view_as(number)])[None]  # `attention_over_rows`
    # Padding on the right is seen by no real token (attention is causal), and SDPA is fastest without a mask.
    states = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1), number


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether `attention_over_rows` is what the model attends with. If not, each row is computed whole."""
    ours = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    return ours and set(layer_types(model)) == {"full_attention"}


def number_tokens(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each token of rows (B, T), and the N places where a new number begins; int64 both.

    A token has the number of the one above it if its whole row up to it equals the row above, else a new one.
    """
    new = attention_mask.clone()  # which tokens get a number; at the file's head 11111. and ...111
    alike = (input_ids[1:] == input_ids[:-1]) & attention_mask[:-1]
    new[1:] &= ~alike.long().cumprod(1).bool()  # not those before the first difference
    count = (new.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)  # 01234. and ...567
    row = torch.arange(len(new), device=new.device)[:, None]
    above = (row * new).cummax(0).values  # the row in which a column's token is new: this one, or one above
    return count.gather(0, above), new.flatten().nonzero()[:, 0]


def attention_over_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """SDPA, for which tokens that stand in one line, (1, heads, N, head_dim), are laid out in rows.

    What `number_tokens` gives comes as the mask, (1, 2, B, T) int64: a model hands a mask of four dimensions
    to attention as it is. Rows of many copies are not kept for the backward pass, but laid out again.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    number, place = attention_mask[0, 0], attention_mask[0, 1].flatten()[: query.shape[2]]

    def attend(*line: Tensor) -> Tensor:
        rows = [F.embedding(number, x[0].transpose(0, 1).flatten(1)) for x in line]
        q, k, v = (x.unflatten(2, (y.shape[1], -1)).transpose(1, 2) for x, y in zip(rows, line, strict=True))
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)  # (B, T, heads, head_dim)
        return output.flatten(0, 1).index_select(0, place)[None]

    if torch.is_grad_enabled() and number.numel() > 3 * query.shape[2]:  # more than three copies of a token
        return checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=False), None
    return attend(query, key, value), None


AttentionInterface.register("sdpa", attention_over_rows)  # from here on, of all models with SDPA


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
    """KL(p || q) by token, from samples of p: Schulman's estimator k3 of gap = log q - log p, any shape.

    Clamped to at most 10, with no gradient beyond, as in verl: at a gap of 15 the term would be 3.3e6, and
    after clipping the gradient nothing else would be learned. (The inner clamp keeps e^gap finite.)
    """
    ### BEGIN SOLUTION kl
    gap = gap.clamp(-20, 20)
    return (gap.exp() - gap - 1).clamp(max=10)
    ### END SOLUTION


def context_of(config: PreTrainedConfig) -> int:
    """The longest row, in tokens, that the model may read: its context; sys.maxsize where it names none.

    Two kinds of rotary embeddings (longrope: Phi-3, Phi-4-mini; dynamic NTK) change all positions once a row
    of the batch exceeds an inner length: with them it is that length, so that batch-mates change nothing.
    """
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None)) or sys.maxsize
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
