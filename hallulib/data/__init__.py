"""Data: every source ends in one row schema, in splits that never cut through a group."""

from __future__ import annotations

from hallulib.data.prepare import DataResult, load_data_result, prepare_data
from hallulib.data.schema import COLUMNS, SPLITS, read_facts, read_rows

__all__ = [
    "COLUMNS", "SPLITS", "DataResult", "load_data_result", "prepare_data", "read_facts",
    "read_rows",
]  # fmt: skip
