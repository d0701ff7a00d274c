"""The made-up world is the same world: hashes of its notes, and of the default run's rows."""

import hashlib
import json
import random

import pytest
from base_model import draw_corpus_note

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_reference, write_summary
from hallulib.data import prepare_data
from hallulib.data.schema import SPLITS
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def hash_lines(lines: list) -> str:
    """sha256 of JSON lines; the order of keys counts."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "fd34cc5d9963fd8f81d6a40f44ba4401e1494b5afc8c322a3dd1e4ce1a91aaad"),
        (7, "43022109b73e26ab7faf4b1bcedc1fac4b31261502e20df809877971b07be6cd"),
    ],
    ids=["seed 0", "seed 7"],
)
def test_notes_with_their_facts_and_summaries_are_the_same_as_ever(seed, expected):
    lines = []
    for note in make_notes(300, seed, missing_rate=0.3):
        fields = ("id", "group_id", "style", "text", "facts", "unwritten", "distractors")
        texts = [write_summary(note.facts), write_reference(note, seed, 0.72)]
        lines.append([getattr(note, name) for name in fields] + texts)
    assert hash_lines(lines) == expected


def test_the_corpus_of_the_base_model_is_the_same_as_ever():
    notes = [draw_corpus_note(random.Random(i), i / 200) for i in range(200)]
    lines = [[note.style, note.text, note.facts] for note in notes]
    assert hash_lines(lines) == "0da55838968639c10ed96274d2e509af0582bfc9db4a3d3732138a93db017958"


HASHED = ("id", "group_id", "source", "prompt", "reference", "context", "style", "style_group",
          "facts", "rejected", "split")  # fmt: skip
ROWS = {
    "train": "82c987eca177f01b287d30f64da7b0d12f6588a9c27ba97bb2643f987a8e9a17",
    "validation": "91409f2a867d0600a0f20af54a6632a677f13bb7bfac0e8da4acf7b8d376c530",
    "test": "af253c466b095ac49240b93f3a4cc492b294451293cc935a7fb2651267001ec0",
}


def test_the_rows_of_the_default_recipe_are_the_same_as_ever(tmp_path):
    recipe = load_recipe("tiny-cpu")
    result = prepare_data(recipe, Run.open(tmp_path / "run", recipe))
    found = {
        name: hash_lines([[row[c] for c in HASHED] for row in result.read(name)]) for name in SPLITS
    }
    assert found == ROWS
