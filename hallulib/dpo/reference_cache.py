"""The reference pass, done once: per-token log-probabilities of every completion, kept on disk.

`reference/<key>/` holds manifest.json (what the key is made of, in plain words) and parquet
shards. The key covers all that moves the numbers and nothing else; within it each row is found by
the content of its pair, so reordered or added pairs recompute nothing that is already there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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

from hallulib.dpo.batching import TokenisedPairs, TokenPair, collate_pairs, tokenise_pairs
from hallulib.dpo.logprobs import CHECKED_PAIRS, choose_layout, completion_logps
from hallulib.dpo.reference_key import fingerprint_reference, hash_fields
from hallulib.errors import GateFailed
from hallulib.files import display_path, storage_guard, write_json_atomic
from hallulib.models import load_policy, load_tokenizer
from hallulib.processes import count_processes, is_main_process, process_rank, wait_for_all
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage
from hallulib.watch import TensorPeak, explain_out_of_memory

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
    processes: int
    bytes: int
    notes: dict[str, Any] = field(default_factory=dict)


def load_reference_result(run: Run) -> ReferenceResult:
    """Read the result of a finished reference pass back from the run."""
    notes = run.manifest["stages"]["reference"]["notes"]
    return ReferenceResult(run.path("reference") / notes["key"][:16], **notes, notes=notes)


@stage("reference", load=load_reference_result, parallel=True)
def cache_reference(recipe: Recipe, run: Run) -> ReferenceResult:
    """Compute and store the SFT policy's log-probs of all pairs, training and validation.

    An interrupted pass goes on at the first pair that is not stored. Raises DataError when no
    pair fits model.max_length.
    """
    tokenizer = load_tokenizer(recipe)
    pairs = []
    for split in ("train", "validation"):
        found = load_pairs(run, split, tokenizer, recipe)
        pairs += found.pairs
        for what, count in found.report(split).items():
            print(f"reference: {count} {what}")
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
        "processes": count_processes(),
        "bytes": sum(file.stat().st_size for file in cache.shards()),
    }
    return ReferenceResult(cache.folder, **notes, notes=notes)


def load_pairs(
    run: Run, split: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> TokenisedPairs:
    """Return the tokenised pairs of a split, and how many were left out, by reason."""
    path = run.require(f"pairs/{split}.parquet")
    frame = pd.read_parquet(path, columns=["prompt", "chosen", "rejected"])
    section = recipe.model
    rows = frame.to_dict("records")
    return tokenise_pairs(tokenizer, rows, section.max_length, section.truncation_side)


class ReferenceCache:
    """The stored rows of one key: pair address -> per-token float32 log-probs of both sides."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self.folder, self.fields = folder, fields
        self.key = hash_fields(fields)
        self.rows: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(
        cls, root: Path, recipe: Recipe, policy: PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> ReferenceCache:
        """Open, or start, the cache that belongs to this policy below `root`."""
        fields = fingerprint_reference(recipe, policy, tokenizer)
        cache = cls(root / hash_fields(fields)[:16], fields)
        if (cache.folder / "manifest.json").exists():
            cache._read_shards()
        return cache

    def _read_shards(self) -> None:
        self.rows = {}
        for file in self.shards():
            try:
                table = pq.read_table(file, page_checksum_verification=True).to_pydict()
                columns = [table[name] for name in COLUMNS]
            except (pa.ArrowInvalid, OSError, KeyError):
                file.unlink(missing_ok=True)  # damaged on disk: its rows are computed again
                continue
            for address, chosen, rejected in zip(*columns, strict=True):
                self.rows[address] = (np.float32(chosen), np.float32(rejected))

    def shards(self) -> list[Path]:
        """Return the files with the rows, in the order in which they were written."""
        return sorted(self.folder.glob("shard-*.parquet"))

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
        Several processes take turns with the shards: the files are those one process would write.
        """
        missing = {pair.address: pair for pair in pairs if pair.address not in self.rows}
        todo = sorted(missing.values(), key=lambda pair: (-pair.length, pair.address))
        self._write_manifest(complete=not todo)
        bar = tqdm(total=len(todo), desc="reference pass", unit="pair", disable=not todo)
        size, free, peak = recipe.reference.shard_size, self._next_number(), TensorPeak()
        wait_for_all()  # everybody has seen the same shards
        for number, start in enumerate(range(0, len(todo), size)):
            shard = todo[start : start + size]
            if number % count_processes() != process_rank():
                bar.update(len(shard))
                continue
            for first in range(0, len(shard), recipe.reference.batch_size):
                batch = shard[first : first + recipe.reference.batch_size]
                with explain_out_of_memory("reference", batch[0].length):
                    found = compute_logps(policy, batch, pad_id, shared, peak)
                self.rows |= {p.address: row for p, row in zip(batch, found, strict=True)}
                bar.update(len(batch))
            self._write_shard(shard, free + number)
        bar.close()
        wait_for_all()
        if todo and count_processes() > 1:
            self._read_shards()
        self._write_manifest(complete=True)
        return len(todo)

    def _next_number(self) -> int:
        return max((int(file.stem.partition("-")[2]) for file in self.shards()), default=-1) + 1

    def _write_shard(self, shard: Sequence[TokenPair], number: int) -> None:
        """Write the rows of some pairs: 32 bytes of address, and 4 a token."""
        addresses = [pair.address for pair in shard]
        values = [[self.rows[a][side] for a in addresses] for side in (0, 1)]
        kind = pa.list_(pa.float32())
        columns = [pa.array(addresses, type=pa.binary(32))]
        columns += [pa.array(side, type=kind) for side in values]
        path = self.folder / f"shard-{number:05d}.parquet"
        temporary = path.with_name(f".{path.name}.tmp")
        with storage_guard(path):
            pq.write_table(
                pa.table(columns, names=COLUMNS), temporary, write_page_checksum=True,
                use_dictionary=False, write_statistics=False, store_schema=False,
            )  # fmt: skip
            os.replace(temporary, path)

    def _write_manifest(self, complete: bool) -> None:
        if not is_main_process():
            return
        what = "per-token log-probabilities (float32, nats) of the reference, the SFT policy"
        manifest = {
            "what": what, "key": self.key, "complete": complete, "rows": len(self.rows),
            "key_is_made_of": self.fields,
        }  # fmt: skip
        with storage_guard(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.folder / "manifest.json", manifest)

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
                    f"The stored reference of pair {pairs[i].address.hex()[:12]} differs by "
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
    policy: PeftModel,
    pairs: Sequence[TokenPair],
    pad_id: int,
    shared: bool = False,
    peak: TensorPeak | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return per-token log-probs (chosen, rejected) of each pair, with dropout off.

    `shared`: run each prompt once for both completions (:func:`choose_layout`). `peak` watches.
    """
    policy.eval()
    device = next(policy.parameters()).device
    batch = {name: t.to(device) for name, t in collate_pairs(pairs, pad_id, shared).items()}
    with peak.watch(batch, policy) if peak else nullcontext():
        rows = [logps.cpu().numpy() for logps in completion_logps(policy, batch)]
    return list(zip(rows[: len(pairs)], rows[len(pairs) :], strict=True))
