"""Every causal architecture of transformers, tiny and random, against plain forward passes of one row.

    python -m tests.bench.families qwen2 phi3 gemma3_text       (no name: all of them, half an hour on a core)

A line an architecture, its name and JSON: of each check "ok", "REFUSED: ..." (the line that a user would see)
or what is wrong. `check_model` must refuse, when a model is loaded, whatever would go wrong behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import signal
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from lib import UserError
from lib.attacks import Attempt, Budget, Slot, Victim
from lib.attacks.autodan import target_losses
from lib.batches import pad_batch
from lib.judges import Judge
from lib.policy import token_logprobs
from lib.run.checkpoint import save_policy
from lib.run.hub import load_policy
from lib.run.processes import full_weights
from lib.sampler import sample
from tests.bench.decoders import DECODERS, sampling_by

BUDGET = Budget(gcg_steps=1, gcg_width=4, gcg_top_k=4, gcg_suffix_tokens=4, gcg_init="please")
SECONDS, NEW, TOLERANCE = 60, 12, 1e-3  # for an architecture; tokens of a completion; nats
SIZES_TO_NAMES: dict = {
    97: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model word_embed_proj_dim lru_width",
    64: "intermediate_size ffn_hidden_size n_inner ffn_dim decoder_ffn_dim mlp_hidden_size",
    4: "num_hidden_layers num_attention_heads n_layer n_head n_layers n_heads num_layers num_heads "
    "num_experts num_local_experts n_routed_experts decoder_layers decoder_attention_heads "
    "altup_num_inputs mamba_n_heads linear_num_value_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk eos_token_id linear_num_key_heads "
    "num_global_key_value_heads max_window_layers",
    8: "head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "query_pre_attn_scalar hidden_size_per_layer_input state_size mamba_d_state linear_key_head_dim "
    "linear_value_head_dim global_head_dim laurel_rank",
    256: "max_position_embeddings n_positions max_seq_len",
    7: "sliding_window attention_window local_attention_window",
    16: "moe_intermediate_size shared_expert_intermediate_size mamba_d_head attention_chunk_size",
    1: "n_group topk_group first_k_dense_replace moe_layer_start_index",
    0.2: "initializer_range init_std",
    0.0: "dropout",
}
SIZES = {name: size for size, names in SIZES_TO_NAMES.items() for name in names.split()}
SIZES |= {"use_cache": True, "use_sliding_window": True, "num_kv_shared_layers": 0}
SIZES |= {"pad_token_id": None, "bos_token_id": None}
NOISE = "attention_dropout hidden_dropout residual_dropout embedding_dropout activation_dropout dropout "
NOISE += "resid_pdrop attn_pdrop embd_pdrop layerdrop router_jitter_noise input_jitter_noise"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
    "{{ '<|im_start|> assistant ' if add_generation_prompt }}"
)
WORDS = "<unk> <|im_start|> <|im_end|> <pad> <think> </think> user assistant tell me a story about the sea"


def word_tokenizer(unknown: str = "<unk>") -> PreTrainedTokenizerFast:
    """97 words, split at spaces; without a word for the `unknown`, it raises what it does not know."""
    words = f"{WORDS} sure here is please".split()
    words += [f"w{i}" for i in range(97 - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"] + [unknown] * (unknown in words))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(kind: str, changes: dict):
    """The architecture's configuration in small. Some break with one of the sizes: tried without it."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    reasons = []
    for left_out in ([], ["head_dim"], ["num_key_value_heads"], ["head_dim", "num_key_value_heads"]):
        try:
            config = cls(**{name: size for name, size in sizes.items() if name not in left_out} | changes)
        except Exception as error:
            reasons.append(str(error))
            continue
        kinds = getattr(config, "layer_types", None)
        if kinds and len(kinds) != config.num_hidden_layers:
            config.layer_types = list(kinds)[: config.num_hidden_layers]
        return config
    raise ValueError(reasons[0])


