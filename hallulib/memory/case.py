"""The case's figures about memory, recomputed: what is right, what is loose, what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from hallulib.memory.counts import ParameterCounts, count_parameters, load_model_config
from hallulib.memory.peak import GIB
from hallulib.memory.table import predict_large
from hallulib.recipe import LoraSection

LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"
PAIRS, MAX_LENGTH, TRIPLETS, CARD_GB = 10_335, 512, 8_484, 12
QV = LoraSection(r=16, target_modules=["q_proj", "v_proj"])
QKVO = LoraSection(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(frozen=True)
class Statement:
    """What a report says, what comes out when it is computed, and what to make of it."""

    report: str
    computed: str
    verdict: str


def check_statements() -> list[Statement]:
    """Return the reports' statements about memory with the computed number beside each."""
    return [*_check_counts(), *_check_peaks(), *_check_cache()]


def _check_counts() -> list[Statement]:
    llama, mistral = (count_parameters(load_model_config(name), QV) for name in (LLAMA, MISTRAL))
    packed = count_parameters(load_model_config(LLAMA), QKVO)
    return [
        Statement(
            "Mistral-7B: 8,037,076,992 parameters, 6,815,744 of them trained",
            f"Llama-3-8B has {llama.total:,} / {llama.lora:,}; Mistral-7B {mistral.total:,}",
            _judge(llama.total == 8_037_076_992, "right number, wrong model"),
        ),
        Statement(
            "4-bit: 13,631,488 of 4,554,231,808 trained, 0.30 %",
            f"{packed.lora:,} of {packed.packed_total:,} packed, {packed.lora / packed.total:.2%} "
            f"of all {packed.total:,}",
            _judge(packed.packed_total == 4_554_231_808, "loose: divides by packed storage"),
        ),
        Statement(
            "two 4-bit models take 15.80 GB",
            f"weights of two Llama-3-8B: {2 * weigh(packed) / 1e9:.2f} GB, "
            f"{2 * weigh(packed, upcast=True) / 1e9:.2f} GB with embeddings and head in fp32",
            "loose: an fp32 upcast, not the second model, makes the difference",
        ),
    ]


def weigh(counts: ParameterCounts, upcast: bool = False) -> int:
    """Return bytes of NF4 weights with double quantisation, the rest in 16 bits or upcast to 32."""
    rest = counts.base - counts.linear
    return counts.base_bytes("nf4", 2) + counts.constant_bytes("nf4") + 2 * rest * upcast


def _check_peaks() -> list[Statement]:
    def gib(model: str, strategy: str) -> tuple[str, bool]:
        budget = predict_large(model, strategy, MAX_LENGTH)
        fits = budget.fits(CARD_GB)
        return f"{budget.reserved / GIB:.1f} GiB, {'fits' if fits else 'does not fit'}", fits

    dual, cached = gib(LLAMA, "dual_model"), gib(LLAMA, "cached_reference_pass2")
    mistral = gib(MISTRAL, "dual_4bit")
    copied = gib(LLAMA, "adapter_copy")
    return [
        Statement(
            "two models in 16 bits take 26-28 GB", f"Llama-3-8B: {dual[0]} in 12 GiB",
            _judge(not dual[1], "right that it does not fit, too low"),
        ),
        Statement(
            "two 4-bit Mistral-7B do not fit in 12 GB", f"Mistral-7B: {mistral[0]}",
            _judge(mistral[1], "wrong: a real Mistral-7B would have fitted"),
        ),
        Statement(
            "with a stored reference: 6-7 GB", f"Llama-3-8B: {cached[0]}, without the context",
            _judge(cached[1], "right"),
        ),
        Statement(
            "DPO needs two models, or a stored reference", f"adapter copied: {copied[0]}",
            _judge(copied[1], "wrong: a second adapter on one model peaks at about the same"),
        ),
    ]  # fmt: skip


def _check_cache() -> list[Statement]:
    vocabulary = load_model_config(LLAMA).vocab_size
    tokens = PAIRS * 2 * MAX_LENGTH
    days = TRIPLETS * 4.5 / 60 / 24
    return [
        Statement(
            "the stored reference takes 50 GB",
            f"all logits {2 * tokens * vocabulary / 1e12:.1f} TB; a log-prob a token at most "
            f"{4 * tokens / 1e6:.0f} MB; two sums a pair {8 * PAIRS / 1e3:.0f} kB",
            "wrong thing stored: log-probs are enough",
        ),
        Statement(
            "one epoch on the CPU: 26.5 days",
            f"{TRIPLETS:,} steps of 4.5 minutes are {days:.1f} days",
            "loose: the arithmetic is right, the 4.5 minutes were not measured",
        ),
    ]


def _judge(holds: bool, verdict: str) -> str:
    return verdict if holds else "no longer reproduced: look into it"
