"""Two real CPU processes under `accelerate launch`: the same bytes, and the same training."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_dpo import weights
from tiny_model import copy_sft_run, make_recipe, record_pairs, start_run

from hallulib.checkpoints import load_trained
from hallulib.dpo.reference import cache_reference, load_reference_result
from hallulib.dpo.train import train_dpo
from hallulib.files import read_jsonl, sha256_tree
from hallulib.run import Run
from hallulib.sft import train_sft
from hallulib.stages import PACKAGE

pytestmark = pytest.mark.unit

CONFIGS = PACKAGE / "launch"
SETTINGS = {"dpo.max_steps": 5, "dpo.guardrail_steps": 5}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{1: (recipe, run), 2: (recipe, run)}: reference and DPO by so many processes."""
    root = tmp_path_factory.mktemp("processes")
    found = {}
    for count in (1, 2):
        # Two processes with four pairs each make a step of eight.
        recipe = make_recipe(SETTINGS | {"dpo.batch_size": 8 // count})
        run = copy_sft_run(root / f"run{count}", recipe)
        record_pairs(run, recipe, train=18)
        found[count] = recipe, run
    recipe, run = found[1]
    cache_reference(recipe, run)
    train_dpo(recipe, run)
    for name in ("reference", "dpo"):
        launch(name, *found[2], root)
    return found


def launch(name, recipe, run, root) -> None:
    """Run a stage in two processes, as a user would."""
    file = root / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    # `accelerate launch --cpu` starts two only under MPI; with ACCELERATE_USE_CPU the way for GPUs
    # does it: torch starts two processes, and they talk through gloo.
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    subprocess.run(
        [sys.executable, *launcher, "-m", "hallulib", "run-stage", name]
        + ["--recipe", str(file), "--run-dir", str(run.root)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def test_two_processes_split_the_reference_pass_and_store_the_same_bytes(worlds):
    (_, run_one), (_, run_two) = worlds[1], worlds[2]
    results = [load_reference_result(run) for run in (run_one, run_two)]
    assert [result.notes["processes"] for result in results] == [1, 2]
    assert results[0].notes["key"] == results[1].notes["key"]
    assert results[1].notes["computed"] == results[1].notes["pairs"] == 18
    assert sha256_tree(results[0].folder) == sha256_tree(results[1].folder)


def test_two_processes_train_as_one_with_twice_the_batch(worlds):
    (_, run_one), (_, run_two) = worlds[1], worlds[2]
    a, b = weights(run_one), weights(run_two)
    start = weights(run_one, "sft/adapter")
    moved = max((a[name] - start[name]).abs().max() for name in a)
    differs = max((a[name] - b[name]).abs().max() for name in a)
    assert differs < 1e-3 * moved
    rows = [read_jsonl(run.path("dpo/metrics.jsonl")) for run in (run_one, run_two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_only_one_of_two_processes_writes_and_the_run_is_whole_afterwards(worlds):
    recipe, run = worlds[2]
    result = load_trained(run, "dpo")
    assert result.notes["processes"] == 2
    assert result.notes["steps"] == 5 and result.notes["pairs"] == 18
    assert Run.open(run.root, recipe).is_current("dpo", recipe)
    assert run.require("dpo/adapter").is_dir()
    # A single process finds nothing to do in what two have made.
    assert cache_reference(recipe, run).notes["computed"] == 18


def test_two_processes_fine_tune_as_one_with_twice_the_batch(tmp_path):
    runs = []
    for count in (1, 2):
        recipe = make_recipe({"sft.batch_size": 8 // count})
        run = start_run(tmp_path / f"run{count}", recipe)
        train_sft(recipe, run) if count == 1 else launch("sft", recipe, run, tmp_path)
        runs.append(run)
    a, b = (weights(run, "sft/adapter") for run in runs)
    moved = max(value.abs().max() for name, value in a.items() if "lora_B" in name)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3 * moved
    rows = [read_jsonl(run.path("sft/metrics.jsonl")) for run in runs]
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_the_configuration_that_ships_is_understood_by_accelerate():
    config = load_config_from_file(str(CONFIGS / "ddp.yaml"))
    assert (config.num_processes, str(config.distributed_type.value)) == (2, "MULTI_GPU")
