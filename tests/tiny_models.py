"""Tiny random `transformers` models in which every term of the mathematics shows in the logits.

The default initialisation (std 0.02, norms exactly one, biases exactly zero) hides mistakes: a dropped bias or a wrong
norm weight changes nothing. Here matrices have a standard deviation of 1.2 / sqrt(fan in), so that attention scores and
MLP outputs are of order one at any width; norm weights are 1 + 0.2 N, biases 0.1 N, embeddings N.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench.causal_lm import llama_config
from clusterfusion.random_weights import uniform
from clusterfusion.weights import DecoderWeights, assemble

MATRIX_GAIN = 1.2


def tiny_gpt_neox(*, seed: int = 0, attn_implementation: str = "sdpa", **options: Any) -> GPTNeoXForCausalLM:
    """A GPT-NeoX model on the CPU in float32, in eval mode. `options` are GPTNeoXConfig's, in either spelling."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    # transformers writes into the rope dicts it is given
    config = GPTNeoXConfig(**(sizes | deepcopy(options)), attn_implementation=attn_implementation)
    model = GPTNeoXForCausalLM(config)
    _randomize(model, seed)
    return model.eval()


def tiny_llama(*, seed: int = 0, attn_implementation: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    """A LLaMA model on the CPU in float32, in eval mode. `options` are LlamaConfig's, in either spelling."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    # transformers writes into the rope dicts it is given
    config = LlamaConfig(**(sizes | deepcopy(options)), attn_implementation=attn_implementation)
    model = LlamaForCausalLM(config)
    _randomize(model, seed)
    return model.eval()


def real_gpt_neox(config: DecoderConfig, device: torch.device) -> GPTNeoXForCausalLM:
    """A transformers model of `config`'s shape, of any width, made on `device` in float16 from reproducible values."""
    options = GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position,
        rotary_pct=config.rotary.nominal_dim / config.head_dim,
        use_parallel_residual=config.parallel_residual,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_fast"}[config.activation],
    )
    return _real(GPTNeoXForCausalLM, options, torch.float16, device)


def real_llama(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The same of a LLaMA shape, in `dtype`."""
    return _real(LlamaForCausalLM, llama_config(config), dtype, device)


def _real(make: Any, options: Any, dtype: torch.dtype, device: torch.device) -> Any:
    with device:
        torch.set_default_dtype(dtype)
        try:
            model = make(options).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for stream, (name, parameter) in enumerate(model.named_parameters()):
            norm = "norm" in name and name.endswith("weight")
            std = 0.1 if norm or parameter.dim() == 1 else MATRIX_GAIN / parameter.shape[1] ** 0.5
            std = 1.0 if "embed" in name else std
            parameter.copy_(uniform(tuple(parameter.shape), float(norm), std, stream, dtype, device))
    return model


def tiny_model(family: str, **options: Any) -> PreTrainedModel:
    """tiny_gpt_neox or tiny_llama, by the family's name."""
    return {"gpt_neox": tiny_gpt_neox, "llama": tiny_llama}[family](**options)


def weights_of(model: PreTrainedModel) -> DecoderWeights:
    """DecoderWeights over the model's own tensors, without the checks of a checkpoint loader."""
    return assemble(DecoderConfig.from_dict(model.config.to_dict()), model.state_dict())


def random_token_ids(vocab_size: int, count: int, *, seed: int = 0) -> Tensor:
    """Token ids [count], int64, uniform over the vocabulary."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The worse of |got - wanted| / |wanted| in the Euclidean norm and in the largest absolute value. NaN counts as
    infinite."""
    got, wanted = got.double(), wanted.double()
    assert got.shape == wanted.shape, f"shapes {tuple(got.shape)} and {tuple(wanted.shape)} differ"
    difference = got - wanted
    if not difference.isfinite().all():
        return float("inf")
    euclidean = difference.norm() / wanted.norm()
    largest = difference.abs().max() / wanted.abs().max()
    return max(euclidean.item(), largest.item())


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # tied parameters appear once
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.2 * values
        elif parameter.dim() == 1:
            values = 0.1 * values
        elif "embed" not in name:
            values *= MATRIX_GAIN / parameter.shape[1] ** 0.5
        parameter.copy_(values)
