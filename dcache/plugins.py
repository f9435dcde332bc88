"""What is installed: built-ins and plugins, found once, looked up by name with a did-you-mean."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pluggy
from pydantic import BaseModel, ValidationError

from dcache import hookspecs
from dcache.calls import NAME, Call, parse_call
from dcache.errors import DCacheError, PluginError, UsageError
from dcache.hookspecs import Register, hookimpl

if TYPE_CHECKING:
    import torch

    from dcache.models.family import Family
    from dcache.models.loading import Model, Source
    from dcache.policy import CachePolicy
    from dcache.tasks.base import Task
    from dcache.unmasking.base import Sampling, Unmasker

T = TypeVar("T")
BUILT_IN = "dcache"


class BuiltIns:
    """The built-in policies, unmaskers, families and tasks: one line each."""

    @hookimpl
    def register_policies(self, register: Register) -> None:
        """Cache policies."""
        from dcache.policies.d2 import D2Cache
        from dcache.policies.dkv import DKVCache
        from dcache.policies.dllm_cache import DLLMCache
        from dcache.policies.elastic import ElasticCache
        from dcache.policies.es_dllm import ESDLLM
        from dcache.policies.fast_dllm import FastDLLM
        from dcache.policies.freecache import FreeCache
        from dcache.policies.none import NoCache
        from dcache.policies.spa import SPACache
        from dcache.policies.sparse_dllm import SparseDLLM
        from dcache.policies.suffix import Suffix
        from dcache.policies.vlcache import VLCache

        register("none", NoCache)
        register("elastic", ElasticCache)
        register("dkv", DKVCache)
        register("fast-dllm", FastDLLM)
        register("d2", D2Cache)
        register("dllm-cache", DLLMCache)
        register("freecache", FreeCache)
        register("suffix", Suffix)
        register("es-dllm", ESDLLM)
        register("sparse-dllm", SparseDLLM)
        register("spa", SPACache)
        register("vlcache", VLCache)

    @hookimpl
    def register_unmaskers(self, register: Register) -> None:
        """Unmaskers."""
        from dcache.unmasking.confidence import CertaintyPrior, Entropy, LowConfidence, Margin, Random, Threshold
        from dcache.unmasking.klass import KLASS
        from dcache.unmasking.order import LeftToRight, RandomOrder
        from dcache.unmasking.origin import Origin
        from dcache.unmasking.parallel import EntropyBounded, Factor
        from dcache.unmasking.pc import PCSampler
        from dcache.unmasking.wino import WINO

        register("low-confidence", LowConfidence)
        register("margin", Margin)
        register("entropy", Entropy)
        register("random", Random)
        register("threshold", Threshold)
        register("factor", Factor)
        register("eb", EntropyBounded)
        register("certainty-prior", CertaintyPrior)
        register("klass", KLASS)
        register("pc", PCSampler)
        register("wino", WINO)
        register("origin", Origin)
        register("random-order", RandomOrder)
        register("ar", LeftToRight)

    @hookimpl
    def register_models(self, register: Register) -> None:
        """Model families."""
        from dcache.models.dream import Dream
        from dcache.models.llada import LLaDA
        from dcache.models.llada_v import LLaDAV

        register("llada", LLaDA)
        register("dream", Dream)
        register("llada-v", LLaDAV)

    @hookimpl
    def register_tasks(self, register: Register) -> None:
        """Tasks."""
        from dcache.tasks.gsm_mini import GsmMini
        from dcache.tasks.scenes import Scenes

        register("gsm-mini", GsmMini)
        register("scenes", Scenes)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """Something registered.

    Attributes:
        name: what users write.
        thing: the class.
        source: the distribution it comes from, with its version: "my-package 0.1".
    """

    name: str
    thing: type[T]
    source: str

    def __str__(self) -> str:
        return repr(self.name) if self.source == BUILT_IN else f"{self.name!r} ({self.source})"


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: for messages: "policy".
        plural: "policies".
        contract: every registered class is a subclass of it.
    """

    def __init__(self, kind: str, plural: str, contract: type[Any]):
        self.kind, self.plural, self.contract = kind, plural, contract
        self.entries: dict[str, Entry[T]] = {}

    def add(self, name: str, thing: type[Any], source: str) -> None:
        """Register; refuses a second thing of the same name, and what is not a concrete subclass of the contract."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(f"{source}: {self.kind} name {name!r} is not lower-case words joined by hyphens")
        if not (isinstance(thing, type) and issubclass(thing, self.contract)):
            raise PluginError(
                f"{source}: {self.kind} {name!r} is {thing!r}, expected a subclass of {self.contract.__name__}"
            )
        if inspect.isabstract(thing):
            missing = ", ".join(sorted(thing.__abstractmethods__))
            raise PluginError(f"{source}: {self.kind} {name!r} ({thing.__name__}) does not define {missing}")
        if name in self.entries:
            raise PluginError(
                f"{self.kind} {name!r} is registered by {self.entries[name].source} and by {source}; "
                "names are never overwritten: rename one, or uninstall it"
            )
        self.entries[name] = entry = Entry(name, thing, source)
        for attribute, value in (("name", name), ("label", str(entry))):
            setattr(thing, attribute, value)

    def get(self, name: str) -> Entry[T]:
        """Look up; raises UsageError with the nearest name and the list of installed ones."""
        if name in self.entries:
            return self.entries[name]
        near = difflib.get_close_matches(name, self.entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown {self.kind} {name!r}.{hint}  Installed: {', '.join(self.names())}")

    def names(self) -> list[str]:
        """Installed names in order; those of plugins with their distribution."""
        return [n if e.source == BUILT_IN else f"{n} ({e.source})" for n, e in sorted(self.entries.items())]


class Plugins:
    """All registries, filled from the built-ins and the installed plugins."""

    def __init__(self, extra: Iterable[object] = (), entry_points: bool = True):
        from dcache.models.family import Family
        from dcache.policy import CachePolicy
        from dcache.tasks.base import Task
        from dcache.unmasking.base import Unmasker

        self.policies: Registry[CachePolicy] = Registry("policy", "policies", CachePolicy)
        self.unmaskers: Registry[Unmasker] = Registry("unmasker", "unmaskers", Unmasker)
        self.models: Registry[Family] = Registry("model family", "model families", Family)
        self.tasks: Registry[Task] = Registry("task", "tasks", Task)
        self.manager = pluggy.PluginManager("dcache")
        self.manager.add_hookspecs(hookspecs)
        self.manager.register(BuiltIns(), name=BUILT_IN)
        try:
            for plugin in extra:
                self.manager.register(plugin)
            if entry_points:
                self.manager.load_setuptools_entrypoints("dcache")
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(" ".join(str(error).split())) from error
        except Exception as error:
            raise PluginError(f"{_culprit()} cannot be imported: {type(error).__name__}: {error}") from error
        sources = {
            id(plugin): f"{dist.project_name} {dist.version}" for plugin, dist in self.manager.list_plugin_distinfo()
        }
        registries: dict[str, Registry[Any]] = {
            "register_policies": self.policies,
            "register_unmaskers": self.unmaskers,
            "register_models": self.models,
            "register_tasks": self.tasks,
        }
        for hook, registry in registries.items():
            for impl in getattr(self.manager.hook, hook).get_hookimpls():
                source = sources.get(id(impl.plugin), impl.plugin_name)
                try:
                    impl.function(_registrar(registry, source))
                except DCacheError:
                    raise
                except Exception as error:
                    raise PluginError(f"{source}: {hook} failed: {type(error).__name__}: {error}") from error


def _culprit() -> str:
    """The first plugin that cannot be imported."""
    for point in metadata.entry_points(group="dcache"):
        try:
            point.load()
        except Exception:
            source = "" if point.dist is None else f" ({point.dist.name} {point.dist.version})"
            return f"plugin {point.name!r}{source}"
    return "a plugin"


def _registrar(registry: Registry[Any], source: str) -> Callable[[str, type[Any]], None]:
    def register(name: str, thing: type[Any]) -> None:
        registry.add(name, thing, source)

    return register


@cache
def plugins() -> Plugins:
    """What is installed; found at the first call."""
    return Plugins()


def configure(kind: str, entry: Entry[Any], knobs: Mapping[str, object]) -> Any:
    """Build the `Config` of a registered class; a bad knob names the field, the value and the bound."""
    config: type[BaseModel] = entry.thing.Config
    try:
        return config.model_validate(dict(knobs))
    except ValidationError as error:
        raise UsageError("; ".join(explain(f"{kind} {entry}", config, e) for e in error.errors())) from None


def explain(owner: str, config: type[BaseModel], error: Any) -> str:
    """One validation error as a sentence that names the field, the value and the bound."""
    knob = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(knob, config.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{owner} has no knob {knob!r}.{hint}  Knobs: {', '.join(config.model_fields) or 'none'}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{owner}: {knob}={error['input']!r}: {message}" if knob else f"{owner}: {message}"


def make_policy(policy: str | Call | CachePolicy) -> CachePolicy:
    """A fresh policy from ``"elastic(gamma=0.95)"``; an instance is returned as it is."""
    if not isinstance(policy, str | Call):
        return policy
    call = parse_call(policy) if isinstance(policy, str) else policy
    entry = plugins().policies.get(call.name)
    return entry.thing(config=configure("policy", entry, call.knobs))


def make_unmasker(unmasker: str | Call | Unmasker, sampling: Sampling | None = None) -> Unmasker:
    """A fresh unmasker from ``"threshold(threshold=0.9)"``; an instance is returned as it is."""
    if not isinstance(unmasker, str | Call):
        return unmasker
    call = parse_call(unmasker) if isinstance(unmasker, str) else unmasker
    entry = plugins().unmaskers.get(call.name)
    return entry.thing(configure("unmasker", entry, call.knobs), sampling)


def load_model(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> Model:
    """Load a model of any installed family; see `dcache.models.loading.load_model` for arguments and errors."""
    from dcache.models import loading

    families = [entry.thing() for entry in plugins().models.entries.values()]
    model = loading.load_model(source, device=device, dtype=dtype, revision=revision, family=family, families=families)
    kind = str(model.dtype).removeprefix("torch.")
    return replace(model, source=loading.Source.of(source, model.device.type, kind, revision, family))


def load(source: Source) -> Model:
    """The model of a source."""
    return load_model(
        source.name, device=source.device, dtype=source.dtype, revision=source.revision, family=source.family
    )
