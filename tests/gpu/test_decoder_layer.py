"""decoder_layer on the GPU: block outputs and new keys and values against float64, and the operator's contract there."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from tiny_models import real_gpt_neox
from torch import Tensor
from transformers import DynamicCache, GPTNeoXForCausalLM

import clusterfusion
from clusterfusion import reference
from clusterfusion.engine.loading import demo_folder
from clusterfusion.errors import ArgumentError, DeviceError, UnsupportedModelError
from clusterfusion.named_shapes import NAMED_SHAPES, named_shape
from clusterfusion.ops.layer_checks import layer_config
from clusterfusion.ops.layer_launch import (
    ErrorRecord,
    LayerBuffers,
    LayerScratch,
    RotaryTables,
    layer_arguments,
    plan_for,
    prepare_layer,
)
from clusterfusion.weights import LayerWeights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
FORMS = ("fused", "split")


class Block:
    """The first layer of a transformers model, a cache of random keys and values, and random inputs."""

    def __init__(self, model: GPTNeoXForCausalLM, max_len: int) -> None:
        self.model = model
        engine = clusterfusion.load(model, mode="reference")
        self.config = engine.config
        self.weights: LayerWeights = engine.weights.layers[0]
        c = self.config
        generator = torch.Generator(GPU).manual_seed(11)
        self.k, self.v = (
            torch.randn(c.num_heads, max_len, c.head_dim, generator=generator, device=GPU).half() for _ in range(2)
        )
        self.x = torch.randn(1, c.hidden_size, generator=generator, device=GPU).half()
        self.cos, self.sin = reference.rotary_tables(c.rotary, torch.arange(max_len, device=GPU), torch.float32)

    def arguments(self, position: int | Tensor, **changes: Any) -> dict[str, Any]:
        c = self.config
        return {
            "x": self.x,
            "layer_weights": self.weights,
            "k_cache": self.k.clone(),
            "v_cache": self.v.clone(),
            "position": position,
            "cos": self.cos,
            "sin": self.sin,
            "rotary_dim": c.rotary.dim,
            "eps": c.norm_eps,
            "activation": c.activation,
            "parallel_residual": c.parallel_residual,
        } | changes

    def ours(self, position: int, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, k, v = clusterfusion.decoder_layer(**self.arguments(position, **changes))
        return out.flatten(), k, v

    def exact(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        c, k, v = self.config, self.k.double(), self.v.double()
        cos, sin = reference.rotary_tables(c.rotary, torch.tensor([position], device=GPU), torch.float64)
        with torch.no_grad():
            x = self.x.double()
            out = reference.decoder_layer(c, self.weights, x, cos, sin, k, v, position, dtype=torch.float64)
        return out.flatten(), k[:, position], v[:, position]

    @torch.no_grad()
    def of_transformers(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        outputs: list[Tensor] = []
        layer = self.model.gpt_neox.layers[0]

        def keep(module: Any, inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hook = layer.register_forward_hook(keep)
        cache = DynamicCache()
        if position:
            cache.update(self.k[None, :, :position], self.v[None, :, :position], 0)
        self.model.gpt_neox(inputs_embeds=self.x[None], past_key_values=cache, use_cache=True)
        hook.remove()
        k, v = (getattr(cache.layers[0], name)[0, :, -1] for name in ("keys", "values"))
        return outputs[0].flatten(), k, v


def assert_closer(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    assert torch.isfinite(ours).all()
    our_error, their_error = ((got.double() - exact).abs() for got in (ours, theirs))
    assert our_error.mean() <= their_error.mean(), f"{name}: {our_error.mean():.3e} > {their_error.mean():.3e}"
    assert our_error.max() <= 1.25 * their_error.max(), f"{name}: {our_error.max():.3e}, {their_error.max():.3e}"


def check_block(block: Block, contexts: tuple[int, ...]) -> None:
    for context in contexts:
        exact, theirs = block.exact(context), block.of_transformers(context)
        for x in (block.x, block.x.float()):
            results = {form: block.ours(context, form=form, x=x) for form in FORMS}
            for fused, split in zip(results["fused"], results["split"], strict=True):
                assert torch.equal(fused, split), f"the forms differ at context {context}"
            parts = zip(("output", "k_new", "v_new"), results["fused"], theirs, exact, strict=True)
            for name, ours, other, truth in parts:
                assert_closer(f"{name} of {x.dtype} at context {context}", ours, other, truth)


@pytest.mark.parametrize("name", [n for n in NAMED_SHAPES if named_shape(n).family == "gpt_neox"])
def test_blocks_are_closer_to_the_truth_than_transformers(name: str) -> None:
    config = dataclasses.replace(named_shape(name), num_layers=1, vocab_size=64)
    check_block(Block(real_gpt_neox(config, GPU), 2048), (0, 16, 512, 1024, 2047))


def test_trained_blocks_are_closer_to_the_truth_than_transformers() -> None:
    model = GPTNeoXForCausalLM.from_pretrained(str(demo_folder()), dtype=torch.float16).to(GPU).eval()
    block = Block(model, 2048)
    table = model.gpt_neox.embed_in.weight
    for token in range(30, 100, 10):
        block.x = table[token : token + 1].detach()
        check_block(block, (16, 512, 1024, 2047))


@pytest.fixture(scope="module")
def block() -> Block:
    config = dataclasses.replace(named_shape("pythia-160m"), num_layers=1, vocab_size=64)
    return Block(real_gpt_neox(config, GPU), 300)


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_cache_layouts_tables_and_positions_give_the_same_bits(block: Block) -> None:
    wide = [torch.cat((t, t, torch.ones_like(t)), dim=1) for t in (block.cos, block.sin)]
    for form in FORMS:
        for at in (0, 1, 29, 30, 31, 299):
            expected = block.ours(at, form=form)
            flat = {
                f"{n}_cache": c.transpose(0, 1).flatten(1).contiguous() for n, c in (("k", block.k), ("v", block.v))
            }
            assert equal(block.ours(at, form=form, **flat), expected)
            for name, new in zip(("k", "v"), expected[1:], strict=True):
                written = getattr(block, name).transpose(0, 1).flatten(1).clone()
                written[at] = new.flatten()
                assert torch.equal(flat[f"{name}_cache"], written), "the new row is written, and no other"
            assert equal(block.ours(at, form=form, cos=wide[0][at : at + 1], sin=wide[1][at : at + 1]), expected)
            assert equal(block.ours(torch.tensor([at], dtype=torch.int32, device=GPU), form=form), expected)
            assert equal(block.ours(at, form=form, x=block.x.expand(3, -1)[1]), expected), "a view of x"
            padded = torch.empty(1 + block.x.numel(), dtype=torch.float16, device=GPU)[1:].copy_(block.x[0])
            assert equal(block.ours(at, form=form, x=padded), expected), "x at an odd address"


def test_bfloat16_weights_and_activations(block: Block) -> None:
    names = inspect.signature(clusterfusion.gpt_neox_layer).parameters.keys() - {"heads"}
    given = {name: getattr(block.weights, name) for name in names}
    given = {name: None if tensor is None else tensor.bfloat16() for name, tensor in given.items()}
    weights = clusterfusion.gpt_neox_layer(**given, heads=block.config.num_heads)
    k, v = block.k.bfloat16(), block.v.bfloat16()
    for x in (block.x.bfloat16(), block.x, block.x.float()):
        results = [
            block.ours(77, x=x, layer_weights=weights, k_cache=k.clone(), v_cache=v.clone(), form=form)
            for form in FORMS
        ]
        assert equal(*results)
        assert results[0][0].dtype == x.dtype
        k64, v64 = k.double(), v.double()
        cos, sin = (t[77:78].double() for t in (block.cos, block.sin))
        exact = reference.decoder_layer(
            block.config, weights, x.double().view(1, -1), cos, sin, k64, v64, 77, dtype=torch.float64
        )
        for ours, truth in zip(results[0], (exact.flatten(), k64[:, 77], v64[:, 77]), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=2**-8, atol=2e-2)


def test_angles_of_both_dimensions_of_a_pair(block: Block) -> None:
    d = block.config.rotary.dim
    angles = torch.rand(1, d, device=GPU) * 6
    k64, v64 = block.k.double(), block.v.double()
    cos, sin = (t.double().view(1, 2, d // 2) for t in (angles.cos(), angles.sin()))
    exact = reference.decoder_layer(
        block.config, block.weights, block.x.double(), cos, sin, k64, v64, 50, dtype=torch.float64
    )
    out, k_new, _ = block.ours(50, x=block.x.float(), cos=angles.cos(), sin=angles.sin())
    torch.testing.assert_close(k_new.double(), k64[:, 50], rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(out.double(), exact.flatten(), rtol=0, atol=2e-3)


def test_the_operator_passes_opcheck(block: Block) -> None:
    w, c = block.weights, block.config
    arguments = (
        block.x,
        torch.tensor([7], dtype=torch.int32, device=GPU),
        *(w.qkv_weight, w.qkv_bias, w.o_weight, w.o_bias, w.up_weight, w.up_bias, w.down_weight, w.down_bias),
        *(w.input_norm_weight, w.input_norm_bias, w.post_norm_weight, w.post_norm_bias),
        *(block.k.clone(), block.v.clone(), block.cos, block.sin),
        *(c.num_heads, c.rotary.dim, c.norm_eps, c.activation, c.parallel_residual),
    )
    for form in FORMS:
        results = torch.library.opcheck(torch.ops.clusterfusion.decoder_layer.default, (*arguments, form))
        assert set(results.values()) == {"SUCCESS"}


def test_it_can_be_compiled(block: Block) -> None:
    k, v = block.k.clone(), block.v.clone()

    def step(x: Tensor, position: Tensor) -> Tensor:
        for _ in range(2):
            x = clusterfusion.decoder_layer(**block.arguments(position, x=x, k_cache=k, v_cache=v))[0] * 0.5
        return x

    compiled = torch.compile(step, fullgraph=True)
    for at in (3, 4, 250):
        position = torch.tensor([at], dtype=torch.int32, device=GPU)
        got = compiled(block.x, position).clone()
        assert torch.equal(got, step(block.x, position))


def test_one_captured_graph_serves_every_position(block: Block) -> None:
    position = torch.zeros(1, dtype=torch.int32, device=GPU)
    k, v = block.k.clone(), block.v.clone()
    arguments = block.arguments(position, k_cache=k, v_cache=v)
    clusterfusion.decoder_layer(**arguments)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        captured = clusterfusion.decoder_layer(**arguments)
    for at in (0, 1, 64, 299, 5):
        k.copy_(block.k)
        v.copy_(block.v)
        position.fill_(at)
        graph.replay()
        expected = block.ours(at)
        assert equal((captured[0].flatten(), *captured[1:]), expected)
        assert torch.equal(k[:, at], expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_a_position_outside_the_cache_does_nothing_and_is_reported(block: Block, form: str) -> None:
    for at in (300, -1, 2**31 - 1, -(2**31)):
        arguments = block.arguments(torch.tensor([at], dtype=torch.int32, device=GPU), form=form)
        k, v = arguments["k_cache"].clone(), arguments["v_cache"].clone()
        results = clusterfusion.decoder_layer(**arguments)
        torch.cuda.synchronize()
        assert all(result.isnan().all() for result in results)
        assert torch.equal(arguments["k_cache"], k) and torch.equal(arguments["v_cache"], v)
        with pytest.raises(DeviceError, match=f"position {at} of a cache of 300"):
            block.ours(3)
        assert torch.isfinite(block.ours(3)[0]).all(), "said once"


def test_tensors_that_cannot_be_read_where_they_lie(block: Block) -> None:
    with pytest.raises(ArgumentError, match="x is on cpu"):
        block.ours(3, x=block.x.cpu())
    with pytest.raises(ArgumentError, match="position is on cpu"):
        block.ours(torch.tensor([3], dtype=torch.int32))
    padded = torch.empty(1 + block.weights.o_weight.numel(), dtype=torch.float16, device=GPU)
    shifted = padded[1:].view_as(block.weights.o_weight).copy_(block.weights.o_weight)
    with pytest.raises(UnsupportedModelError, match="o_weight of shape .* multiple of 16"):
        block.ours(3, layer_weights=dataclasses.replace(block.weights, o_weight=shifted))
    odd, too = (torch.zeros(12, 300, 65, dtype=torch.float16, device=GPU)[:, :, :64] for _ in range(2))
    with pytest.raises(UnsupportedModelError, match="cannot be streamed"):
        block.ours(3, k_cache=odd, v_cache=too)


def test_calls_on_two_streams_do_not_disturb_each_other(block: Block) -> None:
    expected = [block.ours(at) for at in (100, 200)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(200):
        for i, at in enumerate((100, 200)):
            with torch.cuda.stream(streams[i]):
                results[i].append(block.ours(at))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(equal(result, expected[i]) for result in results[i])


@pytest.mark.parametrize(("counter", "dependency"), [(0, "attention"), (6, "hidden vector")])
def test_a_dependency_that_is_never_met_is_an_error_and_no_hang(block: Block, counter: int, dependency: str) -> None:
    """A counter that starts too low can never reach its target: the wait ends after some seconds and says so."""
    config = layer_config(block.weights, 300, block.config.rotary.dim, 1e-5, "gelu", True)
    plan, error = plan_for(config, 0), ErrorRecord()
    scratch = LayerScratch(plan, torch.float16, GPU)
    scratch.tensors["counters"][32 * counter] = -1000
    k, v = block.k.clone(), block.v.clone()
    position = torch.tensor([20], dtype=torch.int32, device=GPU)
    tables = RotaryTables(block.cos, block.sin, block.cos.stride(0))
    buffers = LayerBuffers(block.x, torch.empty_like(block.x), k, v, position, tables)
    arguments = layer_arguments(plan, block.weights, buffers, scratch, error)
    (launch,) = prepare_layer(plan, torch.float16, torch.float16, ("whole",), arguments, 0)
    error.check("")
    launch()
    torch.cuda.synchronize()
    with pytest.raises(DeviceError, match=f"gave up waiting for .*{dependency}"):
        error.check("")
    assert torch.isfinite(block.ours(20)[0]).all(), "the device is well"
