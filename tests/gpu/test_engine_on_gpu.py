"""The reference and the engine on a GPU: same mathematics, same random weights, no copy of a shared model."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from tiny_models import random_token_ids, relative_error, tiny_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import clusterfusion
from clusterfusion import reference
from clusterfusion.errors import CheckpointError, DeviceError
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_reference_agrees_with_the_cpu_in_float64(family: str) -> None:
    model = tiny_model(family)
    ids = random_token_ids(97, 12)
    logits = []
    for device in ("cpu", "cuda"):
        session = clusterfusion.load(model.to(device)).session()
        weights = clusterfusion.load(model).weights
        cache = reference.KVCache.allocate(weights.config, 16, torch.float64, device)
        logits.append(reference.forward(weights, ids.to(device), cache, 0, dtype=torch.float64).cpu())
        assert relative_error(session.prefill(ids).cpu(), logits[0]) < 1e-5
    assert relative_error(logits[1], logits[0]) < 1e-6  # cosines are rounded differently in float32 tables


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_greedy_is_transformers_token_for_token(family: str) -> None:
    model = tiny_model(family, eos_token_id=None).to(GPU)
    ids = [5, 17, 3, 88]
    wanted = model.generate(torch.tensor([ids], device=GPU), max_new_tokens=60, do_sample=False)[0, 4:].tolist()
    assert list(clusterfusion.load(model).generate(ids, 60).token_ids) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_random_weights_have_the_same_bits_on_every_device(dtype: torch.dtype) -> None:
    config = dataclasses.replace(named_shape("pythia-14m"), num_layers=2, vocab_size=1000)
    on_gpu = random_weights(config, seed=3, dtype=dtype, device=GPU)
    on_cpu = random_weights(config, seed=3, dtype=dtype, device=torch.device("cpu"))
    assert torch.equal(on_gpu.lm_head.cpu(), on_cpu.lm_head)
    for gpu_layer, cpu_layer in zip(on_gpu.layers, on_cpu.layers, strict=True):
        for gpu_tensor, cpu_tensor in zip(vars(gpu_layer).values(), vars(cpu_layer).values(), strict=True):
            assert gpu_tensor is cpu_tensor is None or torch.equal(gpu_tensor.cpu(), cpu_tensor)


def test_loading_a_transformers_model_takes_no_device_memory() -> None:
    config = GPTNeoXConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16, vocab_size=50304
    )
    with torch.device(GPU):
        model = GPTNeoXForCausalLM(config).to(torch.float16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine = clusterfusion.load(model)
    assert engine.device.type == "cuda"
    assert size > 1e9
    assert torch.cuda.memory_allocated() - before < 0.01 * size
    assert torch.cuda.max_memory_allocated() - before < 0.01 * size, "a temporary copy was made on the way"


def test_demo_writes_the_same_text_as_on_the_cpu() -> None:
    prompt = "The morning was fine, and Elizabeth"
    on_gpu = clusterfusion.load("demo", dtype="float32").generate(prompt, 60)
    on_cpu = clusterfusion.load("demo", device="cpu").generate(prompt, 60)
    assert on_gpu.text == on_cpu.text


def test_demo_takes_the_gpu_and_the_stored_dtype_by_itself() -> None:
    engine = clusterfusion.load("demo")
    assert engine.device.type == "cuda"
    assert engine.dtype == torch.float16
    assert len(engine.generate("It is", 20).token_ids) == 20


def test_a_seed_gives_the_same_tokens_on_every_device() -> None:
    runs = [
        clusterfusion.load("demo", dtype="float32", device=device).generate("It is", 40, temperature=0.8, seed=11)
        for device in ("cpu", "cuda")
    ]
    assert runs[0].token_ids == runs[1].token_ids


def test_too_large_a_model_is_refused() -> None:
    with pytest.raises(DeviceError, match="llama-3-70b .* needs 141.1 GB"):
        clusterfusion.load(random_weights="llama-3-70b", dtype="float16")
    with pytest.raises(DeviceError, match="there are only"):
        clusterfusion.load("demo", device="cuda:99")


def test_a_model_spread_over_devices_is_refused() -> None:
    model = tiny_model("gpt_neox")
    model.gpt_neox.layers[1].to(GPU)
    with pytest.raises(CheckpointError, match="several devices"):
        clusterfusion.load(model)
