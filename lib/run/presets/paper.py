"""The paper's settings. Traces, judges and files that no hub has are given as flags; see README."""

from __future__ import annotations

MIXTURE = dict(
    source="files",
    out="runs/paper/data",
    lambda_harmful=0.5,  # of 0.1, 0.3, 0.5, 0.7, 0.9
    rl_prompts=2000,
    ambiguous_share=0.5,  # UltraFeedback : OR-Bench = 1 : 1
    sft_prompts=1000,
    traces_per_prompt=4,
    max_chars=1000,
    eval_prompts=500,
    files=[
        "harmful=wildjailbreak:400+800",  # 400 for SFT, 800 others for RL
        "harmful=aegis:300+400",
        "harmful=safeedit:300+0",
        "harmful=rainbow@runs/paper/search/rainbow/prompts.jsonl:800",  # not for pi_SFT itself
        "harmless=ultrafeedback:2000",
        "ambiguous=or-bench:2000",
    ],
    eval_files=["harmful=harmbench", "ambiguous=xstest", "harmless=wildchat"],
    rainbow_share=0.8,  # with --rainbow: of the 1000 harmful ones at lambda 0.5, 800, as `files` takes
    rainbow_attacker="huihui-ai/Qwen2.5-7B-Instruct-abliterated",
    rainbow_judge="qwen3guard+grm-8b",
    rainbow_tokens=4096,
    max_batch_tokens=65536,
)
SFT = dict(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    data="runs/paper/data",
    out="runs/paper/sft",
    learning_rate=3e-5,
    epochs=3,
    batch_size=16,
    dtype="bfloat16",
    gradient_checkpointing=True,
)
RL = dict(
    model="runs/paper/sft",
    data="runs/paper/data",
    out="runs/paper/rl",
    judge="qwen3guard+grm-8b",  # open stand-in for the moderation API; the authors' reward model
    prompts_per_step=32,
    group_size=8,
    temperature=0.6,
    max_prompt_tokens=512,
    max_new_tokens=4096,
    max_sample_tokens=262144,  # of Qwen2.5-1.5B in bfloat16: 7.5 GB of cache
    learning_rate=1e-6,
    epochs=3.0,
    kl_coef=1e-3,
    kl_estimator="k3",
    entropy_coef=1e-3,  # not in the paper's text: verl's default when the authors' script ran
    normalisation="token",
    dtype="bfloat16",
    gradient_checkpointing=True,
)
RPO = dict(prompts_per_step=4, learning_rate=3e-4)  # 4 pairs a prompt: 16 an update
EVAL = {
    "data": "runs/paper/data",
    "out": "runs/paper/eval",
    "judge": "harmbench+grm-8b",  # the paper's classifier of 13 B parameters; task scores as in training
    "temperature": 0.6,
    "max_new_tokens": 4096,
    "answer_tokens": 1024,
    "max_batch_tokens": 131072,
    "attacks": ["gcg", "autodan", "pair", "pap"],
    "behaviours": 300,  # the paper's 400 without the 100 of copyright, which no classifier judges
    "budgets": ["0.1", "0.2", "0.5"],
    "attacker": "huihui-ai/Qwen2.5-7B-Instruct-abliterated",
    "gcg_steps": 500,
    "gcg_width": 512,
    "gcg_top_k": 256,
    "gcg_suffix_tokens": 20,
    "gcg_init": "!",
    "universal_behaviours": 25,
    "techniques": 40,
    "streams": 20,
    "depth": 3,
    "population": 256,
    "generations": 100,
    "dtype": "bfloat16",
}
