"""A run: one folder under outputs/, where every artifact lives, and the chain of what made what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hallulib.errors import (
    HallulibError,
    MissingArtifact,
)
from hallulib.files import (
    display_path,
    resolve_path,
    sha256_text,
    sha256_tree,
    storage_guard,
    write_json_atomic,
    write_text_atomic,
)
from hallulib.provenance import (
    STAGES,
    StageSpec,
    find_output,
    find_producer,
    git_commit,
    hash_code,
    hash_external,
    library_versions,
)
from hallulib.recipe import Recipe

__all__ = ["STAGES", "Run", "StageSpec", "compare_runs", "list_runs", "read_manifest"]

SCHEMA = 1
MANIFEST = "manifest.json"
PREVIOUS = "manifest.previous.json"


class Run:
    """One run folder. Open it with `Run.open`; ask it for artifacts, never build paths by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, run_dir: str | Path, recipe: Recipe) -> Run:
        """Open (or start) a run; "" means outputs/<recipe name>, relative counts from the project.

        Raises HallulibError for another recipe's folder, HallulibError, HallulibError.
        """
        run = cls(resolve_path(run_dir or f"outputs/{recipe.name}"))
        if not (run.root / MANIFEST).exists():
            empty = {"schema": SCHEMA, "recipe": recipe.to_dict(), "stages": {}, "notebooks": {}}
            with storage_guard(run.root):
                run.root.mkdir(parents=True, exist_ok=True)
            write_json_atomic(run.root / MANIFEST, empty)
        owner = run.manifest["recipe"].get("name")
        if owner != recipe.name:
            raise HallulibError(
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

        Raises MissingArtifact (no finished stage wrote it) or MissingArtifact (its content, or an
        input of the stage that made it, has changed since); both name the notebook to run.
        """
        manifest = self.manifest
        producer, output = find_producer(artifact), find_output(artifact)
        notebook = STAGES[producer].notebook
        record = manifest["stages"].get(producer)
        if record is None or not self.path(artifact).exists():
            raise MissingArtifact(
                f"{artifact} is not there yet (expected {display_path(self.path(artifact))}).",
                f"Run notebook {notebook} first, with the same recipe and run_dir.",
            )
        if sha256_tree(self.path(output)) != record["outputs"].get(output):
            raise MissingArtifact(
                f"{display_path(self.path(output))} is not what stage '{producer}' wrote: "
                "it was changed afterwards.",
                f"Run notebook {notebook} again; it makes the artifact anew.",
            )
        changed = _changed_input(manifest, producer)
        if changed:
            stage, name = changed
            raise MissingArtifact(
                f"{artifact} rests on an older {name} than the run holds now.",
                f"Run notebook {STAGES[stage].notebook} again, then those after it.",
            )
        return self.path(artifact)

    def stage_key(self, stage: str, recipe: Recipe) -> str:
        """sha256 of all that decides a stage: inputs, recipe sections, seed, code, base model."""
        spec = STAGES[stage]
        parts = {
            "inputs": _recorded_inputs(self.manifest, spec),
            "sections": recipe.section_hash(list(spec.sections)),
            "code": hash_code(spec),
            "external": hash_external(spec, recipe),
        }
        return sha256_text(json.dumps(parts, sort_keys=True))

    def is_current(self, stage: str, recipe: Recipe) -> bool:
        """Whether the stage is finished and neither its outputs nor what decides it has changed."""
        manifest = self.manifest
        record = manifest["stages"].get(stage)
        if record is None or record["key"] != self.stage_key(stage, recipe):
            return False
        if _changed_input(manifest, stage):
            return False
        outputs = [(self.path(name), sha) for name, sha in record["outputs"].items()]
        return all(path.exists() and sha256_tree(path) == sha for path, sha in outputs)

    def checkpoint_dir(self, stage: str, recipe: Recipe) -> Path:
        """Where a stage keeps checkpoints; one folder per key, so none is resumed wrongly."""
        key = self.stage_key(stage, recipe)
        return self._checkpoints(stage) / f"{stage}-{key[:12]}"

    def forget(self, stage: str) -> None:
        """Drop a stage's record and checkpoints; its outputs stay until it writes new ones."""
        self.update(lambda manifest: manifest["stages"].pop(stage, None))
        with storage_guard(self.root):
            for folder in self._checkpoints(stage).glob(f"{stage}-*"):
                shutil.rmtree(folder)

    def record(
        self, stage: str, recipe: Recipe, measured: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Write down a finished stage: last of all, so that a record means finished.

        `measured` has wall_seconds, peak_memory_bytes, device, and optionally the `key` the stage
        started with. Raises MissingArtifact if an output is not there.
        """
        spec = STAGES[stage]
        for name in spec.outputs:
            if not self.path(name).exists():
                raise MissingArtifact(
                    f"Stage '{stage}' ended without writing {display_path(self.path(name))}.",
                    f"This is a fault of the stage; run notebook {spec.notebook} again to see it.",
                )
        record = {
            "key": measured.get("key") or self.stage_key(stage, recipe),
            "inputs": _recorded_inputs(self.manifest, spec),
            "outputs": {name: sha256_tree(self.path(name)) for name in spec.outputs},
            "recipe_hash": recipe.section_hash(list(spec.sections)),
            "versions": library_versions(),
            "seed": recipe.seed,
            "device": measured.get("device", ""),
            "wall_seconds": round(measured.get("wall_seconds", 0.0), 3),
            "peak_memory_bytes": measured.get("peak_memory_bytes", 0),
            "rss_before_bytes": measured.get("rss_before_bytes", 0),
            "memory": measured.get("memory", {}),
            "git_commit": git_commit(),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "notes": notes,
        }

        def add(manifest: dict[str, Any]) -> None:
            manifest["stages"][stage] = record
            manifest["recipe"] = recipe.to_dict()

        self.update(add)

    def update(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Apply `change` to the manifest as it is on disk now and write it atomically.

        The one before is kept beside it as manifest.previous.json.
        """
        manifest = self.manifest
        write_text_atomic(self.root / PREVIOUS, (self.root / MANIFEST).read_text("utf-8"))
        change(manifest)
        write_json_atomic(self.root / MANIFEST, manifest)

    def _checkpoints(self, stage: str) -> Path:
        return self.root / STAGES[stage].outputs[0].split("/")[0] / "checkpoints"


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises HallulibError when it cannot be understood."""
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"schema {manifest['schema']!r}, this version reads {SCHEMA}")
        for name in ("recipe", "stages", "notebooks"):
            if not isinstance(manifest[name], dict):
                raise ValueError(f"'{name}' is not a table")
    except (ValueError, KeyError, TypeError) as error:
        previous = root / PREVIOUS
        restore = f"Put {display_path(previous)} in its place" if previous.exists() else ""
        anew = "delete it: the stages then run again, no other file is touched"
        raise HallulibError(
            f"{display_path(path)} cannot be read ({type(error).__name__}: {error}).",
            f"{restore}; or {anew}." if restore else f"{anew.capitalize()}.",
        ) from None
    return manifest


def list_runs(outputs: str | Path = "outputs") -> list[Path]:
    """Run folders (those with a manifest) directly below `outputs`, by name."""
    return sorted(path.parent for path in resolve_path(outputs).glob(f"*/{MANIFEST}"))


def compare_runs(a: str | Path, b: str | Path) -> dict[str, tuple[Any, Any]]:
    """Recipe keys in which two runs differ: dotted key -> (value in a, value in b)."""
    left, right = (_flatten(read_manifest(find_run(path))["recipe"]) for path in (a, b))
    keys = list(left) + [key for key in right if key not in left]
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def find_run(run: str | Path) -> Path:
    """The folder of a run given as a path or as its name below outputs/."""
    for folder in (resolve_path(run), resolve_path("outputs") / run):
        if (folder / MANIFEST).is_file():
            return folder
    raise MissingArtifact(
        f"There is no run '{run}'.", "`python -m hallulib runs` lists the runs that exist."
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _recorded_inputs(manifest: dict[str, Any], spec: StageSpec) -> dict[str, str | None]:
    """The sha each input has in its producer's record; None where there is no record."""
    return {name: _recorded_sha(manifest, name) for name in spec.inputs}


def _recorded_sha(manifest: dict[str, Any], artifact: str) -> str | None:
    record = manifest["stages"].get(find_producer(artifact), {})
    return record.get("outputs", {}).get(artifact)


def _changed_input(manifest: dict[str, Any], stage: str) -> tuple[str, str] | None:
    """(first stage to run again, its input that changed), at or above `stage`; None if none."""
    changed = []
    for name, sha in manifest["stages"][stage]["inputs"].items():
        producer = find_producer(name)
        if producer not in manifest["stages"]:
            changed.append((producer, name))
            continue
        above = _changed_input(manifest, producer)
        if above:
            changed.append(above)
        if _recorded_sha(manifest, name) != sha:
            changed.append((stage, name))
    return min(changed, key=lambda found: list(STAGES).index(found[0]), default=None)
