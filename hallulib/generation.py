"""Batched generation with a shared prompt: many samples per note for the price of few.

All samples of a prompt live in one row. Each step adds one token per sample to the row, and a
4-D mask lets a sample see the prompt and its own tokens only, so the prompt's keys and values are
stored and read once however many samples are drawn. It needs no change to the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import Cache, DynamicLayer

from hallulib.errors import RecipeError
from hallulib.models import fold_adapter, render_prompt

DROP_SHARE = 0.25  # finished rows leave the batch when they are at least this share of it


@dataclass(frozen=True)
class Generation:
    """One generated summary; `finish_reason` is "stop" (it ended itself) or "length" (cut off).

    `token_ids` are the tokens generated before the end token.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


@torch.no_grad()
def generate_summaries(
    model: torch.nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], *,
    batch_size: int, max_new_tokens: int, temperature: float = 0.0, num_samples: int = 1,
    seed: int = 0,
) -> list[list[Generation]]:  # fmt: skip
    """Return `num_samples` summaries for each prompt, in the order of `prompts`.

    `batch_size` counts summaries generated at a time. Temperature 0 takes the most likely token;
    otherwise the random numbers of a sample depend only on (seed, prompt, sample), not on the
    batch it is in, so a pass done in pieces gives what it gives in one. The model is put in
    evaluation mode.
    """
    if temperature == 0 and num_samples > 1:
        raise RecipeError(
            "Several samples at temperature 0 would all be the same.", "Set a temperature above 0."
        )
    model.eval()
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    rows = max(1, batch_size // num_samples)
    results: list[list[Generation]] = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        draws = None
        if temperature > 0:
            draws = [draw_numbers(seed, prompts[i], num_samples, max_new_tokens) for i in chosen]
        own = [encoded[i] for i in chosen]
        batch = GenerationBatch(model, tokenizer, own, num_samples, max_new_tokens)
        with fold_adapter(model):
            decoded = batch.run(temperature, draws)
        for i, tokens in zip(chosen, decoded, strict=True):
            for ids, stopped in tokens:
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                results[i].append(Generation(text, ids, "stop" if stopped else "length"))
    return results


def limit_new_tokens(tokenizer: Tokenizer, references: Iterable[str]) -> int:
    """Return a quarter more than the longest reference, in tokens: room to end, not to run on."""
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in references]
    return max(lengths) + max(lengths) // 4 + 1


def draw_numbers(seed: int, prompt: str, num_samples: int, length: int) -> np.ndarray:
    """Return uniform numbers (num_samples, length) that depend on seed, prompt and sample only."""
    rows = []
    for sample in range(num_samples):
        key = int.from_bytes(sha256(f"{seed}\0{sample}\0{prompt}".encode()).digest()[:16], "big")
        rows.append(np.random.Generator(np.random.Philox(key=key)).random(length))
    return np.stack(rows).astype(np.float32)


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for all tokens to come, so that a step copies nothing old."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.room = [self._make_room(states) for states in (key_states, value_states)]
        end = self.length + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = states
        self.length = end
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        for i, used in enumerate((self.keys, self.values)):
            used = used[rows]
            self.room[i] = self._make_room(used)
            self.room[i][:, :, : self.length] = used

    def _make_room(self, states: Tensor) -> Tensor:
        rows, heads, _, size = states.shape
        return states.new_empty((rows, heads, self.capacity, size))


