"""The seed's LLaMA names, so far as they are there."""

from __future__ import annotations

import torch
from torch import Tensor

from clusterfusion.arguments import require, require_dense
from clusterfusion.jit.cluster_norm import MAX_HIDDEN
from clusterfusion.ops.layer_checks import require_tensor
from clusterfusion.ops.norm import rms_norm
from clusterfusion.seed_api.checks import device_of


def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019; transformers' LlamaRMSNorm) of every row: x / sqrt(mean(x^2) + eps) * weight.

    input: float16 [batch, hidden], hidden up to 16,384; weight: float16 [hidden]. Returns a new tensor like input. The
    arithmetic is float32 and rounds once, at the end. Raises ArgumentError naming the argument; DeviceError and CompileError
    as `clusterfusion.rms_norm`, which it is.
    """
    device = device_of("input", input)
    shape = list(input.shape)
    needed = f"[batch, hidden], hidden from 1 to {MAX_HIDDEN}"
    require("input", f"of shape {shape}", len(shape) == 2 and 1 <= shape[1] <= MAX_HIDDEN, needed)
    require("input", input.dtype, input.dtype == torch.float16, "torch.float16")
    require_dense("weight", weight, f"a tensor [{shape[1]}]")
    require_tensor("weight", weight, (shape[1],), torch.float16, device)
    return rms_norm(input, weight, eps)
