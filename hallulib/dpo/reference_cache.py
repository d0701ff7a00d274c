"""The reference pass, done once: per-token log-probabilities of every completion, kept on disk.

`reference/<key>/` holds manifest.json (what the key is made of, in plain words) and parquet
shards. The key covers all that moves the numbers and nothing else; within it each row is found by
the content of its pair, so reordered or added pairs recompute nothing that is already there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hallulib.dpo.batching import TokenPair, collate_pairs, tokenise_pairs
from hallulib.dpo.logprobs import CHECKED_PAIRS, choose_layout, completion_logps
from hallulib.errors import GateFailed, storage_guard
from hallulib.models import load_policy, load_tokenizer
from hallulib.paths import display_path, sha256_text, write_json_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

SCHEMA = 1
# Largest difference of a token's log-prob (nats) between a stored row and the same row computed
# again in a batch of another shape; measured: 1e-4 in float32, 0.02 in bfloat16.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.1}
COLUMNS = ("address", "chosen_logps", "rejected_logps")


@dataclass(frozen=True)
class ReferenceResult:
    """What the reference pass did: `computed` pairs this time, `reused` ones found in the cache."""

    folder: Path
    key: str
    pairs: int
    computed: int
    reused: int
    prompts_shared: bool
    bytes: int
    notes: dict[str, Any] = field(default_factory=dict)


def load_reference_result(run: Run) -> ReferenceResult:
    """Read the result of a finished reference pass back from the run."""
    notes = run.manifest["stages"]["reference"]["notes"]
    return ReferenceResult(run.path("reference") / notes["key"][:16], **notes, notes=notes)


@stage("reference", load=load_reference_result)
def cache_reference(recipe: Recipe, run: Run) -> ReferenceResult:
    """Compute and store the SFT policy's log-probs of all pairs, training and validation.

    An interrupted pass goes on at the first pair that is not stored. Raises DataError when no
    pair fits model.max_length.
    """
    tokenizer = load_tokenizer(recipe)
    pairs = []
    for split in ("train", "validation"):
        kept, dropped = load_pairs(run, split, tokenizer, recipe.model.max_length)
        pairs += kept
        for reason, count in dropped.items():
            print(f"reference: {count} {split} pairs left out, {reason}")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    cache = ReferenceCache.open(run.path("reference"), recipe, policy, tokenizer)
    layout = choose_layout(policy, pairs[:CHECKED_PAIRS], tokenizer.pad_token_id, recipe)
    print(layout)
    computed = cache.fill(policy, pairs, tokenizer.pad_token_id, recipe, layout.shared)
    distinct = len({pair.address for pair in pairs})
    notes = {
        "key": cache.key,
        "pairs": distinct,
        "computed": computed,
        "reused": distinct - computed,
        "prompts_shared": layout.shared,
        "bytes": sum(file.stat().st_size for file in cache.folder.glob("shard-*.parquet")),
    }
    return ReferenceResult(cache.folder, **notes, notes=notes)


def load_pairs(
    run: Run, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[TokenPair], dict[str, int]]:
    """Return the tokenised pairs of a split and how many were left out, by reason."""
    path = run.require(f"pairs/{split}.parquet")
    frame = pd.read_parquet(path, columns=["prompt", "chosen", "rejected"])
    return tokenise_pairs(tokenizer, frame.to_dict("records"), max_length)


def fingerprint_reference(
    recipe: Recipe, policy: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return all that moves a log-prob, by name; their hash is the cache's key.

    Weights are hashed as they are in memory, so it does not matter whether they came from a
    folder or the hub, nor what the folder is called. Learning rate, beta and seed are not in it.
    """
    adapter = {n: t for n, t in policy.state_dict().items() if "lora_" in n}
    base = {n: t for n, t in policy.state_dict().items() if "lora_" not in n}
    config = policy.peft_config["default"]
    return {
        "schema": SCHEMA,
        "base_weights": _hash_tensors(base),
        "adapter_weights": _hash_tensors(adapter),
        "adapter_scale": f"{config.lora_alpha}/{config.r}",
        "tokenizer": _hash_tokenizer(tokenizer),
        "chat_template": sha256_text(str(tokenizer.chat_template)),
        "max_length": recipe.model.max_length,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "quantization": recipe.model.quantization,
    }


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call; they add padding or cut, neither of which is scored.
    for name in ("padding", "truncation"):
        state.pop(name, None)
    return sha256_text(json.dumps(state, sort_keys=True))


