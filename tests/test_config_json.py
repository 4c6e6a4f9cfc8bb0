"""Reading config.json: published files, both spellings of every option, and refusals by name."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, LlamaConfig

from clusterfusion.architecture import DecoderConfig, RotaryConfig
from clusterfusion.errors import UnsupportedModelError
from clusterfusion.named_shapes import named_shape

# As on the hub, in the spelling of the transformers version that wrote them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu_fast",
        "hidden_dropout_prob": 0,
        "hidden_size": 6144,
        "initializer_range": 0.02,
        "intermediate_size": 24576,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.19.0.dev0",
        "use_cache": True,
        "vocab_size": 50432,
    },
    "RedPajama-INCITE-Base-3B-v1": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": True,
        "use_parallel_residual": False,
        "vocab_size": 50432,
    },
    "stablelm-base-alpha-3b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "model_type": "gpt_neox",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50688,
    },
    "Llama-2-7b-hf": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "TinyLlama-1.1B-Chat-v1.0": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    },
}

# The named shape of each, and what a checkpoint says differently.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia-70m": ("pythia-70m", {}),
    "gpt-neox-20b": ("gpt-neox-20b", {}),
    "RedPajama-INCITE-Base-3B-v1": ("redpajama-incite-3b", {}),
    "stablelm-base-alpha-3b": ("stablelm-alpha-3b", {}),
    "Llama-2-7b-hf": ("llama-2-7b", {}),
    "Llama-3.1-8B-Instruct": ("llama-3.1-8b", {"eos_token_ids": (128001, 128008, 128009)}),
    "Llama-3.2-1B": ("llama-3.2-1b", {}),
    "TinyLlama-1.1B-Chat-v1.0": ("tinyllama-1.1b", {}),
    # The named shape is of the first SmolLM: the second has a longer context and another base.
    "SmolLM2-135M": ("smollm-135m", {"max_position": 8192, "rotary": RotaryConfig(64, 100000.0)}),
}

NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA: dict[str, Any] = NEOX | {"model_type": "llama", "num_key_value_heads": 2}
BASES = {"gpt_neox": NEOX, "llama": LLAMA}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Family, options as a published checkpoint spells them, and the fields of DecoderConfig they must give.
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "neox-defaults": (
        "gpt_neox",
        {},
        {
            "parallel_residual": True,
            "rotary": RotaryConfig(2),
            "norm": "layer_norm",
            "norm_eps": 1e-5,
            "activation": "gelu",
            "gated_mlp": False,
            "attention_bias": True,
            "mlp_bias": True,
            "tied_embeddings": False,
            "fused_qkv": True,
            "num_kv_heads": 4,
            "head_dim": 10,
        },
    ),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False}, {"parallel_residual": False}),
    "neox-rotary-all": ("gpt_neox", {"rotary_pct": 1.0}, {"rotary": RotaryConfig(10)}),
    "neox-rotary-int": ("gpt_neox", {"rotary_pct": 1}, {"rotary": RotaryConfig(10)}),
    "neox-rotary-none": ("gpt_neox", {"rotary_pct": 0.0}, {"rotary": RotaryConfig(0)}),
    "neox-rotary-odd": ("gpt_neox", {"rotary_pct": 0.3}, {"rotary": RotaryConfig(3)}),
    "neox-rotary-rounds-down": ("gpt_neox", {"rotary_pct": 0.49}, {"rotary": RotaryConfig(4)}),
    "neox-base": ("gpt_neox", {"rotary_emb_base": 500}, {"rotary": RotaryConfig(2, 500.0)}),
    "neox-both-rotary-spellings": (
        "gpt_neox",
        {"rotary_emb_base": 500, "rope_theta": 500, "rotary_pct": 0.5, "partial_rotary_factor": 0.5},
        {"rotary": RotaryConfig(5, 500.0)},
    ),
    "neox-linear": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rotary": RotaryConfig(5, 500.0, "linear", 2.0)},
    ),
    "neox-gelu-new": ("gpt_neox", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
    "neox-gelu-fast": ("gpt_neox", {"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
    "neox-gelu-pytorch-tanh": ("gpt_neox", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    "neox-gelu-python": ("gpt_neox", {"hidden_act": "gelu_python"}, {"activation": "gelu"}),
    "neox-no-attention-bias": ("gpt_neox", {"attention_bias": False}, {"attention_bias": False, "mlp_bias": True}),
    "neox-tied": ("gpt_neox", {"tie_word_embeddings": True}, {"tied_embeddings": True}),
    "neox-eps": ("gpt_neox", {"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
    "neox-float16": ("gpt_neox", {"torch_dtype": "float16"}, {"dtype": "float16"}),
    "llama-defaults": (
        "llama",
        {},
        {
            "parallel_residual": False,
            "rotary": RotaryConfig(10),
            "norm": "rms_norm",
            "norm_eps": 1e-6,
            "activation": "silu",
            "gated_mlp": True,
            "attention_bias": False,
            "mlp_bias": False,
            "tied_embeddings": False,
            "fused_qkv": False,
            "num_kv_heads": 2,
            "head_dim": 10,
        },
    ),
    "llama-kv-heads-null": ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "llama-head-dim-larger": ("llama", {"head_dim": 16}, {"head_dim": 16, "rotary": RotaryConfig(16)}),
    "llama-head-dim-smaller": ("llama", {"head_dim": 4}, {"head_dim": 4, "rotary": RotaryConfig(4)}),
    "llama-head-dim-null": ("llama", {"head_dim": None}, {"head_dim": 10}),
    "llama-base": ("llama", {"rope_theta": 500000.0}, {"rotary": RotaryConfig(10, 500000.0)}),
    "llama-linear": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rotary": RotaryConfig(10, 10000.0, "linear", 4.0)},
    ),
    "llama-llama3": (
        "llama",
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
        {"rotary": RotaryConfig(10, 500000.0, "llama3", 8.0, 1.0, 4.0, 64)},
    ),
    "llama-default-scaling": ("llama", {"rope_scaling": {"rope_type": "default"}}, {"rotary": RotaryConfig(10)}),
    "llama-attention-bias": ("llama", {"attention_bias": True}, {"attention_bias": True, "mlp_bias": False}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}, {"attention_bias": False, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {"tied_embeddings": True}),
    "llama-eps": ("llama", {"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
    "llama-swish": ("llama", {"hidden_act": "swish"}, {"activation": "silu"}),
    "llama-eos-list": ("llama", {"eos_token_id": [3, 5]}, {"eos_token_ids": (3, 5)}),
    "llama-eos-null": (
        "llama",
        {"eos_token_id": None, "bos_token_id": None},
        {"eos_token_ids": (), "bos_token_id": None},
    ),
    "llama-bfloat16": ("llama", {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
}


def through_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers writes for a config that it read: its own spelling, with every default filled in."""
    config_class = {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig}[raw["model_type"]]
    written: dict[str, Any] = config_class(**copy.deepcopy(raw)).to_dict()
    return json.loads(json.dumps(written))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_their_named_shapes(name: str) -> None:
    shape, differs = SHAPES[name]
    assert DecoderConfig.from_dict(PUBLISHED[name]) == replace(named_shape(shape), **differs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_read_the_same_in_the_spelling_of_transformers_5(name: str) -> None:
    written = through_transformers(PUBLISHED[name])
    assert "rope_parameters" in written and "rotary_pct" not in written and "torch_dtype" not in written
    assert DecoderConfig.from_dict(written) == DecoderConfig.from_dict(PUBLISHED[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_read(name: str) -> None:
    family, options, wanted = OPTIONS[name]
    config = DecoderConfig.from_dict(BASES[family] | options)
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert config.family == family
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (97, 40, 80)
    assert (config.num_layers, config.num_heads, config.max_position) == (2, 4, 128)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_read_the_same_in_the_spelling_of_transformers_5(name: str) -> None:
    family, options, wanted = OPTIONS[name]
    raw = BASES[family] | options
    config = DecoderConfig.from_dict(through_transformers(raw))
    assert {field: getattr(config, field) for field in wanted} == wanted
    # Token ids have defaults in transformers; a file without them names none.
    tokens: dict[str, Any] = {"bos_token_id": config.bos_token_id, "eos_token_ids": config.eos_token_ids}
    assert replace(DecoderConfig.from_dict(raw), **tokens) == config


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "default", "rope_theta": 500.0}, RotaryConfig(2, 500.0)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, RotaryConfig(5)),
        (
            {"rope_type": "linear", "factor": 2, "rope_theta": 7, "partial_rotary_factor": 1},
            RotaryConfig(10, 7.0, "linear", 2.0),
        ),
        ({"rope_type": None, "type": "linear", "factor": 2.0}, RotaryConfig(2, 10000.0, "linear", 2.0)),
    ],
)
def test_rope_parameters_are_read(rope: dict[str, Any], wanted: RotaryConfig) -> None:
    assert DecoderConfig.from_dict(NEOX | {"rope_parameters": rope}).rotary == wanted


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rope_dicts_win_as_in_transformers(family: str, scaling: dict[str, Any] | None) -> None:
    """`rope_scaling` replaces `rope_parameters`; what either holds beats the fields of the family."""
    raw = BASES[family] | {
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        {"gpt_neox": "rotary_emb_base", "llama": "rope_theta"}[family]: 9.0,
    }
    rotary = DecoderConfig.from_dict(raw).rotary
    assert rotary.theta == (9.0 if scaling else 7.0)
    # transformers leaves what it did not use beside the rope_parameters it wrote
    assert DecoderConfig.from_dict(through_transformers(raw)).rotary == rotary


