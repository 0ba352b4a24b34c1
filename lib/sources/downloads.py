"""--dry-run of stage 1."""

from __future__ import annotations

from lib import UserError
from lib.sources import described
from lib.sources.manifest import words_of


def plan_downloads(settings) -> None:
    """Print where each word leads. UserError for a --dry-run that is no machine, whether or not a model writes traces."""
    from lib.run.plan import read_machine  # here, because it is slow to import

    try:
        read_machine(settings.dry_run)
    except UserError:
        raise UserError(f"--dry-run: given {settings.dry_run}; allowed GPUSxGIGABYTES, e.g. 1x80") from None
    for word in words_of(settings):
        print(described(word))
    if settings.source == "sandbox":
        print("sandbox: made here, nothing has to be downloaded")
