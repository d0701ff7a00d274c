"""Base models, tokenizers and their LoRA adapter: load, attach, save, fold."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from hallulib.errors import GateFailed, HallulibError
from hallulib.files import display_path, resolve_path, sha256_file, write_json_atomic
from hallulib.processes import count_processes
from hallulib.recipe import Recipe

CHECKSUMS = "SHA256SUMS.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FOLD_LIMIT = 256 * 2**20


def pick_device(recipe: Recipe) -> str:
    """Return the device of the recipe; `auto` is cuda, then mps, then cpu.

    Raises HallulibError when a device is asked for that this machine does not have.
    """
    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    asked = recipe.model.device
    if asked not in ("auto", "cpu", *there):
        raise HallulibError(
            f"The recipe asks for device '{asked}', and PyTorch finds none here.",
            "Set model.device=auto, or use the recipe tiny-cpu.",
        )
    return [*there, "cpu"][0] if asked == "auto" else asked


def find_model(recipe: Recipe) -> str:
    """Return the local folder of the base model, or its hub id when there is no such folder.

    Raises HallulibError for a missing local folder, and for a file that differs from what
    SHA256SUMS.json in it says ({file name: hex sha256}).
    """
    name = recipe.model.name_or_path
    folder = resolve_path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~", "data/")) or name.count("/") > 1 or "\\" in name:
            what = f"There is no base model in {display_path(folder)}."
            advice = "Run `make base` to build the shipped one, or set model.name_or_path."
            raise HallulibError(what, advice)
        return name
    sums = folder / CHECKSUMS
    for file, expected in json.loads(sums.read_text("utf-8") if sums.is_file() else "{}").items():
        path = folder / file
        if not path.is_file() or sha256_file(path) != expected:
            state = "differs from its checksum" if path.is_file() else "is missing"
            raise HallulibError(
                f"{display_path(path)} {state}.",
                "Restore the folder (git checkout, or download it again), or run `make base`.",
            )
    return str(folder)


def load_tokenizer(recipe: Recipe) -> Tokenizer:
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


def render_prompt(tokenizer: Tokenizer, prompt: str) -> str:
    """Return the text the model continues: the chat template, or a plain form where there is none.

    Tokenise it with `add_special_tokens=False`: a BOS token, where one is due, is already in it.
    """
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    adds_bos = tokenizer.bos_token_id in tokenizer("").input_ids
    return f"{tokenizer.bos_token if adds_bos else ''}{prompt}\n\nSummary:\n"


def load_base_model(recipe: Recipe) -> PreTrainedModel:
    """Return the frozen base model in evaluation mode, on its device: under several processes on
    the GPU that is this one's.

    Weights keep the recipe's dtype: peft's `prepare_model_for_kbit_training`, which copies
    embeddings and head to float32 (3.2 GiB on an 8B model), is not used. Under NF4 or int8 the
    linear layers are quantised by bitsandbytes, on CPU as well as on CUDA.
    """
    name, device = find_model(recipe), pick_device(recipe)
    if device == "cuda" and count_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = getattr(torch, recipe.model.dtype)
    transformers_logging.disable_progress_bar()
    with _explain_loading(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=recipe.model.revision, dtype=dtype, device_map={"": device},
            attn_implementation=recipe.model.attention,
            quantization_config=build_quantization(recipe.model.quantization, dtype),
        )  # fmt: skip
    for module in model.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks NF4 weights in place at the first forward
        # in evaluation mode, and a later backward then skips these layers (0.50, measured).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def build_quantization(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores the base weights; None for "none"."""
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


@contextmanager
def _explain_loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        shown = display_path(name) if Path(name).is_dir() else name
        first_line = str(error).strip().split("\n")[0]
        raise HallulibError(
            f"The model '{shown}' cannot be loaded: {first_line}",
            "Check model.name_or_path and model.revision; for a hub model, the network and your "
            "access to it; for nf4 and int8, that bitsandbytes is installed.",
        ) from error


