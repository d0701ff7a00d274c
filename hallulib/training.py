"""The one training loop: SFT, DPO and the arms beside it differ in the task they hand in."""

from __future__ import annotations

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


# watch(step, is_last), called before the first step and after each, returns whether to stop.
Watch = Callable[[int, bool], bool]


def train(
    policy: PeftModel,
    task: Task,
    section: SftSection | DpoSection,
    log: Log,
    seed: int,
    watch: Watch = lambda step, is_last: False,
) -> None:
    """Train the policy for `section.max_steps` steps; checkpoints lie beside the log.

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
    state = load_checkpoint(policy, optimizer, scheduler, log.folder, task.reference)
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
            policy.train()
            batches = [task.collate(rows, True) for rows in steps[step - 1]]
            weights = weigh_tokens([int(b["counts"][: section.batch_size].sum()) for b in batches])
            sums: dict[str, list[float]] = {}
            for batch, weight in zip(batches, weights, strict=True):
                # Gradients are summed over the processes once, at the last of the micro-batches.
                wait = batch is not batches[-1]
                with accelerator.no_sync(model) if wait else nullcontext():
                    loss, found = task.measure(model, move(batch, policy.device), weight)
                    check_loss_is_a_number(loss.detach(), step)
                    accelerator.backward(loss / len(batches))
                add_sums(sums, found)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            metrics = take_means(sums, task.loss_weights) | {"grad_norm": float(norm)}
            log.write(step, metrics | {"learning_rate": scheduler.get_last_lr()[0]})
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


def share_out(
    rows: Sequence[Any], section: SftSection | DpoSection, seed: int
) -> list[list[list[Any]]]:
    """Return this process' rows: for every step, for every micro-batch of it."""
    size, parts = section.batch_size * count_processes(), section.gradient_accumulation
    order = draw_order([row.length for row in rows], size, section.max_steps * parts, seed)
    ordered = [rows[number] for number in order]
    micro_batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    own = [part[process_rank() :: count_processes()] for part in micro_batches]
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
    batch = move(task.collate(longest, True), policy.device)
    task.measure(InForward(policy), batch, 1.0)[0].backward()
    check_gradient_flow(policy)
    policy.zero_grad(set_to_none=True)


def check_gradient_flow(model: torch.nn.Module) -> int:
    """After a backward pass: gradients have reached every LoRA tensor and nothing else.

    Returns the number of LoRA tensors. Raises GateFailed naming the first offender: a base weight
    that would be trained, a frozen or unreached LoRA tensor, or a B matrix whose gradient is zero
    (A's is zero by construction while B still is).
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


@torch.no_grad()
def evaluate(policy: PeftModel, task: Task, batch_size: int) -> dict[str, float]:
    """Return the mean loss and metrics over all validation rows, as eval_<name>."""
    policy.eval()
    rows = sorted(task.validation, key=lambda row: row.length)[process_rank() :: count_processes()]
    sums: dict[str, list[float]] = {}
    for start in range(0, len(rows), batch_size):
        batch = move(task.collate(rows[start : start + batch_size], False), policy.device)
        add_sums(sums, task.measure(InForward(policy), batch, 1.0)[1])
    means = take_means(sums, task.loss_weights)
    return {f"eval_{name}": mean for name, mean in means.items()}


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on the device."""
    return {name: values.to(device) for name, values in batch.items()}


def weigh_tokens(counts: Sequence[int]) -> list[float]:
    """Return what the mean over each micro-batch's tokens weighs, from its number of tokens.

    Every token of the optimiser step then counts the same, however unevenly the micro-batches and
    the processes share them.
    """
    everywhere = [count for own in gather_from_all(list(counts)) for count in own]
    return [count * len(everywhere) / sum(everywhere) for count in counts]


def add_sums(sums: dict[str, list[float]], more: Metrics) -> None:
    """Add (sum, count) entries in place."""
    for name, (value, count) in more.items():
        entry = sums.setdefault(name, [0.0, 0])
        entry[0] += float(value)
        entry[1] += count


def take_means(sums: dict[str, list[float]], weights: dict[str, float]) -> dict[str, float]:
    """Return sum / count per name, over all processes, and the loss: their weighted sum."""
    everywhere: dict[str, list[float]] = {}
    for own in gather_from_all(sums):
        add_sums(everywhere, own)
    means = {name: total / max(count, 1) for name, (total, count) in everywhere.items()}
    loss = sum(weight * means[name] for name, weight in weights.items() if weight)
    return {"loss": loss} | means


def check_loss_is_a_number(loss: Tensor, step: int) -> None:
    """Raise GateFailed at the first loss that is not finite; what was saved before stays good."""
    if not loss.isfinite():
        raise GateFailed(
            f"The loss of step {step} is {loss.item()}.",
            "Lower the learning rate or raise the warm-up; with float16 try bfloat16 or float32.",
        )


def report_slow_step(step: int, seconds: float, pace: list[float]) -> None:
    """Say so when a step took many times the usual; `pace`: seconds of the usual ones so far."""
    usual = statistics.median(pace) if len(pace) >= 3 else float("inf")
    if seconds > max(5 * usual, 5.0):
        tqdm.write(
            f"step {step} took {seconds:.0f} s, the usual is {usual:.1f} s: did the computer "
            "sleep, or is memory short?"
        )
    else:
        pace.append(seconds)
