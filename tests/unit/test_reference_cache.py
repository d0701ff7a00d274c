"""The reference cache: right values, nothing computed twice, and a wrong reference refused."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import copy_sft_run, make_recipe, make_texts, record_pairs

from hallulib.dpo import reference
from hallulib.dpo.batching import collate_pairs, tokenise_pair
from hallulib.dpo.logprobs import completion_logps
from hallulib.dpo.reference import ReferenceCache, cache_reference
from hallulib.errors import GateFailed, HallulibError
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


def open_cache(root, world, recipe=None, policy=None, tokenizer=None) -> ReferenceCache:
    """The cache of the world's policy, or of what is given in place of its parts."""
    recipe, policy, tokenizer = recipe or world[0], policy or world[3], tokenizer or world[2]
    return ReferenceCache(root, recipe.model, policy, tokenizer)


def load_sft(world):
    return load_policy(world[0], world[1].require("sft/adapter"), trainable=False)


def fill(cache, world, pairs=None) -> int:
    """Fill in batches of four; returns how many pairs were computed."""
    _, _, tokenizer, policy, all_pairs = world
    return cache.fill(policy, pairs or all_pairs, tokenizer.pad_token_id, 4, shared=False)


@pytest.fixture
def filled(tmp_path, world):
    """The folder of a cache in which the ten pairs of the world are stored."""
    fill(open_cache(tmp_path / "cache", world), world)
    return tmp_path / "cache"


def test_pairs_carry_into_the_batch_what_the_policy_says_of_them(world, filled):
    _, _, tokenizer, policy, pairs = world
    cache = open_cache(filled, world)
    with torch.no_grad():
        live = completion_logps(policy, collate_pairs(pairs, tokenizer.pad_token_id))
    for row, sides in enumerate(cache.lookup(pairs)):
        for side, stored in enumerate(sides):
            assert stored.dtype == np.float32
            assert stored == pytest.approx(live[10 * side + row].numpy(), abs=1e-4)
    with_sums = cache.add_reference(pairs[::-1])
    assert with_sums == pairs[::-1]  # what the reference says does not make another pair
    batch = collate_pairs(with_sums[::-1], 0)
    sums = [tokens.sum().item() for tokens in live]
    assert batch["ref_chosen_logps"].tolist() == pytest.approx(sums[:10], abs=1e-3)
    assert batch["ref_rejected_logps"].tolist() == pytest.approx(sums[10:], abs=1e-3)


class PowerCut(Exception):
    """Stands for a power cut."""


def test_a_pass_begins_with_the_longest_and_goes_on_where_it_was_interrupted(
    tmp_path, world, filled
):
    shapes: list[tuple[int, int]] = []

    def note(module, args, inputs):
        if len(shapes) == 2:
            raise PowerCut
        shapes.append(tuple(inputs["input_ids"].shape))

    watch = world[3].get_base_model().base_model.register_forward_pre_hook(note, with_kwargs=True)
    with watch, pytest.raises(PowerCut):
        fill(open_cache(tmp_path / "broken", world), world)
    # Two batches of four pairs, of like lengths.
    assert [rows for rows, _ in shapes] == [8, 8]
    longest = sorted((pair.length for pair in world[4]), reverse=True)
    assert [width for _, width in shapes] == [longest[0], longest[4]] and longest[4] < longest[0]
    assert fill(open_cache(tmp_path / "broken", world), world) == 2
    # The same bytes as a pass that was never interrupted.
    assert sha256_tree(tmp_path / "broken") == sha256_tree(filled)


