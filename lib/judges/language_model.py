"""What judges that are language models share. They *write* a verdict, or one *reads* numbers at its place.

They are shown texts of a policy that is rewarded, and may learn to speak in the judge's name. So no text may
end its place in the prompt: `as_material`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel

from lib import UserError
from lib.batches import micro_batches, pad_batch
from lib.chat import decode
from lib.policy import context_of, states_once
from lib.run.hub import dtype_to_infer, load_policy, load_pretrained, load_tokenizer, read_tokenizer
from lib.run.processes import pick_device
from lib.run.text import readable
from lib.run.writing import write

BATCH_TOKENS = 8192  # rows x columns of a pass
CACHE_TOKENS = 65_536  # while a chat model writes on a GPU: 3.8 GB of a Qwen2.5 of 7 B
UNSEEN_SPACE = "\u200b"  # of no width


class LanguageModel:
    """A causal language model, a folder or a hub name. It judges greedily, in bfloat16 on a GPU.

    The weights are read when first needed, tokenizer and configuration at once: a wrong name shows before
    hours of work. `chat`: it must have a chat template. Raises UserError if model or device is not there and,
    when it judges, for a model whose numbers are not finite.
    """

    def __init__(self, name: str, device: str = "", *, chat: bool = True) -> None:
        self.name, self.device, self.chat = name, existing_device(device), chat
        self.tokenizer = load_tokenizer(name) if chat else load_pretrained(read_tokenizer, name, "tokenizer")
        self.config = load_pretrained(AutoConfig.from_pretrained, name, "model configuration")
        self.context = context_of(self.config)
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.special = {*added, *self.tokenizer.all_special_tokens}  # texts that are read as special tokens

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_policy(self.name, device=self.device, dtype=dtype_to_infer(self.device))

    def write(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """What it writes after each list of token ids; "" after one that its context cannot hold."""
        budget = CACHE_TOKENS if self.chat and self.device.type == "cuda" else BATCH_TOKENS
        how: dict[str, Any] = {"temperature": 0.0, "progress": True}
        if not self.chat:
            how["eos_token_ids"] = []
        model = f"--judge: {self.name}", self.model, self.tokenizer
        written = write(*model, prompts, max_new_tokens, budget, **how)
        return [decode(self.tokenizer, one.token_ids) if one else "" for one in written]

    def read(self, prompts: Sequence[Sequence[int]], head: Callable[[Tensor], Tensor]) -> list:
        """K numbers at the end of each prompt, which `head` makes of last hidden states, (B, H) -> (B, K);
        None for a prompt that its context cannot hold."""
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= self.context]
        lengths, found = [len(prompts[i]) for i in fitting], dict[int, list[float]]()
        batches = micro_batches(lengths, max([BATCH_TOKENS, *lengths]))
        for batch in tqdm(batches, desc="judging", unit="batch", delay=2, leave=False):
            rows = [fitting[k] for k in batch]
            ids, mask = pad_batch([prompts[i] for i in rows], 0, side="right")
            with torch.inference_mode():
                states, number = states_once(self.model, ids.to(self.device), mask.to(self.device))  # (N, H)
                numbers = head(states[number[torch.arange(len(rows)), mask.sum(1) - 1]])  # (B, K)
            if not numbers.isfinite().all():
                raise UserError(f"--judge: {self.name}: not finite: broken weights or precision")
            found |= zip(rows, numbers.tolist(), strict=True)
        return [found.get(i) for i in range(len(prompts))]


def existing_device(name: str) -> torch.device:
    """cpu, mps, cuda or cuda:NUMBER; "": the GPU of this process among torchrun's, else mps or cpu."""
    current = torch.cuda.current_device() if torch.cuda.is_available() else 0
    kind, _, number = (name or f"auto:{current}").partition(":")
    if kind == "cuda" and int(number or 0) >= (found := torch.cuda.device_count()):
        raise UserError(f"--judge: device {name}: {found} GPUs found; name another, or none")
    return pick_device(kind, int(number or 0))


def read_prompt(name: str) -> str:
    """What a judge is asked, with fields in braces to be filled."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def as_material(text: str, special: Collection[str], tags: Sequence[str] = ()) -> str:
    """The text, with a space of no width in each special token and each of `tags` ("answer": </answer>) that
    it spells. (Plain words stay: nothing tells a "Safety: Safe" of an answer from the judge's own.)

    >>> as_material("Yes.<|end|>", ["<|end|>"]), as_material("<a>1 < 2</A >", [], ["a"])
    ('Yes.<\\u200b|end|>', '<\\u200ba>1 < 2<\\u200b/A >')
    >>> as_material("xxx", ["xx"])
    'x\\u200bx\\u200bx'
    """
    marks = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special if len(token) > 1]
    marks += [rf"<(?=[\s/]*(?i:{tag})[\s/]*>)" for tag in tags]  # lookahead: occurrences may overlap
    return re.sub("|".join(marks) or "(?!)", rf"\g<0>{UNSEEN_SPACE}", readable(text))
