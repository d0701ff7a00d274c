"""The few lines every notebook needs: show the settings, read a metrics file, say what passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from hallulib.recipe import Recipe
from hallulib.run import Run


def show_settings(config: Recipe, *sections: str) -> pd.DataFrame:
    """A table of the effective settings of some recipe sections, with what each one means."""
    rows = []
    for section in sections:
        values = getattr(config, section)
        for name, info in type(values).model_fields.items():
            rows.append((f"{section}.{name}", repr(getattr(values, name)), info.description))
    return pd.DataFrame(rows, columns=["setting", "value", "meaning"]).set_index("setting")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON object per line."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def print_passed(what: str) -> None:
    """The green line at the end of a checkpoint cell."""
    print(f"\x1b[32mcheckpoint passed: {what}\x1b[0m")


def print_cost(run: Run, stage: str) -> None:
    """Measured time and peak memory of a finished stage, from the manifest."""
    record = run.manifest["stages"][stage]
    peak = record["peak_memory_bytes"] / 2**30
    print(f"{stage}: {record['wall_seconds']:.0f} s, peak {peak:.2f} GiB on {record['device']}")
