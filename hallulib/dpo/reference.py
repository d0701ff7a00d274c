"""The reference pass, done once: per-token log-probabilities of every completion, kept on disk.

`reference/<key>/` holds key.json (what the key is made of, in plain words) and rows.sqlite. The key
covers all that moves the numbers and nothing else; within it each row is found by the content of
its pair, so reordered or added pairs recompute nothing that is already there.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from hallulib.run import Run, stage

TABLE = "CREATE TABLE IF NOT EXISTS rows (address BLOB, chosen BLOB, rejected BLOB, checksum INT)"
# What sqlite says of a file that it could read and that is not, or no longer, our database.
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


@dataclass(frozen=True)
class ReferenceResult:
    """Where the rows are. `notes`: key, pairs, those computed this time and those reused, whether
    prompts were shared, how many processes worked, and the bytes on disk."""

    folder: Path
    notes: dict[str, Any]


def load_reference_result(run: Run) -> ReferenceResult:
    """Read the result of a finished reference pass back from the run."""
    notes = run.manifest["stages"]["reference"]["notes"]
    return ReferenceResult(run.path("reference") / notes["key"][:16], notes)


@stage("reference", load=load_reference_result, parallel=True)
def cache_reference(recipe: Recipe, run: Run) -> ReferenceResult:
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
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    pad_id = tokenizer.pad_token_id
    cache = ReferenceCache.open(run.path("reference"), recipe.model, policy, tokenizer)
    layout = choose_layout(policy, pairs, pad_id, recipe.dpo.prefix_sharing, recipe.model.dtype)
    print(layout)
    longest = max(pair.length for pair in pairs)
    with explain_out_of_memory("reference", longest, run.path("budget/reference.json")):
        computed = cache.fill(policy, pairs, pad_id, recipe.reference.batch_size, layout.shared)
    distinct = len({pair.address for pair in pairs})
    notes = {
        "key": cache.key,
        "pairs": distinct,
        "computed": computed,
        "reused": distinct - computed,
        "prompts_shared": layout.shared,
        "processes": processes.count_processes(),
        "bytes": cache.file.stat().st_size,
    }
    return ReferenceResult(cache.folder, notes)


def fingerprint_reference(
    model: ModelSection, policy: PeftModel, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return all that moves a log-prob, by name; their hash is the cache's key.

    Weights are hashed as they are in memory, so it does not matter whether they came from a
    folder or the hub, nor what the folder is called. Learning rate, beta and seed are not in it.
    """
    state, config = policy.state_dict(), policy.peft_config["default"]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call; they add padding or cut, neither of which is scored.
    vocabulary |= {"padding": None, "truncation": None}
    names = ("max_length", "truncation_side", "dtype", "attention", "quantization")
    return {
        "base_weights": _hash_tensors({n: t for n, t in state.items() if "lora_" not in n}),
        "adapter_weights": _hash_tensors({n: t for n, t in state.items() if "lora_" in n}),
        "adapter_scale": f"{config.lora_alpha}/{config.r}",
        "tokenizer": sha256_text(json.dumps(vocabulary, sort_keys=True)),
        "chat_template": sha256_text(str(tokenizer.chat_template)),
    } | {name: getattr(model, name) for name in names}


