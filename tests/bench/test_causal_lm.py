"""transformers' models as the other side: whole, greedy in spite of a checkpoint's settings, and on our tensors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_token_ids, tiny_gpt_neox, tiny_llama, tiny_model

from clusterfusion import reference
from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench.causal_lm import CausalLM
from clusterfusion.bench.truth import hidden_states
from clusterfusion.errors import ClusterFusionError
from clusterfusion.named_shapes import named_shape
from clusterfusion.random_weights import random_weights

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"num_layers": 2, "vocab_size": 64}


def small_llama(shape: str) -> DecoderConfig:
    config = named_shape(shape)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return dataclasses.replace(config, rotary=dataclasses.replace(config.rotary, nominal_dim=16), **sizes, **SMALL)


CONFIGS = {
    "gpt_neox": dataclasses.replace(named_shape("pythia-14m"), **SMALL),
    "llama": small_llama("llama-2-7b"),
    "llama, scaled, tied": small_llama("llama-3.2-1b"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_on_our_tensors_computes_the_reference(config: DecoderConfig) -> None:
    weights = random_weights(config, dtype=torch.float32, device=CPU)
    peer = CausalLM.shared(weights)
    ids = random_token_ids(64, 12)
    cache = reference.KVCache.allocate(config, 12, torch.float32, CPU)
    expected = reference.forward(weights, ids, cache, 0, last_only=False)
    torch.testing.assert_close(peer.logits(ids.tolist()), expected, rtol=1e-4, atol=1e-5)
    hidden = hidden_states(weights, ids, cache, 0, torch.float32)
    stepper = peer.stepper()
    for position, token in enumerate(ids.tolist()):
        logits, state = stepper.step(token)
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, hidden[position], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_greedy_is_generate_without_the_checkpoints_settings(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    prompt = random_token_ids(97, 5).tolist()
    plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    expected = plain[0, 5:].tolist()
    model.generation_config.eos_token_id = expected[2]  # would end it
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(tmp_path)
    peer = CausalLM.from_folder(tmp_path, torch.float32, CPU, 0)
    tokens, logits = peer.greedy(prompt, 12)
    assert tokens == expected == logits.argmax(-1).tolist()
    assert logits.shape == (12, 97)
    torch.testing.assert_close(logits, peer.logits(prompt + tokens)[4:-1], rtol=1e-4, atol=1e-5)


def test_folders_are_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert CausalLM.from_folder(tmp_path, torch.bfloat16, CPU, 0).logits([1, 2]).dtype == torch.bfloat16


def test_what_transformers_cannot_load_is_one_error(tmp_path: Path) -> None:
    tiny_gpt_neox().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ClusterFusionError, match="transformers cannot load"):
        CausalLM.from_folder(tmp_path, torch.float32, CPU, 0)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ClusterFusionError, match="pip install 'transformers>=5'"):
        CausalLM.from_folder(tmp_path, torch.float32, CPU, 0)
