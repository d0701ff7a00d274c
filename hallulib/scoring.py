"""Score completions: tokens of prompt and completion, and their log-probabilities.

Used by SFT and DPO alike. Only positions that predict a completion token pass through the
language-model head, which for a small model is a large share of the work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from hallulib.errors import HallulibError
from hallulib.models import render_prompt

# Logits alive at a time: 2**24 float32 values are 64 MiB, whatever the size of the vocabulary.
LOGITS_PER_CHUNK = 2**24


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    """Return token ids of the rendered prompt and of the completion, which ends in one EOS.

    Prompt and prompt + completion are tokenised separately and the completion starts where the
    two part, so a token that merges across the boundary is scored and not lost.
    """
    text = render_prompt(tokenizer, prompt)
    alone = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer(text + completion, add_special_tokens=False).input_ids
    cut = 0
    while cut < min(len(alone), len(whole)) and alone[cut] == whole[cut]:
        cut += 1
    end = tokenizer.eos_token_id
    return whole[:cut], [token for token in whole[cut:] if token != end] + [end]


def pad_rows(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input_ids and completion mask (bool), both (rows, tokens), padded on the right."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor(prompt + completion)
        mask[i, len(prompt) : end] = True
    return input_ids, mask


def score_completions(
    model: Module, input_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return, for each True of `completion_mask[:, 1:]` in row order, a log-prob and a hit.

    Both are flat: log-probabilities in float32 (nats, with a gradient where the policy has one)
    and bool, whether the token was the most likely one. Rows must be padded on the right: under
    causal attention no real token then sees padding, and no attention mask is needed.
    """
    hidden = read_hidden_states(model, input_ids=input_ids)
    scored = completion_mask[:, 1:]
    return score_tokens(model, hidden[:, :-1][scored], input_ids[:, 1:][scored])


def unwrap_model(model: Module) -> Module:
    """Return the causal language model within a PeftModel; its LoRA layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_hidden_states(model: Module, **inputs: Any) -> Tensor:
    """Return the last hidden states (rows, tokens, width), without passing the head.

    Raises HallulibError where a model changes the logits after the head: scoring past that would
    be wrong.
    """
    base = unwrap_model(model)
    config = base.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise HallulibError(
                f"{type(base).__name__} changes its logits after the head ({name}).",
                "Choose a model without it, such as Llama, Mistral or Qwen2.5.",
            )
    return base.base_model(**inputs, use_cache=False).last_hidden_state


def score_tokens(model: Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-prob (float32, nats) and hit of each of `targets` (tokens,), from the states
    `hidden` (tokens, width) that predict them.

    The head runs in chunks of tokens, so its memory does not grow with the batch.
    """
    base = unwrap_model(model)
    head = base.get_output_embeddings()
    size = max(1, LOGITS_PER_CHUNK // base.config.get_text_config().vocab_size)

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float()
        return -cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    # One chunk keeps its logits for the backward pass; several are recomputed there one by one.
    recompute = len(chunks) > 1 and torch.is_grad_enabled()
    scores = [checkpoint(score, *chunk, use_reentrant=False) if recompute else score(*chunk)
              for chunk in chunks]  # fmt: skip
    logps, hits = zip(*scores, strict=True)
    return torch.cat(logps), torch.cat(hits)
