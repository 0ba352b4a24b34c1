"""Talk to a model in the terminal: a run of stage 2 or 3, or any chat model by folder or hub name.

    python -m lib.chat runs/demo/rl                          # /reset, /quit or Ctrl-D; Ctrl-C stops an answer
    python -m lib.chat runs/demo/rl how do i make a cake ?   # one answer
    echo "how do i make a cake ?" | python -m lib.chat runs/demo/rl

The reasoning is dim on a terminal (not if NO_COLOR is set), and stands between its markers everywhere. Later turns
show the model the earlier answers, not the earlier reasoning.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib import UserError
from lib.chat import THINK_OPEN, decode, encode_chat, eos_token_ids, parse_completion, parse_direct
from lib.policy import context_of
from lib.run.command import Flags, number
from lib.run.folder import stated_reasoning
from lib.run.hub import load_policy, load_tokenizer
from lib.run.settings import LAST_SEED
from lib.run.text import UNSEEN
from lib.tools.stream import Part, parts, stream, texts

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Chat:
    """A loaded model, and what was said to it and by it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reasoning: bool
    temperature: float
    max_new_tokens: int
    seed: int
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: int = 0  # asked, forgotten ones too: each has random numbers of its own
    note: str = ""  # what is to be said about the last answer

    def ask(self, text: str) -> Iterator[Part]:
        """The answer as it is written. However it ends, what was answered is remembered; without an answer, nothing is."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        prompt = encode_chat(self.tokenizer, [*system, *self.messages, question], reasoning=self.reasoning)
        context = context_of(self.model.config)
        limit, eos = (
            min(self.max_new_tokens, context - len(prompt)),
            eos_token_ids(self.model, self.tokenizer),
        )
        if limit < 1:
            raise UserError(
                f"{len(prompt)} tokens were said, and the model's context holds {context}: /reset, or say less"
            )
        own = {"temperature": self.temperature, "seed": (self.seed * 2**20 + self.turns) % 2**63}
        self.turns, self.note, written = self.turns + 1, "", []

        def tokens() -> Iterator[int]:
            for token in stream(self.model, prompt, max_new_tokens=limit, eos_token_ids=eos, **own):  # type: ignore[arg-type]
                written.append(token)
                yield token

        try:
            yield from parts(texts(self.tokenizer, tokens()), reasoning=self.reasoning)
            if written[-1] not in eos:
                reason = "--max-new-tokens" if limit == self.max_new_tokens else "the context is full"
                self.note = f"cut after {limit} tokens: {reason}"
        finally:
            said, ended = decode(self.tokenizer, written), bool(written) and written[-1] in eos
            answer = (parse_completion if self.reasoning else parse_direct)(said).answer
            if answer and (
                ended or not self.reasoning or "</think>" in said
            ):  # else it is unfinished reasoning
                self.messages += [question, {"role": "assistant", "content": answer}]

    def unknown_words(self, text: str) -> list[str]:
        """Words that the tokenizer turns into its unknown token, as a word-level one (the sandbox's) does."""
        unknown = self.tokenizer.unk_token_id
        ids = {
            word: self.tokenizer.encode(word, add_special_tokens=False)
            for word in dict.fromkeys(text.split())
        }
        return [word for word, found in ids.items() if unknown is not None and unknown in found]


def reply(chat: Chat, text: str, out: TextIO) -> None:
    """Ask, and write the answer to `out` as it comes. Warnings go to stderr."""
    text = text.encode("utf-8", "replace").decode()  # a terminal can send half a character
    if words := chat.unknown_words(text):
        print(f"the model does not know: {' '.join(words)}", file=sys.stderr)
    colour = out.isatty() and not os.environ.get("NO_COLOR")
    with contextlib.closing(chat.ask(text)) as answer:  # type: ignore[type-var]
        try:
            for thought, piece in answer:
                piece = UNSEEN.sub(
                    "", piece
                )  # what a model writes must not steer the terminal, nor reorder its text
                out.write(f"{DIM}{piece}{PLAIN}" if thought and colour else piece)
                out.flush()
        finally:
            out.write("\n")
    if chat.note:
        print(f"[{chat.note}]", file=sys.stderr)


def converse(chat: Chat) -> None:
    """Questions from the terminal until /quit, Ctrl-D, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() arrow keys and a history)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # each Ctrl-C counts here, not only the first
    print("/reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            print("error: that was not UTF-8", file=sys.stderr)
            continue
        if text == "/quit":
            return
        if text == "/reset":
            chat.messages.clear()
        elif re.fullmatch(r"/\w+", text):
            print(f"{text}: no such command; allowed /reset, /quit", file=sys.stderr)
        elif text:
            try:
                reply(chat, text, sys.stdout)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print("[stopped]", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    flags = Flags("lib.chat", __doc__)
    flags.add_argument("run", help="a run of stage 2 or 3, or any chat model: a folder or a hub name")
    flags.add_argument("prompt", nargs="*", help="ask this alone; none, and no terminal: what stdin says")
    flags.add_argument("--system", default="", help="system prompt (default: what the chat template has)")
    flags.add_argument(
        "--temperature", type=number(float, 0, 10), default=0.6, help="0: greedy (default: 0.6, as evaluated)"
    )
    flags.add_argument(
        "--max-new-tokens", type=number(int, 1), default=2048, help="tokens of an answer (default: 2048)"
    )
    boolean = argparse.BooleanOptionalAction
    flags.add_argument(
        "--reasoning", action=boolean, help="open its turn with <think> (default: what the run says)"
    )
    flags.add_argument("--seed", type=number(int, 0, LAST_SEED), default=0, help="of sampling (default: 0)")
    flags.add_device("auto")
    given = flags.parse_intermixed_args(argv)
    prompt = " ".join(given.prompt).strip()
    alone = bool(prompt) or not sys.stdin.isatty()
    try:
        prompt = prompt or (sys.stdin.read().strip() if alone else "")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 ({error.reason} at byte {error.start})") from None
    if alone and not prompt:
        raise UserError("no prompt: give one behind the run, or on stdin")
    tokenizer = load_tokenizer(given.run)
    model = load_policy(given.run, device=given.device, dtype=given.dtype)
    reasoning = thinks_first(given.run, tokenizer) if given.reasoning is None else given.reasoning
    chat = Chat(
        model, tokenizer, reasoning, given.temperature, given.max_new_tokens, given.seed, given.system
    )
    if not alone:
        return converse(chat)
    try:
        reply(chat, prompt, sys.stdout)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def thinks_first(run: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model thinks first: as its settings.json says; without one, if its chat template opens <think>."""
    stated = stated_reasoning(run)
    try:
        opening = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{run}: its chat template fails: {' '.join(str(error).split())}") from error
    return str(opening).endswith(THINK_OPEN) if stated is None else stated
