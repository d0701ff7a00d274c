"""What a recipe holds: every setting with its default, one line about it, and its limits."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic import Field as PydanticField


def field(default: Any, description: str, **limits: Any) -> Any:
    """A recipe field: its default, one line about it, and its limits."""
    return PydanticField(default, description=description, **limits)


class Section(BaseModel):
    """Unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    name_or_path: str = field("data/base_model", "shipped folder, your own folder, or a hub id")
    revision: str = field("main", "hub revision (branch, tag or commit)")
    quantization: Literal["none", "nf4", "int8"] = field("none", "storage of the base weights")
    dtype: Literal["float32", "bfloat16", "float16"] = field("float32", "type of the computation")
    attention: Literal["sdpa", "eager"] = field("sdpa", "attention implementation")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "auto = cuda, then mps, then cpu")
    max_length: int = field(512, "longest prompt + completion in tokens", ge=8)
    truncation_side: Literal["right", "left"] = field("right", "end at which a prompt is cut")
    gradient_checkpointing: bool = field(False, "recompute activations: less memory, more time")


class LoraSection(Section):
    r: int = field(8, "rank of the update", ge=1)
    alpha: int = field(16, "scale of the update is alpha / r", ge=1)
    dropout: float = field(0.0, "dropout before the update; DPO switches it off", ge=0, lt=1)
    target_modules: str | list[str] = field("all-linear", "layers that get an adapter")


Column = Literal[
    "id", "group_id", "context", "prompt", "reference", "chosen", "rejected", "messages"
]  # fmt: skip
Task = Literal["summarisation", "information_extraction", "question_answering", "inference"]


class DataSection(Section):
    source: Literal["clinic", "medhal", "file"] = field("clinic", "where the rows come from")
    path: str = field("", "a file; for medhal also a folder or a hub id, as name@commit")
    columns: dict[Column, str] = field({}, "your file's column names: {context: dialogue, ...}")
    encoding: str = field("auto", "of a csv or json file; auto = UTF-8, or what its BOM says")
    tasks: list[Task] = field(["summarisation", "information_extraction"], "MedHal's tasks to use")
    max_chars: int = field(0, "leave out longer prompts (in characters); 0 = none", ge=0)
    near_duplicates: float = field(0.8, "overlap that makes notes one group; 0 = off", ge=0, le=1)
    max_cut_share: float = field(0.05, "share of cut training rows that is refused", ge=0, le=1)
    prompt_template: str = field(
        "Summarise the note.\n\n{context}", "prompt around the note", pattern=r"\{context\}"
    )
    train_size: int = field(3000, "training notes", ge=1)
    validation_size: int = field(200, "validation notes", ge=1)
    test_size: int = field(400, "held-out notes", ge=1)
    missing_rate: float = field(0.22, "share of optional sections missing from a note", ge=0, le=1)
    reference_fill_rate: float = field(0.72, "share of these that references state", ge=0, le=1)


class SftSection(Section):
    learning_rate: float = field(2e-3, "peak learning rate", gt=0)
    batch_size: int = field(32, "rows per micro-batch", ge=1)
    gradient_accumulation: int = field(1, "micro-batches per step", ge=1)
    max_steps: int = field(200, "optimiser steps", ge=1)
    warmup_steps: int = field(10, "steps of linear warm-up", ge=0)
    eval_steps: int = field(50, "steps between evaluations", ge=1)
    save_steps: int = field(50, "steps between checkpoints", ge=1)
    weight_decay: float = field(0.0, "AdamW weight decay", ge=0)
    report_to: Literal["tensorboard", "none"] = field("tensorboard", "where curves are logged")


class PairsSection(Section):
    origin: Literal["sampled", "perturbed", "twin", "given"] = field(
        "sampled", "who writes the rejected side: the policy, a rule, MedHal, or your own file"
    )
    notes: int = field(640, "training notes to make pairs from", ge=1)
    max_pairs: int = field(0, "keep the pairs of the first notes only; 0 = all", ge=0)
    check_references: bool = field(True, "perturbed, twin: leave out references with errors")
    samples_per_note: int = field(8, "summaries sampled per note", ge=2)
    temperature: float = field(1.0, "sampling temperature", gt=0)
    validation_share: float = field(0.1, "share of pairs held out for validation", gt=0, lt=1)
    judge: Literal["entities"] = field("entities", "detector that ranks the samples")
    judge_false_positive_rate: float = field(0.05, "right statements called wrong", ge=0, le=1)
    judge_false_negative_rate: float = field(0.10, "wrong statements let through", ge=0, le=1)
    batch_size: int = field(64, "summaries generated at a time", ge=1)


