"""The small library behind the four chapters. Its flat part is to be read, the rooms may be skipped at first.

Read with the chapters, in this order (a page or two each):

    chat.py      messages <-> token ids, the <think> format, taking a completion apart
    rewards.py   format, safety, task, and their product; what a judge is
    sampler.py   `sample_simple`, the idea in 25 lines; then `sample`, the engine of all chapters
    cache.py     the key-value cache that the sampler grows and packs
    policy.py    log-probabilities of tokens without ever holding all logits
    batches.py   padding, micro-batches, the order of data
    metrics.py   defence success, compliance, task score, and their intervals

Rooms, each with a door (its `__init__`) that says what is inside:

    run/         the plumbing behind `run`: settings, folders, resuming, several GPUs
    attacks/     the attacks besides GCG, whose heart is in chapter 4; rainbow teaming
    judges/      guards, reward models, graders, refusal phrases
    sources/     data sets by name, files of yours, traces
    report/      tables and figures of chapter 4, learning curves
    sandbox/     the embedded world with its exact judge and its tiny base model
    compare/     the paper's comparisons: RPO, and studies over seeds and mixtures
    tools/       talk to a model, check what it can still do
"""


class UserError(Exception):
    """What a user can put right, in one line: what was wrong and what to do. Ends a stage, exit code 2."""
