"""The exceptions this package raises on purpose.

Every message holds what was seen, what is needed, and the way out. Anything else that escapes is a bug.
"""


class ClusterFusionError(Exception):
    """Base of every error raised on purpose by this package."""


class ArgumentError(ClusterFusionError, ValueError):
    """A caller's argument is unusable; the message names it, what came and what is needed."""


class UnsupportedModelError(ClusterFusionError):
    """A model asks for something that is not implemented; the message names the field and its value."""


class CheckpointError(ClusterFusionError):
    """A checkpoint is unreadable; the message names the file and the tensor."""


class ContextLengthError(ClusterFusionError):
    """A session has no room for the tokens asked of it. The session is unchanged."""


class DeviceError(ClusterFusionError):
    """The machine lacks what was asked for: a GPU, a compute capability, memory, a driver."""


class CompileError(ClusterFusionError):
    """A CUDA source does not compile; the message holds the compiler's log and the source line."""
