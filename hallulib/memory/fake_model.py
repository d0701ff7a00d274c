"""The project's model from a configuration alone: the real classes, around storages without bytes.

The skeleton is built on PyTorch's meta device by transformers, bitsandbytes and peft themselves;
then each tensor is swapped for a fake one that says it is on the CPU. (Fake "meta" tensors would
take the slow path of attention, and fake "cuda" ones need a CUDA build of PyTorch.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import bitsandbytes as bnb
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from hallulib.errors import HallulibError
from hallulib.models import _build_quantization, attach_adapter
from hallulib.recipe import Recipe
from hallulib.tracker import StorageTracker

PACKED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def make_fake_mode() -> FakeTensorMode:
    """Return a mode whose tensors may meet real ones: masks and positions keep their values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def build_skeleton(
    config: PretrainedConfig, recipe: Recipe, adapters: int = 1, double_quant: bool = True
) -> PeftModel:
    """Return base model and trainable adapter as this project makes them, on the meta device.

    With two `adapters` a frozen copy called "reference" stands beside "default". Raises
    HallulibError for what is no decoder and for an adapter that finds no layer.
    """
    dtype = getattr(torch, recipe.model.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                deepcopy(config), dtype=dtype, attn_implementation=recipe.model.attention
            )
        _replace_packed(model, recipe, dtype, double_quant)
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


def _replace_packed(
    model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype, double_quant: bool
) -> None:
    """Put bitsandbytes' layers in place of the linear ones, as loading a checkpoint does."""
    quantization = _build_quantization(recipe, dtype)
    if quantization is None:
        return
    quantization.bnb_4bit_use_double_quant = double_quant
    quantizer = AutoHfQuantizer.from_config(quantization)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)
    # bitsandbytes makes its table of codes once a process; make it now, where nobody counts.
    bnb.functional.quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")
    for module in model.modules():
        if isinstance(module, PACKED) and module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
        if isinstance(module, PACKED):
            module.loaded_dtype = dtype


def swap_for_fake(model: nn.Module, mode: FakeTensorMode, tracker: StorageTracker) -> nn.Module:
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
    return model


def upcast_as_peft_does(policy: PeftModel) -> None:
    """What `prepare_model_for_kbit_training` does and this project does not: whatever is not packed
    becomes float32 (embeddings and head of an 8B model: 3.2 GiB more than in bfloat16)."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    prepare_model_for_kbit_training(policy.get_base_model(), use_gradient_checkpointing=False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _make_fake(
    module: nn.Module, old: torch.Tensor, mode: FakeTensorMode, tracker: StorageTracker
) -> torch.Tensor:
    if isinstance(module, PACKED) and old is module.weight:
        return _quantise(module, old, mode, tracker)
    with mode:
        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
    tracker.follow(new)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _quantise(
    module: nn.Module, old: nn.Parameter, mode: FakeTensorMode, tracker: StorageTracker
) -> nn.Parameter:
    """Pack a fake weight with bitsandbytes' own functions: they decide what is stored beside it."""
    int8 = isinstance(module, bnb.nn.Linear8bitLt)
    with mode:
        weight = torch.empty(
            (module.out_features, module.in_features),
            dtype=torch.float16 if int8 else module.loaded_dtype,
        )
    tracker.follow(weight)
    # Outside the mode: bitsandbytes keeps the tables of codes it makes here for other models.
    if int8:
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
