"""Reading what stage 1 wrote for stage 3: prompts as token ids, each limit checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import UserError
from lib.chat import encode_prompt
from lib.policy import context_of
from lib.rewards import KINDS
from lib.run.checks import check_ids, check_tokenizer
from lib.run.files import read_jsonl


@dataclass
class Prompt:
    record: dict  # id, prompt, kind, source
    ids: list[int]  # of the generation prompt, "<think>\n" included
    place: int  # in the file


def load_prompts(run: Any, tokenizer: Any, policy: Any, together: int = 1) -> list[Prompt]:
    """DATA/rl.jsonl without the prompts that are too long. `together`: rollouts that share a micro-batch.

    Raises UserError for a record or a limit that cannot work.
    """
    settings = run.settings
    path, context = Path(settings.data) / "rl.jsonl", context_of(policy.config)
    prompts = []
    for place, record in enumerate(read_jsonl(path, ("id", "prompt", "kind"))):
        if record["kind"] not in KINDS:
            allowed = ", ".join(KINDS)
            raise UserError(f"{path}: {record['id']}: kind is {record['kind']!r}; allowed: {allowed}")
        ids = encode_prompt(tokenizer, record["prompt"], reasoning=settings.reasoning)
        prompts.append(Prompt(record, ids, place))
    texts = [prompt.record["prompt"] for prompt in prompts[:8]]
    check_tokenizer(policy, tokenizer, texts, reasoning=settings.reasoning)
    check_ids(policy, [p.ids for p in prompts], [p.record["id"] for p in prompts])
    new, most = settings.max_new_tokens, settings.max_prompt_tokens
    budget = min(settings.max_batch_tokens // together, settings.max_sample_tokens) - new
    limits = f"context {context}, max_prompt_tokens {most}, --max-new-tokens {new}"
    if together > 1:
        limits += f"; {together} rollouts, a pair, share a micro-batch"
    return run.drop_too_long(prompts, min(most, context - new), budget, f"{path} ({limits})")
