"""What a run found, as tables for the terminal and as one self-contained report.html."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import nbformat

from hallulib.errors import DataError
from hallulib.files import display_path, write_text_atomic
from hallulib.run import Run, compare_runs, read_manifest

HEADLINE = ["system", "n", "hallucinated", "95 % interval", "omissions", "answered"]
STAGE = ["stage", "finished", "device", "seed", "seconds", "key"]
COST = ["notebook", "status", "minutes", "peak GiB"]


def read_headline(root: Path) -> list[dict[str, Any]]:
    """One row per system from evaluation/summary.json, rates as shares; [] before notebook 06.

    Each row: system, n, hallucination_rate, interval [low, high], omission_rate, answer_rate.
    """
    path = root / "evaluation" / "summary.json"
    if not path.is_file():
        return []
    try:
        systems = json.loads(path.read_text("utf-8"))["systems"]
        wanted = ("n", "hallucination_rate", "interval", "omission_rate", "answer_rate")
        return [{"system": n} | {key: s[key] for key in wanted} for n, s in systems.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{display_path(path)} cannot be read ({type(error).__name__}: {error}).",
            "Run notebook 06_evaluation again.",
        ) from None


def headline_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The headline as text cells: never a percentage without its n and interval."""
    return [
        [
            row["system"],
            str(row["n"]),
            _percent(row["hallucination_rate"]),
            " - ".join(_percent(bound) for bound in row["interval"]),
            _percent(row["omission_rate"]),
            _percent(row["answer_rate"]),
        ]
        for row in rows
    ]


def headline_table(rows: list[dict[str, Any]]) -> str:
    """The headline as aligned text."""
    return format_table(HEADLINE, headline_cells(rows))


def cost_cells(manifest: dict[str, Any]) -> list[list[str]]:
    """Time and peak memory of each notebook as text cells, with their sum and maximum last."""
    records = sorted(manifest["notebooks"].items())
    rows = [
        [
            name,
            record["status"],
            f"{record['wall_seconds'] / 60:.1f}",
            f"{record['peak_memory_bytes'] / 2**30:.2f}",
        ]
        for name, record in records
    ]
    minutes = sum(record["wall_seconds"] for _, record in records) / 60
    peak = max((record["peak_memory_bytes"] for _, record in records), default=0) / 2**30
    return [*rows, ["all", "", f"{minutes:.1f}", f"{peak:.2f}"]]


def cost_table(manifest: dict[str, Any]) -> str:
    """Time and peak memory of each notebook as aligned text."""
    return format_table(COST, cost_cells(manifest))


def compare_table(a: Path, b: Path) -> str:
    """Two runs side by side: where their recipes differ, what was measured, what it cost."""
    left, right = (
        {row[0]: row[2:] for row in headline_cells(read_headline(path))} for path in (a, b)
    )
    rows = [[key, *map(_plain, values)] for key, values in compare_runs(a, b).items()]
    for system in [*left, *(name for name in right if name not in left)]:
        for index, column in enumerate(HEADLINE[2:]):
            pair = [side[system][index] if system in side else "-" for side in (left, right)]
            rows.append([f"{system}: {column}", *pair])
    for index, column in ((2, "minutes"), (3, "peak GiB")):
        costs = [cost_cells(read_manifest(path))[-1][index] for path in (a, b)]
        rows.append([f"all notebooks: {column}", *costs])
    return format_table(["", a.name, b.name], rows)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def write_report(run: Run) -> Path:
    """Write <run>/report.html: headline, costs, provenance and every figure; returns its path.

    Everything is inside the one file, so that it can be mailed and opened offline.
    """
    manifest = run.manifest
    rows = read_headline(run.root)
    recipe = manifest["recipe"]
    parts = [
        f"<h1>hallulib: {html.escape(recipe['name'])}</h1>",
        f"<p>{html.escape(recipe['description'])} Run <code>{_code(run.root)}</code>.</p>",
        "<h2>Result on held-out notes</h2>",
        _html_table(HEADLINE, headline_cells(rows)) if rows else "<p>Not evaluated yet.</p>",
        "<h2>Time and peak memory</h2>",
        _html_table(COST, cost_cells(manifest)),
        "<h2>Stages</h2>",
        _html_table(STAGE, _stage_cells(manifest)),
        "<h2>Figures</h2>",
        *_figures(run.root / "notebooks"),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre>",
    ]
    path = run.root / "report.html"
    write_text_atomic(path, PAGE.format(title=html.escape(recipe["name"]), body="\n".join(parts)))
    return path


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>hallulib: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
</style></head><body>
{body}
</body></html>
"""


def _stage_cells(manifest: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            record["finished_at"],
            record["device"],
            str(record["seed"]),
            f"{record['wall_seconds']:.1f}",
            record["key"][:12],
        ]
        for name, record in manifest["stages"].items()
    ]


def _figures(folder: Path) -> list[str]:
    """Every PNG of the executed notebooks, under a link to its notebook."""
    parts = []
    for path in sorted(folder.glob("*.ipynb")):
        images = [
            output["data"]["image/png"]
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        link = f'<a href="notebooks/{html.escape(path.name)}">{html.escape(path.stem)}</a>'
        parts.append(f"<h3>{link}</h3>")
        parts += [
            f'<p><img alt="{html.escape(path.stem)}, figure {number}" '
            f'src="data:image/png;base64,{"".join(image.split())}"></p>'
            for number, image in enumerate(images, start=1)
        ]
    return parts


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _code(path: Path) -> str:
    return html.escape(display_path(path))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def format_gib(size: int) -> str:
    """Bytes as "1.23 GiB"."""
    return f"{size / 2**30:.2f} GiB"


def _plain(value: Any) -> str:
    """A recipe value as text in one cell."""
    text = "-" if value is None else json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
