"""The functions of the project's seed, argument for argument: one decoder layer of Pythia-2.8B or 6.9B at one token, and the
attention half of one of Llama-2-7B.

Each is `clusterfusion.decoder_layer`, or segments of the same program, at one shape and in float16. Inference only: no
gradient is recorded.
"""

from __future__ import annotations

from torch import Tensor

from clusterfusion.seed_api import graph_context, layer
from clusterfusion.seed_api.checks import PYTHIA_2B8, PYTHIA_6B9
from clusterfusion.seed_api.graph_context import graph_context_bytes
from clusterfusion.seed_api.layer import Results
from clusterfusion.seed_api.llama import llama_decoder_layer, llama_decoder_layer_sglang, rmsnorm
from clusterfusion.seed_api.llama_batch import llama_decoder_layer_batch_decode_sglang

__all__ = [
    "graph_context_bytes",
    "llama_decoder_layer",
    "llama_decoder_layer_batch_decode_sglang",
    "llama_decoder_layer_sglang",
    "pythia_2b8_attention_only",
    "pythia_2b8_create_graph_context",
    "pythia_2b8_decoder_layer",
    "pythia_2b8_decoder_layer_split",
    "pythia_2b8_destroy_graph_context",
    "pythia_2b8_graph_decode_step",
    "pythia_2b8_mlp_only",
    "pythia_6b9_attention_only",
    "pythia_6b9_create_graph_context",
    "pythia_6b9_decoder_layer",
    "pythia_6b9_decoder_layer_split",
    "pythia_6b9_destroy_graph_context",
    "pythia_6b9_graph_decode_step",
    "pythia_6b9_mlp_only",
    "rmsnorm",
]