def make(folder: str | Path, kind: str, changes: dict) -> str:
    """A folder with a random model of the architecture, and the tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind, changes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


# ---- plain passes: one row, no cache, no padding -----------------------------------------------------------


def reference_model(folder: str) -> PreTrainedModel:
    """The model with the attention that is written out, or with SDPA where it has no such thing."""
    for attention in ("eager", "sdpa"):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            return model.float().eval().requires_grad_(False)
        except ValueError as error:
            reason = error
    raise reason


def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """ids (T,) -> logits (T, vocab) fp32."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """NEW tokens and their log-probabilities, each by a pass over the whole row."""
    ids, logprobs = list(prompt), []
    for _ in range(NEW):
        values = plain_logits(model, ids)[-1].log_softmax(-1)
        ids.append(int(values.argmax()))
        logprobs.append(values[ids[-1]].item())
    return ids[len(prompt) :], logprobs


def plain_gradient(model: PreTrainedModel, parts: Sequence[list[int]], target: list[int]) -> Tensor:
    """(S, vocab): d loss of the target / d one-hot of the middle part, by a pass over the whole row."""
    before, suffix, behind = parts
    table, seen = model.get_input_embeddings(), []

    def keep(module, inputs, embeds):
        seen.append(embeds.detach().requires_grad_())
        return seen[0].clone()

    hook = table.register_forward_hook(keep)
    logits = plain_logits(model, before + suffix + behind)[-len(target) :]
    hook.remove()
    loss = F.cross_entropy(logits, torch.tensor(target))
    slope = torch.autograd.grad(loss, seen[0])[0][0, len(before) : len(before) + len(suffix)]
    with torch.no_grad():
        return slope @ table(torch.arange(table.weight.shape[0])).T


# ---- the checks --------------------------------------------------------------------------------------------


class Case:
    """One architecture: as it is used here (`policy`), and plain (`reference`), of the same weights."""

    def __init__(self, kind: str, changes: dict, folder: str) -> None:
        self.folder, self.tokenizer = make(folder, kind, changes), word_tokenizer()
        self.policy = load_policy(folder, device="cpu").requires_grad_(False)
        self.reference = reference_model(folder)
        rng = random.Random(0)
        self.prompts = [[rng.randrange(5, 97) for _ in range(length)] for length in (3, 17, 9, 1, 12)]
        with torch.no_grad():
            self.expected = [greedy(self.reference, prompt) for prompt in self.prompts]
        self.rows = [p + tokens for p, (tokens, _) in zip(self.prompts, self.expected, strict=True)]
        judge = Judge("none", lambda prompts, answers: [0.0] * len(answers), lambda p, a: [0.0] * len(a))
        self.victim = Victim("x", self.policy, self.tokenizer, True, judge, max_new_tokens=4, temperature=0.0)
        self.target = "sure here is a story"

    def sampling(self) -> str:
        """Tokens and log-probabilities: in groups under a budget, with fixed shapes as on a GPU, and not."""
        worst = 0.0
        for group, budget, decoder in ((1, None, "ours"), (2, 70, "ours"), (1, None, "fixed_shapes")):
            how = {"max_new_tokens": NEW, "temperature": 0.0, "eos_token_ids": [], "max_batch_tokens": budget}
            with sampling_by(DECODERS[decoder]):
                drawn = sample(self.policy, self.prompts, group_size=group, **how)
            for i, found in enumerate(drawn):
                tokens, logprobs = self.expected[i // group]
                if found.token_ids != tokens:
                    return f"WRONG TOKENS of prompt {i // group}: {found.token_ids} for {tokens}"
                worst = max(worst, *(abs(a - b) for a, b in zip(found.logprobs, logprobs, strict=True)))
        return verdict(worst)

    def logprobs(self) -> str:
        """Of completions, in padded rows."""
        ids, attention_mask = pad_batch(self.rows, 0, side="right")
        place = attention_mask.cumsum(1) * attention_mask  # from 1
        mask = place > torch.tensor([[len(prompt)] for prompt in self.prompts])
        with torch.no_grad():
            found = token_logprobs(self.policy, ids, attention_mask, mask)
        expected = torch.tensor([value for _, logprobs in self.expected for value in logprobs])
        return verdict(float((found[mask] - expected).abs().max()))

    def gcg(self) -> str:
        """Losses of candidates behind a cached prefix, and the gradient."""
        request = {"id": "a", "prompt": "tell me a story about the sea w1 w2 w3", "target": self.target}
        slot = Slot(self.victim, Attempt(request), self.target, BUDGET)
        chapter = importlib.import_module("04_attack_eval")
        before, target = slot.prefix, slot.target.tolist()
        suffix, behind = slot.start.tolist(), slot.tail.tolist()
        candidates = torch.tensor(suffix).repeat(3, 1)
        candidates[1, 0], candidates[2, 3] = 50, 60
        for row, found in zip(candidates.tolist(), chapter.losses(slot, candidates), strict=True):
            with torch.no_grad():
                logits = plain_logits(self.reference, before + row + behind)[-len(target) :]
            if not abs(F.cross_entropy(logits, torch.tensor(target)) - found) < TOLERANCE:
                return f"WRONG LOSS {found:.4f}"
        expected = plain_gradient(self.reference, (before, suffix, behind), target)
        found = chapter.gradient(slot, candidates[0])
        gap = float((found - expected).abs().max() / expected.abs().max())
        return "ok" if gap < 1e-2 else f"WRONG GRADIENT by {gap:.3g}"

    def autodan(self) -> str:
        """Losses of prompts of different lengths in one batch."""
        texts = ["tell me a story", "tell me a story about the sea w1 w2 w3 w4 w5 w6 w7 w8 w9", "please"]
        target = self.tokenizer.encode(self.target, add_special_tokens=False)
        worst = 0.0
        losses = target_losses(self.victim, Attempt({"target": self.target}), texts, BUDGET)
        for text, found in zip(texts, losses, strict=True):
            with torch.no_grad():
                logits = plain_logits(self.reference, self.victim.encode(text) + target)
            loss = F.cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target)).item()
            worst = max(worst, abs(loss - found))
        return verdict(worst)

    def saving(self) -> str:
        """A checkpoint loads as what was saved."""
        ids = torch.tensor([self.rows[2]])
        with tempfile.TemporaryDirectory() as folder:
            save_policy(self.policy, self.tokenizer, folder, full_weights(self.policy))
            again = load_policy(folder, device="cpu")
            with torch.no_grad():
                same = torch.equal(again(ids).logits, self.policy(ids).logits)
        return "ok" if same else "WRONG"

    def checkpointing(self) -> str:
        """Where layers are recomputed, nothing else changes, whatever noise the model would train with."""
        path = Path(self.folder) / "config.json"
        config = json.loads(path.read_text())
        inner, ids = config.get("text_config", config), torch.tensor([self.rows[2]])
        text_config = self.policy.config.get_text_config()
        inner |= {
            name: 0.3 for name in NOISE.split() if isinstance(getattr(text_config, name, None), int | float)
        }
        path.write_text(json.dumps(config))
        plain = load_policy(self.folder, device="cpu")
        recomputing = load_policy(self.folder, device="cpu", gradient_checkpointing=True)
        plain, other = (model(ids, use_cache=False).logits for model in (plain, recomputing))
        gap = (plain - other).abs().max().item()
        return "ok" if gap < 1e-4 else f"WRONG by {gap:.3g}"


def verdict(worst: float) -> str:
    return "ok" if worst < TOLERANCE else f"WRONG by {worst:.3g}"


CHECKS = ("sampling", "logprobs", "gcg", "autodan", "saving", "checkpointing")


def examine(kind: str, changes: dict) -> dict[str, str]:
    """What each check says of the architecture, with changes of its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"load": outcome(partial(Case, kind, changes, folder))}
        if isinstance(found["load"], Case):
            case = found.pop("load")
            found = {name: outcome(getattr(case, name)) for name in CHECKS}
    return found


def outcome(check: Callable[[], Any]) -> Any:
    """What it returns, or what went wrong. (An architecture may be none in this size.)"""
    try:
        return check()
    except UserError as error:
        return f"REFUSED: {error}"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {str(error)[:160]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*NAMES, []], metavar="KIND", help="default: all of them")
    kinds = parser.parse_args().kinds or sorted(NAMES)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def late(*given) -> None:
        raise TimeoutError(f"{SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for kind in kinds:
        signal.alarm(SECONDS)
        found = examine(kind, {})
        signal.alarm(0)
        print(kind, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
