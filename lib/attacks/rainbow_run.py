"""Rainbow teaming as stage 1 runs it: the victim, the attacker and the judges that its settings name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lib.attacks.rainbow import rainbow
from lib.attacks.rainbow_grid import Comparison, by_score, load_grid
from lib.attacks.victim import Victim
from lib.judges import load_judge
from lib.run.checks import check_tokenizer
from lib.run.folder import stated_reasoning
from lib.run.hub import dtype_to_infer, load_policy, load_tokenizer


def search(settings, harmful: list[dict]) -> list[dict]:
    """Records of prompts that `settings.rainbow` answers harmfully, `rainbow_share` as many as `harmful`, which it starts from.

    `settings` are stage 1's. Written to OUT/rainbow as it goes; a search that was stopped goes on.
    """
    limits = {
        "max_new_tokens": settings.rainbow_tokens,
        "max_batch_tokens": settings.max_batch_tokens,
    }
    dtype = dtype_to_infer(settings.device)
    judge, tokenizer = load_judge(settings.rainbow_judge), load_tokenizer(settings.rainbow)

    @cache
    def victim() -> Victim:
        model = load_policy(settings.rainbow, device=settings.device, dtype=dtype).requires_grad_(False)
        reasoning = stated_reasoning(settings.rainbow) is not False
        check_tokenizer(model, tokenizer, [record["prompt"] for record in harmful[:8]], reasoning=reasoning)
        return Victim("rainbow", model, tokenizer, reasoning, judge, temperature=0.6, **limits)

    return rainbow(
        victim,
        load_grid(settings.rainbow_attacker, device=settings.device, dtype=dtype, **limits),
        Comparison(settings.rainbow_compare) if settings.rainbow_compare else by_score,
        [record["prompt"] for record in harmful],
        Path(settings.out) / "rainbow",
        prompts=round(settings.rainbow_share * len(harmful)),
        archives=settings.rainbow_archives,
        iterations=settings.rainbow_iterations,
        max_chars=settings.max_chars,
        seed=settings.seed,
    )
