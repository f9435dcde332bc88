"""Every kernel test runs on a CPU under the interpreter, or on a GPU: a `device` argument says which."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

HAVE_GPU = torch.cuda.is_available()


def pytest_itemcollected(item: pytest.Item) -> None:
    """What runs on "cuda" is a GPU test and needs one; what runs on "cpu" needs the interpreter, which is off there."""
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    if device == "cuda":
        item.add_marker(pytest.mark.gpu)
    if item.get_closest_marker("gpu") is not None and not HAVE_GPU:
        item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
    if device == "cpu" and HAVE_GPU:
        item.add_marker(pytest.mark.skip(reason="a CUDA device takes the place of the interpreter"))


@pytest.fixture(params=["cpu", "cuda"], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the test runs."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def patched_once() -> Iterator[None]:
    """In every call of a kernel function by another the interpreter looks through all of `triton.language` to patch it.

    That is a third of its time, and finds nothing where the launch, or an earlier call, has patched both modules.
    """

    def call(function: InterpretedFunction, *given: Any, **how: Any) -> Any:
        if is_builtin(tl.load) or is_builtin(tl.core.load):
            return patching(function, *given, **how)
        return function.rewrite()(*given, **how)

    patching, is_builtin = InterpretedFunction.__call__, tl.core.is_builtin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def unwritten_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, True, or negative, so that an element that nobody wrote shows."""
    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fresh(*given: Any, **how: Any) -> Tensor:
        x = make(*given, **how)
        return x.fill_(torch.nan if x.is_floating_point() else -99)

    return fresh
