"""How fast this machine really is: a few training steps, timed, as operations a second."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hallulib.memory.counts import count_parameters
from hallulib.memory.steps import StepShape, make_rows, sft_loss
from hallulib.models import attach_adapter
from hallulib.recipe import load_recipe

# Wide enough that time goes into matrices, as in a large model; a step takes a second or so.
SHAPE = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, vocab_size=4096,
)  # fmt: skip
TOKENS, STEPS = 256, 4


def measure_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return operations a second of SFT steps with LoRA here: the median of a few, after one.

    A step is a forward and a backward pass through frozen weights: 2 x 2 operations per weight
    and token.
    """
    recipe = load_recipe("tiny-cpu", {"model.device": device})
    base = LlamaForCausalLM(SHAPE).to(device, dtype).requires_grad_(False)
    policy = attach_adapter(base, recipe).train()
    batch = make_rows(StepShape(rows=1, tokens=TOKENS, completion=TOKENS // 2))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    seconds = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        sft_loss(policy, batch).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    work = 2 * 2 * count_parameters(SHAPE, recipe.lora).linear * TOKENS
    return work / statistics.median(seconds[1:])


def project_days(parameters: int, tokens: int, passes: int, rate: float) -> float:
    """Return the days that `passes` over `tokens` take at `rate` operations a second.

    A pass costs 2 operations per parameter and token. A projection, not a promise: memory that is
    too small for the model makes it many times longer.
    """
    return 2 * parameters * tokens * passes / rate / 86_400
