"""The project's model from a configuration alone: the real classes, around storages without bytes.

The skeleton is built on PyTorch's meta device by transformers, bitsandbytes and peft themselves;
then each tensor is swapped for a fake one that says it is on the CPU. (Fake "meta" tensors would
take the slow path of attention, and fake "cuda" ones need a CUDA build of PyTorch.)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.quantizers import AutoHfQuantizer

from hallulib.errors import HallulibError
from hallulib.memory.tracker import StorageTracker
from hallulib.models import attach_adapter, build_quantization
from hallulib.recipe import Recipe

PACKED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def build_skeleton(config: PretrainedConfig, recipe: Recipe, adapters: int = 1) -> PeftModel:
    """Return base model and trainable adapter as this project makes them, on the meta device.

    With two `adapters` a frozen copy called "reference" stands beside "default". Raises
    HallulibError for what is no decoder and for an adapter that finds no layer.
    """
    _require_decoder(config)
    dtype = getattr(torch, recipe.model.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=dtype, attn_implementation=recipe.model.attention
            )
        _replace_packed(model, recipe.model.quantization, dtype)
        policy = attach_adapter(model.eval().requires_grad_(False), recipe)
    except ValueError as error:
        raise HallulibError(
            f"A '{config.model_type}' configuration makes no decoder with this adapter: "
            f"{str(error).splitlines()[0][:200]}",
            "Give the configuration of a decoder such as Llama, Mistral or Qwen; "
            "lora.target_modules=all-linear fits each of them, and model.attention=eager those "
            "without sdpa.",
        ) from None
    if adapters > 1:
        policy.add_adapter("reference", policy.peft_config["default"])
        policy.set_adapter("default")
    return policy


def _require_decoder(config: PretrainedConfig) -> None:
    """transformers builds many an encoder under the head of a decoder, without a word: its
    attention looks ahead, so log-probabilities of what it "writes" mean nothing."""
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if config.is_encoder_decoder or looks_ahead and not getattr(config, "is_decoder", False):
        raise HallulibError(
            f"A '{config.model_type}' configuration is that of an encoder, which writes no text.",
            "Give the configuration of a decoder such as Llama, Mistral or Qwen.",
        )


def _replace_packed(model: PreTrainedModel, quantization: str, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers in place of the linear ones, as loading a checkpoint does."""
    settings = build_quantization(quantization, dtype)
    if settings is None:
        return
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    # bitsandbytes makes its table of codes once a process; make it now, where nobody counts.
    bnb.functional.quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")
    for module in model.modules():
        if isinstance(module, PACKED):
            module.loaded_dtype = dtype
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)


def has_equal_layers(config: PretrainedConfig) -> bool:
    """Whether all layers look alike: the same modules, and the same settings where a configuration
    lists one for each layer, as it does for sliding windows."""
    text = config.get_text_config()
    if any(len(set(map(str, values))) > 1 for values in _list_per_layer(text).values()):
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config))
    depth = text.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return len(stacks) == 1 and len({repr(layer) for layer in stacks[0]}) == 1


def cut_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the configuration of the same model with its first `count` layers only."""
    cut = deepcopy(config)
    text = cut.get_text_config()
    lists = _list_per_layer(text)
    text.num_hidden_layers = count
    for name, values in lists.items():
        setattr(text, name, values[:count])
    return cut


def _list_per_layer(text: PretrainedConfig) -> dict[str, list]:
    values = text.to_dict().items()
    return {k: v for k, v in values if isinstance(v, list) and len(v) == text.num_hidden_layers}


def make_fake_mode() -> FakeTensorMode:
    """Return a mode whose tensors may meet real ones: masks and positions keep their values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def swap_for_fake(model: nn.Module, mode: FakeTensorMode, tracker: StorageTracker) -> None:
    """Swap each parameter and buffer for a fake one of the same shape, type and ties.

    The tracker sees them come in this order, and on a GPU what packing a weight needs for a moment.
    """
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                if old is None:
                    continue
                if id(old) not in made:  # the old one is kept too, so that no id comes again
                    made[id(old)] = (_make_fake(module, old, mode, tracker), old)
                place[name] = made[id(old)][0]
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as load_base_model does


def _make_fake(
    module: nn.Module, old: torch.Tensor, mode: FakeTensorMode, tracker: StorageTracker
) -> torch.Tensor:
    packs = isinstance(module, PACKED) and old is module.weight
    shape, dtype = old.shape, old.dtype
    if packs:
        shape = (module.out_features, module.in_features)
        is_int8 = isinstance(module, bnb.nn.Linear8bitLt)
        dtype = torch.float16 if is_int8 else module.loaded_dtype
    with mode:
        new = torch.empty(shape, dtype=dtype, device="cpu")
    tracker.follow(new)
    if packs:
        return _pack(new, old, is_int8)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _pack(weight: torch.Tensor, old: nn.Parameter, is_int8: bool) -> nn.Parameter:
    """Pack a fake weight with bitsandbytes' own functions: they decide what is stored beside it.
    Not within the fake mode: bitsandbytes keeps the tables of codes it makes for other models."""
    if is_int8:
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
        new = nn.Parameter(packed, requires_grad=False)
        new.CB, new.SCB = packed, scales
        return new
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=old.blocksize, compress_statistics=old.compress_statistics,
        quant_type=old.quant_type, quant_storage=old.quant_storage,
    )  # fmt: skip
    new = nn.Parameter(packed, requires_grad=False)
    new.quant_state = state
    return new


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Within the block eager attention and int8 layers take the operators of a GPU."""
    before = bnb.matmul, nn.functional.softmax

    def matmul(a, b, out=None, state=None, threshold=0.0, bias=None):  # noqa: ANN001, ANN202
        state.threshold = 0.0  # how many columns are outliers depends on values: none is assumed
        return MatMul8bitLt.apply(a, b, out, bias, state)

    def softmax(values, dim=None, _stacklevel=3, dtype=None):  # noqa: ANN001, ANN202
        """CUDA turns 16 bits into 32 within softmax; a CPU makes a copy first."""
        if dtype is torch.float32 and values.dtype == torch.float16:
            return torch._softmax(values, dim, True)
        return before[1](values, dim, _stacklevel, dtype)

    bnb.matmul, nn.functional.softmax = matmul, softmax
    try:
        yield
    finally:
        bnb.matmul, nn.functional.softmax = before


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block the libraries do not warn about what a fake run meets by design."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
