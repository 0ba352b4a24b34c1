"""One consumer GPU of 24 GB, nothing gated, no key: open judges, open data, completions of up to 1024 tokens.

HarmBench and XSTest come as files from GitHub (see docs/real-models.md): on the hub they are gated.
"""

RUNS = "runs/open"
BASE = "Qwen/Qwen2.5-0.5B-Instruct"
JUDGE = "qwen3guard+skywork"  # 0.6 B each: they stay beside the policy
FILES = "runs/open/files"

MIXTURE = dict(
    source="files",
    files=["harmful=aegis:1000", "harmless=ultrafeedback:2000", "ambiguous=or-bench:2000"],
    trace_files=["star1"],
    sft_prompts=900,
    eval_files=[
        f"harmful=harmbench@{FILES}/harmbench_behaviors_text_all.csv",  # its targets beside it
        f"ambiguous=xstest@{FILES}/xstest_prompts.csv",
    ],
)
SFT = dict(
    model=BASE,
    dtype="bfloat16",
    max_batch_tokens=4096,  # without recomputation: half a megabyte of activations a token
)
RL = dict(
    judge=JUDGE,
    prompts_per_step=16,
    max_new_tokens=1024,
    max_batch_tokens=4096,
    max_sample_tokens=196608,  # 16 x 8 completions at their full length: 2.4 GB of cache
    dtype="bfloat16",
)
RPO = dict(prompts_per_step=4)  # 16 pairs an update
EVAL = {
    "models": [f"base={BASE}", "sft=runs/open/sft", "tars=runs/open/rl"],
    "no_reasoning": ["base"],
    "judge": JUDGE,
    "max_new_tokens": 1024,
    "answer_tokens": 512,
    "max_batch_tokens": 65536,
    "limit": 200,
    "behaviours": 50,
    "mutation": 0.2,  # AutoDAN's 0.01 is for 256 prompts; of 24, it would hardly ever rewrite one
    "gcg_steps": 100,
    "gcg_width": 256,
    "gcg_top_k": 256,
    "gcg_suffix_tokens": 20,
    "gcg_init": "!",
    "dtype": "bfloat16",
}
