"""What judges that are language models share: open a model once, cut an answer, read what it writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib.chat import decode, eos_token_ids, load_tokenizer
from lib.files import UserError
from lib.hub import load_pretrained
from lib.policy import load_policy
from lib.processes import pick_device
from lib.sampler import sample

BATCH_TOKENS = 8192  # rows x columns of the cache: 6.7 GB (twice that while it is repacked) for a Llama of 13 B in bfloat16


class LanguageModel:
    """A causal language model, a folder or a hub name, that answers greedily.

    Tokenizer and configuration are read at once, so that a wrong name shows before hours of work; the weights when first
    needed. They stay in memory: on the GPU of this process in bfloat16, without a GPU in float32. `chat`: it must have a
    chat template. Raises UserError if it is not there; no code of the model's own is run.
    """

    def __init__(self, name: str, *, chat: bool) -> None:
        self.name = name
        self.tokenizer = open_tokenizer(name, chat=chat)
        self.config = load_pretrained(AutoConfig.from_pretrained, name, "model configuration")
        self.context = getattr(self.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @cached_property
    def model(self) -> PreTrainedModel:
        device = pick_device("auto")
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())  # that of this process among torchrun's
        return load_policy(self.name, device=device, dtype="bfloat16" if device.type == "cuda" else "float32")

    def clip(self, text: str, tokens: int) -> str:
        """The text of its first `tokens` tokens, counted with those that the tokenizer puts before every text."""
        return decode(self.tokenizer, self.tokenizer(encodable(text), max_length=tokens, truncation=True)["input_ids"])

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str | None]:
        """What it writes, greedily, after each list of token ids; None after one that its context cannot hold.

        A text does not depend on its batch-mates (but for the last bits of rounding, see lib.sampler). A bar appears when
        it takes more than two seconds. Raises UserError for a model whose numbers are not finite, or that lib.sampler does
        not know how to sample from.
        """
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens <= self.context]
        texts: list[str | None] = [None] * len(prompts)
        if not fitting:
            return texts
        longest = max(len(prompts[i]) for i in fitting) + max_new_tokens
        try:
            completions = sample(
                self.model,
                [prompts[i] for i in fitting],
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                eos_token_ids=stop_ids(self.model, self.tokenizer),
                max_batch_tokens=max(BATCH_TOKENS, longest),
                progress=True,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"--judge: {self.name}: {error}") from error
        for i, completion in zip(fitting, completions, strict=True):
            texts[i] = decode(self.tokenizer, completion.token_ids)
        return texts


def open_tokenizer(name: str, *, chat: bool) -> PreTrainedTokenizerBase:
    """A classifier's tokenizer may lack a chat template, which lib.chat insists on. Cuts text at its end."""
    tokenizer = load_tokenizer(name) if chat else load_pretrained(AutoTokenizer.from_pretrained, name, "tokenizer")
    tokenizer.truncation_side = "right"
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text; none, for a classifier without a chat template or eos."""
    if tokenizer.chat_template:
        return eos_token_ids(model, tokenizer)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
