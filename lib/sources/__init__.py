"""The room of sources: where stage 1's prompts and traces come from, apart from the sandbox.

You may skip it at first: `01_build_mixture.py` gets lists of records from it. Inside:

    known     a short function for each known data set: add yours there
    tables    rows of a jsonl, json, csv, tsv or parquet file, or of the hub; the text in a cell
    reading   from words of --files, [KIND=]SOURCE[:N], to records, pools, quotas, the manifest
    traces    reasoning traces that a model writes itself

Tests: tests/test_sources.py, tests/test_mixture.py, tests/test_traces.py.
"""

from lib.sources.known import EVAL_SETS
from lib.sources.reading import (
    HELP,
    Pool,
    Source,
    Traced,
    hold_out,
    parse_word,
    read_pool,
    read_traces,
    take_sft,
    write_manifest,
)
from lib.sources.tables import read_table, text_of

__all__ = ["EVAL_SETS", "HELP", "Pool", "Source", "Traced", "hold_out", "parse_word", "read_pool"]
__all__ += ["read_table", "read_traces", "take_sft", "text_of", "write_manifest", "write_traces"]


def write_traces(records: list[dict], count: int, settings, use: str) -> list[list[list[str]]]:
    from lib.sources.traces import write_all  # here, because torch is slow to import

    return write_all(records, count, settings, use)
