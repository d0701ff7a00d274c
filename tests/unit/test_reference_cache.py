"""The reference cache: right values, nothing computed twice, and a wrong reference refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_model import copy_sft_run, make_recipe, make_texts, record_pairs

from hallulib.dpo import reference_cache
from hallulib.dpo.batching import collate_pairs, tokenise_pair
from hallulib.dpo.logprobs import completion_logps
from hallulib.dpo.reference import ReferenceCache, cache_reference, compute_logps
from hallulib.errors import GateFailed
from hallulib.files import sha256_tree
from hallulib.models import load_policy, load_tokenizer, lora_parameters

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(recipe, run, tokenizer, policy, pairs) with SFT finished; the policy is SFT's."""
    recipe = make_recipe()
    run = copy_sft_run(tmp_path_factory.mktemp("world") / "run", recipe)
    tokenizer = load_tokenizer(recipe)
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    return recipe, run, tokenizer, policy, make_pairs(tokenizer, 10)


def make_pairs(tokenizer, count: int):
    texts = [make_texts(number) for number in range(count)]
    return [
        tokenise_pair(tokenizer, note, reference.partition(" Allergic")[0], reference)
        for note, reference in texts
    ]


def open_cache(root, world) -> ReferenceCache:
    recipe, _, tokenizer, policy, _ = world
    return ReferenceCache.open(root, recipe, policy, tokenizer)


def test_stored_log_probs_equal_those_computed_live(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    assert cache.fill(policy, pairs, tokenizer.pad_token_id, recipe) == 10
    read_back = open_cache(tmp_path, world).lookup(pairs)
    with torch.no_grad():
        live = completion_logps(policy, collate_pairs(pairs, tokenizer.pad_token_id))
    for row, (chosen, rejected) in enumerate(read_back):
        assert chosen.dtype == np.float32
        assert chosen == pytest.approx(live[row].numpy(), abs=1e-4)
        assert rejected == pytest.approx(live[10 + row].numpy(), abs=1e-4)
        assert len(chosen) == len(pairs[row].chosen_ids)


def test_rows_are_found_by_content_in_whatever_order(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    cache.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    forward, backward = cache.lookup(pairs), cache.lookup(pairs[::-1])
    assert all(a[0] is b[0] for a, b in zip(forward, backward[::-1], strict=True))


def test_an_interrupted_pass_computes_only_what_is_missing(tmp_path, world, monkeypatch):
    recipe, _, tokenizer, policy, pairs = world
    whole = open_cache(tmp_path / "whole", world)
    whole.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    calls: list[int] = []

    def count(policy, batch, *others):
        if sum(calls) == 8 and len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return compute_logps(policy, batch, *others)

    monkeypatch.setattr(reference_cache, "compute_logps", count)
    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path / "broken", world).fill(policy, pairs, tokenizer.pad_token_id, recipe)
    assert calls == [4, 4]
    manifest = json.loads(next((tmp_path / "broken").glob("*/manifest.json")).read_text())
    assert manifest["complete"] is False
    calls.append(0)  # no interruption any more
    again = open_cache(tmp_path / "broken", world)
    assert again.fill(policy, pairs, tokenizer.pad_token_id, recipe) == 2
    assert calls[3:] == [2]
    # The same bytes as a pass that was never interrupted.
    assert sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "whole")


