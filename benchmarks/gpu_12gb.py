"""Peak memory and time of the reference pass and of a DPO step on a card capped to 12 GB.

Llama-3-8B and Mistral-7B shapes with random weights in NF4, LoRA as in the recipe, checkpointing
on. Every case runs in a process of its own, so that no peak is another's. One row a case in
gpu_12gb.csv, with the card and the versions beside it. Needs CUDA and bitsandbytes.

    python benchmarks/gpu_12gb.py                    # all cases
    python benchmarks/gpu_12gb.py --shape tiny       # a smoke test of the script, on a CPU too
    python benchmarks/gpu_12gb.py --predict          # no GPU: put the predictions beside the rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from accelerate import init_empty_weights
from blocks import replace_block
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from hallulib import memory
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.losses import dpo_loss
from hallulib.dpo.prefix_sharing import enable_prefix_sharing
from hallulib.memory import peak
from hallulib.models import attach_adapter, lora_parameters
from hallulib.recipe import Recipe, load_recipe

CSV = Path(__file__).with_suffix(".csv")
SHAPES = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
    ),
    "Mistral-7B": MistralConfig(sliding_window=None),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ),
}  # fmt: skip
LENGTHS, COMPLETION, STEPS = (512, 1024, 2048), 128, 4


def build_model(shape: str, device: str) -> PreTrainedModel:
    """Return the shape with random weights: linear layers in NF4, the rest in bfloat16.

    Layer by layer, so that the whole model never exists unquantised.
    """
    import bitsandbytes as bnb

    config = SHAPES[shape]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, torch.nn.Linear) or layer is head:
                continue
            size = (layer.out_features, layer.in_features)
            weight = torch.randn(size, dtype=torch.bfloat16, device=device) / 64
            quantised = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.bfloat16, compress_statistics=True, device="meta",
            )  # fmt: skip
            quantised.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            quantised.support_avx512bf16_for_cpu = False
            setattr(parent, name, quantised.to(device))
    for parent in model.modules():
        for name, value in list(parent.named_parameters(recurse=False)):
            if value.is_meta:
                filled = torch.full(value.shape, 1.0, dtype=torch.bfloat16, device=device)
                if value.ndim > 1:
                    filled.normal_(std=0.02)
                setattr(parent, name, torch.nn.Parameter(filled, requires_grad=False))
        for name, value in list(parent.named_buffers(recurse=False)):
            setattr(parent, name, value.to(device))
    return model.eval().requires_grad_(False)


def make_pairs(count: int, length: int, vocabulary: int) -> list[TokenPair]:
    """Random tokens: completions of 128 (a quarter of a short row), prompts for the rest."""
    completion = min(COMPLETION, length // 4)
    draw = torch.randint(5, vocabulary, (count, length + completion)).tolist()
    cut = length - completion
    return [TokenPair(row[:cut], row[cut:length], row[length:]) for row in draw]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in this process; raises torch.OutOfMemoryError where it does not fit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case["cap_gib"] * 2**30 / total))
    torch.manual_seed(0)
    recipe = load_recipe("llama3-8b-12gb", {"model.gradient_checkpointing": True, "lora.r": 16})
    policy = attach_adapter(build_model(case["shape"], device), recipe)
    reference = build_model(case["shape"], device) if case["phase"] == "dual model" else None
    if case["shared"]:
        enable_prefix_sharing(policy.get_base_model())
    pairs = make_pairs(STEPS, case["length"], SHAPES[case["shape"]].vocab_size)
    if device == "cuda":
        torch.cuda.empty_cache()  # what making the weights left behind
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    optimizer = torch.optim.AdamW(lora_parameters(policy).values(), lr=1e-5)
    for pair in pairs:
        began = time.perf_counter()
        batch = collate_pairs([pair], 0, case["shared"])
        batch = {name: t.to(device) for name, t in batch.items()}
        if case["phase"] == "reference pass":
            sum_logps(policy.eval(), batch)
        else:
            step(policy, reference, batch, recipe, optimizer)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {"seconds_per_pair": sorted(seconds[1:])[len(seconds) // 2 - 1], "fits": True}
    if device == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        found["device"] = torch.cuda.get_device_name()
    return found


@torch.no_grad()
def sum_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A reference's pass: summed log-probabilities, chosen first."""
    return sum_completions(completion_logps(model, batch))