def pythia_2b8_decoder_layer(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, mlp_down_weight: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """One decode step through a Pythia-2.8B layer (Black et al. 2022; transformers' GPTNeoXLayer) in one cooperative
    launch: x' = x + attention(norm1 x) + mlp(norm2 x), eps 1e-5, exact GELU. Returns (output, k_new, v_new).

    input: x, float16 [1, 2560], in memory apart from the caches; output is x', alike. Matrices are float16,
    output-major: weight_qkv [7680, 2560], its rows head by head, 80 each of q, k, v; weight_o [2560, 2560];
    mlp_up_weight [10240, 2560]; mlp_down_weight [2560, 10240]. Biases and norm weights: float16, one element a row, [n]
    or [1, n]. All are read where they lie.
    k_cache, v_cache: keys (rotated) and values so far, float16 [max_len, 2560], a token a row; rows may lie apart.
    Those below current_seq_len are read; the new token's are written at row current_seq_len, and returned as k_new
    and v_new [1, 32, 80].
    cos, sin: float32 [1, 80], of the new token's angles, one for each of the 20 dimensions that rotate; the other 60
    are not read.
    current_seq_len: how many tokens are cached, 0 to max_len - 1: an int, or an int32 tensor of one element on the
    device. On a GPU only the launch looks at a tensor's value: one out of range leaves output NaN, and the next call
    that comes after that launch has ended is a DeviceError.

    Sums are float32. The MLP's hidden vector, the new keys and values and the output are rounded to float16: on a GPU
    nothing else is; on the CPU every operand of a matrix product is, the normed x, the queries and attention's result
    too.

    On CUDA tensors it runs on PyTorch's current stream, on CPU tensors the reference runs. Raises ArgumentError naming
    the argument, before anything is launched; DeviceError and CompileError as `clusterfusion.decoder_layer` does.
    """
    return layer.layer(
        PYTHIA_2B8, "fused", input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos,
        sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_2b8_decoder_layer_split(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, mlp_down_weight: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """`pythia_2b8_decoder_layer` as regular launches instead of a cooperative one: the same bits."""
    return layer.layer(
        PYTHIA_2B8, "split", input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos,
        sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_2b8_attention_only(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, current_seq_len: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The first half of `pythia_2b8_decoder_layer`, whose arguments it shares. Returns (attn_output, mlp_intermediate,
    k_new, v_new): attention through the output projection, without the residual, float16 [1, 2560]; and
    GELU(up(norm2 x)), float16 [10240]. `pythia_2b8_mlp_only` makes the layer's output of them."""
    return layer.attention_only(
        PYTHIA_2B8, input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos, sin,
        post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, current_seq_len,
    )  # fmt: skip


def pythia_2b8_mlp_only(
    input: Tensor, attn_output: Tensor, mlp_intermediate: Tensor, mlp_down_weight: Tensor, mlp_down_bias: Tensor
) -> Tensor:
    """The second half of the layer: input + attn_output + down(mlp_intermediate), float16 [1, 2560]. The first two are
    [1, 2560], mlp_intermediate [10240] or [1, 10240]. Errors as for `pythia_2b8_decoder_layer`."""
    return layer.mlp_only(PYTHIA_2B8, input, attn_output, mlp_intermediate, mlp_down_weight, mlp_down_bias)


def pythia_2b8_create_graph_context(
    ctx_id: int, k_cache: Tensor, v_cache: Tensor, weight_qkv: Tensor, weight_o: Tensor, mlp_up_weight: Tensor,
    mlp_down_weight: Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    """Makes what `pythia_2b8_graph_decode_step` runs over, under the int ctx_id: the launch's arguments with their
    tensor maps, static buffers and scratch. Tensors as for `pythia_2b8_decoder_layer`; max_seq_len is 1 to max_len.

    Until `pythia_2b8_destroy_graph_context` it keeps its tensors alive, and takes `clusterfusion.seed_api.graph_context_bytes` of device
    memory: 136 KB on an H200, 216 KB at 6.9B. The two models' ids do not meet; any thread may use any id. Raises
    ArgumentError for an id in use, and otherwise as `pythia_2b8_decoder_layer` does."""
    graph_context.create(
        PYTHIA_2B8, ctx_id, k_cache, v_cache, weight_qkv, weight_o, mlp_up_weight, mlp_down_weight, max_seq_len
    )


def pythia_2b8_graph_decode_step(
    ctx_id: int, input: Tensor, ln_weight: Tensor, ln_bias: Tensor, bias_qkv: Tensor, bias_o: Tensor, cos: Tensor,
    sin: Tensor, k_cache: Tensor, v_cache: Tensor, post_ln_weight: Tensor, post_ln_bias: Tensor, mlp_up_bias: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """`pythia_2b8_decoder_layer` over a context: the same arguments, the same bits. k_cache and v_cache must be the
    memory that the context was created with, current_seq_len below its max_seq_len.

    The first step with a set of norm weights and biases captures the launch, with their addresses, in a CUDA graph that
    later steps replay at any position; a context keeps the last four such graphs. Results are fresh tensors. The steps
    of a context share buffers: one on another stream has to wait for those before it. While the current stream is being
    captured a step goes into that graph, with buffers of the graph's own. Once a step has failed on the GPU, every
    later one raises DeviceError: destroy the context. What fails in a graph of the caller's own is raised by the next call of any
    of this module's functions on that device."""
    return graph_context.step(
        PYTHIA_2B8, ctx_id, input, ln_weight, ln_bias, bias_qkv, bias_o, cos, sin, k_cache, v_cache, post_ln_weight,
        post_ln_bias, mlp_up_bias, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_2b8_destroy_graph_context(ctx_id: int) -> None:
    """Ends a context and frees its memory, after waiting for the device."""
    graph_context.destroy(PYTHIA_2B8, ctx_id)


def pythia_6b9_decoder_layer(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, mlp_down_weight: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """`pythia_2b8_decoder_layer` at Pythia-6.9B's sizes: hidden 4096, 32 heads of 128, of which 32 rotate, MLP
    16384."""
    return layer.layer(
        PYTHIA_6B9, "fused", input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos,
        sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_6b9_decoder_layer_split(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, mlp_down_weight: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """`pythia_2b8_decoder_layer_split` at Pythia-6.9B's sizes."""
    return layer.layer(
        PYTHIA_6B9, "split", input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos,
        sin, post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, mlp_down_weight, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_6b9_attention_only(
    input: Tensor, weight_qkv: Tensor, bias_qkv: Tensor, weight_o: Tensor, bias_o: Tensor, k_cache: Tensor,
    v_cache: Tensor, ln_weight: Tensor, ln_bias: Tensor, cos: Tensor, sin: Tensor, post_ln_weight: Tensor,
    post_ln_bias: Tensor, mlp_up_weight: Tensor, mlp_up_bias: Tensor, current_seq_len: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`pythia_2b8_attention_only` at Pythia-6.9B's sizes."""
    return layer.attention_only(
        PYTHIA_6B9, input, weight_qkv, bias_qkv, weight_o, bias_o, k_cache, v_cache, ln_weight, ln_bias, cos, sin,
        post_ln_weight, post_ln_bias, mlp_up_weight, mlp_up_bias, current_seq_len,
    )  # fmt: skip


def pythia_6b9_mlp_only(
    input: Tensor, attn_output: Tensor, mlp_intermediate: Tensor, mlp_down_weight: Tensor, mlp_down_bias: Tensor
) -> Tensor:
    """`pythia_2b8_mlp_only` at Pythia-6.9B's sizes."""
    return layer.mlp_only(PYTHIA_6B9, input, attn_output, mlp_intermediate, mlp_down_weight, mlp_down_bias)


def pythia_6b9_create_graph_context(
    ctx_id: int, k_cache: Tensor, v_cache: Tensor, weight_qkv: Tensor, weight_o: Tensor, mlp_up_weight: Tensor,
    mlp_down_weight: Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    """`pythia_2b8_create_graph_context` at Pythia-6.9B's sizes."""
    graph_context.create(
        PYTHIA_6B9, ctx_id, k_cache, v_cache, weight_qkv, weight_o, mlp_up_weight, mlp_down_weight, max_seq_len
    )


def pythia_6b9_graph_decode_step(
    ctx_id: int, input: Tensor, ln_weight: Tensor, ln_bias: Tensor, bias_qkv: Tensor, bias_o: Tensor, cos: Tensor,
    sin: Tensor, k_cache: Tensor, v_cache: Tensor, post_ln_weight: Tensor, post_ln_bias: Tensor, mlp_up_bias: Tensor,
    mlp_down_bias: Tensor, current_seq_len: int | Tensor,
) -> Results:  # fmt: skip
    """`pythia_2b8_graph_decode_step` at Pythia-6.9B's sizes."""
    return graph_context.step(
        PYTHIA_6B9, ctx_id, input, ln_weight, ln_bias, bias_qkv, bias_o, cos, sin, k_cache, v_cache, post_ln_weight,
        post_ln_bias, mlp_up_bias, mlp_down_bias, current_seq_len,
    )  # fmt: skip


def pythia_6b9_destroy_graph_context(ctx_id: int) -> None:
    """`pythia_2b8_destroy_graph_context` at Pythia-6.9B's sizes."""
    graph_context.destroy(PYTHIA_6B9, ctx_id)
