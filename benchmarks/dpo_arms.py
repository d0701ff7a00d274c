"""One arm of dpo_vs_trl.py, alone in its process: python dpo_arms.py ARM FOLDER STEPS."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from dpo_workloads import MODEL_FOLDER, PAIRS_FILE, PAIRS_PER_STEP, UNORDERED_FILE, tokenise
from transformers import Trainer, TrainerCallback, set_seed

BETA, LEARNING_RATE, WARMUP = 0.1, 1e-3, 2


class StepClock(TrainerCallback):
    """CPU seconds and loss of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def read_status(field: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def train_measured(trainer: Trainer, clock: StepClock) -> dict:
    """Train; return the median step, the losses, and the peak over what was resident before."""
    trainer.add_callback(clock)
    gc.collect()
    resident = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    trainer.train()
    return {
        "step_seconds": statistics.median(clock.seconds[WARMUP:]),
        "losses": clock.losses,
        "added_mb": read_status("VmHWM") - resident,
    }


def run_trl(folder: Path, steps: int, patched: bool) -> dict:
    """TRL with a precomputed reference; see the conditions in dpo_vs_trl.py."""
    import trl.trainer.utils
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    if patched:
        trl.trainer.utils._use_triton = lambda device: True
    timed: list[float] = []
    DPOTrainer._precompute_ref_logps = _time_calls(DPOTrainer._precompute_ref_logps, timed)
    args = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=PAIRS_PER_STEP, max_steps=steps, max_length=None,
        precompute_ref_log_probs=True, precompute_ref_batch_size=PAIRS_PER_STEP, beta=BETA,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, max_grad_norm=1.0, train_sampling_strategy="sequential", seed=0,
        data_seed=0, dataloader_pin_memory=False, report_to="none", disable_tqdm=True,
        logging_steps=1, save_strategy="no", eval_strategy="no",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL_FOLDER, dtype=torch.float32)
    set_seed(0)
    trainer = DPOTrainer(
        model=model, args=args,
        train_dataset=load_dataset("json", data_files=str(folder / PAIRS_FILE), split="train"),
        processing_class=AutoTokenizer.from_pretrained(folder / MODEL_FOLDER),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    found = train_measured(trainer, StepClock())
    return found | {"reference_seconds": sum(timed), "cache_bytes_per_pair": 8.0}


def _time_calls(function: Callable, seconds: list[float]) -> Callable:
    def timed(*args, **kwargs):
        began = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return result

    return timed


def run_ours(folder: Path, steps: int, shared: bool) -> dict:
    """Our reference pass and trainer, without evaluation and guardrail, as TRL has none here."""
    from hallulib.adapters import attach_adapter
    from hallulib.dpo.logprobs import choose_layout
    from hallulib.dpo.reference import ReferenceCache
    from hallulib.dpo.step import Arm
    from hallulib.dpo.trainer import SequentialDPOTrainer
    from hallulib.models import load_base_model, load_tokenizer
    from hallulib.recipe import load_recipe

    recipe = load_recipe("tiny-cpu", {
        "model": {"name_or_path": str(folder / MODEL_FOLDER), "max_length": 4096},
        "reference": {"batch_size": PAIRS_PER_STEP},
        "dpo": {
            "beta": BETA, "learning_rate": LEARNING_RATE, "batch_size": PAIRS_PER_STEP,
            "max_steps": steps, "warmup_steps": 0, "report_to": "none",
            "prefix_sharing": "auto" if shared else "off",
        },
    })  # fmt: skip
    tokenizer = load_tokenizer(recipe)
    lines = (folder / UNORDERED_FILE).read_text("utf-8").splitlines()
    pairs = [tokenise(tokenizer, json.loads(line)) for line in lines]
    model = load_base_model(recipe)
    set_seed(0)
    policy = attach_adapter(model, recipe)
    layout = choose_layout(
        policy, pairs[:1], tokenizer.pad_token_id, recipe.dpo.prefix_sharing, recipe.model.dtype
    )
    assert layout.shared == shared, layout
    cache = ReferenceCache.open(Path(tempfile.mkdtemp(dir=folder)), recipe.model, policy, tokenizer)
    began = time.process_time()
    cache.fill(policy, pairs, tokenizer.pad_token_id, PAIRS_PER_STEP, shared)
    reference_seconds = time.process_time() - began
    stored = cache.file.stat().st_size
    arm = Arm("dpo", preference=True, sft_weight=0.0)
    trainer = SequentialDPOTrainer(
        policy, recipe, arm, folder / "ours", cache, (pairs, []), tokenizer.pad_token_id, shared
    )
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.eval_on_start = False
    found = train_measured(trainer, StepClock())
    return found | {
        "reference_seconds": reference_seconds,
        "cache_bytes_per_pair": stored / len(pairs),
    }


def main() -> None:
    arm, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    family, _, variant = arm.partition("_")
    run = run_trl if family == "trl" else run_ours
    found = run(folder, steps, variant in ("patched", "shared"))
    names = ("torch", "transformers", "trl")
    found |= {name: version(name) for name in names} | {"pairs_per_step": PAIRS_PER_STEP}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