def _hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ReferenceCache:
    """The stored rows of one key: pair address -> per-token float32 log-probs of both sides."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder, self.fields = folder, fields
        self.key = _hash_fields(fields)
        self.rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(
        cls, root: Path, recipe: Recipe, policy: PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> ReferenceCache:
        """Open, or start, the cache that belongs to this policy below `root`."""
        fields = fingerprint_reference(recipe, policy, tokenizer)
        cache = cls(root / _hash_fields(fields)[:16], fields)
        if (cache.folder / "manifest.json").exists():
            cache._read_shards()
        return cache

    def _read_shards(self) -> None:
        for file in sorted(self.folder.glob("shard-*.parquet")):
            try:
                table = pq.read_table(file, page_checksum_verification=True).to_pydict()
            except (pa.ArrowInvalid, OSError):
                file.unlink()  # damaged on disk: its rows are computed again
                continue
            for address, chosen, rejected in zip(*(table[c] for c in COLUMNS), strict=True):
                self.rows[address] = (np.float32(chosen), np.float32(rejected))

    def fill(
        self,
        policy: PeftModel,
        pairs: Sequence[TokenPair],
        pad_id: int,
        recipe: Recipe,
        shared: bool = False,
    ) -> int:
        """Compute and store the pairs that are missing; returns how many there were.

        The order is free here, so rows are sorted by length (padding nearly vanishes), longest
        first (running out of memory shows at once). Each shard is written whole and then renamed.
        """
        missing = {pair.address: pair for pair in pairs if pair.address not in self.rows}
        todo = sorted(missing.values(), key=lambda pair: (-pair.length, pair.address))
        with storage_guard(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.folder / "manifest.json", self._describe(complete=not todo))
        bar = tqdm(total=len(todo), desc="reference pass", unit="pair", disable=not todo)
        for start in range(0, len(todo), recipe.reference.shard_size):
            shard = todo[start : start + recipe.reference.shard_size]
            for first in range(0, len(shard), recipe.reference.batch_size):
                batch = shard[first : first + recipe.reference.batch_size]
                found = compute_logps(policy, batch, pad_id, shared)
                self.rows |= {p.address: row for p, row in zip(batch, found, strict=True)}
                bar.update(len(batch))
            self._write_shard(shard)
        bar.close()
        write_json_atomic(self.folder / "manifest.json", self._describe(complete=True))
        return len(todo)

    def _write_shard(self, shard: Sequence[TokenPair]) -> None:
        taken = [int(f.stem.partition("-")[2]) for f in self.folder.glob("shard-*.parquet")]
        path = self.folder / f"shard-{max(taken, default=-1) + 1:05d}.parquet"
        addresses = [pair.address for pair in shard]
        values = [[self.rows[a][side] for a in addresses] for side in (0, 1)]
        kind = pa.list_(pa.float32())
        table = pa.table(
            [pa.array(addresses), *(pa.array(side, type=kind) for side in values)], names=COLUMNS
        )
        temporary = path.with_name(f".{path.name}.tmp")
        with storage_guard(path):
            pq.write_table(table, temporary, write_page_checksum=True)
            os.replace(temporary, path)

    def _describe(self, complete: bool) -> dict[str, Any]:
        what = "per-token log-probabilities (float32, nats) of the reference, the SFT policy"
        return {
            "what": what, "key": self.key, "complete": complete, "rows": len(self.rows),
            "key_is_made_of": self.fields,
        }  # fmt: skip

    def lookup(self, pairs: Sequence[TokenPair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (chosen, rejected) per-token log-probs of each pair.

        Raises GateFailed for a pair without a row, naming what differs from the caches there are.
        """
        missing = [pair for pair in pairs if pair.address not in self.rows]
        if missing:
            raise GateFailed(
                f"{len(missing)} of {len(pairs)} pairs have no row in the reference cache "
                f"{display_path(self.folder)}. {self._explain_difference()}",
                "Run notebook 04_reference_cache again; only the missing rows are computed.",
            )
        return [self.rows[pair.address] for pair in pairs]

    def _explain_difference(self) -> str:
        for file in sorted(self.folder.parent.glob("*/manifest.json")):
            other = json.loads(file.read_text("utf-8"))["key_is_made_of"]
            differs = [n for n, v in self.fields.items() if other.get(n) != v]
            if differs:
                return f"The cache {file.parent.name} was made with another {', '.join(differs)}."
        return ""

    def spot_check(
        self, policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, recipe: Recipe
    ) -> float:
        """Compute a few random rows again; returns the largest difference of a token, in nats.

        Raises GateFailed, naming the row, when a stored value is not what the policy says now.
        """
        stored = self.lookup(pairs)
        rng = np.random.default_rng(recipe.seed)
        count = min(recipe.reference.spot_check_rows, len(pairs))
        chosen = rng.choice(len(pairs), count, replace=False).tolist()
        worst, limit = 0.0, TOLERANCE[recipe.model.dtype]
        for i in chosen:
            (now,) = compute_logps(policy, [pairs[i]], pad_id)
            differs = max(_largest_difference(*sides) for sides in zip(now, stored[i], strict=True))
            if differs > limit:
                raise GateFailed(
                    f"The stored reference of pair {pairs[i].address[:12]} differs by "
                    f"{differs:.3g} nats from the policy's own value (up to {limit} is rounding).",
                    f"Delete {display_path(self.folder)} and run notebook 04_reference_cache.",
                )
            worst = max(worst, differs)
        return worst


def _largest_difference(now: np.ndarray, stored: np.ndarray) -> float:
    """In nats; infinite for another length or a value that is not a number."""
    if now.shape != stored.shape or not np.isfinite(stored).all():
        return float("inf")
    return float(np.abs(now - stored).max())


@torch.no_grad()
def compute_logps(
    policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, shared: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return per-token log-probs (chosen, rejected) of each pair, with dropout off.

    `shared`: run each prompt once for both completions (:func:`choose_layout`).
    """
    policy.eval()
    device = next(policy.parameters()).device
    batch = {name: t.to(device) for name, t in collate_pairs(pairs, pad_id, shared).items()}
    rows = [logps.cpu().numpy() for logps in completion_logps(policy, batch)]
    return list(zip(rows[: len(pairs)], rows[len(pairs) :], strict=True))


def _hash_fields(fields: dict[str, Any]) -> str:
    return sha256_text(json.dumps(fields, sort_keys=True))
