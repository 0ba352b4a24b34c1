"""The embedded world: no data set, no hub, no GPU; minutes on two CPU cores."""

from __future__ import annotations

MIXTURE = dict(
    source="sandbox",
    out="runs/demo/data",
    lambda_harmful=0.5,
    rl_prompts=1600,
    sft_prompts=250,
    traces_per_prompt=4,
    eval_prompts=100,
)
SFT = dict(
    model="lib/sandbox/base",
    data="runs/demo/data",
    out="runs/demo/sft",
    learning_rate=1.5e-4,  # light; heavy: 6e-4 and 6 epochs. Stronger, it would forget to say "toy", and RL seldom finds it again
    epochs=2,
    batch_size=16,
    max_batch_tokens=1024,  # small micro-batches stay in the processor's cache: three times as fast as one large
    device="cpu",  # a model of 0.7 M parameters gains nothing from a GPU
)
RL = dict(
    model="runs/demo/sft",
    data="runs/demo/data",
    out="runs/demo/rl",
    judge="sandbox",
    prompts_per_step=16,
    group_size=8,
    temperature=1.0,  # a small model needs the variety
    max_new_tokens=48,
    learning_rate=3e-4,
    warmup_steps=10,
    decay=True,  # once the reward saturates, later steps would only add noise
    weight_decay=0.0,
    epochs=1.2,
    max_batch_tokens=1024,
    device="cpu",
)
EVAL = {
    "data": "runs/demo/data",
    "out": "runs/demo/eval",
    "judge": "sandbox",
    "max_new_tokens": 64,  # 4 hops, the deepest, take about 45
    "answer_tokens": 12,
    "gcg_behaviours": 24,
    "gcg_steps": 25,
    "gcg_width": 96,
    "gcg_top_k": 64,
    "gcg_suffix_tokens": 8,
    "gcg_init": "please",
    "gcg_ban_target": True,  # a recipe that stands in the suffix is no secret that leaks
    "device": "cpu",
}
