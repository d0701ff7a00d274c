"""What each system writes on the held-out items: generated once, row by row, on one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from hallulib.errors import DataError
from hallulib.files import append_lines, recover_lines
from hallulib.generation import generate_summaries
from hallulib.models import load_systems, load_tokenizer, use_system
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.scoring import encode_completion, pad_rows, score_completions

SCORED = 100  # items whose references are scored: perplexity needs no more, and reads everything
KEPT = ("id", "group_id", "style", "style_group", "prompt", "context", "reference")
Row = dict[str, Any]


def generate_all(recipe: Recipe, run: Run, rows: list[Row]) -> list[Row]:
    """Rows of generations.jsonl for all systems, reusing what an interrupted call has written.

    The work files lie in the checkpoint folder, whose name holds the stage key: rows made with
    another adapter, recipe or code are in another folder and are never mixed in.
    """
    adapters = {name: run.require(f"{name}/adapter") for name in ("sft", "dpo")}
    for arm in recipe.dpo.comparison_arms:
        adapters[arm] = run.require("dpo/arms") / arm / "adapter"
    folder = run.checkpoint_dir("evaluation", recipe)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("base", *adapters)}
    done = {name: {row["id"]: row for row in recover_lines(path)} for name, path in files.items()}
    todo = {name: [row for row in rows if row["id"] not in done[name]] for name in files}
    if any(todo.values()):
        model, tokenizer = load_systems(recipe, adapters), load_tokenizer(recipe)
        check_lengths(model, tokenizer, rows, recipe.evaluation.max_new_tokens)
        scored = {row["id"] for row in rows[:SCORED]}
        for name, missing in todo.items():
            bar = tqdm(total=len(missing), desc=name, unit="summary")
            with use_system(model, name), files[name].open("a", encoding="utf-8") as file, bar:
                for made in generate_batches(model, tokenizer, missing, scored, recipe):
                    done[name] |= {row["id"]: row | {"system": name} for row in made}
                    append_lines(file, (done[name][row["id"]] for row in made))
                    bar.update(len(made))
    return [done[name][row["id"]] for name in files for row in rows]


def check_lengths(model: Any, tokenizer: Any, rows: list[Row], longest: int) -> None:
    """Raise DataError for a prompt that, with a summary of `longest` tokens, passes what the model
    was built for: it would go on without a warning and write worse."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        size = len(encode_completion(tokenizer, row["prompt"], "")[0])
        if limit and size + longest > limit:
            raise DataError(
                f"the prompt of test item {row['id']!r} has {size} tokens; with {longest} new ones "
                f"it passes the model's {limit}",
                "shorten or drop the note in your source file, lower evaluation.max_new_tokens, or "
                "choose a model with a longer context",
            )


def generate_batches(
    model: Any, tokenizer: Any, rows: list[Row], scored: set[str], recipe: Recipe
) -> Iterator[list[Row]]:
    """Batch by batch, what the model writes on `rows`, greedily, beside what they hold and, for the
    ids in `scored`, how likely the reference is."""
    size, longest = recipe.evaluation.batch_size, recipe.evaluation.max_new_tokens
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        outputs = generate_summaries(
            model, tokenizer, [row["prompt"] for row in batch], batch_size=size,
            max_new_tokens=longest,
        )  # fmt: skip
        made = []
        for row, (output,) in zip(batch, outputs, strict=True):
            written = {"text": output.text, "finish_reason": output.finish_reason,
                       "n_tokens": len(output.token_ids)}  # fmt: skip
            if row["id"] in scored:
                written |= score_reference(model, tokenizer, row, recipe.model.max_length)
            made.append({name: row[name] for name in KEPT} | written)
        yield made


@torch.no_grad()
def score_reference(model: Any, tokenizer: Any, row: Row, longest: int) -> dict[str, float]:
    """How likely the reference is: {reference_logp (nats), reference_hits (tokens that were the
    most likely), reference_tokens}; {} for an empty one, and where prompt and reference have more
    than `longest` tokens: cut, it would be another text."""
    coded = encode_completion(tokenizer, row["prompt"], row["reference"])
    if not row["reference"].strip() or sum(map(len, coded)) > longest:
        return {}
    logps, hits = score_completions(model, *(t.to(model.device) for t in pad_rows([coded], 0)))
    logp = round(float(logps.double().sum()), 4)
    hits = int(hits.sum())
    return {"reference_logp": logp, "reference_hits": hits, "reference_tokens": len(coded[1])}
