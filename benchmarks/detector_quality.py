"""How good the rule-based detector is, on three kinds of text. Writes detector_quality.csv and its
block of README.md.

    python benchmarks/detector_quality.py

The real data (MEDEC, MTS-Dialog; both CC BY 4.0) are not shipped and are read from data/external/
(data/README.md says how they come there). Without them only the clinic world is measured, and
nothing is written.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from blocks import replace_block
from cases import read_medec_cases, read_mts_cases

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_reference
from hallulib.detectors import Case, Source, get_detector, measure_detector, measure_judge
from hallulib.files import display_path, resolve_path

HERE = Path(__file__).parent
MEDEC = resolve_path("data/external/medec/validation.csv")
MTS = resolve_path("data/external/mts-dialog")
RATES = ("sensitivity", "specificity", "balanced_accuracy", "mcc", "auroc")


def measure_all() -> dict[str, dict[str, Any]]:
    """Text -> figures of the detector `entities`."""
    rules, found = get_detector("entities"), {}
    notes = make_notes(400, seed=11, missing_rate=0.22)
    rows = [
        (Source(n.text, n.facts | {"distractors": n.distractors}), write_reference(n, 11, 0.72))
        for n in notes
    ]
    exact, name = get_detector("facts"), "clinic world, references against the exact checker"
    cases = [Case(*row, exact.judge(*row).hallucinated, row[0].text) for row in rows]
    found[f"{name}, statement"] = measure_judge(rules, rows, exact)
    found[f"{name}, summary"] = measure_detector(rules, cases, "summary")
    if MEDEC.is_file():
        medec, _ = read_medec_cases(MEDEC)
        found["MEDEC, wrong and corrected sentences"] = measure_detector(rules, medec, "sentence")
    if MTS.is_dir():
        mts, _ = read_mts_cases(MTS / "automatic_summaries.csv", MTS / "manual_scores.csv")
        found["MTS-Dialog, summaries graded by people"] = measure_detector(rules, mts, "summary")
    return found


def make_table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table with 95 % intervals."""
    lines = ["| text | n | unreadable | " + " | ".join(RATES) + " |", "|---" * 8 + "|"]
    for name, quality in found.items():
        cells = [
            "-" if quality[rate] is None else
            "{value:.2f} ({low:.2f}-{high:.2f})".format(**quality[rate]) for rate in RATES
        ]  # fmt: skip
        lines.append(f"| {name} | {quality['n']} | {quality['unmatched']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(path: Path, found: dict[str, dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "unit", "tp", "fp", "tn", "fn", "unreadable", "rate", "value",
                         "low", "high"])  # fmt: skip
        for name, q in found.items():
            counts = [name, q["unit"], q["tp"], q["fp"], q["tn"], q["fn"], q["unmatched"]]
            for rate in RATES:
                figures = q[rate] or {}
                numbers = [figures.get(key, "") for key in ("value", "low", "high")]
                writer.writerow([*counts, rate, *numbers])


def main() -> None:
    found = measure_all()
    table = make_table(found)
    print(table)
    missing = [display_path(path) for path in (MEDEC, MTS) if not path.exists()]
    if missing:
        print(f"Nothing was written: {', '.join(missing)} not found (see data/README.md).")
        return
    write_csv(HERE / "detector_quality.csv", found)
    text = (
        "## What the rule-based detector is worth\n\n`python benchmarks/detector_quality.py`. "
        "Positive = hallucinated; 95 % intervals (Wilson, and bootstrap over documents for the "
        "last three). MEDEC's faithful sentences are copied from their source, which flatters the "
        "specificity; MTS-Dialog's summaries say what the dialogue says in other words, and rules "
        f"take most of that for invention.\n\n{table}"
    )
    replace_block(HERE / "README.md", "detector_quality", text)


if __name__ == "__main__":
    main()
