"""Every causal architecture of transformers, tiny and random, against plain forward passes of one row.

    python -m tests.bench.families qwen2 phi3 gemma3_text       (no name: all of them, half an hour on a core)

One line of JSON an architecture: of each check "ok", "REFUSED: ..." (the one line that a user would see) or
what is wrong. `check_model` must refuse, when a model is loaded, whatever would go wrong behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from lib import UserError
from lib.attacks import Budget, Slot, Victim
from lib.attacks.autodan import target_losses
from lib.attacks.core import Cost
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
SIZES_OF_NAMES = """
vocab_size 97, hidden_size 32, intermediate_size 64, ffn_hidden_size 64, num_hidden_layers 4,
num_attention_heads 4, num_key_value_heads 2, head_dim 8, max_position_embeddings 256, sliding_window 7,
n_embd 32, n_layer 4, n_head 4, n_positions 256, n_inner 64, d_model 32, n_layers 4, n_heads 4, num_layers
4, num_heads 4, attention_window 7, local_attention_window 7, moe_intermediate_size 16,
shared_expert_intermediate_size 16, num_experts 4, num_local_experts 4, n_routed_experts 4,
num_experts_per_tok 2, moe_topk 2, n_group 1, topk_group 1, kv_lora_rank 8, q_lora_rank 8, qk_rope_head_dim
8, qk_nope_head_dim 8, v_head_dim 8, first_k_dense_replace 1, initializer_range 0.2, init_std 0.2,
eos_token_id 2, ffn_dim 64, word_embed_proj_dim 32, rotary_dim 8, dropout 0.0, max_seq_len 256,
decoder_layers 4, decoder_attention_heads 4, decoder_ffn_dim 64, query_pre_attn_scalar 8, altup_num_inputs
4, vocab_size_per_layer_input 97, hidden_size_per_layer_input 8, state_size 8, mamba_d_state 8,
mamba_n_heads 4, mamba_d_head 16, linear_num_key_heads 2, linear_num_value_heads 4, linear_key_head_dim 8,
linear_value_head_dim 8, lru_width 32, attention_chunk_size 16, moe_layer_start_index 1, mlp_hidden_size 64,
global_head_dim 8, num_global_key_value_heads 2, laurel_rank 8, num_kv_shared_layers 0, max_window_layers 2
"""
SIZES: dict = {name: json.loads(size) for name, size in (part.split() for part in SIZES_OF_NAMES.split(","))}
SIZES |= {"pad_token_id": None, "bos_token_id": None, "use_cache": True, "use_sliding_window": True}
NOISE = (
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "attn_pdrop",
    "embd_pdrop",
    "dropout",
    "layerdrop",
)
NOISE += ("layerdrop", "activation_dropout", "router_jitter_noise", "input_jitter_noise")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + ' ' + m.content + ' <|im_end|> ' }}{% endfor %}"
    "{{ '<|im_start|> assistant ' if add_generation_prompt }}"
)
WORDS = (
    "<unk> <|im_start|> <|im_end|> <pad> <think> </think> user assistant sure here is a story tell me about"
)
WORDS += " the sea please"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """97 words; <think> and </think> are ordinary ones."""
    words = [*WORDS.split(), *(f"w{i}" for i in range(97 - len(WORDS.split())))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    core.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    ends = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **ends)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(kind: str):
    """The architecture's configuration in small. Some break with one of the sizes: tried without it."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    known = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    reasons = []
    for left_out in ([], ["head_dim"], ["num_key_value_heads"], ["head_dim", "num_key_value_heads"]):
        try:
            config = cls(**{name: size for name, size in sizes.items() if name not in left_out})
        except Exception as error:
            reasons.append(str(error))
            continue
        kinds = getattr(config, "layer_types", None)
        if kinds and len(kinds) != config.num_hidden_layers:
            config.layer_types = list(kinds)[: config.num_hidden_layers]
        return config
    raise ValueError(reasons[0])


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

    def __init__(self, kind: str, folder: str) -> None:
        config = tiny_config(kind)
        torch.manual_seed(0)
        self.folder, self.tokenizer = folder, word_tokenizer()
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
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
        """Of completions, in rows padded on either side."""
        worst = 0.0
        for side in ("right", "left"):
            ids, attention_mask = pad_batch(self.rows, 0, side=side)
            place = attention_mask.cumsum(1) * attention_mask  # from 1
            mask = place > torch.tensor([[len(prompt)] for prompt in self.prompts])
            with torch.no_grad():
                found = token_logprobs(self.policy, ids, attention_mask, mask)
            for row, which, (_, logprobs) in zip(found, mask, self.expected, strict=True):
                worst = max(worst, float((row[which] - torch.tensor(logprobs)).abs().max()))
        return verdict(worst)

    def gcg(self) -> str:
        """Losses of candidates behind a cached prefix, and the gradient."""
        before, suffix, behind, target, losses, gradient = gcg_of(self)
        candidates = torch.tensor(suffix).repeat(3, 1)
        candidates[1, 0], candidates[2, 3] = 50, 60
        for row, found in zip(candidates.tolist(), losses(candidates), strict=True):
            with torch.no_grad():
                logits = plain_logits(self.reference, before + row + behind)[-len(target) :]
            if not abs(F.cross_entropy(logits, torch.tensor(target)) - found) < TOLERANCE:
                return f"WRONG LOSS {found:.4f}"
        expected = plain_gradient(self.reference, (before, suffix, behind), target)
        found = gradient(candidates[0])
        gap = float((found - expected).abs().max() / expected.abs().max())
        return "ok" if gap < 1e-2 else f"WRONG GRADIENT by {gap:.3g}"

    def autodan(self) -> str:
        """Losses of prompts of different lengths in one batch."""
        texts = ["tell me a story", "tell me a story about the sea w1 w2 w3 w4 w5 w6 w7 w8 w9", "please"]
        target = self.tokenizer.encode(self.target, add_special_tokens=False)
        worst = 0.0
        for text, found in zip(texts, autodan_losses(self, texts), strict=True):
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
        inner |= {name: 0.3 for name in NOISE if isinstance(getattr(text_config, name, None), int | float)}
        path.write_text(json.dumps(config))
        plain = load_policy(self.folder, device="cpu")
        recomputing = load_policy(self.folder, device="cpu", gradient_checkpointing=True)
        plain, other = (model(ids, use_cache=False).logits for model in (plain, recomputing))
        gap = (plain - other).abs().max().item()
        return "ok" if gap < 1e-4 else f"WRONG by {gap:.3g}"


