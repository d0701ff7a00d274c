"""Put what a benchmark wrote between its marks in a Markdown file, and leave the rest alone."""

from __future__ import annotations

from pathlib import Path

from hallulib.files import write_text_atomic


def replace_block(path: Path, name: str, text: str) -> None:
    """Replace the block `name` of the file, or add it at the end; blocks are marked by comments."""
    start = f"<!-- {name}: written by benchmarks/{name}.py -->"
    end = f"<!-- /{name} -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    after = rest.partition(end)[2].strip()
    parts = [before.rstrip(), f"{start}\n{text.strip()}\n{end}", after]
    write_text_atomic(path, "\n\n".join(part for part in parts if part) + "\n")
