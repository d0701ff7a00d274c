"""A run: one folder under outputs/ with every artifact, and a manifest of what made what.

`Run` keeps the manifest; `stage` is the contract that every stage function keeps.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from hallulib.errors import HallulibError, MissingArtifact, RecipeError
from hallulib.files import (
    display_path,
    resolve_path,
    sha256_text,
    sha256_tree,
    storage_guard,
    write_json_atomic,
)
from hallulib.meter import measure
from hallulib.processes import is_main_process, speak_once, wait_for_all
from hallulib.recipe import Recipe
from hallulib.stages import STAGES, find_producer, library_versions, list_causes

MANIFEST = "manifest.json"
EMPTY = {"schema": 1, "stages": {}, "notebooks": {}}


@dataclass(frozen=True)
class Run:
    """One run folder. Open it with `Run.open`; ask it for artifacts, never build paths by hand."""

    root: Path

    @classmethod
    def open(cls, run_dir: str | Path, recipe: Recipe) -> Self:
        """Open (or start) a run; "" means outputs/<recipe name>, relative counts from the project.
        Raises RecipeError for another recipe's folder."""
        run = cls(resolve_path(run_dir or f"outputs/{recipe.name}"))
        if not (run.root / MANIFEST).exists():
            write_json_atomic(run.root / MANIFEST, EMPTY | {"recipe": recipe.to_dict()})
        owner = run.manifest["recipe"].get("name")
        if owner != recipe.name:
            what = f"{display_path(run.root)} belongs to recipe '{owner}', not to '{recipe.name}'."
            raise RecipeError(what, f"Choose another run_dir, or recipe '{owner}'.")
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk now; raises HallulibError when it cannot be understood."""
        path = self.root / MANIFEST
        try:
            manifest = json.loads(path.read_text("utf-8"))
            if manifest["schema"] != EMPTY["schema"] or not {"recipe", *EMPTY} <= set(manifest):
                raise ValueError("its parts are not those that this version writes")
        except (ValueError, KeyError, TypeError) as error:
            raise HallulibError(
                f"{display_path(path)} cannot be read ({type(error).__name__}: {error}).",
                "Delete it: the stages then run again, no other file is touched.",
            ) from None
        return manifest

    def path(self, artifact: str) -> Path:
        """Where `artifact` lives, whether or not it is there."""
        return self.root / artifact

    def require(self, artifact: str) -> Path:
        """The path of a finished, unchanged artifact.

        Raises MissingArtifact, naming the notebook to run, unless a finished stage wrote it and
        neither its content nor an input of that stage has changed since.
        """
        manifest, path = self.manifest, self.path(artifact)
        producer, output = find_producer(artifact)
        record, stale = manifest["stages"].get(producer), _list_stale(manifest, producer)
        if record is None or not path.exists():
            what = f"{artifact} is not there yet (expected {display_path(path)})."
        elif sha256_tree(self.path(output)) != record["outputs"].get(output):
            what = f"{display_path(self.path(output))} was changed after its stage wrote it."
        elif stale:
            producer, changed = stale[0]
            what = f"{artifact} rests on an older {changed} than the run holds now."
        else:
            return path
        notebook = STAGES[producer].notebook
        advice = f"Run notebook {notebook} with the same recipe and run_dir, then those after it."
        raise MissingArtifact(what, advice)

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
        outputs = {self.path(name): sha for name, sha in record["outputs"].items()}
        return not _list_stale(manifest, stage) and all(
            path.exists() and sha256_tree(path) == sha for path, sha in outputs.items()
        )

    def checkpoint_dir(self, stage: str, recipe: Recipe) -> Path:
        """Where a stage keeps checkpoints; one folder per key, so none is resumed wrongly."""
        return self._checkpoints(stage) / f"{stage}-{self.stage_key(stage, recipe)[:12]}"

    def _checkpoints(self, stage: str) -> Path:
        return self.root / STAGES[stage].outputs[0].split("/")[0] / "checkpoints"

    def forget(self, stage: str) -> None:
        """Drop a stage's record and checkpoints; its outputs stay until it writes new ones."""
        self.update(lambda manifest: manifest["stages"].pop(stage, None))
        for folder in self._checkpoints(stage).glob(f"{stage}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def record(
        self, stage: str, recipe: Recipe, measured: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Write down a finished stage: last of all, so that a record means finished.

        `measured` joins the record: time, memory, and the `key` that the stage started with.
        Raises FileNotFoundError if an output is not there.
        """
        sections = recipe.choose_sections(STAGES[stage].sections)
        record = {
            "key": self.stage_key(stage, recipe),
            "inputs": _recorded_inputs(self.manifest, stage),
            "outputs": {name: sha256_tree(self.path(name)) for name in STAGES[stage].outputs},
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
    def lock(self) -> Iterator[None]:
        """Be the only process that writes this run; readers need no lock, and a process that dies
        leaves none. Raises HallulibError when another process writes."""
        try:
            with FileLock(self.root / ".lock", timeout=2, is_singleton=True, thread_local=False):
                yield
        except Timeout:
            what = f"{display_path(self.root)} is being written by another process."
            advice = "Wait until that has ended, or choose another run_dir."
            raise HallulibError(what, advice) from None


def _recorded_inputs(manifest: dict[str, Any], stage: str) -> dict[str, str | None]:
    """The sha each input has in its producer's record; None where there is no record."""
    written = {}
    for record in manifest["stages"].values():
        written |= record["outputs"]
    return {name: written.get(name) for name in STAGES[stage].inputs}


def _list_stale(manifest: dict[str, Any], stage: str) -> list[tuple[str, str]]:
    """(stage to run again, what has changed), at and above `stage`; the first to run is first."""
    record, now = manifest["stages"].get(stage), _recorded_inputs(manifest, stage)
    if record is None:
        return [(stage, STAGES[stage].outputs[0])]
    stale = [(stage, name) for name, sha in record["inputs"].items() if now.get(name) != sha]
    for producer in {find_producer(name)[0] for name in record["inputs"]}:
        stale += _list_stale(manifest, producer)
    return sorted(stale, key=lambda found: list(STAGES).index(found[0]))


@dataclass(frozen=True)
class Result:
    """What a stage has made: the first of its outputs, and the notes of its record."""

    path: Path
    notes: dict[str, Any]


def load_result(run: Run, stage: str) -> Result:
    """Read the result of a finished stage back from the run."""
    return Result(run.path(STAGES[stage].outputs[0]), run.manifest["stages"][stage]["notes"])


StageFunction = Callable[[Recipe, Run], Any]


def stage(
    name: str, load: Callable[[Run], Any] | None = None, parallel: bool = False
) -> Callable[[StageFunction], StageFunction]:
    """Make `body(recipe, run) -> result` a stage.

    If nothing that decides it has changed, `load(run)`, else :func:`load_result`, reads its result
    back. Otherwise its inputs are required, it is measured, and its outputs are recorded at its
    end; when it raises, the next call starts it again. Under `accelerate launch` every process runs
    a `parallel` body, the main one alone any other; only the main one records.
    """
    load = load or functools.partial(load_result, stage=name)

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
                key, result = run.stage_key(name, recipe), None
                wait_for_all()
                if is_main_process():
                    with run.lock(), storage_guard(run.root):
                        with measure() as measured:
                            result = body(recipe, run)
                        measured |= {"key": key, "seed": recipe.seed}
                        notes = getattr(result, "notes", None) or {}
                        run.record(name, recipe, measured, dict(notes))
                elif parallel:
                    result = body(recipe, run)
                wait_for_all()
                return load(run) if result is None else result

        return run_stage

    return decorate
