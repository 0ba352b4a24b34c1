"""Settings by purpose. A module holds four dicts, one a stage: MIXTURE (01), SFT (02), RL (03) and EVAL (04).

RPO, where there is one, is what `python -m lib.compare.rpo` sets otherwise than RL.

A stage's own defaults stand where a preset says nothing, and its flags override both. RUNS, where there is
one, stands in the place of the folder `runs/demo` in these defaults.
"""
