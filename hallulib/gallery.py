"""The gallery: executed notebooks to read without running them, stamped with their origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from hallulib.course import find_notebooks
from hallulib.errors import DataError
from hallulib.files import project_root, resolve_path, sha256_file, write_text_atomic
from hallulib.run import read_manifest

GALLERY = "outputs/gallery"


def publish_gallery(
    run_root: Path, notebooks: str | Path = "notebooks", target: str | Path = GALLERY
) -> list[Path]:
    """Copy a run's executed notebooks to the gallery and stamp each; returns the copies.

    Raises DataError, before anything is written, unless every notebook ran to its end from its
    present source and no copy names a folder of this machine.
    """
    manifest = read_manifest(run_root)
    copies = {}
    for source in find_notebooks(notebooks):
        record = manifest["notebooks"].get(source.stem, {})
        if record.get("status") != "done" or record.get("source_sha") != sha256_file(source):
            raise _refuse(source.stem, "has not run to its end from its present source")
        notebook = nbformat.read(run_root / "notebooks" / source.name, as_version=4)
        notebook.metadata["hallulib"] = _stamp(manifest, record)
        text = nbformat.writes(notebook)
        if str(Path.home()) in text or str(project_root()) in text:
            raise _refuse(source.stem, "prints a path of this machine")
        copies[resolve_path(target) / source.name] = text
    for path, text in copies.items():
        write_text_atomic(path, text + "\n")
    return list(copies)


def find_stale(notebooks: str | Path = "notebooks", target: str | Path = GALLERY) -> list[str]:
    """Why the gallery does not show the present sources, one line per notebook; [] if it does."""
    problems = []
    for source in find_notebooks(notebooks):
        copy = resolve_path(target) / source.name
        if not copy.is_file():
            problems.append(f"{source.stem}: missing")
            continue
        notebook = nbformat.read(copy, as_version=4)
        if notebook.metadata.get("hallulib", {}).get("source_sha") != sha256_file(source):
            problems.append(f"{source.stem}: made from another version of the source")
        counts = [c.execution_count for c in notebook.cells if c.cell_type == "code" and c.source]
        if counts != list(range(1, len(counts) + 1)):
            problems.append(f"{source.stem}: cells did not run in order")
    return problems


def _stamp(manifest: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    stages = manifest["stages"].values()
    return {
        "source_sha": record["source_sha"],
        "recipe": manifest["recipe"]["name"],
        "parameters": record["parameters"],
        "wall_seconds": round(record["wall_seconds"], 1),
        "peak_memory_bytes": record["peak_memory_bytes"],
        "versions": next(iter(stages), {}).get("versions", {}),
    }


def _refuse(name: str, why: str) -> DataError:
    return DataError(
        f"The gallery cannot take notebook {name}: it {why}.",
        "Run `python -m hallulib course` first; the gallery is unchanged.",
    )
