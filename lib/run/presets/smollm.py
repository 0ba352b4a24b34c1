"""A real 135 M chat model and real prompts, in two hours on two CPU cores: does RL find the distinction?

Needs the files named below (public: GitHub danielkty/tars and paul-rottger/exaggerated-safety, HarmBench),
and `--models` for stage 4. For a model in a folder give `--trace-model` to stage 1, `--model` to stage 2.
"""

RUNS = "runs/smollm"
FILES = "runs/smollm/files"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

MIXTURE = dict(
    source="files",
    files=[f"tars@{FILES}/train_lambda_0.5.parquet"],
    eval_files=[
        f"harmbench@{FILES}/harmbench_behaviors_text_val.csv",  # its targets beside it
        f"tars@{FILES}/test.parquet",  # StrongREJECT's small set; without targets
        f"ambiguous=xstest@{FILES}/xstest_v2_completions_gpt4.csv",
    ],
    ambiguous_share=0.0,
    rl_prompts=240,
    sft_prompts=48,
    traces_per_prompt=2,
    max_chars=150,  # short prompts: on a CPU a step's time goes into reading them
    eval_prompts=250,
    trace_model=MODEL,
    trace_max_new_tokens=56,
)
SFT = dict(
    model=MODEL,
    learning_rate=1e-4,  # the paper's 3e-5 is for 3600 traces: 66 updates would not teach the format
    batch_size=4,
    patience=3,
    max_batch_tokens=1024,
    held_out_share=0.1,
)
RL = dict(
    judge="standin",
    prompts_per_step=6,
    group_size=6,
    temperature=1.0,
    max_new_tokens=64,
    learning_rate=3e-5,  # the paper's 1e-6 has hundreds of steps to add up in; here there are 120
    kl_coef=0.02,
    epochs=3.0,
    max_batch_tokens=1024,
    save_every=2,
    rollouts_every=1,
)
EVAL = {
    "judge": "standin",
    "max_new_tokens": 112,
    "answer_tokens": 64,
    "limit": 8,  # 0: all, see docs/real-models.md
    "behaviours": 1,
    "attacker": MODEL,
    "attacker_tokens": 48,
    "mutation": 0.2,  # AutoDAN's 0.01 is for 256 prompts; of 24, it would hardly ever rewrite one
    "gcg_steps": 10,
    "gcg_width": 32,
    "gcg_top_k": 256,
    "gcg_suffix_tokens": 20,
    "gcg_init": "!",
    "budgets": ["0.5"],
}
