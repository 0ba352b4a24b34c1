"""How much memory a run will take, and what to change where that is too much (`--dry-run`, see lib.run.rehearsal).

Sizes follow from the model's shape. P parameters, N processes; with `--shard` what is marked * is divided by N:

    weights*    4 P    fp32, whatever is computed in: an update of 1e-6 is lost in bfloat16
    gradients*  4 P    AdamW*  8 P: two moments in fp32
    reference*  4 P, in bfloat16 2 P, and without --shard 2 more for each weight of the embeddings
    casts       2 P    in bfloat16: autocast keeps a copy of each weight while it computes
    activations        what the backward pass needs of every token of a micro-batch, see `activation_bytes`
    logits             of `CHUNK` tokens at a time, four copies: logits, log-probabilities, and two of the entropy; two more
                       where the entropy bonus has a gradient
    KV cache           2 x layers x key-value width, a column, and one layer more while it is repacked

Sampling and training do not coincide (and while it samples there are no gradients), so the peak is the larger of the two.
These are tensors alone. What the allocator keeps beside them and the CUDA context come on top: on a GPU `SPARE` is left for
them. On a CPU it can be more: a run of stage 3 was reported to take 5.97 GB where this says 4.87.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lib import UserError
from lib.policy import CHUNK
from lib.run.hub import load_pretrained

SPARE = 0.08  # of a GPU
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """What a decoder's memory depends on; widths in numbers."""

    parameters: int
    layers: int
    hidden: int
    query: int  # heads x head_dim
    key_value: int  # key-value heads x head_dim
    mlp: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class Need:
    """What a stage asks of each GPU. dtype: to compute in. sample_tokens 0: it does not sample; reference: a frozen copy."""

    batch_tokens: int
    longest: int = 1  # tokens of the longest sequence: no budget may be smaller
    sample_tokens: int = 0
    reference: bool = False
    dtype: str = "float32"
    checkpointing: bool = False
    shard: bool = False
    offload: bool = False
    processes: int = 1
    beside: float = 0.0  # bytes of other models on the same GPU: judges
    entropy_gradient: bool = False  # of the entropy bonus


def shape_of(name_or_path: str) -> Shape:
    """From the configuration alone: no weights are read. Raises UserError if there is no such model."""
    config = load_pretrained(AutoConfig.from_pretrained, name_or_path, "model's configuration")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(
            f"{name_or_path}: no causal language model ({' '.join(str(error).split())[:100]})"
        ) from error
    return shape_of_model(model)


def shape_of_model(model: PreTrainedModel) -> Shape:
    """Where layers differ in a size (Gemma 3n, Gemma 4), the widest counts for all."""
    text = model.config.get_text_config()

    def widest(name: str) -> int:
        found = [getattr(layer, name, None) or 0 for layer in text.per_layer_config]
        return max(max(size) if isinstance(size, list) else size for size in found)

    heads = widest("num_attention_heads")
    if not heads:
        raise UserError(
            f"{type(model).__name__} has no attention: its memory cannot be planned, nor can it be used here"
        )
    head_dim = widest("head_dim") or text.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_dim,
        key_value=(widest("num_key_value_heads") or heads) * head_dim,
        mlp=widest("intermediate_size") or widest("ffn_dim") or 4 * text.hidden_size,
        heads=heads,
        vocabulary=text.vocab_size,
    )


def activation_bytes(shape: Shape, need: Need) -> float:
    """What the backward pass keeps for a micro-batch, bytes: of each layer (Llama, Qwen) and token

        fp32      4 x (6 hidden + 2 query + 2 key-value + 4 mlp + heads)
        bfloat16  16 hidden + 2 x (5 hidden + 2 query + 2 key-value + 4 mlp) + 4 heads

    6 hidden: before, in and after both norms; in bfloat16 the first two stay fp32, and each projection's input is a copy. With
    checkpointing, each layer's input, and one layer in full. Behind the layers: the last norm, and the input of the head.
    """
    h, q, kv, m = shape.hidden, shape.query, shape.key_value, shape.mlp
    layer = 4 * (6 * h + 2 * q + 2 * kv + 4 * m + shape.heads)
    if need.dtype == "bfloat16":
        layer = 16 * h + 2 * (5 * h + 2 * q + 2 * kv + 4 * m) + 4 * shape.heads
    end = (10 if need.dtype == "bfloat16" else 12) * h
    a_token = end + (shape.layers * 4 * h + layer if need.checkpointing else shape.layers * layer)
    return need.batch_tokens * a_token


def width(dtype: str) -> int:
    """Bytes of a number."""
    return 2 if dtype == "bfloat16" else 4


