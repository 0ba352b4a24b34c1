"""The paper's settings: the stages' own defaults and these. HarmBench's files: see docs/real-models.md."""

RUNS = "runs/paper"

MIXTURE = dict(
    source="files",
    files=[
        "harmful=wildjailbreak:400+800",  # 400 for SFT, 800 others for RL
        "harmful=aegis:300+400",
        "harmful=safeedit:300+0",
        "harmful=rainbow@runs/paper/search/rainbow/prompts.jsonl:800",  # not for pi_SFT itself
        "harmless=ultrafeedback:2000",
        "ambiguous=or-bench:2000",
    ],
    eval_files=[
        f"harmful=harmbench@{RUNS}/files/harmbench_behaviors_text_all.csv",  # its targets beside it, for GCG
        "ambiguous=xstest",
        "harmless=wildchat",
    ],
    rainbow_share=0.8,  # with --rainbow: of the 1000 harmful ones at lambda 0.5, 800, as `files` takes
    rainbow_attacker="huihui-ai/Qwen2.5-7B-Instruct-abliterated",
    rainbow_judge="qwen3guard+grm-8b",
    rainbow_tokens=4096,
    max_batch_tokens=65536,
)
SFT = dict(
    model="Qwen/Qwen2.5-1.5B-Instruct",
    dtype="bfloat16",
    gradient_checkpointing=True,
)
RL = dict(
    judge="qwen3guard+grm-8b",  # open stand-in for the moderation API; the authors' reward model
    entropy_coef=1e-3,  # not in the paper's text: verl's default when the authors' script ran
    dtype="bfloat16",
    gradient_checkpointing=True,
)
EVAL = {
    "judge": "harmbench+grm-8b",  # the paper's classifier of 13 B parameters; task scores as in training
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
    "population": 256,
    "generations": 100,
    "dtype": "bfloat16",
}