class GenerationBatch:
    """Prompts decoded together: rows of one prompt each, `samples` columns a row."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: Tokenizer, prompts: list[list[int]],
        samples: int, max_new_tokens: int,
    ) -> None:  # fmt: skip
        self.model, self.samples, self.max_new_tokens = model, samples, max_new_tokens
        self.device = next(model.parameters()).device
        # What ends a summary: the tokenizer's EOS and the tokens that the model declares.
        declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        more = declared if isinstance(declared, list) else [declared]
        stops = {tokenizer.eos_token_id, *more} - {None}
        self.stop_ids = torch.tensor(sorted(stops), device=self.device)
        self.pad_id = tokenizer.pad_token_id
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.width = int(self.lengths.max())
        ids = [[self.pad_id] * (self.width - len(prompt)) + prompt for prompt in prompts]
        self.prompt_ids = torch.tensor(ids, device=self.device)
        capacity = self.width + samples * max_new_tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[_RoomyLayer(capacity) for _ in range(layers)])

    def run(
        self, temperature: float, draws: list[np.ndarray] | None
    ) -> list[list[tuple[list[int], bool]]]:
        """Decode; returns per prompt and sample the token ids and whether a stop token came."""
        count, steps = len(self.lengths), self.max_new_tokens
        uniform = None if draws is None else torch.tensor(np.stack(draws), device=self.device)
        tokens = torch.full((count, self.samples, steps), self.pad_id, device=self.device)
        ends = torch.full((count, self.samples), steps, device=self.device)
        live = torch.arange(count, device=self.device)  # which prompt each row of the batch is
        logits = self.read_prompts()
        mask = self.build_mask()
        for step in range(steps):
            draw = None if uniform is None else uniform[live, :, step]
            next_ids = choose_tokens(logits, temperature, draw)
            open_ = ends[live] == steps
            stops = torch.isin(next_ids, self.stop_ids) & open_
            ends[live] = torch.where(stops, step, ends[live])
            tokens[live, :, step] = next_ids
            done = (ends[live] < steps).all(1)
            if done.all() or step + 1 == steps:
                break
            if done.float().mean() >= DROP_SHARE:
                keep = (~done).nonzero()[:, 0]
                live, next_ids, mask = live[keep], next_ids[keep], mask[keep]
                for layer in self.cache.layers:
                    layer.keep_rows(keep)
            logits = self.read_step(next_ids, mask, self.lengths[live] + step, step)
        return [
            [(row[:end], end < steps) for row, end in zip(rows, row_ends, strict=True)]
            for rows, row_ends in zip(tokens.tolist(), ends.tolist(), strict=True)
        ]

    def read_prompts(self) -> Tensor:
        """Logits (rows, samples, vocabulary) of the first token; the same for each sample."""
        columns = torch.arange(self.width, device=self.device)
        seen = columns >= self.width - self.lengths[:, None]
        logits = self.model(
            input_ids=self.prompt_ids, attention_mask=seen.long(),
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return logits.expand(-1, self.samples, -1)

    def build_mask(self) -> Tensor:
        """Additive mask (rows, 1, samples, capacity): own prompt and own sample's tokens."""
        columns = torch.arange(self.width, device=self.device)
        prompt = columns >= self.width - self.lengths[:, None]
        prompt = prompt[:, None, :].expand(-1, self.samples, -1)
        own = torch.eye(self.samples, dtype=torch.bool, device=self.device)
        own = own.repeat(1, self.max_new_tokens).expand(len(prompt), -1, -1)
        visible = torch.cat([prompt, own], dim=2)[:, None]
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
        return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)

    def read_step(self, ids: Tensor, mask: Tensor, position: Tensor, step: int) -> Tensor:
        """Logits (rows, samples, vocabulary) of the token after `ids`, the step-th of each."""
        used = self.width + (step + 1) * self.samples
        return self.model(
            input_ids=ids, attention_mask=mask[..., :used],
            position_ids=position[:, None].expand(-1, self.samples),
            past_key_values=self.cache, use_cache=True,
        ).logits  # fmt: skip


def choose_tokens(logits: Tensor, temperature: float, draw: Tensor | None) -> Tensor:
    """Next tokens (rows, samples): the most likely, or where `draw` falls on the distribution."""
    if draw is None:
        return logits.argmax(-1)
    summed = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # The first token whose cumulated probability exceeds the draw (inverse transform sampling).
    found = torch.searchsorted(summed, draw[..., None] * summed[..., -1:], right=True)[..., 0]
    return found.clamp(max=logits.shape[-1] - 1)
