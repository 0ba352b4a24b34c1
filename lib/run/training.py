"""Of a training step what is no lesson: loading, the rate, gradients of several processes, the rehearsal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lib import UserError
from lib.policy import token_logprobs
from lib.run.hub import load_policy
from lib.run.shards import shard_model


def load_model(run: Any, path: str, *, frozen: bool = False) -> PreTrainedModel:
    """The model in `path` for a stage that trains: the policy, or a frozen reference; fp32 weights.

    Its log-probabilities are computed in --dtype. With --shard it is read on the CPU, and this process's part
    of it stays: load one after the other.
    """
    settings, device = run.settings, run.device
    half, shard = settings.dtype == "bfloat16", settings.shard
    model = load_policy(
        path,
        device="cpu" if shard else device,
        dtype=settings.dtype if shard and frozen else "float32",
        gradient_checkpointing=settings.gradient_checkpointing and not frozen,
    )
    model.requires_grad_(not frozen)
    if shard:
        shard_model(model, device, run.size, settings.dtype, settings.offload)
    elif half and frozen:
        halve_linear_layers(model)
    if half:
        inner = getattr(model, "within_forward", None) or (lambda function, *args: function(model, *args))
        # what `lib.policy.token_logprobs` calls
        model.within_forward = precision(device, "bfloat16")(inner)  # type: ignore[assignment]
    return model


def halve_linear_layers(model: torch.nn.Module) -> None:
    """Keep in bfloat16 what autocast would cast anyway: a frozen reference takes half as much, and computes
    to the bit what the policy of equal weights does, so KL begins at 0."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in embeddings:  # a tied head stays
            module.to(torch.bfloat16)


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """A context to compute in: bfloat16 over fp32 weights, or fp32 as it is.

    The weights stay fp32 in both. In bfloat16 they would have 8 bits of precision, and an update of 1e-6 on a
    weight of 0.02 would be rounded away: training would run, and change nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: Any, step: int, total: int) -> float:
    """Linear warm-up, then constant, or with `decay` linear to zero at `total`. Returns the rate."""
    warmup = settings.warmup_steps
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, warmup))
    if settings.decay and step >= warmup:
        rate = settings.learning_rate * (total - step) / max(1, total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def sum_and_clip(optimizer: torch.optim.Optimizer, limit: float, size: int, sharded: bool) -> float:
    """Sum the gradients of all `size` processes, and clip them together to the L2 norm `limit` (0: not).

    What DistributedDataParallel does, by hand: that sums in every backward pass, so all processes would need
    equally many micro-batches, and takes the mean. Here it is one sum an update: if each process scales its
    loss by the count over all of them, the sum is the gradient of the mean. Shards have summed theirs.
    Returns the norm before clipping.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters if size > 1 and not sharded else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
    norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def rehearse(
    run: Any, policy: PreTrainedModel, reference: PreTrainedModel | None, rows: int, longest: int, prompt: int
) -> None:
    """Compute the largest micro-batch there may be, with room taken for the optimizer and the key-value
    cache, and forget it: what does not fit memory, or a budget of tokens, ends here, before step 1.

    Call it before the optimizer has its state. rows: sequences of an update, on this process; longest: tokens
    of the longest, `prompt` of them of its prompt. The longest sequences might leave some of the budget
    unused, so the batch that fills it is computed.
    """
    settings = run.settings
    for name in ("max_batch_tokens", "max_sample_tokens"):
        if longest > (most := getattr(settings, name, longest)):
            flag = f"--{name.replace('_', '-')} {most}"
            raise UserError(f"{flag}: a sequence may have {longest} tokens, and must fit: raise it")
    tokens = min(settings.max_batch_tokens, rows * longest)  # a budget beyond all rows is never used
    run.say(f"rehearsing the largest batch: {tokens} tokens")
    own = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in policy.parameters())
    moments = torch.empty(8 * own, dtype=torch.uint8, device="cpu" if settings.offload else run.device)
    if reference is not None:
        with run.sampling(policy):
            room_of_cache(policy, min(settings.max_sample_tokens, rows * longest), settings, run.device)
    height = max(1, -(-tokens // longest))
    width = tokens // height
    if width <= prompt:
        height, width = max(1, tokens // longest), longest
    ids = torch.full((height, width), 1, device=run.device)
    everything = torch.ones_like(ids, dtype=torch.bool)
    completion = everything.clone()
    completion[:, : max(1, prompt)] = False
    both: Any = {"with_entropy": True, "entropy_gradient": getattr(settings, "entropy_coef", 0) > 0}
    logprobs, entropy = token_logprobs(policy, ids, everything, completion, **both)
    if reference is not None:
        with torch.no_grad():
            token_logprobs(reference, ids, everything, completion)
    run.backward(0.0 * (logprobs + entropy).sum())
    policy.zero_grad(set_to_none=True)
    del moments


@torch.no_grad()
def room_of_cache(model: PreTrainedModel, tokens: int, settings: Any, device: torch.device) -> Tensor:
    """Memory of the sampler's key-value cache, and of one layer more while it is repacked; taken, not used.

    In bfloat16 autocast keeps a copy of each weight while it computes: room for these, too.
    """
    cache: Any = DynamicCache()
    model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device), cache=cache, use_cache=True)
    layers = cache.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) * (len(layers) + 1) // len(layers)
    copies = 2 * model.num_parameters() if settings.dtype == "bfloat16" and not settings.shard else 0
    return torch.empty(size * tokens + copies, dtype=torch.uint8, device=device)
