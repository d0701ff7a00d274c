"""Rebuild the base model from nothing: `python data/build/pretrain.py` (or `make base`).

Writes a checkpoint every few hundred steps and goes on from it after an interruption. At the end it
measures what it made on notes it has not seen, writes the figures beside the weights, and fills the
model card from them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from base_card import write_card, write_checksums
from base_model import (
    build_config,
    build_tokenizer,
    encode_note,
    iterate_batches,
    tokenizer_corpus,
)
from copying import measure_copying
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parents[2]
STEPS, BATCH_SIZE, CHECKPOINT_EVERY = 6000, 32, 250
SECOND_CYCLE = 1 / 6  # share of the steps after the embeddings were separated
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE, WARMUP_STEPS = 0.02, 3e-3, 100


def build_optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon (Jordan et al. 2024) learns to copy in about half of AdamW's steps here.
    """
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(outer, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Return the factor on the learning rate: warm-up, plateau, then straight down over 60 %.

    In the second cycle: warm-up to one half, then straight down.
    """
    turn = second_start(steps)
    if step < turn:
        return min((step + 1) / WARMUP_STEPS, (turn - step) / (0.6 * turn), 1.0)
    return 0.5 * min((step - turn + 1) / WARMUP_STEPS, (steps - step) / (steps - turn))


def second_start(steps: int) -> int:
    """Return the step at which the second cycle begins."""
    return steps - round(SECOND_CYCLE * steps)


@torch.no_grad()
def separate_embeddings(
    model: LlamaForCausalLM, tokens: list[int], seed: int, alike: float = 0.95
) -> list[int]:
    """Pull apart embeddings of `tokens` that have become one, in place; return their token ids.

    Words that stand in the same places ("cardiology", "urology") may be pushed onto one vector
    early, before anything reads them from the note. From there no gradient tells them apart again,
    and the model guesses. Noise as long as the vectors themselves breaks the tie.
    """
    table = model.get_input_embeddings().weight
    ids = torch.tensor(tokens, device=table.device)
    unit = torch.nn.functional.normalize(table[ids].float(), dim=1)
    likeness = (unit @ unit.T).fill_diagonal_(0)
    found = ids[likeness.amax(1) > alike]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(found), table.shape[1]), generator=generator).to(table.device)
    table[found] += noise * (table[found].norm(dim=1, keepdim=True) / table.shape[1] ** 0.5)
    return found.tolist()


def compute_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy in nats over the summary tokens; the head runs on them only."""
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        hidden = model.model(batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[scored])
    return cross_entropy(logits.float(), labels[scored])


def pretrain(folder: Path, checkpoint: Path, seed: int, steps: int, device: str) -> Path:
    """Train the base model, write it to `folder` and return that path.

    What is in `folder` stays until the new model is complete; until then `checkpoint` grows.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tokenizer_corpus(seed))
    model = LlamaForCausalLM(build_config(tokenizer)).to(device)
    losses = train(model, tokenizer, checkpoint, seed, steps)
    model.eval().float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    figures = {"steps": steps, "batch_size": BATCH_SIZE, "seed": seed, "device": device}
    figures |= {"losses": losses}
    figures |= {"copying": measure_copying(model, tokenizer)}
    (folder / "model.safetensors").chmod(0o644)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    write_card(folder, figures, sum(p.numel() for p in model.parameters()))
    write_checksums(folder)
    return folder


def find_used_tokens(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[int]:
    """Return the ids that occur in notes and summaries; others are steps of the BPE only."""
    rows = (encode_note(tokenizer, note) for note in tokenizer_corpus(seed)[:2000])
    return sorted({token for prompt, summary in rows for token in prompt + summary})


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Path,
    seed: int,
    steps: int,
) -> list[list[float]]:
    """Run the optimiser from the last checkpoint to `steps`; return [step, loss] every 50 steps."""
    optimisers = build_optimisers(model)
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimisers]
    start, losses = _load_checkpoint(checkpoint, model, optimisers)
    turn = second_start(steps)
    batches = iterate_batches(tokenizer, seed, range(start, steps), turn, BATCH_SIZE)
    progress = tqdm(enumerate(batches, start), initial=start, total=steps, desc="base model")
    for step, batch in progress:
        if step == turn:
            separate_embeddings(model, find_used_tokens(tokenizer, seed), seed)
            optimisers = build_optimisers(model)
        for optimiser, rates in zip(optimisers, base_rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, steps)
        loss = compute_loss(model, {k: v.to(model.device) for k, v in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 49:
            losses.append([step + 1, round(loss.item(), 4)])
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            _save_checkpoint(checkpoint, model, optimisers, step + 1, losses)
    return losses


def _save_checkpoint(path: Path, model, optimisers, step: int, losses: list) -> None:
    state = {"model": model.state_dict(), "step": step, "losses": losses}
    state["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def _load_checkpoint(path: Path, model, optimisers) -> tuple[int, list]:
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return state["step"], state["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=PROJECT / "data/base_model")
    parser.add_argument(
        "--checkpoint", type=Path, default=PROJECT / "outputs/base_model_checkpoint.pt"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print(pretrain(**vars(options)))


if __name__ == "__main__":
    main()
