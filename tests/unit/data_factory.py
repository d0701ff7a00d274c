"""Small files in the formats people have, and runs of the data stage on them."""

import json
from functools import cache
from pathlib import Path

from base_model import build_tokenizer
from tiny_model import shared_folder

from hallulib.clinic import make_notes
from hallulib.data.schema import make_row
from hallulib.files import project_root
from hallulib.recipe import Recipe, load_recipe
from hallulib.run import Run

REAL = project_root() / "data" / "external"  # fetched, never committed
TEMPLATE = "Summarise the note.\n\n{context}"


@cache
def tokenizer_folder() -> Path:
    """A small tokenizer of clinic notes, as a model folder."""
    folder = shared_folder() / "data-tokenizer"
    build_tokenizer(make_notes(60, seed=1), vocab_size=512).save_pretrained(folder)
    return folder


def open_run(folder: Path, **data) -> tuple[Recipe, Run]:
    """A recipe of 60, 12 and 21 notes with these settings of its data, and a run of it."""
    sizes = {"train_size": 60, "validation_size": 12, "test_size": 21}
    model = {"name_or_path": str(tokenizer_folder()), "max_length": 640}
    recipe = load_recipe("tiny-cpu", {"model": model, "data": sizes | data})
    return recipe, Run.open(folder / "run", recipe)


def write_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, records: list[dict]) -> Path:
    return write_file(path, "".join(json.dumps(record) + "\n" for record in records))


def plain_row(row_id, group_id, prompt, reference, context, rejected="") -> dict[str, str]:
    """A row of the schema from a file."""
    sides = {"reference": reference, "rejected": rejected}
    return make_row(id=row_id, group_id=group_id, prompt=prompt, context=context, **sides)


def make_text(number: int, words: int = 40) -> str:
    """A text that no other number's text resembles."""
    return " ".join(f"w{number}x{i}" for i in range(words))
