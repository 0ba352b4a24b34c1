"""Tools beside the four stages: commands, each a file of its own. Nothing in the book needs them.

    lib.tools.chat          talk to a model, over transformers' own `generate`
    lib.tools.capability    is the capability kept? Exact match on questions with one right answer
    lib.tools.course        a course: what students get, what instructors keep
    lib.tools.grade         which exercises are solved, and what is wrong with the others

Skip this room at first: no chapter imports it. Tested in tests/test_tools.py and
tests/test_course.py.
"""
