"""What runs found, as tables for the terminal and as one self-contained report.html."""

import json
from pathlib import Path

import jinja2
import nbformat
import pandas as pd

from hallulib.errors import MissingArtifact
from hallulib.files import display_path, resolve_path, write_text_atomic
from hallulib.run import MANIFEST, Run

TEMPLATE = Path(__file__).with_name("run.html.j2")


def find_run(name: str) -> Run:
    """The run of a folder given as a path or as its name below outputs/."""
    for folder in (resolve_path(name), resolve_path("outputs") / name):
        if (folder / MANIFEST).is_file():
            return Run(folder)
    advice = "`python -m hallulib runs` lists the runs that exist."
    raise MissingArtifact(f"There is no run '{name}'.", advice)


def read_headline(run: Run) -> pd.DataFrame:
    """A row of text per system, never a rate without n and interval; empty before notebook 06."""
    path, rows = run.path("evaluation/summary.json"), {}
    systems = json.loads(path.read_text("utf-8"))["systems"] if path.is_file() else {}
    for name, system in systems.items():
        rows[name] = {
            "n": str(system["n"]),
            "hallucinated": _percent(system["hallucination_rate"]),
            "95 % interval": " - ".join(map(_percent, system["interval"])),
            "omissions": _percent(system["omission_rate"]),
            "answered": _percent(system["answer_rate"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(columns="system")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def read_costs(run: Run) -> pd.DataFrame:
    """Minutes and peak memory of each notebook, with their sum and maximum last."""
    records = run.manifest["notebooks"]
    minutes = {name: record["wall_seconds"] / 60 for name, record in records.items()}
    peaks = {name: record["peak_memory_bytes"] / 2**30 for name, record in records.items()}
    minutes["all"], peaks["all"] = sum(minutes.values()), max(peaks.values(), default=0)
    table = pd.DataFrame({"minutes": minutes, "peak GiB": peaks}).rename_axis(columns="notebook")
    return table.round({"minutes": 1, "peak GiB": 2})


def compare_runs(a: Run, b: Run) -> pd.DataFrame:
    """Two runs side by side: where their recipes differ, what was measured, what it cost."""
    columns = {}
    for run in (a, b):
        recipe = pd.json_normalize(run.manifest["recipe"]).iloc[0].add_prefix("recipe ")
        measured = read_headline(run).drop(columns="n", errors="ignore").stack()
        measured.index = [": ".join(names) for names in measured.index]
        costs = read_costs(run).loc["all"].add_prefix("all notebooks: ")
        columns[run.root.name] = pd.concat([recipe, measured, costs]).astype(object)
    table = pd.DataFrame(columns).fillna("-")
    equal = table.iloc[:, 0].astype(str) == table.iloc[:, 1].astype(str)
    return table[~(equal & table.index.str.startswith("recipe "))]


def write_report(run: Run) -> Path:
    """Write <run>/report.html: headline, costs, provenance and every figure, all inside the one
    file, so that it can be mailed and opened offline; returns its path."""
    manifest, headline = run.manifest, read_headline(run)
    columns = ["finished_at", "device", "seed", "wall_seconds", "key"]
    stages = pd.DataFrame(manifest["stages"], index=columns).T.rename_axis(columns="stage")
    page = jinja2.Template(TEMPLATE.read_text("utf-8"), autoescape=True).render(
        recipe=manifest["recipe"],
        folder=display_path(run.root),
        headline=None if headline.empty else headline.to_html(),
        costs=read_costs(run).to_html(),
        stages=stages.to_html(),
        notebooks={
            path.stem: nbformat.read(path, 4) for path in run.root.glob("notebooks/*.ipynb")
        },
        settings=json.dumps(manifest["recipe"], indent=2, ensure_ascii=False),
    )
    write_text_atomic(run.path("report.html"), page)
    return run.path("report.html")