def test_added_pairs_compute_only_themselves(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    open_cache(tmp_path, world).fill(policy, pairs[:6], tokenizer.pad_token_id, recipe)
    again = open_cache(tmp_path, world)
    assert again.fill(policy, pairs, tokenizer.pad_token_id, recipe) == 4
    assert again.fill(policy, pairs, tokenizer.pad_token_id, recipe) == 0


def test_a_damaged_shard_is_computed_again(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    cache.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    shard = sorted(cache.folder.glob("shard-*.parquet"))[1]
    shard.write_bytes(shard.read_bytes()[:100])
    again = open_cache(tmp_path, world)
    assert again.fill(policy, pairs, tokenizer.pad_token_id, recipe) == 4
    assert len(again.lookup(pairs)) == 10


def test_one_flipped_byte_in_a_shard_is_found_and_only_that_shard_computed_again(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    cache.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    shard = sorted(cache.folder.glob("shard-*.parquet"))[0]
    data = bytearray(shard.read_bytes())
    data[600] ^= 1  # among the values, where parquet itself would not notice
    shard.write_bytes(data)
    assert open_cache(tmp_path, world).fill(policy, pairs, tokenizer.pad_token_id, recipe) == 4


def test_kill_minus_9_in_the_middle_of_a_pass_loses_at_most_one_shard(tmp_path):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    record_pairs(run, recipe)
    code = (
        "import time; from tiny_model import make_recipe; from hallulib.run import Run\n"
        "from hallulib.dpo import reference_cache as r\n"
        "slow, real = time.sleep, r.compute_logps\n"
        "r.compute_logps = lambda *a: (slow(0.4), real(*a))[1]\n"
        f"recipe = make_recipe(base={recipe.model.name_or_path!r})\n"
        f"r.cache_reference(recipe, Run.open({str(run.root)!r}, recipe))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 60
    while not (shards := list(run.path("reference").glob("*/shard-*.parquet"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    result = cache_reference(recipe, run)
    assert result.reused >= 4 * len(shards)
    assert result.computed == result.pairs - result.reused > 0


def test_rows_are_sorted_by_length_so_that_padding_nearly_vanishes(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    cache.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    length = {pair.address: pair.length for pair in pairs}
    stored = []
    for shard in sorted(cache.folder.glob("shard-*.parquet")):
        stored += [length[address] for address in pq.read_table(shard)["address"].to_pylist()]
    assert stored == sorted(stored, reverse=True) and len(set(stored)) > 1


@pytest.fixture
def filled(tmp_path, world):
    """The folder of a cache in which the ten pairs of the world are stored."""
    recipe, _, tokenizer, policy, pairs = world
    open_cache(tmp_path / "cache", world).fill(policy, pairs, tokenizer.pad_token_id, recipe)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "change",
    [
        {"dpo.learning_rate": 1e-6}, {"dpo.beta": 0.5}, {"dpo.loss": "ipo"}, {"seed": 7},
        {"dpo.max_steps": 50}, {"dpo.batch_size": 2}, {"reference.batch_size": 1},
        {"reference.shard_size": 3}, {"name": "another-run"},
        "reordered pairs", "added pairs", "another folder", "padding left in the tokenizer",
    ],
    ids=str,
)  # fmt: skip
def test_what_moves_no_log_prob_recomputes_no_pair(tmp_path, world, filled, change):
    recipe, _, tokenizer, policy, pairs = world
    added = make_pairs(tokenizer, 12)[10:] if change == "added pairs" else []
    asked = [*reversed(pairs), *added] if isinstance(change, str) else pairs
    if change == "another folder":
        filled = filled.rename(tmp_path / "elsewhere")
    if change == "padding left in the tokenizer":
        tokenizer("a", padding="max_length", max_length=9)
    recipe = make_recipe(change) if isinstance(change, dict) else recipe
    cache = ReferenceCache.open(filled, recipe, policy, tokenizer)
    assert len(cache.lookup(pairs)) == 10
    assert cache.fill(policy, asked, tokenizer.pad_token_id, recipe) == len(added)


def change_policy(world, what: str):
    recipe, run, _, _, _ = world
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    if what == "adapter_weights":
        next(iter(lora_parameters(policy).values())).data[0, 0] += 1e-3
    elif what == "base_weights":
        policy.get_base_model().model.norm.weight.data[0] += 1e-3
    else:
        policy.peft_config["default"].lora_alpha += 1
    return policy


def change_tokenizer(recipe, what: str):
    tokenizer = load_tokenizer(recipe)
    if what == "tokenizer":
        tokenizer.add_tokens(["hypertension"])
    else:
        tokenizer.chat_template += " "
    return tokenizer


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("adapter_weights", "policy"), ("base_weights", "policy"), ("adapter_scale", "policy"),
        ("tokenizer", "tokenizer"), ("chat_template", "tokenizer"),
        ("max_length", {"model.max_length": 159}),
        ("truncation_side", {"model.truncation_side": "left"}),
        ("dtype", {"model.dtype": "bfloat16"}), ("attention", {"model.attention": "eager"}),
        ("quantization", {"model.quantization": "nf4"}),
    ],
)  # fmt: skip
def test_what_moves_a_log_prob_refuses_the_old_rows_by_name(world, filled, field, change):
    recipe, _, tokenizer, policy, pairs = world
    policy = change_policy(world, field) if change == "policy" else policy
    tokenizer = change_tokenizer(recipe, field) if change == "tokenizer" else tokenizer
    recipe = make_recipe(change) if isinstance(change, dict) else recipe
    cache = ReferenceCache.open(filled, recipe, policy, tokenizer)
    with pytest.raises(GateFailed, match=rf"10 of 10[\s\S]*made with another {field}\."):
        cache.lookup(pairs)


def test_a_pair_takes_at_most_64_bytes_and_4_a_token_on_disk(tmp_path, world):
    recipe = make_recipe({"reference.shard_size": 256})
    _, _, tokenizer, _, _ = world
    pairs = make_pairs(tokenizer, 10)
    rng = np.random.default_rng(0)
    many = [
        replace(pair, prompt_ids=[*pair.prompt_ids, int(number)])
        for pair in pairs
        for number in rng.permutation(300)[:60]
    ]
    cache = open_cache(tmp_path, world)
    tokens = 0
    for pair in many:
        sizes = len(pair.chosen_ids), len(pair.rejected_ids)
        tokens += sum(sizes)
        cache.rows[pair.address] = tuple(-rng.exponential(size=n).astype("f4") for n in sizes)
    cache._write_manifest(complete=True)
    for number in range(0, len(many), recipe.reference.shard_size):
        cache._write_shard(many[number : number + recipe.reference.shard_size], number)
    size = sum(file.stat().st_size for file in cache.shards())
    assert size <= 4 * tokens + 64 * len(many)
    assert open_cache(tmp_path, world).rows.keys() == {pair.address for pair in many}


def test_the_spot_check_passes_a_true_row_and_refuses_a_false_one(tmp_path, world):
    recipe, _, tokenizer, policy, pairs = world
    cache = open_cache(tmp_path, world)
    cache.fill(policy, pairs, tokenizer.pad_token_id, recipe)
    checked = make_recipe({"reference.spot_check_rows": 10})
    assert cache.spot_check(policy, pairs, tokenizer.pad_token_id, checked) < 1e-4
    true = cache.rows[pairs[3].address]
    for false in (true[0] + np.float32(0.01), true[0][:-1], true[0] * np.float32("nan")):
        cache.rows[pairs[3].address] = (false, true[1])
        with pytest.raises(GateFailed, match=pairs[3].address.hex()[:12]):
            cache.spot_check(policy, pairs, tokenizer.pad_token_id, checked)


def test_the_stage_stores_both_splits_and_is_not_run_again(tmp_path, capsys):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    record_pairs(run, recipe, train=7, validation=3)
    result = cache_reference(recipe, run)
    # The first three notes are in both splits; what is the same is stored once.
    assert (result.pairs, result.computed, result.reused) == (7, 7, 0)
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["rows"] == 7
    assert "adapter_weights" in manifest["key_is_made_of"]
    assert result.bytes < 100_000
    assert cache_reference(recipe, run) == result
    assert "reference: unchanged" in capsys.readouterr().out
