"""The room of sources: where stage 1's prompts and traces come from, apart from the sandbox.

You may skip it at first: `01_build_mixture.py` gets lists of records from it. Inside:

    known     a short function for each known data set: add yours there
    tables    rows of a jsonl, json, csv, tsv or parquet file, or of the hub; the text in a cell
    reading   from a word of --files, [KIND=]SOURCE[:N], to records; pools, traces, quotas
    traces    reasoning traces that a model writes itself
    manifest  what was made of what

Tests: tests/test_sources.py, tests/test_mixture.py, tests/test_traces.py.
"""

from lib.sources.known import EVAL_SETS, Pool
from lib.sources.manifest import manifest, summary
from lib.sources.reading import (
    HELP,
    Source,
    Traced,
    check_traces,
    hold_out,
    parse_word,
    read_pool,
    read_traces,
    take_sft,
)
from lib.sources.tables import read_table, text_of

__all__ = ["EVAL_SETS", "HELP", "Pool", "Source", "Traced", "check_traces", "hold_out", "manifest"]
__all__ += ["parse_word", "read_pool", "read_table", "read_traces", "summary", "take_sft", "text_of"]
__all__ += ["write_traces"]


def write_traces(records, count: int, settings, use) -> list:
    """Traces that a model writes itself: `lib.sources.traces.write_all`."""
    from lib.sources.traces import write_all  # here, because torch is slow to import

    return write_all(records, count, settings, use)
