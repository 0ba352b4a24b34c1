"""Talk to a model: a run of stage 2 or 3, or any chat model, a folder or a name on the hub.

python -m lib.tools.chat runs/demo/rl                          # a conversation; Ctrl-D ends it
python -m lib.tools.chat runs/demo/rl how do i make a cake ?   # one answer
"""

import sys
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, TextStreamer

from lib import UserError
from lib.chat import THINK_OPEN, decode, encode_chat, eos_token_ids, parse_completion, parse_direct
from lib.policy import context_of
from lib.run.command import Flags, number, run_main
from lib.run.folder import read_settings
from lib.run.hub import load_policy, load_tokenizer
from lib.run.text import UNSEEN


def reply(model, tokenizer, messages: list[dict], reasoning: bool, max_new_tokens: int) -> str:
    """Print the answer as it is written. Returns what later turns are shown of it: no reasoning."""
    ids = torch.tensor([encode_chat(tokenizer, messages, reasoning=reasoning)], device=model.device)
    if (limit := min(max_new_tokens, context_of(model.config) - ids.shape[1])) < 1:
        raise UserError(f"{ids.shape[1]} tokens were said, more than the model's context: begin anew")
    # What a model writes must not steer the terminal, nor reorder its text.
    screen = SimpleNamespace(decode=lambda part: UNSEEN.sub("", decode(tokenizer, part)))
    streamer, seen = TextStreamer(screen, skip_prompt=True), torch.ones_like(ids)  # type: ignore[arg-type]
    print(THINK_OPEN if reasoning else "", end="")
    written = model.generate(ids, attention_mask=seen, max_new_tokens=limit, streamer=streamer)
    text = decode(tokenizer, written[0, ids.shape[1] :].tolist())
    return (parse_completion if reasoning else parse_direct)(text).answer


def main(argv: list[str] | None = None) -> None:
    flags = Flags("lib.tools.chat", __doc__)
    flags.add_argument("run", help="a folder or a hub name")
    flags.add_argument("prompt", nargs="*", help="ask this alone (default: a conversation)")
    flags.add_argument("--reasoning", action="store_true", help="open <think>, as a run of ours does unasked")
    flags.add_argument("--temperature", type=number(float, 0, 10), default=0.6, help="0: greedy (0.6)")
    flags.add_argument("--max-new-tokens", type=number(int, 1), default=2048, help="of an answer (2048)")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flags.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="auto", help="of weights")
    given = flags.parse_intermixed_args(argv)
    reasoning, heat = given.reasoning or read_settings(given.run).get("reasoning") is True, given.temperature
    tokenizer = load_tokenizer(given.run)
    model = load_policy(given.run, device=given.device, dtype=given.dtype)
    sampling = {"do_sample": True, "temperature": heat or 1.0, "top_k": 0 if heat else 1}
    ends = {"eos_token_id": eos_token_ids(model, tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**sampling, **ends)  # not as the base's authors advise
    messages: list[dict] = []
    for text in [" ".join(given.prompt)] if given.prompt else map(str.strip, sys.stdin):
        messages.append({"role": "user", "content": text})
        answer = reply(model, tokenizer, messages, reasoning, given.max_new_tokens)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    run_main(main)
