"""transformers' causal language models as the other side of an evaluation: greedy, step by step, or over a whole text.

A checkpoint is loaded by transformers itself from the folder that the engine read; random weights are shared with the
engine. Attention is what transformers takes by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.bench.peers import cache_keyword, shared_model
from clusterfusion.engine.memory import require_memory
from clusterfusion.errors import ClusterFusionError
from clusterfusion.weights import DecoderWeights, LayerWeights

_LLAMA_TENSORS = {
    "input_layernorm.weight": "input_norm_weight",
    "post_attention_layernorm.weight": "post_norm_weight",
    "self_attn.q_proj.weight": "q_weight",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.weight": "k_weight",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.weight": "v_weight",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.o_proj.weight": "o_weight",
    "self_attn.o_proj.bias": "o_bias",
    "mlp.gate_proj.weight": "gate_weight",
    "mlp.gate_proj.bias": "gate_bias",
    "mlp.up_proj.weight": "up_weight",
    "mlp.up_proj.bias": "up_bias",
    "mlp.down_proj.weight": "down_weight",
    "mlp.down_proj.bias": "down_bias",
}


class CausalLM:
    """A transformers model that ends in a final norm and an LM head, in eval mode, without gradients."""

    def __init__(self, model: Any, weights: str) -> None:
        from transformers import GenerationConfig

        # Neither an end-of-sequence token nor a checkpoint's sampling settings may end or change greedy decoding.
        model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
        self.model = model.eval().requires_grad_(False)
        self.weights = weights  # where they come from, in words

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype, device: torch.device, needed_bytes: int) -> CausalLM:
        """The checkpoint in `folder`. Raises DeviceError without the memory, ClusterFusionError where transformers does
        not load it."""
        _require_transformers()
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        require_memory("transformers' own copy of the weights", needed_bytes, device)
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
            return cls(model.to(device), "loaded by transformers from the same folder")
        except Exception as error:  # whatever transformers raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ClusterFusionError(
                f"transformers cannot load {folder}: {type(error).__name__}: {reason}; an evaluation needs it as the other "
                "side"
            ) from error
        finally:
            if bars:
                logging.enable_progress_bar()

    @classmethod
    def shared(cls, weights: DecoderWeights) -> CausalLM:
        """A model whose parameters are the engine's tensors."""
        _require_transformers()
        make = _shared_gpt_neox if weights.config.family == "gpt_neox" else _shared_llama
        return cls(make(weights), "the engine's own tensors")

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], tokens: int) -> tuple[list[int], Tensor]:
        """`tokens` new tokens by `generate`, and the logits [tokens, vocab] that each was chosen from."""
        prompt = torch.tensor([list(ids)], device=self.model.device)
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [T, vocab] after each token, in one forward."""
        return self.model(torch.tensor([list(ids)], device=self.model.device), use_cache=False).logits[0]

    def stepper(self) -> Stepper:
        """A new, empty decoding state."""
        return Stepper(self.model)


class Stepper:
    """One token a forward, with transformers' dynamic cache."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = {cache_keyword(model): DynamicCache(config=model.config)}

    @torch.no_grad()
    def step(self, token: int) -> tuple[Tensor, Tensor]:
        """Logits [vocab] and the final norm's input [hidden] after `token`."""
        # output_hidden_states would give the state after the final norm.
        base = self._model.base_model
        final_norm = base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm
        seen: list[Tensor] = []
        handle = final_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            ids = torch.tensor([[token]], device=self._model.device)
            out = self._model(ids, use_cache=True, **self._cache)
        finally:
            handle.remove()
        return out.logits[0, -1], seen[0][0, -1]


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ClusterFusionError(
            f"transformers is the other side of every evaluation, and cannot be imported ({error}): "
            "pip install 'transformers>=5'"
        ) from error


def _shared_gpt_neox(weights: DecoderWeights) -> Any:
    from transformers import GPTNeoXForCausalLM

    base = shared_model(weights)
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(base.config)
    model.gpt_neox = base
    model.get_output_embeddings().weight = torch.nn.Parameter(weights.lm_head, requires_grad=False)
    return model


def llama_config(config: DecoderConfig) -> Any:
    """transformers' LlamaConfig of a LLaMA model."""
    from transformers import LlamaConfig

    c = config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rotary.theta}
    if c.rotary.scaling != "none":
        rope |= {"rope_type": c.rotary.scaling, "factor": c.rotary.factor}
    if c.rotary.scaling == "llama3":
        rope |= {
            "low_freq_factor": c.rotary.low_freq_factor,
            "high_freq_factor": c.rotary.high_freq_factor,
            "original_max_position_embeddings": c.rotary.original_max_position,
        }
    return LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.norm_eps,
        rope_parameters=rope,
        attention_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
        tie_word_embeddings=c.tied_embeddings,
        attn_implementation="sdpa",
    )


def _shared_llama(weights: DecoderWeights) -> Any:
    from transformers import LlamaForCausalLM

    config = llama_config(weights.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm_weight,
        "lm_head.weight": weights.lm_head,
    }
    for i, layer in enumerate(weights.layers):
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in _llama_layer(layer).items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights.device)  # no parameters: still on meta
    return model


def _llama_layer(layer: LayerWeights) -> dict[str, Tensor]:
    tensors = {name: getattr(layer, field) for name, field in _LLAMA_TENSORS.items()}
    return {
        name: tensor.flatten(0, 1) if "_proj" in name and "attn" in name and "o_proj" not in name else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }
