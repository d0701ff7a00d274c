"""Attention for rows that share a prompt: the prompt runs once, both completions read it.

All pairs of a batch stand in one row, [prompt | chosen | rejected] after [prompt | chosen |
rejected], without padding. The prompt sees itself causally; a completion sees the prompt and
itself. A function registered with transformers' own attention interface does this pair by pair
with plain scaled_dot_product_attention, so it runs wherever that does (CPU, MPS, CUDA), skips what
a mask would compute only to discard, and patches no model class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "prefix_sharing"


@dataclass(frozen=True)
class PairLayout:
    """Where the pairs of one row lie: `lengths` holds (prompt, chosen, rejected) tokens of each.

    A rejected length of 0 is a row without its rejected completion.
    """

    lengths: tuple[tuple[int, int, int], ...]
    masks: dict = field(default_factory=dict, compare=False, repr=False)

    def blocks(self) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """Return (start, stop, spans of keys) of every stretch of queries, in order of the row."""
        found, at = [], 0
        for prompt, chosen, rejected in self.lengths:
            end, both = at + prompt, at + prompt + chosen
            found.append((at, end, ((at, end),)))
            found.append((end, both, ((at, both),)))
            if rejected:
                found.append((both, both + rejected, ((at, end), (both, both + rejected))))
            at = both + rejected
        return found

    def mask(
        self, queries: int, keys: int, window: int | None, like: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the additive mask (queries, keys) of the last `queries` of `keys` positions.

        None where the plain causal path does. Masks are kept: every layer asks for the same ones.
        """
        if window is not None and window >= keys:
            window = None
        if queries == keys and window is None:
            return None
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self.masks:
            rows = torch.arange(keys - queries, keys, device=like.device)[:, None]
            columns = torch.arange(keys, device=like.device)
            seen = columns <= rows
            if window is not None:
                seen &= rows - columns < window
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            self.masks[key] = torch.where(seen, zero, float("-inf"))[None, None]
        return self.masks[key]


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pair_layout: PairLayout | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attend block by block where the row has a layout, and as plain SDPA everywhere else.

    query, key, value: (1, heads, tokens, width). Returns (1, tokens, heads, width).
    """
    if pair_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for start, stop, spans in pair_layout.blocks():
        keys, values = (_gather(states, spans) for states in (key, value))
        mask = pair_layout.mask(stop - start, keys.shape[2], sliding_window, query)
        part, _ = sdpa_attention_forward(
            module, query[:, :, start:stop], keys, values, mask, **kwargs | {"is_causal": None}
        )
        outputs.append(part)
    return torch.cat(outputs, dim=1), None


def _gather(states: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    parts = [states[:, :, start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def enable_prefix_sharing(model: PreTrainedModel) -> None:
    """Let `model` take the keyword `pair_layout`; calls without it attend as before, with SDPA."""
    AttentionInterface.register(NAME, shared_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
