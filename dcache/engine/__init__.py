"""The engine: static buffers, one pass per plan, one sync per pass. It knows no policy and no model family by name."""

from dcache.engine.engine import Engine
from dcache.engine.layer import Layer
from dcache.engine.network import Network, Weights

__all__ = ["Engine", "Layer", "Network", "Weights"]