def attach_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put a new, trainable LoRA adapter "default" on a plain base model.

    B starts at zero, so the model's output is unchanged until the first step (Hu et al. 2021).
    Raises GateFailed when the model already carries an adapter: a second one on top would train,
    and be saved, without the first.
    """
    if hasattr(model, "peft_config"):
        raise GateFailed(
            "The model already has a LoRA adapter; a second one would be stacked on top of it.",
            "Load the existing adapter with load_policy(recipe, path, trainable=True) instead.",
        )
    lora = recipe.lora
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
        target_modules=lora.target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    return _prepare_policy(get_peft_model(model, config), recipe)


def load_policy(recipe: Recipe, adapter_path: str | Path, trainable: bool) -> PeftModel:
    """Return the base model with the adapter of `adapter_path` on it, as the one named "default".

    With `trainable=False` nothing requires a gradient.
    """
    require_adapter(adapter_path)
    base = load_base_model(recipe)
    model = PeftModel.from_pretrained(base, str(adapter_path), is_trainable=trainable)
    return _prepare_policy(model, recipe) if trainable else model.eval()


def _prepare_policy(model: PeftModel, recipe: Recipe) -> PeftModel:
    # Saved adapters name the base model as the recipe does, not by its place on this machine.
    model.peft_config["default"].base_model_name_or_path = recipe.model.name_or_path
    if recipe.model.gradient_checkpointing:
        # Non-reentrant, so that gradients reach the adapters although no input requires one.
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model


def load_systems(recipe: Recipe, adapters: Mapping[str, str | Path]) -> PeftModel:
    """Return one base model that carries several named adapters, for `use_system`: the base weights
    are in memory once, however many systems are compared."""
    for path in adapters.values():
        require_adapter(path)
    (first, path), *others = adapters.items()
    model = PeftModel.from_pretrained(load_base_model(recipe), str(path), adapter_name=first)
    for name, path in others:
        model.load_adapter(str(path), adapter_name=name)
    return model.eval()


@contextmanager
def use_system(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """Within the block the model is system `name`; "base" is the model without any adapter."""
    if name == "base":
        with model.disable_adapter():
            yield model
        return
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield model
    finally:
        model.set_adapter(before, inference_mode=True)


def require_adapter(adapter_path: str | Path) -> None:
    """Raise HallulibError unless the folder holds a saved adapter."""
    missing = [name for name in ADAPTER_FILES if not (Path(adapter_path) / name).is_file()]
    if missing:
        raise HallulibError(
            f"{display_path(adapter_path)} holds no adapter ({', '.join(missing)} missing).",
            "Run the notebook that trains it again (02_sft or 05_sequential_dpo).",
        )


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter "default" to `folder`, replacing what is there only once it is complete.

    The files are the same bytes whenever the weights are.
    """
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    # Without this flag peft looks the base model up on the hub at every save.
    model.save_pretrained(str(fresh), save_embedding_layers=False)
    for extra in set(os.listdir(fresh)) - set(ADAPTER_FILES):
        (fresh / extra).unlink()
    config = json.loads((fresh / ADAPTER_FILES[0]).read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    write_json_atomic(fresh / ADAPTER_FILES[0], config)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@contextmanager
def fold_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Within the block W + BA stands in for W, which makes generating a third faster (measured).

    Afterwards the very same weight tensors are back, bit for bit (unlike after peft's merge and
    unmerge). Quantised weights, and more than FOLD_LIMIT bytes of them, are left as they are.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.disable_adapters]
    weights = [layer.get_base_layer().weight for layer in layers]
    foldable = all(weight.is_floating_point() for weight in weights)
    if not foldable or sum(w.numel() * w.element_size() for w in weights) > FOLD_LIMIT:
        yield
        return
    originals = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            delta = sum(layer.get_delta_weight(name) for name in names)
            weight.data = (weight.data + delta).to(weight.dtype)
            layer.merged_adapters = names
        yield
    finally:
        for layer, weight, original in zip(layers, weights, originals, strict=True):
            weight.data = original
            layer.merged_adapters = []


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA tensors by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}
