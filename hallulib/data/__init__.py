"""Data: every source ends in one row schema, in splits that never cut through a group."""

from __future__ import annotations

from hallulib.data.audit import audit_splits, refuse_cut_rows, tabulate_audit
from hallulib.data.near_duplicates import measure_similarity
from hallulib.data.own import stream_own_rows
from hallulib.data.prepare import DataResult, load_data_result, prepare_data
from hallulib.data.schema import COLUMNS, SPLITS, read_facts, read_rows

__all__ = [
    "COLUMNS", "SPLITS", "DataResult", "audit_splits", "load_data_result", "measure_similarity",
    "prepare_data", "read_facts", "read_rows", "refuse_cut_rows", "stream_own_rows",
    "tabulate_audit",
]  # fmt: skip
