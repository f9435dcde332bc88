import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported

import atexit
import importlib.util
import sys
import tempfile
from pathlib import Path

KEPT = tempfile.TemporaryDirectory(prefix="dcache-tests-")  # what is computed once per model stays out of the user's
atexit.register(KEPT.cleanup)
os.environ["DCACHE_CACHE_DIR"] = KEPT.name

ROOT = Path(__file__).resolve().parents[1]
# The checkout's own `kernels/` must not shadow the optional package of that name that transformers looks for.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
if importlib.util.find_spec("dcache") is None:  # not installed: import from the checkout
    sys.path.insert(0, str(ROOT))
    import dcache  # noqa: F401

    sys.path.remove(str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--golden", metavar="DIR", help="run the golden tests on another folder of the same format")


def pytest_configure(config):
    from hypothesis import settings

    torch.set_num_threads(1)  # the models are tiny, and tests run side by side
    settings.register_profile("dcache", deadline=None, derandomize=True, max_examples=30)
    settings.load_profile("dcache")
