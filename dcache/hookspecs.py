"""Everything a plugin can add, in full. A plugin is a module or package named under the entry-point group ``dcache``.

Hooks run once, at start-up: each hands the plugin a `register` callable, and what was registered is called directly
from then on. Built-ins come in by the same door (`dcache.plugins`).
"""

from typing import Any, Protocol

import pluggy

hookspec = pluggy.HookspecMarker("dcache")
hookimpl = pluggy.HookimplMarker("dcache")


class Register(Protocol):
    """What a hook is given: call it once per thing."""

    def __call__(self, name: str, thing: type[Any]) -> None:
        """Make `thing`, a class, available under `name` (lower-case words joined by hyphens)."""


@hookspec
def register_policies(register: Register) -> None:
    """Register cache policies: subclasses of `dcache.CachePolicy`."""


@hookspec
def register_unmaskers(register: Register) -> None:
    """Register unmaskers: subclasses of `dcache.Unmasker`."""


@hookspec
def register_models(register: Register) -> None:
    """Register model families: subclasses of `dcache.Family`."""


@hookspec
def register_tasks(register: Register) -> None:
    """Register tasks with checkable answers: subclasses of `dcache.Task`."""