class ReferenceSection(Section):
    batch_size: int = field(32, "pairs per forward pass", ge=1)
    spot_check_rows: int = field(4, "rows recomputed when the cache is loaded", ge=0)


class DpoSection(Section):
    prefix_sharing: Literal["auto", "off"] = field("auto", "run a prompt once for both completions")
    loss: Literal["sigmoid", "ipo", "simpo"] = field("sigmoid", "simpo needs no reference")
    simpo_gamma: float = field(0.5, "margin that simpo asks for", ge=0)
    beta: float = field(0.05, "how far the policy may move from the reference", gt=0)
    label_smoothing: float = field(0.0, "assumed share of flipped pairs", ge=0, lt=0.5)
    sft_weight: float = field(1.0, "weight of the SFT term on the chosen completion", ge=0)
    learning_rate: float = field(6e-4, "peak learning rate", gt=0)
    batch_size: int = field(16, "pairs per micro-batch", ge=1)
    gradient_accumulation: int = field(1, "micro-batches per step", ge=1)
    max_steps: int = field(64, "optimiser steps", ge=1)
    warmup_steps: int = field(10, "steps of linear warm-up", ge=0)
    eval_steps: int = field(16, "steps between evaluations", ge=1)
    save_steps: int = field(16, "steps between checkpoints", ge=1)
    weight_decay: float = field(0.0, "AdamW weight decay", ge=0)
    guardrail_notes: int = field(100, "validation notes generated by the guardrail", ge=0)
    guardrail_steps: int = field(8, "steps between guardrail checks", ge=1)
    guardrail_patience: int = field(0, "checks without a new best until it stops; 0 = never", ge=0)
    comparison_arms: list[Literal["dpo_plain", "sft_on_chosen"]] = field(
        ["dpo_plain", "sft_on_chosen"], "arms trained beside DPO for equally many steps"
    )
    report_to: Literal["tensorboard", "none"] = field("tensorboard", "where curves are logged")


class MemorySection(Section):
    card_gb: float = field(12.0, "memory of the card to plan for, in GiB", gt=0)


class EvaluationSection(Section):
    notes: int = field(0, "held-out notes to evaluate; 0 = all", ge=0)
    batch_size: int = field(64, "summaries generated at a time", ge=1)
    max_new_tokens: int = field(160, "longest summary in tokens", ge=1)
    detector: Literal["facts", "entities", "nli"] = field("facts", "detector that reports")
    nli_model: str = field("", "for nli: folder or hub id[@revision] of a sequence classifier")
    force_same_detector: bool = field(False, "report with the detector that made the pairs")


class AssessmentSection(Section):
    items: int = field(20, "summaries to grade", ge=1)
    mode: Literal["single", "ab"] = field("single", "one summary, or two side by side")
    assessor: str = field("me", "name written into the grades")
    repeat_share: float = field(0.1, "share of items shown twice, for self-agreement", ge=0, le=1)


class Recipe(Section):
    """Everything that decides a run. `load_recipe` makes one; it cannot be changed afterwards."""

    name: str = PydanticField(
        description="name of the recipe; a run folder belongs to one", pattern=r"^\w[\w.+ -]*$"
    )
    description: str = field("", "one line about it")
    seed: int = field(0, "seed of every random choice", ge=0)
    model: ModelSection = field(ModelSection(), "base model")
    lora: LoraSection = field(LoraSection(), "adapter")
    data: DataSection = field(DataSection(), "notes and references")
    sft: SftSection = field(SftSection(), "supervised fine-tuning")
    pairs: PairsSection = field(PairsSection(), "preference pairs")
    reference: ReferenceSection = field(ReferenceSection(), "cached reference log-probabilities")
    dpo: DpoSection = field(DpoSection(), "direct preference optimisation")
    memory: MemorySection = field(MemorySection(), "memory budget")
    evaluation: EvaluationSection = field(EvaluationSection(), "measurement on held-out notes")
    assessment: AssessmentSection = field(AssessmentSection(), "human assessment")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain, JSON-ready values."""
        return self.model_dump(mode="json")

    def choose_sections(self, sections: Sequence[str]) -> dict[str, Any]:
        """The named sections and the seed, which always counts, as plain values."""
        return self.model_dump(mode="json", include={*sections, "seed"})
