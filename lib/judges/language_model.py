"""What judges that are language models share: open a model once, fill its template, read what it writes or how likely
each of its labels is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib import UserError
from lib.batches import pad_batch
from lib.chat import decode, encode_prompt, eos_token_ids
from lib.policy import context_of, head_logits, hidden_states
from lib.run.hub import dtype_to_infer, load_policy, load_pretrained, load_tokenizer, read_tokenizer
from lib.run.plan import kv_cache_bytes, shape_of_model
from lib.run.processes import pick_device
from lib.sampler import sample

BATCH_TOKENS = 8192  # rows x columns of a pass; on a CUDA GPU, of one that reads
CACHE_BYTES = (
    6.7e9  # there, of one that writes: 8 thousand tokens of a Llama of 13 B, 110 thousand of a Qwen2.5 of 7 B
)
UNSEEN_SPACE = "\u200b"  # of no width
RUBRIC_TAGS = ("request", "answer")
LABEL_MASS = 0.5  # the least that all labels together must weigh for a verdict


class LanguageModel:
    """A causal language model, a folder or a hub name, that answers greedily or weighs its labels.

    Tokenizer and configuration are read at once, so that a wrong name shows before hours of work; the weights when first
    needed. They stay in memory: on `device`, "cuda:1" say, or (none named) on the GPU of this process, in bfloat16; on a
    CPU in float32. `chat`: it must have a chat template. Raises UserError if it or the device is not there; no code of the
    model's own is run.
    """

    def __init__(self, name: str, *, chat: bool, device: str = "") -> None:
        self.name = name
        self.device = existing_device(device) if device else None
        self.tokenizer = open_tokenizer(name, chat=chat)
        self.config = load_pretrained(AutoConfig.from_pretrained, name, "model configuration")
        self.context = context_of(self.config)

    @cached_property
    def model(self) -> PreTrainedModel:
        device = self.device or pick_device("auto")
        if device.type == "cuda" and not self.device:
            device = torch.device(
                "cuda", torch.cuda.current_device()
            )  # that of this process among torchrun's
        return self.load(device, dtype_to_infer(device))

    @property
    def cache_tokens(self) -> int:
        if self.model.device.type != "cuda":
            return BATCH_TOKENS
        return int(CACHE_BYTES / kv_cache_bytes(shape_of_model(self.model), 1, "bfloat16"))

    @cached_property
    def special(self) -> list[str]:
        return special_tokens(self.tokenizer)

    def load(self, device: torch.device, dtype: str) -> PreTrainedModel:
        return load_policy(self.name, device=device, dtype=dtype)

    def clip(self, text: str, tokens: int) -> str:
        """The text of its first `tokens` tokens, counted with those that the tokenizer puts before every text."""
        return decode(
            self.tokenizer, self.tokenizer(encodable(text), max_length=tokens, truncation=True)["input_ids"]
        )

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
                max_batch_tokens=max(self.cache_tokens, longest),
                progress=True,
            )
        except (ValueError, FloatingPointError) as error:
            raise UserError(f"--judge: {self.name}: {error}") from error
        for i, completion in zip(fitting, completions, strict=True):
            texts[i] = decode(self.tokenizer, completion.token_ids)
        return texts

    def label_probabilities(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
    ) -> list[list[float] | None]:
        """P(label | prompt) of each label after each prompt, all of its tokens; None after a prompt too long for the context.

        Labels are token ids, none the beginning of another. One pass reads a prompt followed by all but the last token of
        a label, and so weighs every label that begins in the same way: labels of one token each need one pass in all.
        For models whose logits are the head's output as it is (Llama, Qwen). UserError for numbers that are not finite.
        """
        stems = sorted({tuple(label[:-1]) for label in labels})
        stems = [
            stem for stem in stems if not any(other != stem and other[: len(stem)] == stem for other in stems)
        ]
        longest = max(map(len, labels))
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + longest <= self.context]
        rows = [(i, stem) for i in fitting for stem in stems]
        logprob: dict[
            tuple, float
        ] = {}  # (prompt, first tokens of a label) -> log p(the last of them | what is before)
        for batch, hidden in self.hidden_states([[*prompts[i], *stem] for i, stem in rows]):
            for (i, stem), states in zip((rows[row] for row in batch), hidden, strict=True):
                first = len(prompts[i]) - 1  # this position predicts a label's first token
                logprobs = self.head(states[first : first + len(stem) + 1]).log_softmax(
                    -1
                )  # (len(stem) + 1, vocab)
                for label in labels:
                    for k in range(min(len(stem) + 1, len(label))):
                        if tuple(label[:k]) == stem[:k]:
                            logprob[i, tuple(label[: k + 1])] = logprobs[k, label[k]].item()
        if not all(map(math.isfinite, logprob.values())):
            raise UserError(f"--judge: {self.name}: its logits are not finite: broken weights or precision")
        result: list[list[float] | None] = [None] * len(prompts)
        for i in fitting:
            parts = ([logprob[i, tuple(label[: k + 1])] for k in range(len(label))] for label in labels)
            result[i] = [math.exp(sum(part)) for part in parts]
        return result

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """The last hidden states of all sequences, batch by batch, longest first: their indices (B), the states (B, T, H).

        Padding is on the right, where no real token sees it (attention is causal).
        """
        waiting = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        with tqdm(total=len(waiting), desc="judging", unit="answer", delay=2, leave=False) as bar:
            while waiting:
                rows = max(1, BATCH_TOKENS // len(sequences[waiting[0]]))
                batch, waiting = waiting[:rows], waiting[rows:]
                ids, mask = pad_batch([sequences[i] for i in batch], 0, side="right")
                with torch.inference_mode():
                    yield (
                        batch,
                        hidden_states(self.model, ids.to(self.model.device), mask.to(self.model.device)),
                    )
                bar.update(len(batch))

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) -> logits (..., vocab) fp32."""
        with torch.inference_mode():
            return head_logits(self.model, hidden)


