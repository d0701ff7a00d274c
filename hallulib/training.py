"""The one training loop: SFT, DPO and the arms beside it differ in the task they hand in."""

import signal
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import get_scheduler

from hallulib.checkpoints import Log, load_checkpoint, note_signals, save_checkpoint
from hallulib.errors import GateFailed
from hallulib.models import lora_parameters
from hallulib.processes import count_processes, gather_from_all, process_rank
from hallulib.recipe_sections import DpoSection, SftSection

WINDOW = 16  # batches sorted by length together: little padding, and still a random order
MAX_GRAD_NORM = 1.0

Batch = dict[str, Tensor]
Metrics = dict[str, tuple[Any, int]]  # name -> (sum, of how many)


@dataclass(frozen=True)
class Task:
    """What is trained.

    `rows` and `validation` have a `length` in tokens. `collate(rows, training)` makes a batch;
    its `counts` begin with the scored tokens of each row. `measure(model, batch, token_weight)`
    returns the loss, a scalar, and its metrics; it calls the policy as `model(function, ...)`.
    `loss_weights`: the loss over many batches as a weighted sum of mean metrics. `schedule`: of the
    learning rate, by transformers' name. `reference`: key of what the policy is compared with.
    """

    name: str
    rows: Sequence[Any]
    validation: Sequence[Any]
    collate: Callable[[Sequence[Any], bool], Batch]
    measure: Callable[[Module, Batch, float], tuple[Tensor, Metrics]]
    loss_weights: dict[str, float]
    schedule: str
    reference: str = ""


TrainSection = SftSection | DpoSection


def train(
    policy: PeftModel, task: Task, section: TrainSection, log: Log, seed: int,
    watch: Callable[[int, bool], bool] = lambda step, is_last: False,
) -> None:  # fmt: skip
    """Train the policy for `section.max_steps` steps; checkpoints lie beside the log.

    `watch(step, is_last)`, called before the first step and after each, says whether to stop.
    Interrupted, the next call goes on at the last checkpoint, to the same bits on a CPU: weights,
    optimiser, schedule and random states come from the checkpoint, the order of rows from the seed.
    Each of n processes takes a share of a step's rows, so they train as one does with n times the
    batch. Raises GateFailed when the loss, or a weight, is no number any more.
    """
    set_seed(seed + process_rank())
    probe_longest_batch(policy, task, section.batch_size)
    accelerator = Accelerator(cpu=policy.device.type == "cpu")
    model = accelerator.prepare_model(InForward(policy), device_placement=False)
    optimizer = make_optimizer(policy.parameters(), section.learning_rate, section.weight_decay)
    scheduler = get_scheduler(task.schedule, optimizer, section.warmup_steps, section.max_steps)
    state = load_checkpoint(policy, optimizer, scheduler, log, task.reference)
    step, is_over = state["step"], state.get("is_over", False)
    log.start(step)
    if not step:
        log.write(0, evaluate(policy, task, section.batch_size))
        watch(0, False)
    steps, pace = share_out(task.rows, section, seed), []
    bar = tqdm(total=section.max_steps, initial=step, desc=task.name, unit="step")

    with note_signals() as signals:
        while not is_over:
            step += 1
            began = time.time()  # not monotonic: that clock may stand still while asleep
            metrics = compute_gradients(accelerator, model, task, steps[step - 1], step)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            metrics |= {"grad_norm": float(norm), "learning_rate": scheduler.get_last_lr()[0]}
            log.write(step, metrics)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            report_slow_step(step, time.time() - began, pace)
            is_last = step == section.max_steps
            is_over = watch(step, is_last) or is_last
            evaluates = is_over or step % section.eval_steps == 0
            if evaluates:
                log.write(step, evaluate(policy, task, section.batch_size))
            interrupted = any(gather_from_all(bool(signals)))
            if evaluates or interrupted or step % section.save_steps == 0:
                state = {"step": step, "is_over": is_over, "reference": task.reference}
                save_checkpoint(policy, optimizer, scheduler, log, state)
            if interrupted:
                raise SystemExit(143) if signal.SIGTERM in signals else KeyboardInterrupt
    bar.close()
    log.close()


def compute_gradients(
    accelerator: Accelerator, model: Module, task: Task, parts: Sequence[Sequence[Any]], step: int
) -> dict[str, float]:
    """Sum the gradients of a step over its micro-batches `parts`; returns its mean metrics.

    Raises GateFailed at a loss that is not finite; what was saved before stays good.
    """
    model.train()
    batches, found = [task.collate(rows, True) for rows in parts], []
    counts = [int(b["counts"][: len(p)].sum()) for b, p in zip(batches, parts, strict=True)]
    everywhere = [count for own in gather_from_all(counts) for count in own]
    for batch, count in zip(batches, counts, strict=True):
        # Every token counts the same, however unevenly micro-batches and processes share them.
        weight = count * len(everywhere) / sum(everywhere)
        # Gradients are summed over the processes once, at the last of the micro-batches.
        waits = batch is not batches[-1]
        with accelerator.no_sync(model) if waits else nullcontext():
            loss, metrics = task.measure(model, move(batch, model), weight)
            if not loss.isfinite():
                raise GateFailed(
                    f"The loss of step {step} is {loss.item()}.",
                    "Lower the learning rate; with float16 try bfloat16 or float32.",
                )
            accelerator.backward(loss / len(batches))
        found.append(metrics)
    return take_means(found, task.loss_weights)


