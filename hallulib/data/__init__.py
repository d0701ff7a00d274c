"""Data: every source ends in one row schema, in splits that never cut through a group."""

from hallulib.data.audit import audit_splits, refuse_cut_rows
from hallulib.data.lengths import describe_cuts
from hallulib.data.medhal import join_twins, stream_medhal_rows
from hallulib.data.own import stream_own_rows
from hallulib.data.prepare import prepare_data
from hallulib.data.splits import measure_similarity
from hallulib.errors import DataError
from hallulib.models import load_tokenizer, render_prompt

__all__ = [
    "DataError", "audit_splits", "describe_cuts", "join_twins", "load_tokenizer",
    "measure_similarity", "prepare_data", "refuse_cut_rows", "render_prompt", "stream_medhal_rows",
    "stream_own_rows",
]  # fmt: skip
