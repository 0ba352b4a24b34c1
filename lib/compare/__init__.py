"""Comparisons: commands beside the four stages, each a file of its own. Nothing in the book needs them.

    lib.compare.study       many seeds and lambdas, by the chapters' commands (studies.py, tables.py)
    lib.compare.rpo         DPO with a likelihood term, the paper's comparison with RL
    lib.compare.decides     does the answer follow from the reasoning?
    lib.compare.diversity   how much samples differ, and how long a model thinks about twins

Skip this room at first: no chapter imports it. Tests: tests/test_study.py, test_rpo.py, test_decides.py,
test_diversity.py.
"""
