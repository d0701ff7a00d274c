"""The model card, filled from the run's files only: nothing in it was typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hallulib.evaluation.report import headline_table, result_sentences
from hallulib.paths import write_text_atomic
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
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "dpo/adapter")
```
"""
_LIMITS = {
    "clinic": "The notes are made up by a generator; real clinical text is longer and untidier.",
    "medhal": "MedHal's statements are partly written by language models.",
    "file": "The data are the user's own and are not described here.",
}


def write_model_card(path: Path, recipe: Recipe, run: Run, summary: dict[str, Any]) -> None:
    """Write the card of the DPO adapter as Markdown with Hugging Face metadata."""
    data = ModelCardData(
        library_name="peft", pipeline_tag="text-generation", language="en",
        base_model=recipe.model.name_or_path, model_name=recipe.name,
        tags=["lora", "dpo", "summarization", "clinical", "hallucination", "education"],
    )  # fmt: skip
    text = _TEXT.format(
        metadata=data.to_yaml(), name=recipe.name, description=recipe.description,
        base=recipe.model.name_or_path, revision=recipe.model.revision,
        quantization=recipe.model.quantization, dtype=recipe.model.dtype,
        source=recipe.data.source, counts=_read_counts(run), sft_steps=recipe.sft.max_steps,
        beta=recipe.dpo.beta, sft_weight=recipe.dpo.sft_weight, dpo_steps=recipe.dpo.max_steps,
        seed=recipe.seed, origin=recipe.pairs.origin, judge=recipe.pairs.judge,
        detector=summary["detector"], n=summary["n"], table=headline_table(summary),
        sentences="\n".join(f"- {sentence}" for sentence in result_sentences(summary)),
        data_limit=_LIMITS[recipe.data.source],
    )  # fmt: skip
    write_text_atomic(path, str(ModelCard(text)))


def _read_counts(run: Run) -> str:
    """Rows per split as the data stage's audit counted them."""
    splits = json.loads(run.require("data/audit.json").read_text("utf-8"))["splits"]
    return ", ".join(f"{name} {part['rows']}" for name, part in splits.items())
