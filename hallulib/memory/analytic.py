"""The fallback for a model that does not run on fake tensors: an estimate, marked as one.

Kept activations follow a closed form for Llama-like decoders; expect 10 %, more elsewhere.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from hallulib.errors import HallulibError
from hallulib.memory.counts import count_parameters
from hallulib.memory.steps import StepShape
from hallulib.memory.strategies import Strategy
from hallulib.recipe import Recipe
from hallulib.scoring import LOGITS_PER_CHUNK

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate_terms(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, shape: StepShape
) -> dict[str, int]:
    """Return estimated bytes by term. Raises HallulibError where the sizes are not a decoder's."""
    counts, size = count_parameters(config, recipe.lora), BYTES[recipe.model.dtype]
    text = config.get_text_config()
    try:
        hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    except AttributeError as error:
        raise HallulibError(
            f"A '{config.model_type}' configuration has not the sizes of a decoder ({error}).",
            "Give the configuration of a decoder such as Llama, Mistral or Qwen.",
        ) from None
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    tokens = shape.rows * shape.tokens * (1 if plan.runs == "sft" else 2)
    # A layer keeps its norms' and LoRA's inputs in fp32, attention's and the MLP's in `size`.
    layer = tokens * (20 * hidden + 4 * hidden * size + 3 * wide * size)
    kept = layers * (tokens * hidden * size if recipe.model.gradient_checkpointing else layer)
    scored = tokens * shape.completion // shape.tokens * vocabulary
    if shape.head == "chunked":
        scored = min(scored, max(LOGITS_PER_CHUNK, vocabulary))
    quantization, trained = recipe.model.quantization, counts.lora if plan.trains else 0
    return {
        "base_weights": plan.base_copies * counts.base_bytes(quantization, size),
        "quantisation_constants": plan.base_copies * counts.constant_bytes(quantization),
        "lora_weights": 4 * counts.lora * plan.adapter_copies,
        "gradients": 4 * trained,
        "optimiser_states": 8 * trained,
        "activations": kept if plan.trains else 2 * tokens * hidden * size,
        "logits": 12 * scored,
        "temporaries": layer if plan.trains and recipe.model.gradient_checkpointing else 0,
    }
