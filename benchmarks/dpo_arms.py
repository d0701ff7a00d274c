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
from transformers import TrainerCallback, set_seed

BETA, LEARNING_RATE, WARMUP = 0.1, 1e-3, 2


class StepClock(TrainerCallback):
    """CPU seconds and loss of every optimiser step of TRL's trainer; `tick` is for our loop."""

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

    def tick(self, step: int, is_last: bool) -> bool:
        """Called before the first step and after each, which is from one tick to the next."""
        now = time.process_time()
        self.seconds += [now - self.began] if step else []
        self.began = now
        return False


def read_status(field: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def train_measured(train: Callable[[], object], clock: StepClock) -> dict:
    """Train; return the median step, and the peak over what was resident before."""
    gc.collect()
    resident = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    train()
    return {
        "step_seconds": statistics.median(clock.seconds[WARMUP:]),
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
    clock = StepClock()
    trainer.add_callback(clock)
    found = train_measured(trainer.train, clock)
    return found | {
        "losses": clock.losses,
        "reference_seconds": sum(timed),
        "cache_bytes_per_pair": 8.0,
    }


def _time_calls(function: Callable, seconds: list[float]) -> Callable:
    def timed(*args, **kwargs):
        began = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return result

    return timed


def run_ours(folder: Path, steps: int, shared: bool) -> dict:
    """Our reference pass and training loop, without the guardrail, as TRL has none here.

    One pair is evaluated before the first and after the last step, outside of what is timed.
    """
    from hallulib.checkpoints import Log
    from hallulib.dpo.logprobs import choose_layout
    from hallulib.dpo.reference import ReferenceCache
    from hallulib.dpo.train import Start, make_task
    from hallulib.models import attach_adapter, load_base_model, load_tokenizer
    from hallulib.recipe import load_recipe
    from hallulib.training import train

    recipe = load_recipe("tiny-cpu", {
        "model": {"name_or_path": str(folder / MODEL_FOLDER), "max_length": 4096},
        "dpo": {
            "beta": BETA, "learning_rate": LEARNING_RATE, "batch_size": PAIRS_PER_STEP,
            "max_steps": steps, "warmup_steps": 0, "eval_steps": steps, "save_steps": steps,
            "prefix_sharing": "auto" if shared else "off",
        },
    })  # fmt: skip
    tokenizer = load_tokenizer(recipe)
    pad_id = tokenizer.pad_token_id
    lines = (folder / UNORDERED_FILE).read_text("utf-8").splitlines()
    pairs = [tokenise(tokenizer, json.loads(line)) for line in lines]
    model = load_base_model(recipe)
    set_seed(0)
    policy = attach_adapter(model, recipe)
    dtype = recipe.model.dtype
    layout = choose_layout(policy, pairs[:1], pad_id, recipe.dpo.prefix_sharing, dtype)
    assert layout.shared == shared, layout
    cache = ReferenceCache(Path(tempfile.mkdtemp(dir=folder)), recipe.model, policy, tokenizer)
    began = time.process_time()
    cache.fill(policy, pairs, pad_id, PAIRS_PER_STEP, shared)
    reference_seconds = time.process_time() - began
    pairs = cache.add_reference(pairs)
    start = Start(policy, tokenizer, pairs, pairs[:1], shared, {"reference_key": cache.key})
    task = make_task(start, "dpo_plain", recipe.dpo)
    clock, log = StepClock(), Log(Path(tempfile.mkdtemp(dir=folder)))
    found = train_measured(lambda: train(policy, task, recipe.dpo, log, 0, clock.tick), clock)
    return found | {
        "losses": [row["loss"] for row in log.rows if "loss" in row],
        "reference_seconds": reference_seconds,
        "cache_bytes_per_pair": cache.file.stat().st_size / len(pairs),
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