def test_reading_leaves_the_mapping_as_it_was() -> None:
    raw = LLAMA | {"rope_scaling": dict(LLAMA3_SCALING), "eos_token_id": [3, 5]}
    before = copy.deepcopy(raw)
    DecoderConfig.from_dict(raw)
    assert raw == before


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}], ids=repr)
def test_an_unknown_field_that_is_switched_off_changes_nothing(value: object) -> None:
    raw = LLAMA | {"field_of_the_future": value, "sliding_window": value}
    assert DecoderConfig.from_dict(raw) == DecoderConfig.from_dict(LLAMA)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_dropout", 0.1),
        ("hidden_dropout", 0.1),
        ("initializer_range", 1.0),
        ("use_cache", False),
        ("is_causal", True),
        ("is_causal", None),
        ("pretraining_tp", 2),
        ("transformers_version", "9.0"),
        ("architectures", ["Anything"]),
        ("id2label", {"0": "LABEL_0"}),
    ],
)
def test_fields_without_effect_are_ignored(field: str, value: object) -> None:
    for base in BASES.values():
        assert DecoderConfig.from_dict(base | {field: value}) == DecoderConfig.from_dict(base)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NOT_SIZES: tuple[Any, ...] = (-1, 0, "8", 8.0, True, [8], {}, math.nan, 2**31, 10**400)

