"""The cache policy `periodic` for dcache."""

from dcache import Register, hookimpl

from .policy import Periodic


@hookimpl
def register_policies(register: Register) -> None:
    """Called by dcache at its start; `register` may be called for more than one policy."""
    register("periodic", Periodic)