def step(
    policy: torch.nn.Module,
    reference: PreTrainedModel | None,
    batch: dict[str, torch.Tensor],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One DPO step of one pair; without a second model the reference is what was stored."""
    policy.train()
    sums = sum_completions(completion_logps(policy, batch))
    stored = sums.detach() + 1.0 if reference is None else sum_logps(reference, batch)
    losses, *_ = dpo_loss(*sums.split(1), *stored.split(1), recipe.dpo.beta)
    losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def list_cases(shapes: list[str], cap_gib: float) -> list[dict[str, Any]]:
    """Every case: two phases with and without sharing, and two models for contrast."""
    cases = []
    for shape in shapes:
        for length in LENGTHS if shape != "tiny" else (64,):
            phases = [(p, s) for p in ("reference pass", "dpo step") for s in (False, True)]
            for phase, shared in [*phases, ("dual model", False)]:
                case = {"shape": shape, "length": length, "phase": phase, "shared": shared}
                cases.append(case | {"cap_gib": cap_gib})
    return cases


def start_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a process of its own; where it runs out of memory, that is the result."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
    elif "out of memory" in done.stderr.lower():
        found = {"fits": False}
    else:
        raise RuntimeError(done.stderr[-2000:])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return case | found | versions


def add_predictions(path: Path) -> None:
    """Put what the memory budget predicts (live bytes) beside each measured row of the CSV."""
    names = {"Llama-3-8B": memory.LARGE, "Mistral-7B": "mistralai/Mistral-7B-Instruct-v0.3"}
    passes = {"reference pass": "cached_reference_pass1", "dpo step": "cached_reference_pass2"}
    frame = pd.read_csv(path)
    for at, row in frame[frame["fits"]].iterrows():
        sharing = "auto" if row["shared"] else "off"
        settings = {"model.name_or_path": names[row["shape"]], "dpo.prefix_sharing": sharing}
        recipe = load_recipe("llama3-8b-12gb", settings | {"dpo.gradient_accumulation": 1})
        budget = memory.predict_peak(
            recipe, passes[row["phase"]], rows=1, tokens=row["length"], completion=COMPLETION,
            replay=False,
        )  # fmt: skip
        frame.loc[at, "predicted_gib"] = sum(budget.terms[n] for n in peak.TERMS) / 2**30
    frame.to_csv(path, index=False, float_format="%.4f")
    replace_block(Path(__file__).with_name("README.md"), "gpu_12gb", describe(frame))


def describe(frame: pd.DataFrame) -> str:
    """Markdown: every measured case, and what was predicted for it."""
    error = (frame["predicted_gib"] / frame["allocated_gib"] - 1).dropna()
    cells = ["shape", "tokens", "pass", "prompt runs", "GiB allocated", "predicted", "reserved",
             "s a pair"]  # fmt: skip
    lines = [
        "## On a card of 12 GB", "",
        f"`python benchmarks/gpu_12gb.py`: one {frame['device'].dropna().iloc[0]} capped to "
        f"{frame['cap_gib'].iloc[0]:.0f} GiB, torch {frame['torch'].iloc[0]}, transformers "
        f"{frame['transformers'].iloc[0]}; random weights in NF4, LoRA r=16, checkpointing on, one "
        f"pair a step, completions of {COMPLETION} tokens. Seconds are of that card, not of a "
        "12 GB one. Predicted: live bytes by `hallulib.memory`, from the configuration alone, on a "
        f"CPU; they differ from the measured ones by {error.min():.1%} to {error.max():.1%}.", "",
        "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|",
    ]  # fmt: skip
    for row in frame.itertuples():
        sizes = (row.allocated_gib, row.predicted_gib, row.reserved_gib, row.seconds_per_pair)
        found = [f"{size:.2f}" for size in sizes] if row.fits else ["out of memory", "", "", ""]
        runs = "once" if row.shared else "twice"
        row_cells = [row.shape, str(row.length), row.phase, runs, *found]
        lines.append("| " + " | ".join(row_cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--cap-gib", type=float, default=12.0)
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--predict", action="store_true", help="no GPU: only add predictions")
    args = parser.parse_args()
    if args.predict:
        return add_predictions(args.out)
    if args.case:
        print(json.dumps(run_case(args.case)))
        return
    shapes = args.shape or [name for name in SHAPES if name != "tiny"]
    if "tiny" not in shapes and not torch.cuda.is_available():
        sys.exit("These shapes need a CUDA device; --shape tiny tries the script without one.")
    rows = []
    for case in list_cases(shapes, args.cap_gib):
        rows.append(start_case(case))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(args.out, index=False)  # what is measured is kept


if __name__ == "__main__":
    main()