def _hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class ReferenceCache:
    """The stored rows of one key: pair address -> per-token float32 log-probs of both sides."""

    def __init__(self, root: Path, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.key = sha256_text(json.dumps(fields, sort_keys=True))
        self.folder = root / self.key[:16]
        self.file = self.folder / "rows.sqlite"
        self.rows, self.damaged = _read_rows(self.file) if self.file.exists() else ({}, False)

    @classmethod
    def open(
        cls, root: Path, model: ModelSection, policy: PeftModel, tokenizer: Tokenizer
    ) -> ReferenceCache:
        """Read the cache that belongs to this policy below `root`, or start one.

        Reading deletes nothing. Raises HallulibError when the file cannot be read now.
        """
        return cls(root, fingerprint_reference(model, policy, tokenizer))

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
                if main:
                    _append_rows(self.file, part)
                bar.update(len(part))
        bar.close()
        if main:
            self._write_anew()
        processes.wait_for_all()
        return len(todo)

    def _write_anew(self) -> None:
        """Write key.json, and all rows in one order: equal rows are equal bytes, however they came
        about. A damaged file is kept aside."""
        write_json_atomic(self.folder / "key.json", self.fields)
        if self.damaged:
            aside = self.folder.parent / "checkpoints" / f"damaged-{self.folder.name}.sqlite"
            aside.parent.mkdir(exist_ok=True)
            shutil.copy(self.file, aside)
            print(f"reference: {display_path(self.file)} was damaged; see {display_path(aside)}.")
            print(f"reference: {len(self.rows)} of its rows are good and stay.")
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
        if missing:
            why = "Its file is damaged." if self.damaged else self._explain_difference()
            raise GateFailed(
                f"{missing} of {len(pairs)} pairs have no row in the reference cache "
                f"{display_path(self.folder)}. {why}",
                "Run notebook 04_reference_cache again; only the missing rows are computed.",
            )
        return [self.rows[pair.address] for pair in pairs]

    def _explain_difference(self) -> str:
        for file in sorted(self.folder.parent.glob("*/key.json")):
            if differs := self._list_differences(file):
                return f"The cache {file.parent.name} was made with another {', '.join(differs)}."
        return ""

    def _list_differences(self, file: Path) -> list[str]:
        other = json.loads(file.read_text("utf-8"))
        return [name for name, value in self.fields.items() if other.get(name) != value]

    def add_reference(self, pairs: Sequence[TokenPair]) -> list[TokenPair]:
        """Return the pairs with their reference log-probs, summed. Raises as :meth:`lookup`."""
        sums = [[float(side.sum()) for side in row] for row in self.lookup(pairs)]
        return [
            replace(pair, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
            for pair, (chosen, rejected) in zip(pairs, sums, strict=True)
        ]

    def spot_check(
        self, policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, rows: int, seed: int
    ) -> float:
        """Compute a few random rows again; returns the largest difference of a token, in nats.

        Raises GateFailed, naming the row, when a stored value is not what the policy says now.
        """
        stored, worst, limit = self.lookup(pairs), 0.0, TOLERANCE[self.fields["dtype"]]
        drawn = np.random.default_rng(seed).choice(len(pairs), min(rows, len(pairs)), replace=False)
        for i in drawn.tolist():
            (now,) = compute_logps(policy, [pairs[i]], pad_id)
            now, then = np.concatenate(now), np.concatenate(stored[i])
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
    rows: dict[bytes, Row] = {}
    damaged = False
    try:
        with _connect(file, "rw") as database:
            for address, chosen, rejected, checksum in database.execute("SELECT * FROM rows"):
                if _checksum(address, chosen, rejected) == checksum:
                    rows[address] = (np.frombuffer(chosen, "<f4"), np.frombuffer(rejected, "<f4"))
                else:
                    damaged = True
    except sqlite3.DatabaseError:
        damaged = True
    return rows, damaged


def _append_rows(file: Path, rows: dict[bytes, Row]) -> None:
    with _connect(file, "rwc") as database:
        database.execute("PRAGMA page_size = 16384")  # small pages waste a part of each
        database.execute(TABLE)
        for address, row in rows.items():
            values = (address, *(side.astype("<f4").tobytes() for side in row))
            database.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (*values, _checksum(*values)))


@contextmanager
def _connect(file: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """One transaction. A file that is damaged raises sqlite3.DatabaseError, which will not pass;
    one that cannot be read or written now, which may, raises HallulibError."""
    try:
        uri = f"{file.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True)) as database, database:
            database.text_factory = bytes  # a damaged row may call its bytes a text
            yield database
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            raise
        raise HallulibError(
            f"{display_path(file)} cannot be read or written: {error}.",
            "Is the disk full, or does another program use the file? The same command continues.",
        ) from error


def _checksum(address: Any, chosen: Any, rejected: Any) -> int:
    """crc32 of a row, also of where its sides part; -1 for what is not bytes."""
    if not all(isinstance(part, bytes) for part in (address, chosen, rejected)):
        return -1
    return zlib.crc32(address + chosen + rejected, len(chosen))
