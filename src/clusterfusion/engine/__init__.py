"""Sessions, sampling and text generation over a loaded decoder."""

from clusterfusion.engine.engine import Engine, Generation, TextStream
from clusterfusion.engine.loading import load
from clusterfusion.engine.modes import MODES, ModeChoice
from clusterfusion.engine.sampling import SamplingOptions
from clusterfusion.engine.session import Session

__all__ = ["MODES", "Engine", "Generation", "ModeChoice", "SamplingOptions", "Session", "TextStream", "load"]