def gcg_of(case: Case) -> tuple[list[int], list[int], list[int], list[int], Callable, Callable]:
    """The one place that knows GCG's functions: ids before, of and behind the suffix, and of the target;
    losses of candidates (N, S) -> (N,); gradient of a suffix (S,) -> (S, vocab)."""
    request = {"id": "a", "prompt": "tell me a story about the sea w1 w2 w3", "target": case.target}
    slot = Slot(case.victim, request, case.target, BUDGET, Cost())
    chapter = importlib.import_module("04_attack_eval")
    functions = partial(chapter.losses, slot), partial(chapter.gradient, slot)
    return slot.prefix, slot.start.tolist(), slot.tail.tolist(), slot.target.tolist(), *functions


def autodan_losses(case: Case, texts: list[str]) -> list[float]:
    return target_losses(case.victim, texts, case.target, BUDGET, Cost())


def verdict(worst: float) -> str:
    return "ok" if worst < TOLERANCE else f"WRONG by {worst:.3g}"


CHECKS = ("sampling", "logprobs", "gcg", "autodan", "saving", "checkpointing")


def examine(kind: str) -> dict[str, str]:
    """What each check says of the architecture."""
    found, folder = {}, tempfile.mkdtemp()
    try:
        case = Case(kind, folder)
        for name in CHECKS:
            found[name] = outcome(getattr(case, name))
    except UserError as error:
        found["load"] = f"REFUSED: {error}"
    except Exception as error:  # of transformers: in this size the architecture is none
        found["load"] = f"{type(error).__name__}: {str(error)[:160]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def outcome(check: Callable[[], str]) -> str:
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
        found = examine(kind)
        signal.alarm(0)
        print(kind, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
