"""A decoder's weights as tensors that lie where the checkpoint or the model put them: views, never repacked copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from clusterfusion.architecture import DecoderConfig
from clusterfusion.arguments import as_int, require, require_dense


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices are output-major, as `nn.Linear` holds them.

    The projections of the heads are 3-D views [heads, head_dim, hidden]: contiguous inside a head, with any stride from
    head to head. So a checkpoint that fuses q, k, v head by head (GPT-NeoX) and one that holds them apart (LLaMA) look
    alike, and neither is copied. Biases are [heads, head_dim] in the same manner. None where the model has none. What replaces
    a fused matrix or bias must replace its three views too: `gpt_neox_layer` cuts them.
    """

    input_norm_weight: Tensor  # [hidden]
    input_norm_bias: Tensor | None
    q_weight: Tensor  # [num_heads, head_dim, hidden]
    k_weight: Tensor  # [num_kv_heads, head_dim, hidden]
    v_weight: Tensor  # [num_kv_heads, head_dim, hidden]
    q_bias: Tensor | None  # [num_heads, head_dim]
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_weight: Tensor  # [hidden, num_heads * head_dim]
    o_bias: Tensor | None  # [hidden]
    post_norm_weight: Tensor  # [hidden]; the norm before the MLP
    post_norm_bias: Tensor | None
    gate_weight: Tensor | None  # [intermediate, hidden]
    gate_bias: Tensor | None
    up_weight: Tensor  # [intermediate, hidden]
    up_bias: Tensor | None
    down_weight: Tensor  # [hidden, intermediate]
    down_bias: Tensor | None
    qkv_weight: Tensor | None  # [3 * num_heads * head_dim, hidden]: the matrix that q, k, v are views of, if any
    qkv_bias: Tensor | None


def gpt_neox_layer(
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    o_weight: Tensor,
    o_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    input_norm_weight: Tensor,
    input_norm_bias: Tensor,
    post_norm_weight: Tensor,
    post_norm_bias: Tensor,
    *,
    heads: int,
) -> LayerWeights:
    """A GPT-NeoX layer over its tensors, without copies. qkv_weight [3 * hidden, hidden], the rows of each head together,
    q then k then v; the four `| None` biases may be None. The other shapes are those of LayerWeights.

    Raises ArgumentError naming what is not a tensor, or stands in the way of cutting the matrix into heads."""
    needed = {
        "qkv_weight": qkv_weight,
        "o_weight": o_weight,
        "up_weight": up_weight,
        "down_weight": down_weight,
        "input_norm_weight": input_norm_weight,
        "input_norm_bias": input_norm_bias,
        "post_norm_weight": post_norm_weight,
        "post_norm_bias": post_norm_bias,
    }
    biases = {"qkv_bias": qkv_bias, "o_bias": o_bias, "up_bias": up_bias, "down_bias": down_bias}
    for name, tensor in needed.items():
        require_dense(name, tensor)
    for name, bias in biases.items():
        if bias is not None:
            require_dense(name, bias, "a tensor or None")
    shape = list(qkv_weight.shape)
    require("qkv_weight", f"of shape {shape}", len(shape) == 2 and shape[0] == 3 * shape[1], "[3 * hidden, hidden]")
    rows, hidden = shape
    divisor = f"a divisor of hidden ({hidden})"
    heads = as_int("heads", heads, 1, hidden, divisor)
    require("heads", heads, hidden % heads == 0, divisor)
    if qkv_bias is not None:
        require("qkv_bias", f"of shape {list(qkv_bias.shape)}", tuple(qkv_bias.shape) == (rows,), f"of shape [{rows}]")
    q_weight, k_weight, v_weight = qkv_weight.unflatten(0, (heads, 3, -1)).unbind(1)
    q_bias, k_bias, v_bias = (None,) * 3 if qkv_bias is None else qkv_bias.unflatten(0, (heads, 3, -1)).unbind(1)
    return LayerWeights(
        input_norm_weight=input_norm_weight,
        input_norm_bias=input_norm_bias,
        q_weight=q_weight,
        k_weight=k_weight,
        v_weight=v_weight,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_weight=o_weight,
        o_bias=o_bias,
        post_norm_weight=post_norm_weight,
        post_norm_bias=post_norm_bias,
        gate_weight=None,
        gate_bias=None,
        up_weight=up_weight,
        up_bias=up_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
    )


