"""Loading, adapters that are reused and never doubled, and gradients that reach only them."""

import json
import shutil

import pytest
import torch
from tiny_model import build_tokenizer, make_recipe, shared_base, write_base_model

from hallulib.errors import GateFailed, HallulibError
from hallulib.files import sha256_file, sha256_tree
from hallulib.models import (
    attach_adapter,
    fold_adapter,
    load_base_model,
    load_policy,
    load_systems,
    load_tokenizer,
    lora_parameters,
    pick_device,
    render_prompt,
    save_adapter,
    use_system,
)
from hallulib.training import check_gradient_flow

pytestmark = pytest.mark.unit

UP_PROJ = "model.layers.0.mlp.up_proj.base_layer.weight"
IDS = torch.arange(5, 25).view(2, 10)


def make_adapter(folder, seed: int, recipe=None):
    """Save an adapter whose B is not zero, so that it changes what the model says."""
    recipe = recipe or make_recipe()
    policy = attach_adapter(load_base_model(recipe), recipe)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(policy).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    save_adapter(policy, folder)
    return policy


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter that changes what the model says."""
    make_adapter(tmp_path / "adapter", 1)
    return tmp_path / "adapter"


def backward(model) -> None:
    model(IDS, labels=IDS).loss.backward()


def gradients(policy) -> list[torch.Tensor]:
    """The gradients of every LoRA tensor after a backward pass."""
    backward(policy.train())
    assert check_gradient_flow(policy) == 28  # 2 layers x 7 linear layers x (A, B)
    return [parameter.grad for parameter in lora_parameters(policy).values()]


def quantised(tmp_path, quantization: str, overrides=None):
    """A recipe with quantised weights; a block of NF4 is 64, so no side may be smaller."""
    pytest.importorskip("bitsandbytes")
    base = write_base_model(tmp_path / "base", hidden_size=64, num_key_value_heads=4, steps=25)
    small = {"model.quantization": quantization, "model.dtype": "bfloat16"}
    return make_recipe(small | (overrides or {}), base)


def test_a_base_model_whose_file_differs_from_its_checksum_is_refused(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(shared_base(), folder)
    sums = {"model.safetensors": sha256_file(folder / "model.safetensors")}
    (folder / "SHA256SUMS.json").write_text(json.dumps(sums))
    load_base_model(make_recipe(base=folder))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(HallulibError, match=r"model.safetensors differs[\s\S]*make base"):
        load_base_model(make_recipe(base=folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(HallulibError, match="is missing"):
        load_tokenizer(make_recipe(base=folder))


def test_a_model_an_adapter_or_a_device_that_is_not_there_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HallulibError, match=r"no base model[\s\S]*make base"):
        load_base_model(make_recipe(base=tmp_path / "nothing"))
    with pytest.raises(HallulibError, match="cannot be loaded"):
        load_base_model(make_recipe(base=tmp_path / "empty"))
    with pytest.raises(HallulibError, match=r"holds no adapter[\s\S]*02_sft"):
        load_policy(make_recipe(), tmp_path, trainable=False)
    if not torch.cuda.is_available():
        with pytest.raises(HallulibError, match=r"'cuda'[\s\S]*model.device=auto"):
            pick_device(make_recipe({"model.device": "cuda"}))


def test_a_new_adapter_changes_nothing_until_it_is_trained_and_comes_only_once():
    recipe = make_recipe()
    base = load_base_model(recipe)
    with torch.no_grad():
        before = base(IDS).logits
        policy = attach_adapter(base, recipe)
        assert torch.equal(policy(IDS).logits, before)
    for model in (policy, policy.get_base_model()):
        with pytest.raises(GateFailed, match="already has a LoRA adapter"):
            attach_adapter(model, recipe)


@torch.no_grad()
def test_a_loaded_policy_says_what_the_saved_one_said(tmp_path):
    saved = make_adapter(tmp_path / "adapter", 1).eval()
    policy = load_policy(make_recipe(), tmp_path / "adapter", trainable=False)
    assert torch.equal(policy(IDS).logits, saved(IDS).logits)
    assert list(policy.peft_config) == ["default"]
    assert not any(p.requires_grad for p in policy.parameters())


def test_a_saved_adapter_names_the_base_as_the_recipe_does_and_is_reproducible(tmp_path):
    recipe = make_recipe()
    policy = make_adapter(tmp_path / "a", 1)
    save_adapter(policy, tmp_path / "b")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe.model.name_or_path
    assert config["target_modules"] == sorted(config["target_modules"])
    # Saving replaces an older adapter and leaves nothing else behind.
    make_adapter(tmp_path / "b", 2)
    assert sha256_tree(tmp_path / "a") != sha256_tree(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@torch.no_grad()
def test_systems_on_one_model_say_what_each_says_alone(tmp_path):
    recipe = make_recipe()
    for seed, name in enumerate(("sft", "dpo"), start=1):
        make_adapter(tmp_path / name, seed)
    systems = load_systems(recipe, {"sft": tmp_path / "sft", "dpo": tmp_path / "dpo"})
    for name in ("dpo", "sft", "dpo"):
        alone = load_policy(recipe, tmp_path / name, trainable=False)
        with use_system(systems, name) as model:
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
    with use_system(systems, "base") as model:
        assert torch.equal(model(IDS).logits, load_base_model(recipe)(IDS).logits)
    assert systems.active_adapter == "sft"


def test_a_prompt_goes_through_the_chat_template_or_a_plain_form_without_one():
    tokenizer = build_tokenizer()
    assert render_prompt(tokenizer, "Hello") == "<s><|user|>Hello<|assistant|>"
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, "Hello") == "Hello\n\nSummary:\n"


def test_the_gradient_check_fires_on_each_way_of_going_wrong(adapter):
    def load():
        return load_policy(make_recipe(), adapter, trainable=True)

    frozen = load()
    next(iter(lora_parameters(frozen).values())).requires_grad_(False)
    backward(frozen)
    with pytest.raises(GateFailed, match="is frozen"):
        check_gradient_flow(frozen)

    base_trained = load()
    base_trained.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    backward(base_trained)
    with pytest.raises(GateFailed, match="base weight .*embed_tokens.* would be trained"):
        check_gradient_flow(base_trained)

    with pytest.raises(GateFailed, match="No gradient reaches"):
        check_gradient_flow(load())

    zero = load()
    backward(zero)
    next(p for n, p in lora_parameters(zero).items() if "lora_B" in n).grad.zero_()
    with pytest.raises(GateFailed, match="No gradient reaches .*lora_B"):
        check_gradient_flow(zero)

    with pytest.raises(GateFailed, match="no LoRA tensors"):
        check_gradient_flow(load_base_model(make_recipe()))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_checkpointing_changes_no_gradient(tmp_path, quantization):
    grads = []
    for checkpointing in (False, True):
        changes = {"model.gradient_checkpointing": checkpointing}
        recipe = make_recipe(changes)
        if quantization != "none":
            recipe = quantised(tmp_path, quantization, changes)
        make_adapter(tmp_path / "adapter", 1, recipe)
        policy = load_policy(recipe, tmp_path / "adapter", trainable=True)
        assert policy.get_base_model().is_activation_checkpointing is checkpointing
        grads.append(gradients(policy))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6 if quantization == "none" else 0)


def test_nf4_on_cpu_trains_every_lora_tensor_and_copies_nothing_to_float32(tmp_path):
    recipe = quantised(tmp_path, "nf4")
    policy = attach_adapter(load_base_model(recipe), recipe)
    base = policy.get_base_model()
    assert base.model.embed_tokens.weight.dtype == torch.bfloat16
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base.model.norm.weight.dtype == torch.bfloat16
    linear = base.model.layers[0].mlp.up_proj.base_layer
    assert type(linear).__name__ == "Linear4bit" and linear.weight.dtype == torch.uint8
    gradients(policy)


def test_int8_on_cpu_says_nearly_what_the_unquantised_model_says(tmp_path):
    logits = []
    for quantization in ("none", "int8"):
        model = load_base_model(quantised(tmp_path, quantization))
        with torch.no_grad():
            logits.append(model(IDS).logits.float().log_softmax(-1))
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear).__name__ == "Linear8bitLt" and linear.weight.dtype == torch.int8
    assert 0 < (logits[0] - logits[1]).abs().mean() < 0.1


def test_nf4_gradients_are_the_same_after_a_forward_in_evaluation_mode(tmp_path):
    recipe = quantised(tmp_path, "nf4")
    make_adapter(tmp_path / "adapter", 1, recipe)
    grads = []
    for evaluate_first in (False, True):
        policy = load_policy(recipe, tmp_path / "adapter", trainable=True)
        if evaluate_first:
            with torch.no_grad():
                policy.eval()(IDS)
        grads.append(gradients(policy))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_folding_the_adapter_says_the_same_and_puts_back_the_very_same_weights(adapter):
    policy = load_policy(make_recipe(), adapter, trainable=True).eval()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    apart, base = policy(IDS).logits, policy.get_base_model()
    with pytest.raises(ZeroDivisionError), fold_adapter(policy):
        assert torch.allclose(policy(IDS).logits, apart, atol=1e-4)
        weight = base.model.layers[0].mlp.up_proj.base_layer.weight
        assert not torch.equal(weight, before["base_model.model." + UP_PROJ])
        raise ZeroDivisionError
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    assert torch.equal(policy(IDS).logits, apart)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())
    original = weight.data_ptr()  # a disabled adapter is left alone
    with policy.disable_adapter(), fold_adapter(policy):
        assert weight.data_ptr() == original
    with fold_adapter(policy):
        assert weight.data_ptr() != original
