"""Operations on tensors: checked, then run as plain PyTorch on the CPU or as kernels on the GPU.

Inference only: no gradient is recorded.
"""

from clusterfusion.ops.layer import decoder_layer
from clusterfusion.ops.norm import layer_norm, rms_norm

__all__ = ["decoder_layer", "layer_norm", "rms_norm"]