def test_kill_minus_9_in_the_middle_of_a_pass_loses_at_most_one_batch(tmp_path):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    record_pairs(run, recipe)
    code = (
        "import os; from tiny_model import make_recipe; from hallulib.run import Run\n"
        "from hallulib.dpo import reference as r\n"
        "real, calls = r.compute_logps, []\n"
        "def die(*a): calls.append(a); return os.kill(os.getpid(), 9) if calls[2:] else real(*a)\n"
        "r.compute_logps = die\n"
        f"recipe = make_recipe(base={recipe.model.name_or_path!r})\n"
        f"r.cache_reference(recipe, Run.open({str(run.root)!r}, recipe))"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert died.returncode == -9
    notes = cache_reference(recipe, run).notes
    assert notes["reused"] == 8 and notes["computed"] == notes["pairs"] - 8 > 0


def test_equal_rows_are_equal_bytes_however_they_came_about(tmp_path, world):
    for name, order in (("a", world[4]), ("b", world[4][::-1])):
        for pair in order:
            fill(open_cache(tmp_path / name, world), world, [pair])
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def flip_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_one_flipped_bit_costs_one_row_which_is_said_and_only_it_computed_again(
    world, filled, capsys
):
    pairs, cache = world[4], open_cache(filled, world)
    stored = cache.lookup(pairs)
    flip_bit(cache.file, cache.file.read_bytes().index(stored[3][0].tobytes()) + 9)
    before = sha256_tree(filled)
    reader = open_cache(filled, world)
    with pytest.raises(GateFailed, match=r"1 of 10 pairs have no row[\s\S]*Its file is damaged\."):
        reader.lookup(pairs)
    assert sha256_tree(filled) == before  # a reader changes nothing
    assert fill(reader, world) == 1
    out = capsys.readouterr().out
    assert "rows.sqlite was damaged; 9 of its rows are good and stay" in out
    for old, new in zip(stored, open_cache(filled, world).lookup(pairs), strict=True):
        assert old[0] == pytest.approx(new[0], abs=1e-4)


def test_wherever_a_bit_is_flipped_no_wrong_value_is_ever_believed(world, filled):
    cache = open_cache(filled, world)
    true = {address: (c.tobytes(), r.tobytes()) for address, (c, r) in cache.rows.items()}
    whole = cache.file.read_bytes()
    for at in [*range(0, 200), *range(16384, len(whole), 211)]:
        flip_bit(cache.file, at)
        try:
            seen = open_cache(filled, world).rows
        except HallulibError:
            seen = {}
        assert all(true.get(a) == (c.tobytes(), r.tobytes()) for a, (c, r) in seen.items()), at
        cache.file.write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"no database at all " * 9, None], ids=str)
def test_a_file_that_is_no_database_is_computed_again(world, filled, content):
    file = open_cache(filled, world).file
    content = file.read_bytes()[:20_000] if content is None else content
    file.write_bytes(content)
    cache = open_cache(filled, world)
    missing = 10 - len(cache.rows)
    assert cache.damaged and fill(cache, world) == missing > 0
    assert len(open_cache(filled, world).lookup(world[4])) == 10


def test_an_error_that_may_pass_is_an_error_and_deletes_nothing(world, filled):
    file = open_cache(filled, world).file
    before = sha256_tree(filled)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(HallulibError, match="cannot be read or written: database is locked"):
            open_cache(filled, world)
    assert sha256_tree(filled) == before
    assert len(open_cache(filled, world).lookup(world[4])) == 10


def test_a_value_that_is_not_a_number_is_not_stored(tmp_path, world):
    policy = load_sft(world)
    next(iter(lora_parameters(policy).values())).data[0, 0] = float("nan")
    with pytest.raises(GateFailed, match="not a number"):
        open_cache(tmp_path, world, policy=policy).fill(policy, world[4], 0, 4, shared=False)
    assert open_cache(tmp_path, world, policy=policy).rows == {}


