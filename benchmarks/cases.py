"""Real text with people's labels, to hold a detector against: MEDEC and MTS-Dialog (CC BY 4.0)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from hallulib.detectors import Case, Source
from hallulib.errors import DataError
from hallulib.files import display_path

_MEDEC = ["Text ID", "Error Flag", "Error Sentence", "Corrected Sentence", "Corrected Text"]


def read_medec_cases(path: Path) -> tuple[list[Case], dict[str, int]]:
    """Sentences of MEDEC against the corrected note: each wrong one, and its correction.

    Returns the cases and what was left out, counted by reason. The faithful sentence stands in its
    source word for word, so the specificity found here is that of copied text.
    """
    reasons = "note without an error", "row with an empty field", "flag that is neither 0 nor 1"
    cases, dropped = [], dict.fromkeys(reasons, 0)
    for row in _read_table(path, _MEDEC).to_dict("records"):
        if row["Error Flag"] != "1":
            dropped[reasons[0] if row["Error Flag"] == "0" else reasons[2]] += 1
        elif not all(row[name].strip() for name in _MEDEC[2:]):
            dropped[reasons[1]] += 1
        else:
            source = Source(row["Corrected Text"])
            for name, wrong in (("Error Sentence", True), ("Corrected Sentence", False)):
                cases.append(Case(source, row[name], wrong, row["Text ID"]))
    return cases, dropped


def read_mts_cases(summaries: Path, grades: Path) -> tuple[list[Case], dict[str, int]]:
    """Summaries of MTS-Dialog's correlation study: hallucinated where people found any such fact.

    The two files belong together row by row. Four systems wrote on the same dialogues, and a
    dialogue is one group. Returns the cases and what was left out. Raises DataError.
    """
    texts = _read_table(summaries, ["ID", "Dialogue", "Automatic Summary"])
    rates = pd.to_numeric(_read_table(grades, ["HallucinationRate"]).iloc[:, 0], errors="coerce")
    if len(texts) != len(rates):
        raise DataError(
            f"{display_path(summaries)} has {len(texts)} rows, {display_path(grades)} {len(rates)}",
            "take both files from the same version of MTS-Dialog: they belong together by row",
        )
    cases, dropped = [], {"row with an empty field": 0, "grade that is no rate": 0}
    for row, rate in zip(texts.to_dict("records"), rates, strict=True):
        if not row["Dialogue"].strip() or not row["Automatic Summary"].strip():
            dropped["row with an empty field"] += 1
        elif not 0 <= rate <= 1:  # also NaN
            dropped["grade that is no rate"] += 1
        else:
            source = Source(row["Dialogue"])
            cases.append(Case(source, row["Automatic Summary"], rate > 0, row["Dialogue"]))
    return cases, dropped


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """These columns of a CSV as text, nothing coerced. Raises DataError naming what is wrong."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return table[columns]
    except (OSError, ValueError, KeyError, pd.errors.ParserError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{display_path(path)} cannot be read: {reason}",
            f"check that it is the CSV it was, with the columns {', '.join(columns)}",
        ) from error
