"""The small library behind the four chapters."""


class UserError(Exception):
    """What a user can put right, in one line: what was wrong and what to do. Ends a stage, exit code 2."""