@torch.no_grad()
def evaluate(policy: PeftModel, task: Task, batch_size: int) -> dict[str, float]:
    """Return the mean loss and metrics over all validation rows, as eval_<name>."""
    policy.eval()
    rows = sorted(task.validation, key=lambda row: row.length)[process_rank() :: count_processes()]
    found = []
    for start in range(0, len(rows), batch_size):
        batch = move(task.collate(rows[start : start + batch_size], False), policy)
        found.append(task.measure(InForward(policy), batch, 1.0)[1])
    return {f"eval_{name}": mean for name, mean in take_means(found, task.loss_weights).items()}


def take_means(found: Sequence[Metrics], weights: dict[str, float]) -> dict[str, float]:
    """Return sum / count per name, over all batches of all processes, and the loss: their weighted
    sum."""
    own = [{name: (float(value), count) for name, (value, count) in m.items()} for m in found]
    everywhere = [metrics for share in gather_from_all(own) for metrics in share]
    means = {}
    for name in everywhere[0]:
        values, counts = zip(*(metrics[name] for metrics in everywhere), strict=True)
        means[name] = sum(values) / max(sum(counts), 1)
    return {"loss": sum(weight * means[name] for name, weight in weights.items() if weight)} | means


def draw_order(lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> list[int]:
    """Return `batches * batch_size` row numbers, in the order in which they are trained on.

    Every row comes once before any comes again. Within a window of 16 batches rows are sorted by
    length, so that a batch holds rows of like length, and the batches are shuffled. The order is
    a pure function of its arguments: a resumed run, and every arm of a comparison, sees the same.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < batches * batch_size:
        rows = torch.randperm(len(lengths), generator=generator).tolist()
        whole = len(rows) - len(rows) % batch_size
        for start in range(0, whole, WINDOW * batch_size):
            window = rows[start : min(start + WINDOW * batch_size, whole)]
            window.sort(key=lambda row: lengths[row])
            cut = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            for i in torch.randperm(len(cut), generator=generator).tolist():
                order += cut[i]
        order += rows[whole:]
    return order[: batches * batch_size]


def share_out(rows: Sequence[Any], section: TrainSection, seed: int) -> list[list[list[Any]]]:
    """Return this process' rows: for every step, for every micro-batch of it."""
    size, parts = section.batch_size * count_processes(), section.gradient_accumulation
    order = draw_order([row.length for row in rows], size, section.max_steps * parts, seed)
    ordered = [rows[number] for number in order]
    own = [ordered[at : at + size][process_rank() :: count_processes()]
           for at in range(0, len(ordered), size)]  # fmt: skip
    return [own[at : at + parts] for at in range(0, len(own), parts)]


class InForward(Module):
    """Runs any function of the policy within `forward`, the one call that DDP wraps."""

    def __init__(self, policy: Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(policy, *arguments)`."""
        return function(self.policy, *arguments)


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over those of the parameters that are trained."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)


def probe_longest_batch(policy: PeftModel, task: Task, batch_size: int) -> None:
    """Run the longest batch once, forward and backward, before anything is trained.

    Running out of memory shows here and not hours later, and so does an adapter that no gradient
    reaches (GateFailed).
    """
    longest = sorted(task.rows, key=lambda row: -row.length)[:batch_size]
    policy.train()
    task.measure(InForward(policy), move(task.collate(longest, True), policy), 1.0)[0].backward()
    check_gradient_flow(policy)
    policy.zero_grad(set_to_none=True)


def check_gradient_flow(model: Module) -> int:
    """After a backward pass: gradients have reached every LoRA tensor and nothing else.

    Returns the number of LoRA tensors; raises GateFailed naming the first offender. Of B matrices
    the gradient is not zero either (A's is by construction while B still is).
    """
    lora = lora_parameters(model)
    next_step = "Load the adapter with trainable=True and keep no_grad away from the policy."
    if not lora:
        raise GateFailed("The model has no LoRA tensors to train.", next_step)
    for name, parameter in model.named_parameters():
        if name not in lora and (parameter.requires_grad or parameter.grad is not None):
            raise GateFailed(f"The base weight {name} would be trained.", next_step)
    for name, parameter in lora.items():
        if not parameter.requires_grad:
            raise GateFailed(f"The LoRA tensor {name} is frozen.", next_step)
        if parameter.grad is None or (".lora_B" in name and not parameter.grad.any()):
            raise GateFailed(f"No gradient reaches the LoRA tensor {name}.", next_step)
    return len(lora)


def move(batch: Batch, model: Module) -> Batch:
    """Return the batch on the model's device."""
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items()}


def report_slow_step(step: int, seconds: float, pace: list[float]) -> None:
    """Say so when a step took many times the usual; `pace`: seconds of the usual ones so far."""
    usual = statistics.median(pace) if len(pace) >= 3 else float("inf")
    if seconds <= max(5 * usual, 5.0):
        pace.append(seconds)
        return
    tqdm.write(f"step {step} took {seconds:.0f} s, the usual is {usual:.1f} s: did the computer "
               "sleep, or is memory short?")  # fmt: skip