def expected_value(probabilities: Sequence[float] | None, values: Sequence[float]) -> float | None:
    """The mean of `values`, one for each label, under the labels' probabilities; None if these sum to less than LABEL_MASS.

    >>> expected_value([0.6, 0.2, 0.0], [0.0, 1.0, 0.5])
    0.25
    >>> expected_value([0.1, 0.2, 0.0], [0.0, 1.0, 0.5]) is None  # the model had something else to say
    True
    """
    if probabilities is None or not sum(probabilities) >= LABEL_MASS:
        return None
    return sum(p * value for p, value in zip(probabilities, values, strict=True)) / sum(probabilities)


def existing_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--judge: device {name}: {torch.cuda.device_count()} GPUs found; name another, or none"
        )
    return pick_device(device.type, device.index or 0)


def open_tokenizer(name: str, *, chat: bool) -> PreTrainedTokenizerBase:
    """A classifier's tokenizer may lack a chat template, which lib.chat insists on. Cuts text at its end."""
    tokenizer = load_tokenizer(name) if chat else load_pretrained(read_tokenizer, name, "tokenizer")
    tokenizer.truncation_side = "right"
    return tokenizer


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text; none, for a classifier without a chat template or eos."""
    if tokenizer.chat_template:
        return eos_token_ids(model, tokenizer)
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every text that is read as a special token, the longest first."""
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted({*named, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token))


def as_material(text: str, special: Sequence[str], tags: Sequence[str] = ()) -> str:
    """The text with nothing in it that ends its place in a judge's prompt: a space of no width breaks each special token
    that it spells, and each of `tags` ("answer": </answer>, <ANSWER>). All else stays, and nested spellings find no way round.

    >>> as_material("Yes.<|end|>", ["<|end|>"]), as_material("<a>1 < 2</A >", [], ["a"])
    ('Yes.<\\u200b|end|>', '<\\u200ba>1 < 2<\\u200b/A >')
    """
    text = encodable(text)
    for token in special:
        while (
            len(token) > 1 and UNSEEN_SPACE not in token and token in text
        ):  # again: its occurrences may overlap
            text = text.replace(token, token[0] + UNSEEN_SPACE + token[1:])
    return re.sub(rf"(?i)<(?=[\s/]*(?:{'|'.join(tags)})[\s/]*>)", f"<{UNSEEN_SPACE}", text) if tags else text


def grade(
    judge: LanguageModel, rubric: str, prompts: Sequence[str], answers: Sequence[str], max_new_tokens: int
) -> list[str | None]:
    """What the chat model writes when asked by `rubric`, a text with {prompt} and {answer} between tags, RUBRIC_TAGS."""
    read = []
    for pair in zip(prompts, answers, strict=True):
        prompt, answer = (as_material(text, judge.special, RUBRIC_TAGS) for text in pair)
        read.append(
            encode_prompt(judge.tokenizer, rubric.format(prompt=prompt, answer=answer), reasoning=False)
        )
    return judge.write(read, max_new_tokens)


def encodable(text: str) -> str:
    """Lone surrogates, which no tokenizer takes, become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
