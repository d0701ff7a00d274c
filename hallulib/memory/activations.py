"""What a forward and backward pass keep, as formulas over a decoder's shape.

The terms follow the tensors that Hugging Face's Llama-like decoders save for the backward pass.
They were checked against traces of the real step and against published GPU measurements
(`tests/unit/test_memory_budget.py` has both); they remain an estimate: expect a few percent, more
on other architectures.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from hallulib.errors import ModelError
from hallulib.recipe import LoraSection
from hallulib.scoring import LOGITS_PER_CHUNK

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that decide memory."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> DecoderShape:
        """Read a Hugging Face configuration. Raises ModelError when it is not a decoder's."""
        try:
            hidden, heads = config.hidden_size, config.num_attention_heads
            return cls(
                hidden=hidden,
                intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
                layers=config.num_hidden_layers,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_dim=getattr(config, "head_dim", None) or hidden // heads,
                vocabulary=config.vocab_size,
                positions=config.max_position_embeddings,
            )
        except AttributeError as error:
            raise ModelError(
                f"A '{config.model_type}' configuration has not the sizes of a decoder ({error}).",
                "Give the configuration of a decoder such as Llama, Mistral or Qwen.",
            ) from None


@dataclass(frozen=True)
class Step:
    """One forward (and backward): `rows` sequences of `tokens`, of which `scored` are completion.

    `head`: "chunked" is this project's, logits of the completion, a few at a time; "completion"
    all of these at once; "full" every position, as trainers do by default.
    """

    rows: int
    tokens: int
    scored: int
    dtype_bytes: int
    trains: bool
    checkpointing: bool
    quantization: str
    attention: str
    head: str = "chunked"

    @property
    def all_tokens(self) -> int:
        """Tokens of the padded batch."""
        return self.rows * self.tokens


def layer_bytes_per_token(shape: DecoderShape, lora: LoraSection, step: Step) -> int:
    """Bytes that one layer saves per token for its backward pass.

    Frozen linear layers save nothing; a layer with LoRA saves its input. Norms save theirs in fp32.
    SDPA without a padding mask takes the keys and values as they are; eager attention repeats them
    to all heads and keeps the scores after their softmax.
    """
    size, width = step.dtype_bytes, shape.heads * shape.head_dim
    norms = 2 * (4 * shape.hidden + 4)
    if step.attention == "eager":
        score = 4 + (size if size < 4 else 0)
        attention = 3 * size * width + shape.heads * step.tokens * score
    else:
        keys_values = 2 * shape.kv_heads * shape.head_dim
        attention = size * (2 * width + keys_values) + 4 * shape.heads
    mlp = 3 * size * shape.intermediate  # gate, its activation, up
    return norms + attention + mlp + _lora_inputs(shape, lora, step)


def _lora_inputs(shape: DecoderShape, lora: LoraSection, step: Step) -> int:
    """Bytes per token of what the LoRA layers save: their input and the r numbers in between.

    The adapter is fp32. In fp32 layers share an input; in 16 bits each casts a copy of its own.
    """
    adapted = [name for name in (*_ATTENTION, *_MLP) if _has_lora(lora, name)]
    width = {name: shape.hidden for name in adapted}
    width |= {"o_proj": shape.heads * shape.head_dim, "down_proj": shape.intermediate}
    if step.dtype_bytes < 4:
        inputs = sum(width[name] for name in adapted)
    else:
        shares = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        inputs = sum(width[name] for name in {shares.get(name, name) for name in adapted})
        if step.attention == "sdpa" and "o_proj" in adapted:
            inputs -= width["o_proj"]  # it is the output that attention saves anyway
    return 4 * (inputs + len(adapted) * lora.r)


def _has_lora(lora: LoraSection, name: str) -> bool:
    return lora.target_modules == "all-linear" or name in lora.target_modules


def activation_bytes(shape: DecoderShape, lora: LoraSection, step: Step) -> int:
    """Bytes that the forward pass keeps for the backward pass, at the end of forward."""
    if not step.trains:
        return 2 * step.all_tokens * shape.hidden * step.dtype_bytes  # the residual stream
    kept = step.all_tokens * shape.layers * shape.hidden * step.dtype_bytes
    if not step.checkpointing:
        kept = step.all_tokens * shape.layers * layer_bytes_per_token(shape, lora, step)
    return kept + _int8_inputs(shape, step)


def _int8_inputs(shape: DecoderShape, step: Step) -> int:
    """bitsandbytes' int8 layers hold on to their inputs in a way that non-reentrant checkpointing
    cannot drop, so these stay with checkpointing on or off."""
    if step.quantization != "int8":
        return 0
    width = shape.heads * shape.head_dim
    per_token = 2 * (2 * shape.hidden + width + shape.intermediate)
    return step.all_tokens * shape.layers * per_token


def layer_peak_bytes(shape: DecoderShape, lora: LoraSection, step: Step) -> int:
    """Bytes one layer needs on top while it is worked on: its saved tensors where they are
    recomputed, the temporaries of its backward pass, and the widest weight unpacked."""
    temporaries = 3 * step.dtype_bytes * shape.intermediate
    if step.attention == "eager":  # gradient of the scores, in both types
        temporaries += shape.heads * step.tokens * (4 + step.dtype_bytes)
    unpacked = 0
    if step.quantization == "nf4":
        unpacked = shape.hidden * shape.intermediate * step.dtype_bytes
    if step.trains and step.checkpointing:
        temporaries += layer_bytes_per_token(shape, lora, step)
    return step.all_tokens * temporaries + unpacked


def logit_bytes(shape: DecoderShape, step: Step) -> int:
    """Bytes of vocabulary-sized tensors at their widest.

    The loss of a trainer holds, for every position, the logits, their fp32 copy, the log-softmax
    and its gradient: 12 bytes and the logits' own type per entry. A gathered log-softmax of the
    completion holds 8. This project's chunks hold the log-softmax and two gradients, and in 16
    bits the logits' own gradient, for at most `LOGITS_PER_CHUNK` entries.
    """
    size, entries = step.dtype_bytes, step.rows * step.scored * shape.vocabulary
    if step.head == "full":
        return step.all_tokens * shape.vocabulary * (12 + size)
    if step.head == "completion":
        return entries * 8
    chunk = max(LOGITS_PER_CHUNK, shape.vocabulary)
    if not step.trains:
        return min(entries, chunk) * (8 if size == 4 else 10)
    return min(entries, chunk) * (12 if size == 4 else 14)