# Family, changed fields, and what the message must hold: the field's name and the value seen.
REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "sliding-window": ("llama", {"sliding_window": 4096}, ("sliding_window", "4096")),
    "experts": ("llama", {"num_local_experts": 8, "num_experts_per_tok": 2}, ("num_local_experts", "8")),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq"}}, ("quantization_config", "gptq")),
    "yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}}, ("rope_scaling", "'yarn'")),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, ("rope_scaling", "'dynamic'")),
    "longrope": (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        ("rope_scaling", "'longrope'"),
    ),
    "yarn-5": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("rope_parameters", "'yarn'")),
    "rope-type-of-a-list": ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, ("rope_type", "['linear']")),
    "rope-field": ("llama", {"rope_scaling": LLAMA3_SCALING | {"mscale": 0.7}}, ("rope_scaling", "mscale", "0.7")),
    "rope-no-factor": ("llama", {"rope_scaling": {"type": "linear"}}, ("factor", "missing")),
    "rope-factor-0": ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, ("factor", "0")),
    "rope-factor-text": ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, ("factor", "'2'")),
    "rope-no-original": (
        "llama",
        {"rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": None}},
        ("original_max_position_embeddings", "missing"),
    ),
    "rope-frequency-factors": (
        "llama",
        {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 0.5}},
        ("high_freq_factor", "0.5", "low_freq_factor"),
    ),
    "rope-scaling-text": ("llama", {"rope_scaling": "linear"}, ("rope_scaling", "'linear'")),
    "rope-scaling-list": ("gpt_neox", {"rope_parameters": [1]}, ("rope_parameters", "[1]")),
    "rope-interleaved": ("llama", {"rope_interleaved": True}, ("rope_interleaved", "True")),
    "rope-theta-0": ("llama", {"rope_theta": 0}, ("rope_theta", "0")),
    "rope-theta-nan": ("llama", {"rope_theta": math.nan}, ("rope_theta", "nan")),
    "rope-theta-huge": ("llama", {"rope_theta": 10**400}, ("rope_theta", "1000000")),
    "llama-partial": ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    "unknown-field": ("gpt_neox", {"field_of_the_future": 3}, ("field_of_the_future", "3")),
    "unknown-flag": ("gpt_neox", {"use_stable_embedding": True}, ("use_stable_embedding", "True")),
    "field-of-the-other-family": ("llama", {"use_parallel_residual": True}, ("use_parallel_residual", "True")),
    "kv-heads-in-neox": ("gpt_neox", {"num_key_value_heads": 2}, ("num_key_value_heads", "2")),
    "mistral": ("llama", {"model_type": "mistral"}, ("model_type", "'mistral'")),
    "no-model-type": ("llama", {"model_type": None}, ("model_type", "None", "'gpt_neox'", "'llama'")),
    "model-type-of-a-list": ("llama", {"model_type": ["llama"]}, ("model_type", "['llama']")),
    "relu": ("gpt_neox", {"hidden_act": "relu"}, ("hidden_act", "'relu'", "'gelu_new'")),
    "gelu-in-llama": ("llama", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
    "act-of-a-list": ("llama", {"hidden_act": ["silu"]}, ("hidden_act", "['silu']")),
    "rotary-pct-1.5": ("gpt_neox", {"rotary_pct": 1.5}, ("rotary_pct", "1.5")),
    "rotary-pct-negative": ("gpt_neox", {"rotary_pct": -0.25}, ("rotary_pct", "-0.25")),
    "rotary-pct-text": ("gpt_neox", {"rotary_pct": "0.25"}, ("rotary_pct", "'0.25'")),
    "rotary-factor-1.5": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}},
        ("partial_rotary_factor", "1.5"),
    ),
    "rotary-beyond-odd-head": (
        "gpt_neox",
        {"hidden_size": 20, "rotary_pct": 1.0},
        ("rotary dimension", "6", "head_dim (5)"),
    ),
    "rotary-base-negative": ("gpt_neox", {"rotary_emb_base": -1}, ("rotary_emb_base", "-1")),
    "rotary-bases-differ": ("gpt_neox", {"rotary_emb_base": 500, "rope_theta": 600}, ("rope_theta", "600", "500")),
    "rotary-base-of-llama": ("gpt_neox", {"rope_theta": 600}, ("rope_theta", "600", "rotary_emb_base")),
    "rotary-shares-differ": (
        "gpt_neox",
        {"rotary_pct": 0.5, "partial_rotary_factor": 1.0},
        ("partial_rotary_factor", "1.0", "0.5"),
    ),
    "kv-heads-not-dividing": ("llama", {"num_key_value_heads": 3}, ("num_key_value_heads", "3", "4")),
    "kv-heads-more": ("llama", {"num_key_value_heads": 8}, ("num_key_value_heads", "8", "4")),
    "kv-heads-0": ("llama", {"num_key_value_heads": 0}, ("num_key_value_heads", "0")),
    "hidden-not-divisible": ("llama", {"hidden_size": 42}, ("hidden_size", "42", "num_attention_heads", "4")),
    "neox-hidden-not-divisible": ("gpt_neox", {"hidden_size": 42}, ("hidden_size", "42", "4")),
    "neox-head-dim": ("gpt_neox", {"head_dim": 16}, ("head_dim", "16")),
    "head-dim-0": ("llama", {"head_dim": 0}, ("head_dim", "0")),
    "cross-attention": ("gpt_neox", {"add_cross_attention": True}, ("add_cross_attention", "True")),
    "encoder-decoder": ("llama", {"is_encoder_decoder": True}, ("is_encoder_decoder", "True")),
    "not-causal": ("gpt_neox", {"is_causal": False}, ("is_causal", "False")),
    "not-causal-llama": ("llama", {"is_causal": 0}, ("is_causal", "0")),
    "causal-of-text": ("llama", {"is_causal": "false"}, ("is_causal", "'false'")),
    "parallel-residual-null": ("gpt_neox", {"use_parallel_residual": None}, ("use_parallel_residual is null",)),
    "neox-bias-null": ("gpt_neox", {"attention_bias": None}, ("attention_bias is null",)),
    "eps-nan": ("gpt_neox", {"layer_norm_eps": math.nan}, ("layer_norm_eps", "nan")),
    "eps-infinite": ("llama", {"rms_norm_eps": math.inf}, ("rms_norm_eps", "inf")),
    "eps-negative": ("llama", {"rms_norm_eps": -1e-6}, ("rms_norm_eps", "-1e-06")),
    "eps-0": ("gpt_neox", {"layer_norm_eps": 0}, ("layer_norm_eps", "0")),
    "flag-of-text": ("gpt_neox", {"use_parallel_residual": "false"}, ("use_parallel_residual", "'false'")),
    "flag-of-a-number": ("llama", {"tie_word_embeddings": 1}, ("tie_word_embeddings", "1")),
    "bias-of-text": ("llama", {"attention_bias": "yes"}, ("attention_bias", "'yes'")),
    "mlp-bias-of-text": ("llama", {"mlp_bias": "yes"}, ("mlp_bias", "'yes'")),
    "eos-of-text": ("llama", {"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'")),
    "eos-of-flags": ("llama", {"eos_token_id": [True]}, ("eos_token_id", "[True]")),
    "dtype-int8": ("llama", {"dtype": "int8"}, ("dtype", "'int8'")),
    "torch-dtype-int8": ("llama", {"torch_dtype": "int8"}, ("torch_dtype", "'int8'")),
    "layer-types": ("llama", {"layer_types": ["sliding_attention"]}, ("layer_types", "sliding_attention")),
    "numbers-as-names": ("llama", {"b": 1, 7: 2}, ("b", "7", "2")),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    family, changed, mentioned = REFUSED[name]
    DecoderConfig.from_dict(BASES[family])  # accepted without the change
    with pytest.raises(UnsupportedModelError) as caught:
        DecoderConfig.from_dict(BASES[family] | changed)
    for text in mentioned:
        assert text in str(caught.value)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: repr(value)[:12])
