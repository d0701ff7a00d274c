"""A run: one folder under outputs/ with every artifact, and a manifest of what made what.

`Run` keeps the manifest; `stage` is the contract that every stage function keeps.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hallulib.errors import HallulibError, MissingArtifact, RecipeError
from hallulib.files import (
    display_path,
    resolve_path,
    sha256_text,
    sha256_tree,
    storage_guard,
    write_json_atomic,
    write_text_atomic,
)
from hallulib.meter import measure
from hallulib.processes import is_main_process, speak_once, wait_for_all
from hallulib.recipe import Recipe
from hallulib.stages import STAGES, find_producer, library_versions, list_causes

SCHEMA = 1
MANIFEST = "manifest.json"


class Run:
    """One run folder. Open it with `Run.open`; ask it for artifacts, never build paths by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, run_dir: str | Path, recipe: Recipe) -> Run:
        """Open (or start) a run; "" means outputs/<recipe name>, relative counts from the project.

        Raises RecipeError for another recipe's folder, HallulibError where there can be no run.
        """
        run = cls(resolve_path(run_dir or f"outputs/{recipe.name}"))
        if run.root.is_file():
            raise RecipeError(
                f"{display_path(run.root)} is a file.", "Give a folder as run_dir, or a new name."
            )
        if not (run.root / MANIFEST).exists():
            empty = {"schema": SCHEMA, "recipe": recipe.to_dict(), "stages": {}, "notebooks": {}}
            write_json_atomic(run.root / MANIFEST, empty)
        owner = run.manifest["recipe"].get("name")
        if owner != recipe.name:
            raise RecipeError(
                f"{display_path(run.root)} belongs to recipe '{owner}', not to '{recipe.name}'.",
                f"Choose another run_dir, or recipe '{owner}'.",
            )
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now (another process may have added to it)."""
        return read_manifest(self.root)

    def path(self, artifact: str) -> Path:
        """Where `artifact` lives, whether or not it is there."""
        return self.root / artifact

    def require(self, artifact: str) -> Path:
        """The path of a finished, unchanged artifact.

        Raises MissingArtifact, which names the notebook to run: no finished stage wrote it, its
        content has changed since, or an input of the stage that made it has.
        """
        manifest = self.manifest
        producer, output = find_producer(artifact)
        record, path = manifest["stages"].get(producer), self.path(artifact)
        if record is None or not path.exists():
            what = f"{artifact} is not there yet (expected {display_path(path)})."
            raise _name_notebook(what, producer)
        if sha256_tree(self.path(output)) != record["outputs"].get(output):
            what = f"{display_path(self.path(output))} was changed after its stage wrote it."
            raise _name_notebook(what, producer)
        changed = _changed_input(manifest, producer)
        if changed:
            what = f"{artifact} rests on an older {changed[1]} than the run holds now."
            raise _name_notebook(what, changed[0])
        return path

    def stage_key(self, stage: str, recipe: Recipe) -> str:
        """sha256 of all that decides a stage: inputs, recipe sections, seed, code, base model."""
        causes = list_causes(stage, recipe) | {"inputs": _recorded_inputs(self.manifest, stage)}
        return sha256_text(json.dumps(causes, sort_keys=True))

    def is_current(self, stage: str, recipe: Recipe) -> bool:
        """Whether the stage is finished and neither its outputs nor what decides it has changed."""
        manifest = self.manifest
        record = manifest["stages"].get(stage)
        if record is None or record["key"] != self.stage_key(stage, recipe):
            return False
        outputs = [(self.path(name), sha) for name, sha in record["outputs"].items()]
        return not _changed_input(manifest, stage) and all(
            path.exists() and sha256_tree(path) == sha for path, sha in outputs
        )

    def checkpoint_dir(self, stage: str, recipe: Recipe) -> Path:
        """Where a stage keeps checkpoints; one folder per key, so none is resumed wrongly."""
        return self._checkpoints(stage) / f"{stage}-{self.stage_key(stage, recipe)[:12]}"

    def forget(self, stage: str) -> None:
        """Drop a stage's record and checkpoints; its outputs stay until it writes new ones."""
        self.update(lambda manifest: manifest["stages"].pop(stage, None))
        for folder in self._checkpoints(stage).glob(f"{stage}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def record(
        self, stage: str, recipe: Recipe, measured: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Write down a finished stage: last of all, so that a record means finished.

        `measured` holds time, memory, device, and the `key` that the stage started with. Raises
        MissingArtifact if an output is not there.
        """
        spec = STAGES[stage]
        for path in map(self.path, spec.outputs):
            if not path.exists():
                what = f"Stage '{stage}' ended without writing {display_path(path)}."
                raise _name_notebook(what, stage)
        sections = recipe.choose_sections(spec.sections)
        record = {
            "key": self.stage_key(stage, recipe),
            "inputs": _recorded_inputs(self.manifest, stage),
            "outputs": {name: sha256_tree(self.path(name)) for name in spec.outputs},
            "recipe": sections,
            "versions": library_versions(),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "notes": notes,
        } | measured

        def add(manifest: dict[str, Any]) -> None:
            manifest["stages"][stage] = record
            manifest["recipe"] |= sections  # what no stage has run with is not claimed

        self.update(add)

    def update(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Apply `change` to the manifest as it is on disk now and write it atomically."""
        with self.lock():
            manifest = self.manifest
            change(manifest)
            write_json_atomic(self.root / MANIFEST, manifest)

    @contextmanager
    def lock(self, work: str = "") -> Iterator[None]:
        """Be the only process that writes this run; readers need no lock.

        `work` is what others are told while it goes on. Raises HallulibError, with their work,
        when another process writes. The system frees the lock of a process that dies.
        """
        note = self.root / ".lock-holder"
        lock = FileLock(self.root / ".lock", timeout=2, is_singleton=True, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            holder = note.read_text("utf-8") if note.exists() else "another process"
            raise HallulibError(
                f"{display_path(self.root)} is being written by {holder}.",
                "Wait until that has ended, or choose another run_dir.",
            ) from None
        try:
            if work:
                write_text_atomic(note, f"{work} (process {os.getpid()})")
            yield
        finally:
            if work:
                note.unlink(missing_ok=True)
            lock.release()

    def _checkpoints(self, stage: str) -> Path:
        return self.root / STAGES[stage].outputs[0].split("/")[0] / "checkpoints"


StageFunction = Callable[[Recipe, Run], Any]


def stage(
    name: str, load: Callable[[Run], Any], parallel: bool = False
) -> Callable[[StageFunction], StageFunction]:
    """Make `body(recipe, run) -> result` a stage.

    If nothing that decides the stage has changed, the body is not run: `load(run)` reads its
    result back. Otherwise every input is required (MissingArtifact), the body is measured, and its
    outputs are recorded. Nothing is recorded when the body raises, so the next call starts it
    again, from its checkpoints if it keeps any. Under `accelerate launch` every process runs a
    `parallel` body, and the main one alone any other; only the main process records.
    """

    def decorate(body: StageFunction) -> StageFunction:
        @functools.wraps(body)
        def run_stage(recipe: Recipe, run: Run) -> Any:
            with speak_once():
                if run.is_current(name, recipe):
                    outputs = ", ".join(STAGES[name].outputs)
                    print(f"{name}: unchanged, reusing {outputs} in {display_path(run.root)}")
                    wait_for_all()  # nobody may write before everybody has looked
                    return load(run)
                for artifact in STAGES[name].inputs:
                    run.require(artifact)
                key = run.stage_key(name, recipe)
                wait_for_all()
                result = None
                if is_main_process():
                    with run.lock(f"stage '{name}'"):
                        result = _run_measured(name, body, recipe, run, key)
                elif parallel:
                    result = body(recipe, run)
                wait_for_all()
                return load(run) if result is None else result

        return run_stage

    return decorate


def _run_measured(name: str, body: StageFunction, recipe: Recipe, run: Run, key: str) -> Any:
    with storage_guard(run.root):
        with measure(name) as meter:
            result = body(recipe, run)
        measured = {
            "key": key,
            "seed": recipe.seed,
            "device": meter.device,
            "wall_seconds": round(meter.wall_seconds, 3),
            "peak_memory_bytes": meter.peak_memory_bytes,
            "rss_before_bytes": meter.rss_before_bytes,
            "memory": {
                "allocated": meter.peak_cuda_bytes or meter.peak_mps_bytes,
                "reserved": meter.peak_cuda_reserved_bytes,
            },
        }
        run.record(name, recipe, measured, dict(getattr(result, "notes", None) or {}))
    return result


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises HallulibError when it cannot be understood."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']!r}, this version reads {SCHEMA}")
        if not all(isinstance(manifest[name], dict) for name in ("recipe", "stages", "notebooks")):
            raise ValueError("one of its parts is not a table")
    except (ValueError, KeyError, TypeError) as error:
        raise HallulibError(
            f"{display_path(path)} cannot be read ({type(error).__name__}: {error}).",
            "Delete it: the stages then run again, no other file is touched.",
        ) from None
    return manifest


def _name_notebook(what: str, stage: str) -> MissingArtifact:
    notebook = STAGES[stage].notebook
    advice = f"Run notebook {notebook} with the same recipe and run_dir, then those after it."
    return MissingArtifact(what, advice)


def _recorded_inputs(manifest: dict[str, Any], stage: str) -> dict[str, str | None]:
    """The sha each input has in its producer's record; None where there is no record."""
    found = {}
    for name in STAGES[stage].inputs:
        record = manifest["stages"].get(find_producer(name)[0], {})
        found[name] = record.get("outputs", {}).get(name)
    return found


def _changed_input(manifest: dict[str, Any], stage: str) -> tuple[str, str] | None:
    """(first stage to run again, its input that changed), at or above `stage`; None if none."""
    order, now = list(STAGES), _recorded_inputs(manifest, stage)
    changed = []
    for name, sha in manifest["stages"][stage]["inputs"].items():
        producer = find_producer(name)[0]
        if producer not in manifest["stages"]:
            changed.append((producer, name))
            continue
        above = _changed_input(manifest, producer)
        changed += [above] if above else []
        changed += [(stage, name)] if now[name] != sha else []
    return min(changed, key=lambda found: order.index(found[0]), default=None)