def kv_cache_bytes(shape: Shape, tokens: int, dtype: str) -> int:
    """Keys and values of so many tokens, and of one layer more while the cache is repacked (lib.cache)."""
    return 2 * (shape.layers + 1) * shape.key_value * width(dtype) * tokens


def memory(shape: Shape, need: Need) -> dict[str, float]:
    """Bytes on each GPU by purpose, and "sampling", "training", "peak"."""
    part = need.processes if need.shard else 1
    low = width(need.dtype)
    held = 0 if need.offload else 1 / part
    kept = (
        2 * shape.vocabulary * shape.hidden if need.dtype == "bfloat16" and not need.shard else 0
    )  # embeddings in fp32
    sizes = {
        "weights": 4 * shape.parameters * held,
        "gradients": 4 * shape.parameters * held,
        "AdamW": 8 * shape.parameters * held,
        "reference": (low * shape.parameters + kept) * held if need.reference else 0,
        "casts": 2 * shape.parameters if need.dtype == "bfloat16" and not need.shard else 0,
        "activations": activation_bytes(shape, need),
        "logits": 4 * (6 if need.entropy_gradient else 4) * min(CHUNK, need.batch_tokens) * shape.vocabulary,
        "KV cache": kv_cache_bytes(shape, need.sample_tokens, need.dtype),
        "beside": need.beside,
    }
    fixed = sizes["weights"] + sizes["gradients"] + sizes["AdamW"] + sizes["reference"] + sizes["beside"]
    layer = (shape.parameters - shape.vocabulary * shape.hidden) / shape.layers
    ends = 2 * shape.vocabulary * shape.hidden  # embeddings and head
    # weights of this layer, the next and both ends; their gradients, and these in fp32 to be summed
    gathered = low * (2 * layer + ends) + (low + 4) * (layer + ends) if need.shard else 0
    update = 4 * shape.parameters * held  # AdamW's temporaries
    whole = low * shape.parameters if need.shard else 0
    sizes["sampling"] = (
        fixed - sizes["gradients"] + sizes["casts"] + sizes["KV cache"] + whole if need.sample_tokens else 0
    )
    sizes["training"] = fixed + max(
        sizes["casts"] + sizes["activations"] + sizes["logits"] + gathered, update
    )
    return sizes | {"peak": max(sizes["sampling"], sizes["training"])}


def smallest_change(shape: Shape, need: Need, limit: float) -> str:
    """The flags that make it fit into `limit` bytes, those that cost least first, or a sentence that nothing does."""
    ways = [need, replace(need, dtype="bfloat16")]
    ways += [replace(way, checkpointing=True) for way in ways]
    if need.processes > 1:
        ways += [replace(way, shard=True) for way in ways]
        ways += [replace(ways[-1], offload=True)]
    for way in ways:
        smaller = _smaller_batches(shape, way, limit)
        if memory(shape, smaller)["peak"] <= limit:
            return _flags(need, smaller)
    return "nothing does: take more or larger GPUs, or a smaller model"


def _smaller_batches(shape: Shape, need: Need, limit: float) -> Need:
    """Token budgets halved as long as the phase that they bound does not fit, down to one sequence."""
    while memory(shape, need)["training"] > limit and need.batch_tokens // 2 >= need.longest:
        need = replace(need, batch_tokens=need.batch_tokens // 2)
    while memory(shape, need)["sampling"] > limit and need.sample_tokens // 2 >= need.longest:
        need = replace(need, sample_tokens=need.sample_tokens // 2)
    return need


def _flags(before: Need, after: Need) -> str:
    words = []
    if after.dtype != before.dtype:
        words.append(f"--dtype {after.dtype}")
    for name, flag in (
        ("checkpointing", "--gradient-checkpointing"),
        ("shard", "--shard"),
        ("offload", "--offload"),
    ):
        if getattr(after, name) and not getattr(before, name):
            words.append(flag)
    if after.batch_tokens < before.batch_tokens:
        words.append(f"--max-batch-tokens {after.batch_tokens}")
    if after.sample_tokens < before.sample_tokens:
        words.append(f"--max-sample-tokens {after.sample_tokens}")
    return " ".join(words)


def read_machine(text: str) -> tuple[int, float]:
    """ "4x80" -> (4 GPUs, 80e9 bytes each). Raises UserError for anything else."""
    count, _, size = text.partition("x")
    try:
        gpus, limit = int(count), float(size) * GB
    except ValueError:
        gpus, limit = 0, 0.0
    if gpus < 1 or not 0 < limit < 1e6 * GB:
        raise UserError(f"--dry-run: given {text}; allowed GPUSxGIGABYTES, e.g. 4x80, or here")
    return gpus, limit
