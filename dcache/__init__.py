"""Cache policies for diffusion language models, compared under one decoding loop and one engine."""

# ruff: noqa: E402 - the path below must be set before the first import of a subpackage

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "policies").is_dir():  # a source checkout: the subpackages lie beside this folder
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

from dcache import completion

completion.answer()  # a shell that completes a command has its names, if they are kept, before the rest is imported

# isort: split
from dcache.compare import Comparison, compare
from dcache.compare_config import CompareConfig
from dcache.errors import (
    DCacheError,
    MemoryLimitError,
    ModelError,
    NumericsError,
    PluginError,
    PolicyError,
    UnmaskerError,
    UsageError,
    WorkerError,
)
from dcache.generate import Output, generate
from dcache.hookspecs import Register, hookimpl
from dcache.models.family import Family
from dcache.models.loading import Model
from dcache.plugins import load_model
from dcache.policy import CachePolicy, Filter, FilterConfig, Plan, PolicyConfig
from dcache.reuse import ReuseCache
from dcache.state import Seen, State
from dcache.tasks.base import Problem, Task
from dcache.unmasking.base import Ask, Asked, Picks, Sampling, Unmasker, UnmaskerConfig, Update

__all__ = [
    "Ask",
    "Asked",
    "CachePolicy",
    "CompareConfig",
    "Comparison",
    "DCacheError",
    "Family",
    "Filter",
    "FilterConfig",
    "MemoryLimitError",
    "Model",
    "ModelError",
    "NumericsError",
    "Output",
    "Picks",
    "Plan",
    "PluginError",
    "PolicyConfig",
    "PolicyError",
    "Problem",
    "Register",
    "ReuseCache",
    "Sampling",
    "Seen",
    "State",
    "Task",
    "Unmasker",
    "UnmaskerConfig",
    "UnmaskerError",
    "Update",
    "UsageError",
    "WorkerError",
    "__version__",
    "compare",
    "generate",
    "hookimpl",
    "load_model",
]
