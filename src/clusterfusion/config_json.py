"""Reads a checkpoint's `config.json` into a DecoderConfig, and refuses by name whatever it cannot honour.

The fields follow `transformers`' GPTNeoXConfig and LlamaConfig, in the spelling of version 5 (`rope_parameters`,
`dtype`) and in the older one that published checkpoints carry (`rotary_pct`, `rope_theta`, `rope_scaling`,
`torch_dtype`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from clusterfusion.architecture import Activation, DecoderConfig, RotaryConfig, RotaryScaling
from clusterfusion.errors import UnsupportedModelError

_ACTIVATIONS: dict[str, dict[str, Activation]] = {
    "gpt_neox": {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
    },
    "llama": {"silu": "silu", "swish": "silu"},
}

_LARGEST_SIZE = 2**31 - 1  # sizes and positions are 32-bit integers in the kernels
_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Fields that do not change what a decoder computes at inference, whatever their value.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path architectures attention_dropout attention_probs_dropout_prob bad_words_ids begin_suppress_tokens
    classifier_dropout decoder_start_token_id diversity_penalty do_sample early_stopping
    embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range
    is_decoder is_llama_config label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torchscript transformers.js_config transformers_version typical_p unsloth_version unsloth_fixed use_cache
    _attn_implementation_autoset attn_implementation _attn_implementation chunk_size_feed_forward prefix
    """.split()
)
_SHARED_FIELDS = frozenset(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
    max_position_embeddings tie_word_embeddings rope_parameters rope_scaling attention_bias bos_token_id eos_token_id
    dtype torch_dtype head_dim is_causal
    """.split()
)
_FAMILY_FIELDS = {
    "gpt_neox": _SHARED_FIELDS
    | {"rotary_pct", "rotary_emb_base", "use_parallel_residual", "layer_norm_eps"}
    | {"rope_theta", "partial_rotary_factor"},
    "llama": _SHARED_FIELDS
    | {"num_key_value_heads", "rms_norm_eps", "rope_theta", "mlp_bias", "partial_rotary_factor"},
}
_ROTARY_FIELDS = frozenset(
    """
    rope_type type rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor
    original_max_position_embeddings
    """.split()
)


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The DecoderConfig that a `config.json` mapping describes. See DecoderConfig.from_dict."""
    if not isinstance(raw, Mapping):
        raise UnsupportedModelError(f"config.json holds {type(raw).__name__}; it must hold an object")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _FAMILY_FIELDS:
        raise UnsupportedModelError(f"model_type is {family!r}; supported are {', '.join(map(repr, _FAMILY_FIELDS))}")
    _refuse_unknown(raw, _FAMILY_FIELDS[family] | _WITHOUT_EFFECT, where="config.json")
    causal = raw.get("is_causal")
    if causal is not None and causal is not True:  # the one switch that is on unless a file says otherwise
        raise UnsupportedModelError(f"is_causal is {causal!r}; it must be true or null")
    return (_read_gpt_neox if family == "gpt_neox" else _read_llama)(_Fields(raw))


class _Fields:
    """Typed access to a JSON object; every complaint names the field and shows the value seen."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def _get(self, name: str, default: Any, ok: Callable[[Any], bool], needed: str) -> Any:
        value = self.raw.get(name, default)
        if value is None:
            value = default
        if value is None:
            raise UnsupportedModelError(f"{name} is missing; it must be {needed}")
        if not ok(value):
            raise UnsupportedModelError(f"{name} is {value!r}; it must be {needed}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        needed = f"a positive integer up to {_LARGEST_SIZE}"
        return cast(int, self._get(name, default, lambda v: _is_integer(v) and 0 < v <= _LARGEST_SIZE, needed))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, _is_number, "a finite number"))

    def positive(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, lambda v: _is_number(v) and v > 0, "a positive finite number"))

    def share(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, lambda v: _is_number(v) and 0 <= v <= 1, "between 0 and 1"))

    def flag(self, name: str, default: bool) -> bool:
        if default and name in self.raw and self.raw[name] is None:  # on or off? transformers 4 and 5 disagree
            raise UnsupportedModelError(f"{name} is null; it must be true or false")
        return cast(bool, self._get(name, default, lambda v: isinstance(v, bool), "true or false"))

    def choice(self, name: str, default: str | None, allowed: Mapping[str, Any] | tuple[str, ...]) -> str:
        listed = ", ".join(map(repr, allowed))
        return cast(str, self._get(name, default, lambda v: isinstance(v, str) and v in allowed, f"one of {listed}"))

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if not all(_is_integer(v) for v in ids):
            raise UnsupportedModelError(f"{name} is {value!r}; it must be a token id or a list of them")
        return tuple(v for v in ids if v >= 0)

    def dtype(self) -> str | None:
        name = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        value = self.raw.get(name)
        if value is None or value == "auto":
            return None
        value = str(value).removeprefix("torch.")
        if value not in _DTYPES:
            raise UnsupportedModelError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, _DTYPES))}")
        return value


def _read_gpt_neox(fields: _Fields) -> DecoderConfig:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _head_dim(fields, hidden, heads)
    if head_dim * heads != hidden:
        raise UnsupportedModelError(
            f"head_dim is {head_dim!r}; GPT-NeoX needs hidden_size / num_attention_heads ({hidden} / {heads})"
        )
    bos = fields.token_ids("bos_token_id")
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_position=fields.integer("max_position_embeddings"),
        rotary=_read_rotary(fields, head_dim, theta_name="rotary_emb_base", share_name="rotary_pct", share=0.25),
        norm="layer_norm",
        norm_eps=fields.positive("layer_norm_eps", 1e-5),
        activation=_ACTIVATIONS["gpt_neox"][fields.choice("hidden_act", "gelu", _ACTIVATIONS["gpt_neox"])],
        gated_mlp=False,
        parallel_residual=fields.flag("use_parallel_residual", True),
        attention_bias=fields.flag("attention_bias", True),
        mlp_bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        fused_qkv=True,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


def _read_llama(fields: _Fields) -> DecoderConfig:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _head_dim(fields, hidden, heads)
    rotary = _read_rotary(fields, head_dim, theta_name="rope_theta", share_name="partial_rotary_factor", share=1.0)
    if rotary.nominal_dim != head_dim:
        raise UnsupportedModelError(
            f"partial_rotary_factor is {rotary.nominal_dim / head_dim:g}; LLaMA models rotate whole heads (1.0)"
        )
    bos = fields.token_ids("bos_token_id")
    return DecoderConfig(
        family="llama",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position=fields.integer("max_position_embeddings", 2048),
        rotary=rotary,
        norm="rms_norm",
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS["llama"][fields.choice("hidden_act", "silu", _ACTIVATIONS["llama"])],
        gated_mlp=True,
        parallel_residual=False,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        fused_qkv=False,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
        dtype=fields.dtype(),
    )


def _head_dim(fields: _Fields, hidden: int, heads: int) -> int:
    if fields.raw.get("head_dim") is not None:
        return fields.integer("head_dim")
    if hidden % heads:
        raise UnsupportedModelError(
            f"hidden_size is {hidden}; without head_dim it must be a multiple of num_attention_heads ({heads})"
        )
    return hidden // heads


def _read_rotary(fields: _Fields, head_dim: int, *, theta_name: str, share_name: str, share: float) -> RotaryConfig:
    """The rotary embedding, from `rope_parameters` (transformers 5), `rope_scaling`, or the fields of the family."""
    for name in ("rope_parameters", "rope_scaling"):
        if fields.raw.get(name) is not None and not isinstance(fields.raw[name], Mapping):
            raise UnsupportedModelError(f"{name} is {fields.raw[name]!r}; it must be an object or null")
    scaling_name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    raw = dict(fields.raw.get(scaling_name) or {})
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(
            f"{scaling_name}.rope_type is {kind!r}; supported are 'default', 'linear' and 'llama3'"
        )
    _refuse_unknown(raw, _ROTARY_FIELDS, where=scaling_name)
    rope = _Fields(raw)
    theta = rope.positive("rope_theta", fields.positive(theta_name, 10000.0))
    share = rope.share("partial_rotary_factor", fields.share(share_name, share))
    # transformers 4 and 5 disagree on which of GPT-NeoX's two spellings counts when they differ.
    for other, name, value in (("rope_theta", theta_name, theta), ("partial_rotary_factor", share_name, share)):
        if fields.raw.get(other) is not None and other != name and fields.number(other) != value:
            raise UnsupportedModelError(f"{other} is {fields.raw[other]!r}; it must be that of {name} ({value!r})")
    nominal_dim = int(head_dim * share)
    if kind == "default":
        return RotaryConfig(nominal_dim, theta)
    scaling = cast(RotaryScaling, kind)
    if scaling == "linear":
        return RotaryConfig(nominal_dim, theta, scaling, rope.positive("factor"))
    return RotaryConfig(
        nominal_dim,
        theta,
        scaling,
        rope.positive("factor"),
        rope.positive("low_freq_factor"),
        rope.positive("high_freq_factor"),
        rope.integer("original_max_position_embeddings"),
    )


def _refuse_unknown(raw: Mapping[str, Any], known: frozenset[str] | set[str], *, where: str) -> None:
    """Unknown fields that are switched off (null, false, 0, empty) change nothing; any other value is refused."""
    unknown = {name: value for name, value in raw.items() if name not in known and _switched_on(value)}
    if unknown:
        listed = ", ".join(f"{name} = {_shorten(value)}" for name, value in sorted(unknown.items(), key=str))
        raise UnsupportedModelError(f"{where} asks for what is not implemented: {listed}")


def _switched_on(value: Any) -> bool:
    return not (value is None or value is False or value == 0 or value in ("", [], {}))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