@pytest.mark.parametrize(
    "change",
    [
        {"dpo.learning_rate": 1e-6}, {"dpo.beta": 0.5}, {"dpo.loss": "ipo"}, {"seed": 7},
        {"dpo.max_steps": 50}, {"dpo.batch_size": 2}, {"reference.batch_size": 1},
        {"reference.spot_check_rows": 1}, {"name": "another-run"},
        "reordered pairs", "added pairs", "another folder", "padding left in the tokenizer",
    ],
    ids=str,
)  # fmt: skip
def test_what_moves_no_log_prob_recomputes_no_pair(tmp_path, world, filled, change):
    _, _, tokenizer, _, pairs = world
    added = make_pairs(tokenizer, 12)[10:] if change == "added pairs" else []
    asked = [*reversed(pairs), *added] if isinstance(change, str) else pairs
    if change == "another folder":
        filled = filled.rename(tmp_path / "elsewhere")
    if change == "padding left in the tokenizer":
        tokenizer("a", padding="max_length", max_length=9)
    cache = open_cache(filled, world, make_recipe(change) if isinstance(change, dict) else None)
    assert len(cache.lookup(pairs)) == 10
    assert fill(cache, world, asked) == len(added)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter_weights", None), ("base_weights", None), ("adapter_scale", None),
        ("tokenizer", None), ("chat_template", None), ("max_length", 159),
        ("truncation_side", "left"), ("dtype", "bfloat16"), ("attention", "eager"),
        ("quantization", "nf4"),
    ],
)  # fmt: skip
def test_what_moves_a_log_prob_refuses_the_old_rows_by_name(world, filled, field, value):
    policy, tokenizer = load_sft(world), load_tokenizer(world[0])
    if field == "adapter_weights":
        next(iter(lora_parameters(policy).values())).data[0, 0] += 1e-3
    elif field == "base_weights":
        policy.get_base_model().model.norm.weight.data[0] += 1e-3
    elif field == "adapter_scale":
        policy.peft_config["default"].lora_alpha += 1
    elif field == "tokenizer":
        tokenizer.add_tokens(["hypertension"])
    elif field == "chat_template":
        tokenizer.chat_template += " "
    recipe = make_recipe({f"model.{field}": value}) if value else None
    cache = open_cache(filled, world, recipe, policy, tokenizer)
    with pytest.raises(GateFailed, match=rf"10 of 10[\s\S]*made with another {field}\."):
        cache.lookup(world[4])


def test_a_pair_takes_at_most_64_bytes_and_4_a_token_on_disk(tmp_path, world, monkeypatch):
    rng = np.random.default_rng(0)
    many = [
        replace(pair, prompt_ids=[*pair.prompt_ids, int(number)])
        for pair in world[4]
        for number in range(300)
    ]

    def draw(policy, pairs, pad_id, shared):
        sides = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
        return [tuple(-rng.exponential(size=n).astype("f4") for n in both) for both in sides]

    monkeypatch.setattr(reference, "compute_logps", draw)
    cache = open_cache(tmp_path, world)
    assert cache.fill(world[3], many, 0, size=256, shared=False) == 3000
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in many)
    assert cache.file.stat().st_size <= 4 * tokens + 64 * len(many)
    assert open_cache(tmp_path, world).rows.keys() == {pair.address for pair in many}


def test_the_spot_check_passes_a_true_row_and_refuses_a_false_one(tmp_path, world):
    _, _, tokenizer, policy, pairs = world
    cache, pad_id = open_cache(tmp_path, world), tokenizer.pad_token_id
    fill(cache, world)
    assert cache.spot_check(policy, pairs, pad_id, rows=10, seed=0) < 1e-4
    true = cache.rows[pairs[3].address]
    for false in (true[0] + np.float32(0.01), true[0][:-1], true[0] * np.float32("nan")):
        cache.rows[pairs[3].address] = (false, true[1])
        with pytest.raises(GateFailed, match=pairs[3].address.hex()[:12]):
            cache.spot_check(policy, pairs, pad_id, rows=10, seed=0)


def test_the_stage_stores_both_splits_and_equal_rows_are_the_same_bytes_again(tmp_path, capsys):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    record_pairs(run, recipe, train=7, validation=3)
    result = cache_reference(recipe, run)
    # The first three notes are in both splits; what is the same is stored once.
    assert [result.notes[name] for name in ("pairs", "computed", "reused")] == [7, 7, 0]
    folder = result.path / result.notes["key"][:16]
    assert "adapter_weights" in json.loads((folder / "key.json").read_text())
    assert sorted(file.name for file in folder.iterdir()) == ["key.json", "rows.sqlite"]
    assert result.notes["bytes"] < 100_000
    assert cache_reference(recipe, run) == result
    assert "reference: unchanged" in capsys.readouterr().out
    before = sha256_tree(run.path("reference"))
    run.forget("reference")
    assert cache_reference(recipe, run).notes["reused"] == 7
    assert sha256_tree(run.path("reference")) == before  # so DPO is not stale
