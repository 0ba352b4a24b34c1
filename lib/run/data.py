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


def load_prompts(run: Any, tokenizer: Any, policy: Any) -> list[Prompt]:
    """DATA/rl.jsonl without the prompts that are too long. UserError for a record that cannot be used."""
    settings, prompts = run.settings, []
    path = Path(settings.data) / "rl.jsonl"
    for place, record in enumerate(read_jsonl(path, ("id", "prompt", "kind"))):
        if record["kind"] not in KINDS:
            allowed = ", ".join(KINDS)
            raise UserError(f"{path}: {record['id']}: kind is {record['kind']!r}; allowed: {allowed}")
        ids = encode_prompt(tokenizer, record["prompt"], reasoning=settings.reasoning)
        prompts.append(Prompt(record, ids, place))
    texts = [prompt.record["prompt"] for prompt in prompts[:8]]
    check_tokenizer(policy, tokenizer, texts, reasoning=settings.reasoning)
    check_ids(policy, [p.ids for p in prompts], [p.record["id"] for p in prompts])
    context, new, most = context_of(policy.config), settings.max_new_tokens, settings.max_prompt_tokens
    limits = f"context {context}, max_prompt_tokens {most}, --max-new-tokens {new}"
    return run.drop_too_long(prompts, min(most, context - new), f"{path} ({limits})")
