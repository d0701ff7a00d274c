"""Load base models, policies and systems: device, quantisation, checksums, the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from hallulib.adapters import prepare_training, require_adapter
from hallulib.errors import HallulibError
from hallulib.files import display_path, resolve_path, sha256_file
from hallulib.processes import own_device
from hallulib.recipe import Recipe

CHECKSUMS = "SHA256SUMS.json"


def pick_device(recipe: Recipe) -> str:
    """Return the device of the recipe; `auto` is cuda, then mps, then cpu.

    Raises HallulibError when a device is asked for that this machine does not have.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if recipe.model.device == "auto":
        return next(device for device, there in available.items() if there)
    if not available[recipe.model.device]:
        raise HallulibError(
            f"The recipe asks for device '{recipe.model.device}', and PyTorch finds none here.",
            "Set model.device=auto, or use the recipe tiny-cpu.",
        )
    return recipe.model.device


def find_model(recipe: Recipe) -> str:
    """Return the local folder of the base model, or its hub id when there is no such folder.

    A folder with a SHA256SUMS.json is checked against it. Raises HallulibError for a missing local
    folder and HallulibError for a file that differs.
    """
    name = recipe.model.name_or_path
    folder = resolve_path(name)
    if folder.is_dir():
        verify_checksums(folder)
        return str(folder)
    looks_local = name.startswith((".", "/", "~", "data/")) or name.count("/") > 1 or "\\" in name
    if looks_local:
        raise HallulibError(
            f"There is no base model in {display_path(folder)}.",
            "Run `make base` to build the shipped one, or set model.name_or_path.",
        )
    return name


def verify_checksums(folder: Path) -> None:
    """Check a model folder against its SHA256SUMS.json ({file name: hex sha256}), if it has one."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return
    for name, expected in json.loads(sums.read_text("utf-8")).items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != expected:
            state = "differs from its checksum" if file.is_file() else "is missing"
            raise HallulibError(
                f"{display_path(file)} {state}.",
                "Restore the folder (git checkout, or download it again) or rebuild it with "
                "`make base`.",
            )


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer, with a pad token; HallulibError if it has no EOS."""
    name = find_model(recipe)
    with _explain_loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.model.revision)
    if tokenizer.eos_token_id is None:
        raise HallulibError(
            f"The tokenizer of '{recipe.model.name_or_path}' has no end-of-sequence token.",
            "Choose a model that has one: a summary must be able to end.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(recipe: Recipe) -> PreTrainedModel:
    """Return the frozen base model on its device, in evaluation mode.

    Weights keep the recipe's dtype: peft's `prepare_model_for_kbit_training`, which copies
    embeddings and head to float32 (3.2 GiB on an 8B model), is not used. Under NF4 or int8 the
    linear layers are quantised by bitsandbytes, on CPU as well as on CUDA.
    """
    name, device = find_model(recipe), pick_device(recipe)
    dtype = getattr(torch, recipe.model.dtype)
    transformers_logging.disable_progress_bar()
    with _explain_loading(name):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=recipe.model.revision,
            dtype=dtype,
            attn_implementation=recipe.model.attention,
            quantization_config=_build_quantization(recipe, dtype),
            device_map={"": own_device(device)},
        )
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks NF4 weights in place at the first forward
        # in evaluation mode, and a later backward then skips these layers (0.50, measured).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _build_quantization(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if recipe.model.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if recipe.model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


@contextmanager
def _explain_loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise HallulibError(
            f"The model '{display_path(name) if Path(name).is_dir() else name}' cannot be loaded: "
            f"{first_line}",
            "Check model.name_or_path and model.revision; for a hub model, the network and your "
            "access to it; for nf4 and int8, that bitsandbytes is installed.",
        ) from error


def load_policy(recipe: Recipe, adapter_path: str | Path, trainable: bool) -> PeftModel:
    """Return the base model with the adapter of `adapter_path` on it, as the one named "default".

    With `trainable=False` nothing requires a gradient (forgetting this flag is a common cause of
    "element 0 of tensors does not require grad").
    """
    require_adapter(adapter_path)
    model = PeftModel.from_pretrained(
        load_base_model(recipe), str(adapter_path), is_trainable=trainable
    )
    return prepare_training(model, recipe) if trainable else model.eval()


def load_systems(recipe: Recipe, adapters: Mapping[str, str | Path]) -> PeftModel:
    """Return one base model that carries several named adapters, for inference.

    The base weights are in memory once, however many systems are compared; see `use_system`.
    """
    model = None
    for name, path in adapters.items():
        require_adapter(path)
        if model is None:
            base = load_base_model(recipe)
            model = PeftModel.from_pretrained(base, str(path), adapter_name=name)
        else:
            model.load_adapter(str(path), adapter_name=name)
    if model is None:
        raise HallulibError("No adapter was given.", "Name at least one, as {'sft': path}.")
    return model.eval()


@contextmanager
def use_system(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """Within the block the model is system `name`; "base" is the model without any adapter."""
    if name == "base":
        with model.disable_adapter():
            yield model
        return
    if name not in model.peft_config:
        raise HallulibError(
            f"There is no system '{name}'.", f"Use one of: base, {', '.join(model.peft_config)}."
        )
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield model
    finally:
        model.set_adapter(before, inference_mode=True)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the text the model continues: the chat template, or a plain form where there is none.

    Tokenise it with `add_special_tokens=False`: a BOS token, where one is due, is already in it.
    """
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    adds_bos = tokenizer.bos_token_id in tokenizer("").input_ids
    return f"{tokenizer.bos_token if adds_bos else ''}{prompt}\n\nSummary:\n"


