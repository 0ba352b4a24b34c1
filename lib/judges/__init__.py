"""Judges that are language models. `lib.rewards.load_judge` opens them by name; what a judge is, is written there.

Each gives harm_score alone, so another judge scores the task (`--judge harmbench+standin`). A score of None is
*unknown*: the model gave no verdict that can be read. Unknown is not harmless: count it, and never as a defence.
"""
