"""One search by nanogcg, in an environment of its own (README.md). A job as JSON on stdin, the result as JSON on stdout.

Three things are mended, that would make nanogcg attack another model or another prompt than ours:

- A folder that transformers 5 wrote states RoPE's base, and its chat template, where transformers 4.47 does not look.
- nanogcg removes the text of the BOS token *everywhere* in the chat. SmolLM2's BOS is "<|im_start|>", which opens
  each turn: so the tokenizer forgets it, after nanogcg has banned it from the suffix.
- Its `seed` also turns on deterministic algorithms, which cost time: so the seed is set here.

`gcg.py` checks that both have the same loss to begin with.
"""

import json
import logging
import sys
import time
from itertools import accumulate
from pathlib import Path

import torch
from nanogcg import GCGConfig
from nanogcg.gcg import GCG
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed


class Recorded(GCG):
    """Keeps the loss of the initial suffix, which nanogcg does not report."""

    def init_buffer(self):
        buffer = super().init_buffer()
        self.first_loss = buffer.get_lowest_loss().item()
        return buffer


def load_model(folder: Path):
    config = AutoConfig.from_pretrained(folder)
    if rope := getattr(config, "rope_parameters", None):
        config.rope_theta = rope["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, torch_dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {key: settings[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **tokens
    )
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    return tokenizer


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model, tokenizer = load_model(Path(job["model"])), load_tokenizer(Path(job["model"]))
    config = GCGConfig(
        num_steps=job["steps"],
        optim_str_init=job["init"],
        search_width=job["width"],
        topk=job["top_k"],
        n_replace=1,
    )
    logging.getLogger("nanogcg").setLevel("ERROR")
    search = Recorded(model, tokenizer, config)
    tokenizer.bos_token = None
    with torch.no_grad():
        model(torch.arange(100)[None])  # the first pass of a process is slower
    set_seed(job["seed"])
    wall, cpu = time.perf_counter(), time.process_time()
    result = search.run(job["prompt"], job["target"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    curve = list(accumulate([search.first_loss, *result.losses], min))
    print(json.dumps({"curve": curve, "suffix": result.best_string, "seconds": wall, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main()
