"""The model card, filled from the run's files only: nothing in it was typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hallulib.evaluation.metrics import PRIMARY
from hallulib.evaluation.report import headline_table, result_sentences
from hallulib.files import display_path, resolve_path, write_text_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run

_TEXT = """---
{metadata}
---

# {name}: a LoRA adapter that invents less in clinical summaries

{description}

**For teaching and research. Not a medical device; do not use it for the care of patients.**

## How it was made

- Base model: `{base}` (revision `{revision}`, quantisation {quantization}, {dtype})
- Data: source `{source}`, rows {counts}
- SFT: {sft_steps} steps; DPO: beta {beta}, SFT term {sft_weight}, {dpo_steps} steps, seed {seed}
- Pairs: {origin}, judged by `{judge}`; reported here by `{detector}`

{stages}

## What was measured on {n} held-out items

{table}

{sentences}

## Limits

- The figures hold for this data, these {n} items and this seed; other text was not measured.
- "Hallucinated" means: not supported by the note, as `{detector}` sees it. Nobody has checked
  whether a supported statement matters to a patient.
- {data_limit}

## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "dpo/adapter")
```

The prompt it was trained with, in the tokenizer's chat template where it has one:

```text
{prompt}
```
"""
_LIMITS = {
    "clinic": "The notes are made up by a generator; real clinical text is longer and untidier.",
    "medhal": "MedHal's statements are partly written by language models.",
    "file": "The data are the user's own and are not described here.",
}
_OTHER_LIMIT = "The data are not described here."


def write_model_card(path: Path, recipe: Recipe, run: Run, summary: dict[str, Any]) -> None:
    """Write the card of the DPO adapter as Markdown with Hugging Face metadata."""
    base = _name_base(recipe)
    text = _TEXT.format(
        metadata=_describe(recipe, summary).to_yaml(), name=recipe.name,
        description=recipe.description, base=base, revision=recipe.model.revision,
        quantization=recipe.model.quantization, dtype=recipe.model.dtype,
        source=recipe.data.source, counts=_read_counts(run), sft_steps=recipe.sft.max_steps,
        beta=recipe.dpo.beta, sft_weight=recipe.dpo.sft_weight, dpo_steps=recipe.dpo.max_steps,
        seed=recipe.seed, origin=recipe.pairs.origin, judge=recipe.pairs.judge,
        detector=summary["detector"], n=summary["n"], table=headline_table(summary),
        sentences="\n".join(f"- {sentence}" for sentence in result_sentences(summary)),
        data_limit=_LIMITS.get(recipe.data.source, _OTHER_LIMIT), stages=_list_stages(run),
        prompt=recipe.data.prompt_template,
    )  # fmt: skip
    write_text_atomic(path, str(ModelCard(text)))


def _describe(recipe: Recipe, summary: dict[str, Any]) -> ModelCardData:
    """The metadata block; the hub shows its `model-index`. A local base model has no hub id."""
    rate = summary["systems"]["dpo"]["rates"][PRIMARY] if "dpo" in summary["systems"] else None
    results = None
    if rate:
        interval = f"95 % {rate['method']} {rate['low']:.4f}-{rate['high']:.4f}"
        results = [EvalResult(
            task_type="summarization", dataset_type=recipe.data.source,
            dataset_name=f"{recipe.data.source}, held out", metric_type=PRIMARY,
            metric_value=rate["value"],
            metric_name=f"{rate['k']} of {rate['n']} {rate['unit']} ({interval}), "
                        f"detector {summary['detector']}",
        )]  # fmt: skip
    is_local = resolve_path(recipe.model.name_or_path).is_dir()
    return ModelCardData(
        library_name="peft", pipeline_tag="text-generation", language="en",
        base_model=None if is_local else recipe.model.name_or_path, model_name=recipe.name,
        eval_results=results,
        tags=["lora", "dpo", "summarization", "clinical", "hallucination", "education"],
    )  # fmt: skip


def _name_base(recipe: Recipe) -> str:
    """The hub id, or the folder as a reader of this project would write it."""
    folder = resolve_path(recipe.model.name_or_path)
    return display_path(folder) if folder.is_dir() else recipe.model.name_or_path


def _list_stages(run: Run) -> str:
    """What each training stage took, as the manifest measured it."""
    return "\n".join(
        f"- {name}: {record['wall_seconds']:.0f} s, peak memory "
        f"{record['peak_memory_bytes'] / 2**30:.2f} GiB, {record['device']}"
        for name, record in run.manifest["stages"].items()
        if name in ("sft", "pairs", "reference", "dpo") and "wall_seconds" in record
    )


def _read_counts(run: Run) -> str:
    """Rows per split as the data stage's audit counted them."""
    splits = json.loads(run.require("data/audit.json").read_text("utf-8"))["splits"]
    return ", ".join(f"{name} {part['rows']}" for name, part in splits.items())
