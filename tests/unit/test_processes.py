"""Two real CPU processes under `accelerate launch`: the same bytes, and the same training."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny_dpo import weights
from tiny_model import copy_sft_run, make_recipe, record_pairs, start_run

from hallulib.dpo.reference import cache_reference
from hallulib.dpo.train import train_dpo
from hallulib.files import read_jsonl, sha256_tree
from hallulib.run import Run, load_result
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


def check_trained_alike(run_one, run_two, stage: str, start) -> None:
    """The two adapters differ by less than a thousandth of what one has moved, and so on."""
    a, b = weights(run_one, f"{stage}/adapter"), weights(run_two, f"{stage}/adapter")
    moved = max((a[name] - start[name]).abs().max() for name in start)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3 * moved
    rows = [read_jsonl(run.path(f"{stage}/metrics.jsonl")) for run in (run_one, run_two)]
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_two_processes_split_the_reference_pass_and_store_the_same_bytes(worlds):
    (_, run_one), (_, run_two) = worlds[1], worlds[2]
    one, two = (load_result(run, "reference").notes for run in (run_one, run_two))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["key"] == two["key"] and two["computed"] == two["pairs"] == 18
    assert sha256_tree(run_one.path("reference")) == sha256_tree(run_two.path("reference"))


def test_two_processes_train_as_one_with_twice_the_batch(worlds):
    (_, run_one), (_, run_two) = worlds[1], worlds[2]
    check_trained_alike(run_one, run_two, "dpo", weights(run_one, "sft/adapter"))


def test_only_one_of_two_processes_writes_and_the_run_is_whole_afterwards(worlds):
    recipe, run = worlds[2]
    notes = load_result(run, "dpo").notes
    assert (notes["processes"], notes["steps"], notes["pairs"]) == (2, 5, 18)
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
    trained = weights(runs[0], "sft/adapter")  # B starts at zero
    start = {name: torch.zeros_like(v) for name, v in trained.items() if "lora_B" in name}
    check_trained_alike(*runs, "sft", start)


def test_the_configuration_that_ships_is_understood_by_accelerate():
    config = load_config_from_file(str(CONFIGS / "ddp.yaml"))
    assert (config.num_processes, str(config.distributed_type.value)) == (2, "MULTI_GPU")