def llama_layer(
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    input_norm_weight: Tensor,
    post_norm_weight: Tensor,
    *,
    heads: int,
    kv_heads: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> LayerWeights:
    """A LLaMA layer over its tensors, without copies: matrices as `nn.Linear` holds them, q_weight [heads * head_dim, hidden],
    k_weight and v_weight [kv_heads * head_dim, hidden]. The other shapes are those of LayerWeights.

    Raises ArgumentError naming what is not a tensor, or stands in the way of cutting a matrix into heads."""
    heads = as_int("heads", heads, 1, 2**31, "an int from 1 to 2147483648")
    kv_heads = as_int("kv_heads", kv_heads, 1, heads, f"a divisor of heads ({heads})")
    require("kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of heads ({heads})")

    def cut(name: str, tensor: Tensor | None, count: int, dims: int) -> Tensor | None:
        if tensor is None:
            return None
        require_dense(name, tensor)
        shape = list(tensor.shape)
        fits = len(shape) == dims and shape[0] > 0 and shape[0] % count == 0
        require(name, f"of shape {shape}", fits, f"of {dims} dimensions, its rows a multiple of {count}, the heads")
        return tensor.unflatten(0, (count, -1))

    matrices = {"q": (q_weight, heads), "k": (k_weight, kv_heads), "v": (v_weight, kv_heads)}
    given = {
        "q_weight": q_weight, "k_weight": k_weight, "v_weight": v_weight, "o_weight": o_weight, "gate_weight": gate_weight,
        "up_weight": up_weight, "down_weight": down_weight, "input_norm_weight": input_norm_weight,
        "post_norm_weight": post_norm_weight,
    }  # fmt: skip
    biases = {"o_bias": o_bias, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    for name, tensor in (given | {name: bias for name, bias in biases.items() if bias is not None}).items():
        require_dense(name, tensor)
    q, k, v = (cut(f"{name}_weight", tensor, count, 2) for name, (tensor, count) in matrices.items())
    assert q is not None and k is not None and v is not None
    return LayerWeights(
        input_norm_weight=input_norm_weight,
        input_norm_bias=None,
        q_weight=q,
        k_weight=k,
        v_weight=v,
        q_bias=cut("q_bias", q_bias, heads, 1),
        k_bias=cut("k_bias", k_bias, kv_heads, 1),
        v_bias=cut("v_bias", v_bias, kv_heads, 1),
        o_weight=o_weight,
        o_bias=o_bias,
        post_norm_weight=post_norm_weight,
        post_norm_bias=None,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        qkv_weight=None,
        qkv_bias=None,
    )


@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder, of one dtype and on one device. With tied embeddings `lm_head` is `embedding`."""

    config: DecoderConfig
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm_weight: Tensor  # [hidden]
    final_norm_bias: Tensor | None
    lm_head: Tensor  # [vocab, hidden]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights; tied embeddings count once."""
        return self.config.num_parameters * self.embedding.element_size()


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds, in the spelling of transformers 5.

    With tied embeddings the head has no tensor of its own.
    """
    c = config
    h, inter = c.hidden_size, c.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (h,)
        if c.norm == "layer_norm":
            shapes[f"{name}.bias"] = (h,)

    names = NAMES[c.family]
    shapes[names.embedding] = (c.vocab_size, h)
    for i in range(c.num_layers):
        layer = f"{names.layers}.{i}"
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
        if c.fused_qkv:
            linear(f"{layer}.{names.qkv}", c.q_size + 2 * c.kv_size, h, c.attention_bias)
        else:
            linear(f"{layer}.{names.q}", c.q_size, h, c.attention_bias)
            linear(f"{layer}.{names.k}", c.kv_size, h, c.attention_bias)
            linear(f"{layer}.{names.v}", c.kv_size, h, c.attention_bias)
        linear(f"{layer}.{names.o}", h, c.q_size, c.attention_bias)
        if c.gated_mlp:
            linear(f"{layer}.{names.gate}", inter, h, c.mlp_bias)
        linear(f"{layer}.{names.up}", inter, h, c.mlp_bias)
        linear(f"{layer}.{names.down}", h, inter, c.mlp_bias)
    norm(names.final_norm)
    if not c.tied_embeddings:
        shapes[LM_HEAD] = (c.vocab_size, h)
    return shapes


def assemble(config: DecoderConfig, tensors: Mapping[str, Tensor]) -> DecoderWeights:
    """DecoderWeights over the tensors named and shaped as `expected_tensors` says. Nothing is copied."""
    c = config
    names = NAMES[c.family]

    def heads(tensor: Tensor | None, count: int) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (count, c.head_dim))

    def layer(i: int) -> LayerWeights:
        def get(name: str) -> Tensor:
            return tensors[f"{names.layers}.{i}.{name}"]

        def maybe(name: str) -> Tensor | None:
            return tensors.get(f"{names.layers}.{i}.{name}")

        if c.fused_qkv:
            return gpt_neox_layer(
                get(f"{names.qkv}.weight"),
                maybe(f"{names.qkv}.bias"),
                get(f"{names.o}.weight"),
                maybe(f"{names.o}.bias"),
                get(f"{names.up}.weight"),
                maybe(f"{names.up}.bias"),
                get(f"{names.down}.weight"),
                maybe(f"{names.down}.bias"),
                get("input_layernorm.weight"),
                get("input_layernorm.bias"),
                get("post_attention_layernorm.weight"),
                get("post_attention_layernorm.bias"),
                heads=c.num_heads,
            )
        return LayerWeights(
            input_norm_weight=get("input_layernorm.weight"),
            input_norm_bias=maybe("input_layernorm.bias"),
            q_weight=get(f"{names.q}.weight").unflatten(0, (c.num_heads, c.head_dim)),
            k_weight=get(f"{names.k}.weight").unflatten(0, (c.num_kv_heads, c.head_dim)),
            v_weight=get(f"{names.v}.weight").unflatten(0, (c.num_kv_heads, c.head_dim)),
            q_bias=heads(maybe(f"{names.q}.bias"), c.num_heads),
            k_bias=heads(maybe(f"{names.k}.bias"), c.num_kv_heads),
            v_bias=heads(maybe(f"{names.v}.bias"), c.num_kv_heads),
            o_weight=get(f"{names.o}.weight"),
            o_bias=maybe(f"{names.o}.bias"),
            post_norm_weight=get("post_attention_layernorm.weight"),
            post_norm_bias=maybe("post_attention_layernorm.bias"),
            gate_weight=maybe(f"{names.gate}.weight"),
            gate_bias=maybe(f"{names.gate}.bias"),
            up_weight=get(f"{names.up}.weight"),
            up_bias=maybe(f"{names.up}.bias"),
            down_weight=get(f"{names.down}.weight"),
            down_bias=maybe(f"{names.down}.bias"),
            qkv_weight=None,
            qkv_bias=None,
        )

    embedding = tensors[names.embedding]
    return DecoderWeights(
        config=c,
        embedding=embedding,
        layers=tuple(layer(i) for i in range(c.num_layers)),
        final_norm_weight=tensors[f"{names.final_norm}.weight"],
        final_norm_bias=tensors.get(f"{names.final_norm}.bias"),
        lm_head=embedding if c.tied_embeddings else tensors[LM_HEAD],
    )


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """How a family's checkpoints name their tensors (transformers' GPTNeoXForCausalLM and LlamaForCausalLM)."""

    embedding: str
    layers: str
    final_norm: str
    o: str
    up: str
    down: str
    qkv: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    gate: str = ""


LM_HEAD = "lm_head.weight"

NAMES: dict[str, TensorNames] = {
    "gpt_neox": TensorNames(
        embedding="gpt_neox.embed_in.weight",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        qkv="attention.query_key_value",
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    "llama": TensorNames(
        embedding="model.embed_tokens.weight",
        layers="model.layers",
        final_norm="model.norm",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        o="self_attn.o_proj",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
    ),
}
