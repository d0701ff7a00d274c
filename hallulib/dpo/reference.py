"""The reference pass, done once: per-token log-probabilities of every completion, kept on disk.

`reference/<key>/` holds key.json (what the key is made of, in plain words) and rows.sqlite. The key
covers all that moves the numbers and nothing else; within it each row is found by the content of
its pair, so reordered or added pairs recompute nothing that is already there.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from hallulib import processes
from hallulib.dpo.batching import TokenPair, load_pairs
from hallulib.dpo.logprobs import TOLERANCE, Row, choose_layout, compute_logps
from hallulib.errors import GateFailed, HallulibError
from hallulib.files import display_path, replace_file, sha256_text, write_json_atomic
from hallulib.meter import explain_out_of_memory
from hallulib.models import load_policy, load_tokenizer
from hallulib.recipe import Recipe
from hallulib.recipe_sections import ModelSection
from hallulib.run import Result, Run, stage

TABLE = "CREATE TABLE IF NOT EXISTS rows (address BLOB, chosen BLOB, rejected BLOB, checksum INT)"
# What sqlite says of a file that it could read and that is not, or no longer, our database.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


@stage("reference", parallel=True)
def cache_reference(recipe: Recipe, run: Run) -> Result:
    """Compute and store the SFT policy's log-probs of all pairs, training and validation.

    An interrupted pass goes on at the first batch that is not stored. Raises DataError when no
    pair fits model.max_length.
    """
    tokenizer = load_tokenizer(recipe)
    pairs: list[TokenPair] = []
    for split in ("train", "validation"):
        found, report = load_pairs(run, split, tokenizer, recipe.model)
        pairs += found
        for what, count in report.items():
            print(f"reference: {count} {split} pairs {what}")
    policy, pad_id = load_policy(recipe, run.require("sft/adapter"), False), tokenizer.pad_token_id
    cache = ReferenceCache(run.path("reference"), recipe.model, policy, tokenizer)
    layout = choose_layout(policy, pairs, pad_id, recipe.dpo.prefix_sharing, recipe.model.dtype)
    print(f"prompts shared: {layout.shared} ({layout.reason})")
    longest = max(pair.length for pair in pairs)
    with explain_out_of_memory("reference", longest, run.path("budget/reference.json")):
        computed = cache.fill(policy, pairs, pad_id, recipe.reference.batch_size, layout.shared)
    distinct = len({pair.address for pair in pairs})
    notes = {
        "key": cache.key, "pairs": distinct, "computed": computed, "reused": distinct - computed,
        "prompts_shared": layout.shared, "processes": processes.count_processes(),
        "bytes": cache.file.stat().st_size,
    }  # fmt: skip
    return Result(run.path("reference"), notes)


def fingerprint_reference(
    model: ModelSection, policy: PeftModel, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return all that moves a log-prob, by name; their hash is the cache's key.

    Weights are hashed as they are in memory, so it does not matter where they came from.
    """
    config = policy.peft_config["default"]
    digests = {"base": sha256(), "adapter": sha256()}
    for name, tensor in sorted(policy.state_dict().items()):
        digest = digests["adapter" if "lora_" in name else "base"]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call; they add padding or cut, neither of which is scored.
    vocabulary |= {"padding": None, "truncation": None}
    names = ("max_length", "truncation_side", "dtype", "attention", "quantization")
    return {
        "base_weights": digests["base"].hexdigest(),
        "adapter_weights": digests["adapter"].hexdigest(),
        "adapter_scale": f"{config.lora_alpha}/{config.r}",
        "tokenizer": sha256_text(json.dumps(vocabulary, sort_keys=True)),
        "chat_template": sha256_text(str(tokenizer.chat_template)),
    } | {name: getattr(model, name) for name in names}


class ReferenceCache:
    """The stored rows of one key: pair address -> per-token float32 log-probs of both sides."""

    def __init__(
        self, root: Path, model: ModelSection, policy: PeftModel, tokenizer: Tokenizer
    ) -> None:
        """Read the cache that belongs to this policy below `root`, or start one.

        Reading deletes nothing. Raises HallulibError when the file cannot be read now.
        """
        self.fields = fingerprint_reference(model, policy, tokenizer)
        self.key = sha256_text(json.dumps(self.fields, sort_keys=True))
        self.folder = root / self.key[:16]
        self.file = self.folder / "rows.sqlite"
        self.rows, self.damaged = _read_rows(self.file) if self.file.exists() else ({}, False)

    def fill(
        self, policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, size: int, shared: bool
    ) -> int:
        """Compute and store the pairs that are missing; returns how many there were.

        The order is free here, so rows are sorted by length (padding nearly vanishes), longest
        first (running out of memory shows at once). A batch of `size` pairs is one transaction.
        Several processes take turns with the batches, and the main one writes.
        """
        missing = {pair.address: pair for pair in pairs if pair.address not in self.rows}
        todo = sorted(missing.values(), key=lambda pair: (-pair.length, pair.address))
        main, count = processes.is_main_process(), processes.count_processes()
        processes.wait_for_all()  # everybody has read the same rows
        if main:
            self._write_anew()  # a whole file, to append to
        bar = tqdm(total=len(todo), desc="reference pass", unit="pair", disable=not todo)
        for start in range(0, len(todo), size * count):
            own = todo[start + processes.process_rank() * size :][:size]
            rows = compute_logps(policy, own, pad_id, shared) if own else []
            found = {pair.address: row for pair, row in zip(own, rows, strict=True)}
            for part in processes.gather_from_all(found):
                self.rows |= part
                bar.update(len(part))
                if main:
                    _append_rows(self.file, part)
        bar.close()
        if main:
            self._write_anew()
        processes.wait_for_all()
        return len(todo)

    def _write_anew(self) -> None:
        """Write key.json, and all rows in one order: equal rows are equal bytes, however they came
        about."""
        write_json_atomic(self.folder / "key.json", self.fields)
        if self.damaged:
            print(f"reference: {display_path(self.file)} was damaged;", end=" ")
            print(f"{len(self.rows)} of its rows are good and stay.")
            self.damaged = False
        with replace_file(self.file) as fresh:
            fresh.unlink(missing_ok=True)
            _append_rows(fresh, dict(sorted(self.rows.items())))
            # What a killed pass left behind must not be played back into the new file.
            self.file.with_name(f"{self.file.name}-journal").unlink(missing_ok=True)

    def lookup(self, pairs: Sequence[TokenPair]) -> list[Row]:
        """Return (chosen, rejected) per-token log-probs of each pair.

        Raises GateFailed for a pair without a row, naming what differs from the caches there are.
        """
        missing = sum(pair.address not in self.rows for pair in pairs)
        if not missing:
            return [self.rows[pair.address] for pair in pairs]
        why = "Its file is damaged." if self.damaged else ""
        for file in () if self.damaged else sorted(self.folder.parent.glob("*/key.json")):
            other = json.loads(file.read_text("utf-8"))
            differs = [name for name, value in self.fields.items() if other.get(name) != value]
            if differs:
                why = f"The cache {file.parent.name} was made with another {', '.join(differs)}."
                break
        raise GateFailed(
            f"{missing} of {len(pairs)} pairs have no row in the reference cache "
            f"{display_path(self.folder)}. {why}",
            "Run notebook 04_reference_cache again; only the missing rows are computed.",
        )

    def add_reference(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return the pairs with their reference log-probs, summed. Raises as :meth:`lookup`."""
        return [
            replace(pair, ref_chosen_logps=float(chosen.sum()),
                    ref_rejected_logps=float(rejected.sum()))
            for pair, (chosen, rejected) in zip(pairs, self.lookup(pairs), strict=True)
        ]  # fmt: skip

    def spot_check(
        self, policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, rows: int, seed: int
    ) -> float:
        """Compute a few random rows again; returns the largest difference of a token, in nats.

        Raises GateFailed, naming the row, when a stored value is not what the policy says now.
        """
        stored, worst, limit = self.lookup(pairs), 0.0, TOLERANCE[self.fields["dtype"]]
        drawn = np.random.default_rng(seed).choice(len(pairs), min(rows, len(pairs)), replace=False)
        for i in drawn.tolist():
            (row,) = compute_logps(policy, [pairs[i]], pad_id)
            now, then = np.concatenate(row), np.concatenate(stored[i])
            differs = np.abs(now - then).max() if now.shape == then.shape else float("inf")
            if not differs <= limit:  # not a number is no match either
                raise GateFailed(
                    f"The stored reference of pair {pairs[i].address.hex()[:12]} differs by "
                    f"{differs:.3g} nats from the policy's own value (up to {limit} is rounding).",
                    f"Delete {display_path(self.folder)} and run notebook 04_reference_cache.",
                )
            worst = max(worst, float(differs))
        return worst


def _read_rows(file: Path) -> tuple[dict[bytes, Row], bool]:
    """Return every row whose checksum holds, and whether anything is damaged."""
    rows, damaged = {}, False
    try:
        with _connect(file) as database:
            for address, *sides, checksum in database.execute("SELECT * FROM rows"):
                if _checksum(address, *sides) == checksum:
                    rows[address] = tuple(np.frombuffer(side, "<f4") for side in sides)
                else:
                    damaged = True
    except sqlite3.DatabaseError:
        damaged = True
    return rows, damaged


def _append_rows(file: Path, rows: dict[bytes, Row]) -> None:
    with _connect(file) as database:
        database.execute("PRAGMA page_size = 16384")  # small pages waste a part of each
        database.execute(TABLE)
        for address, row in rows.items():
            values = (address, *(side.astype("<f4").tobytes() for side in row))
            database.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (*values, _checksum(*values)))


@contextmanager
def _connect(file: Path) -> Iterator[sqlite3.Connection]:
    """One transaction. A file that is damaged raises sqlite3.DatabaseError, which will not pass;
    one that cannot be read or written now, which may, raises HallulibError."""
    try:
        with closing(sqlite3.connect(file)) as database, database:
            database.text_factory = bytes  # a damaged row may call its bytes a text
            yield database
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            raise
        what = f"{display_path(file)} cannot be read or written: {error}."
        advice = "Is the disk full, or the file in use elsewhere? The same command continues."
        raise HallulibError(what, advice) from error


def _checksum(*parts: Any) -> int:
    """crc32 of a row's address and sides, also of where its sides part; -1 for what is no bytes."""
    whole = all(isinstance(part, bytes) for part in parts)
    return zlib.crc32(b"".join(parts), len(parts[1])) if whole else -1
