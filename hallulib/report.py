"""What runs found, as tables for the terminal and as one self-contained report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd

from hallulib.errors import DataError, MissingArtifact
from hallulib.files import display_path, resolve_path, write_text_atomic
from hallulib.run import MANIFEST, Run, read_manifest

HEADLINE = ["n", "hallucinated", "95 % interval", "omissions", "answered"]
TEMPLATE = Path(__file__).with_name("run.html.j2")


def list_runs() -> list[Path]:
    """Run folders (those with a manifest) directly below outputs/, by name."""
    return sorted(path.parent for path in resolve_path("outputs").glob(f"*/{MANIFEST}"))


def find_run(run: str | Path) -> Path:
    """The folder of a run given as a path or as its name below outputs/."""
    for folder in (resolve_path(run), resolve_path("outputs") / run):
        if (folder / MANIFEST).is_file():
            return folder
    raise MissingArtifact(
        f"There is no run '{run}'.", "`python -m hallulib runs` lists the runs that exist."
    )


def read_headline(root: Path) -> pd.DataFrame:
    """A row of text per system, never a rate without n and interval; no rows before notebook 06."""
    path, rows = root / "evaluation" / "summary.json", {}
    try:
        systems = json.loads(path.read_text("utf-8"))["systems"] if path.is_file() else {}
        for name, system in systems.items():
            shares = (system["hallucination_rate"], system["omission_rate"], system["answer_rate"])
            rate, omissions, answered = map(_percent, shares)
            interval = " - ".join(map(_percent, system["interval"]))
            rows[name] = [str(system["n"]), rate, interval, omissions, answered]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{display_path(path)} cannot be read ({type(error).__name__}: {error}).",
            "Run notebook 06_evaluation again.",
        ) from None
    return _make_table("system", rows, HEADLINE)


def read_costs(root: Path) -> pd.DataFrame:
    """Status, minutes and peak memory of each notebook, with their sum and maximum last."""
    measures = ["status", "wall_seconds", "peak_memory_bytes"]
    records = pd.DataFrame(read_manifest(root)["notebooks"], index=measures).T.astype(object)
    seconds, peaks = records["wall_seconds"], records["peak_memory_bytes"]
    records.loc["all"] = ["", seconds.sum(), peaks.max() if len(peaks) else 0]
    costs = {
        "status": records["status"],
        "minutes": (records["wall_seconds"] / 60).map("{:.1f}".format),
        "peak GiB": (records["peak_memory_bytes"] / 2**30).map("{:.2f}".format),
    }
    return pd.DataFrame(costs).rename_axis(columns="notebook")


def compare_runs(a: Path, b: Path) -> pd.DataFrame:
    """Two runs side by side: where their recipes differ, what was measured, what it cost."""
    table = pd.DataFrame([_flatten_run(a), _flatten_run(b)], index=[a.name, b.name]).T.fillna("-")
    equal = table.iloc[:, 0].astype(str) == table.iloc[:, 1].astype(str)
    return table[~(equal & table.index.str.startswith("recipe "))]


def write_report(run: Run) -> Path:
    """Write <run>/report.html: headline, costs, provenance and every figure; returns its path.

    Everything is inside the one file, so that it can be mailed and opened offline.
    """
    manifest, headline = run.manifest, read_headline(run.root)
    columns = ["finished_at", "device", "seed", "wall_seconds", "key"]
    stages = {
        name: [str(record.get(column, ""))[:40] for column in columns]
        for name, record in manifest["stages"].items()
    }
    template = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True)
    page = template.render(
        recipe=manifest["recipe"],
        folder=display_path(run.root),
        headline=None if headline.empty else headline.to_html(),
        costs=read_costs(run.root).to_html(),
        stages=_make_table("stage", stages, columns).to_html(),
        figures={path.stem: _read_figures(path) for path in run.root.glob("notebooks/*.ipynb")},
        settings=json.dumps(manifest["recipe"], indent=2, ensure_ascii=False),
    )
    write_text_atomic(run.root / "report.html", page)
    return run.root / "report.html"


def _make_table(corner: str, rows: dict[str, list[str]], columns: list[str]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return table.rename_axis(columns=corner)


def _flatten_run(root: Path) -> dict[str, Any]:
    """All that two runs are compared by, one level deep."""
    recipe = pd.json_normalize(read_manifest(root)["recipe"]).iloc[0]
    measured = read_headline(root).drop(columns="n").stack()
    costs = read_costs(root).loc["all", ["minutes", "peak GiB"]]
    return (
        {f"recipe {key}": value for key, value in recipe.items()}
        | {f"{system}: {column}": value for (system, column), value in measured.items()}
        | {f"all notebooks: {column}": value for column, value in costs.items()}
    )


def _read_figures(path: Path) -> list[str]:
    """Every PNG of an executed notebook, in base64."""
    return [
        "".join(output["data"]["image/png"].split())
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
