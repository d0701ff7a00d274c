"""What each system writes on the held-out items: generated once, row by row, on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hallulib.errors import DataError
from hallulib.files import append_lines, read_jsonl, recover_lines
from hallulib.generation import generate_summaries
from hallulib.models import load_systems, load_tokenizer, use_system
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.scoring import encode_completion, pad_rows, score_completions

CHUNK_BATCHES = 2  # batches generated between two writes to disk
SCORED = 100  # items whose references are scored: perplexity needs no more, and reads everything


def find_systems(recipe: Recipe, run: Run) -> dict[str, Path]:
    """name -> adapter folder of every trained system; "base" is the model without one."""
    paths = {"sft": run.require("sft/adapter"), "dpo": run.require("dpo/adapter")}
    for arm in recipe.dpo.comparison_arms:
        paths[arm] = run.require("dpo/arms") / arm / "adapter"
    return paths


def generate_all(
    recipe: Recipe, run: Run, rows: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Rows of generations.jsonl for all systems, reusing what an interrupted call has written.

    The work files lie in the checkpoint folder, whose name holds the stage key: rows made with
    another adapter, recipe or code are in another folder and are never mixed in.
    """
    rows = [row | {"scored": place < SCORED} for place, row in enumerate(rows)]
    adapters = find_systems(recipe, run)
    folder = run.checkpoint_dir("evaluation", recipe)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("base", *adapters)}
    missing = {name: find_missing(path, rows) for name, path in files.items()}
    if any(missing.values()):
        model, tokenizer = load_systems(recipe, adapters), load_tokenizer(recipe)
        check_lengths(tokenizer, model, rows, recipe)
        for name, todo in missing.items():
            with use_system(model, name):
                generate_missing(model, tokenizer, todo, files[name], name, recipe)
    order = {row["id"]: place for place, row in enumerate(rows)}
    generations = [row for path in files.values() for row in read_jsonl(path) if row["id"] in order]
    names = list(files)
    return sorted(generations, key=lambda g: (names.index(g["system"]), order[g["id"]]))


def find_missing(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The items without a line in the work file `path`."""
    done = {row["id"] for row in recover_lines(path)}
    return [row for row in rows if row["id"] not in done]


def check_lengths(tokenizer: Any, model: Any, rows: list[dict[str, str]], recipe: Recipe) -> None:
    """Raise DataError for a prompt that, with the longest summary, passes what the model was built
    for: it would go on without a warning and write worse."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = longest and longest - recipe.evaluation.max_new_tokens
    for row in rows:
        size = len(encode_completion(tokenizer, row["prompt"], "")[0])
        if room is not None and size > room:
            raise DataError(
                f"the prompt of test item {row['id']!r} has {size} tokens; with "
                f"{recipe.evaluation.max_new_tokens} new ones it passes the model's {longest}",
                "shorten or drop the note in your source file, lower evaluation.max_new_tokens, or "
                "choose a model with a longer context",
            )


def generate_missing(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], path: Path, system: str, recipe: Recipe
) -> None:
    """Generate for `rows` and append each chunk to `path`, flushed to disk, as it is finished."""
    settings = recipe.evaluation
    size = settings.batch_size * CHUNK_BATCHES
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(rows), desc=system) as bar:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            outputs = generate_summaries(
                model, tokenizer, [row["prompt"] for row in chunk],
                batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens,
            )  # fmt: skip
            scores = score_references(model, tokenizer, chunk, recipe)
            append_lines(file, (
                _make_generation(row, output, system) | score
                for row, (output,), score in zip(chunk, outputs, scores, strict=True)
            ))  # fmt: skip
            bar.update(len(chunk))


@torch.no_grad()
def score_references(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], recipe: Recipe
) -> list[dict[str, Any]]:
    """How likely each reference is under the system: {reference_logp (nats), reference_hits (tokens
    that were the most likely), reference_tokens}; all None beyond the first SCORED items, for an
    empty reference, and for a row longer than model.max_length: cut, it would be another text."""
    names = ("reference_logp", "reference_hits", "reference_tokens")
    scores: list[dict[str, Any]] = [dict.fromkeys(names) for _ in rows]
    coded = [encode_completion(tokenizer, row["prompt"], row["reference"]) for row in rows]
    fits = []
    for place, (row, pair) in enumerate(zip(rows, coded, strict=True)):
        short = sum(map(len, pair)) <= recipe.model.max_length
        if row["scored"] and row["reference"].strip() and short:
            fits.append(place)
    for start in range(0, len(fits), recipe.evaluation.batch_size):
        batch = fits[start : start + recipe.evaluation.batch_size]
        ids, mask = (t.to(model.device) for t in pad_rows([coded[i] for i in batch], 0))
        found = score_completions(model, ids, mask)
        sizes = [len(coded[i][1]) for i in batch]
        parts = zip(*(flat.split(sizes) for flat in found), strict=True)
        for i, size, (logps, hits) in zip(batch, sizes, parts, strict=True):
            values = (round(float(logps.double().sum()), 4), int(hits.sum()), size)
            scores[i] = dict(zip(names, values, strict=True))
    return scores


def _make_generation(row: dict[str, str], output: Any, system: str) -> dict[str, Any]:
    kept = ("id", "group_id", "style", "style_group", "prompt", "context", "reference")
    return {name: row[name] for name in kept} | {
        "system": system, "text": output.text, "finish_reason": output.finish_reason,
        "n_tokens": len(output.token_ids),
    }  # fmt: skip