def test_sizes_must_be_positive_integers(family: str, field: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=field) as caught:
        DecoderConfig.from_dict(BASES[family] | {field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("field", SIZES)
def test_sizes_must_be_there(family: str, field: str) -> None:
    without = {name: value for name, value in BASES[family].items() if name != field}
    for raw in (without, without | {field: None}):
        with pytest.raises(UnsupportedModelError, match=f"{field} is missing"):
            DecoderConfig.from_dict(raw)


@pytest.mark.parametrize("raw", [None, [], "gpt_neox", 3])
def test_only_a_mapping_is_a_config(raw: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=type(raw).__name__):
        DecoderConfig.from_dict(raw)


FIELD_NAMES = sorted(
    {field for raw in PUBLISHED.values() for field in raw}
    | {field for _, options, _ in OPTIONS.values() for field in options}
    | {"rope_parameters", "rope_scaling", "dtype", "num_local_experts", "sliding_window", "head_dim"}
)
ROPE_FIELD_NAMES = sorted({*LLAMA3_SCALING, "type", "rope_theta", "partial_rotary_factor", "mscale"})

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-4, 64)
    | st.just(10**400)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["gpt_neox", "llama", "gelu", "silu", "linear", "llama3", "default", "float16", ""])
    | st.text(max_size=4)
)
rope_dicts = st.dictionaries(st.sampled_from(ROPE_FIELD_NAMES), scalars, max_size=6)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(BASES.values())),
    st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(), values | rope_dicts),
)
def test_junk_over_a_good_config_is_read_or_refused(base: dict[str, Any], junk: dict[str, Any]) -> None:
    _read_or_refuse(base | junk)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(BASES.values())), st.sampled_from(FIELD_NAMES), values | rope_dicts)
def test_one_junk_field_is_read_or_refused(base: dict[str, Any], field: str, value: Any) -> None:
    _read_or_refuse(base | {field: value})


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text() | st.integers() | st.none(), values))
def test_junk_without_a_model_type_is_refused(junk: dict[Any, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="model_type"):
        DecoderConfig.from_dict({"model_type": "mistral"} | junk | {"model_type": junk.get("model_type", 3)})


def _read_or_refuse(raw: dict[str, Any]) -> None:
    """Whatever comes out of a config that is accepted must be usable: positive counts, a rotary part that fits."""
    try:
        config = DecoderConfig.from_dict(raw)
    except UnsupportedModelError:
        return
    assert config.num_parameters > 0 and config.step_parameters > 0 and config.kv_elements_per_token > 0
    assert 0 <= config.rotary.dim <= config.head_dim and config.rotary.dim % 2 == 0
    assert math.isfinite(config.norm_eps) and math.isfinite(config.rotary.theta)
