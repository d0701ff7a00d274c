"""What notebooks need beside the stages: settings, metrics, what passed and what it cost."""

import pandas as pd

from hallulib.files import read_jsonl as read_jsonl
from hallulib.recipe import Recipe
from hallulib.recipe import load_recipe as load_recipe
from hallulib.run import Run


def show_settings(config: Recipe, *sections: str) -> pd.DataFrame:
    """A table of the effective settings of some recipe sections, with what each one means."""
    rows = {}
    for section in sections:
        fields = type(getattr(config, section)).model_fields
        for name, value in getattr(config, section):
            rows[f"{section}.{name}"] = [repr(value), fields[name].description]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "meaning"])
    return table.rename_axis("setting")


def print_passed(what: str) -> None:
    """The green line at the end of a checkpoint cell."""
    print(f"\x1b[32mcheckpoint passed: {what}\x1b[0m")


def print_cost(run: Run, stage: str) -> None:
    """Measured time and peak memory of a finished stage, from the manifest."""
    record = run.manifest["stages"][stage]
    peak = record["peak_memory_bytes"] / 2**30
    print(f"{stage}: {record['wall_seconds']:.0f} s, peak {peak:.2f} GiB on {record['device']}")
