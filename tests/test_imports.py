"""The structure of the package, read from its source: which way imports point, and who may name whom."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dcache
from dcache.plugins import BUILT_IN, Registry, plugins

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"dcache": "dcache", "policies": "dcache.policies", "models": "dcache.models", "kernels": "dcache.kernels"}


@dataclass(frozen=True)
class Import:
    """One imported thing: ``from a.b import c`` is ``a.b.c``; `typing_only` under ``if TYPE_CHECKING:``."""

    target: str
    line: int
    typing_only: bool


@dataclass(frozen=True)
class Module:
    """A source file, and the name it is imported under."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, typing_only=False))

    def _imports(self, node: ast.AST, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(f"{self._base(node)}.{alias.name}", node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from self._imports(child, typing_only=True)
            for child in node.orelse:
                yield from self._imports(child, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from self._imports(child, typing_only)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))

    def at(self, line: int) -> str:
        return f"{self.path.relative_to(ROOT)}:{line}"


def _modules() -> Iterator[Module]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield Module(".".join([package, *(part for part in parts if part != "__init__")]), path)


MODULES = list(_modules())


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def modules(*packages: str) -> list[Module]:
    found = [module for module in MODULES if within(module.name, *packages)]
    assert found, f"no module is called {' or '.join(packages)}: moved? This rule would pass on nothing"
    return found


def breaches(importers: list[Module], *forbidden: str, typing_too: bool = True) -> list[str]:
    """Imports of something in `forbidden`, as ``file:line imports name``."""
    return [
        f"{module.at(found.line)} imports {found.target}"
        for module in importers
        for found in module.imports
        if within(found.target, *forbidden) and (typing_too or not found.typing_only)
    ]


def words(module: Module) -> Iterator[tuple[str, int]]:
    """Every identifier and every string literal with its line; docstrings are not literals of the code."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    }
    for node in ast.walk(module.tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield text, node.lineno
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias(name=name):
                yield from ((part, node.lineno) for part in [*name.split("."), node.asname or ""])
            case ast.ImportFrom(module=str(name)):
                yield from ((part, node.lineno) for part in name.split("."))


def names_of(registry: Registry) -> set[str]:
    """What the built-in things are called, by users and as classes."""
    built_in = [entry for entry in registry.entries.values() if entry.source == BUILT_IN]
    return {entry.name.lower() for entry in built_in} | {entry.thing.__name__.lower() for entry in built_in}


def mentions(readers: list[Module], names: set[str]) -> list[str]:
    return [
        f"{module.at(line)} says {word!r}"
        for module in readers
        for word, line in words(module)
        if word.lower().replace("_", "-") in names
    ]


def test_kernels_import_only_torch_triton_and_the_standard_library():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert [
        f"{module.at(found.line)} imports {found.target}"
        for module in modules("dcache.kernels")
        for found in module.imports
        if found.target.split(".")[0] not in allowed and not within(found.target, "dcache.kernels")
    ] == []


def test_importing_the_kernels_package_imports_nothing():
    (package,) = (module for module in MODULES if module.name == "dcache.kernels")
    assert package.imports == []


def test_only_jitted_functions_of_the_kernels_lack_annotations():
    """What mypy does not ask for in these modules, because it would ask it of jitted functions too."""
    lax = []
    for module in modules("dcache.kernels"):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef) and "triton.jit" not in map(ast.unparse, node.decorator_list):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given += [x for x in (node.args.vararg, node.args.kwarg) if x is not None]
                bare = [x.arg for x in given if x.annotation is None and x.arg != "self"]
                lax += [f"{module.at(node.lineno)} {node.name}: {x}" for x in bare]
                lax += [f"{module.at(node.lineno)} {node.name}: result"] if node.returns is None else []
    assert lax == []


def test_policies_know_of_the_models_only_their_spec():
    found = breaches(modules("dcache.policies"), "dcache.models")
    assert [breach for breach in found if not breach.endswith(" dcache.models.transformer.ModelSpec")] == []


def test_policies_use_the_engine_only_in_annotations():
    assert breaches(modules("dcache.policies"), "dcache.engine", typing_too=False) == []


def test_policies_import_nothing_that_runs_them():
    above = ("dcache.decode", "dcache.generate", "dcache.compare", "dcache.cli", "dcache.plugins")
    assert breaches(modules("dcache.policies"), *above) == []


def test_models_import_nothing_that_decodes():
    above = ("dcache.policies", "dcache.engine", "dcache.decode", "dcache.generate", "dcache.compare", "dcache.cli")
    assert breaches(modules("dcache.models"), *above) == []


def test_the_engine_imports_no_policy_and_nothing_that_calls_it():
    above = ("dcache.policies", "dcache.plugins", "dcache.decode", "dcache.generate", "dcache.compare", "dcache.cli")
    assert breaches(modules("dcache.engine"), *above) == []


def test_the_loop_imports_no_policy_and_nothing_that_calls_it():
    above = ("dcache.policies", "dcache.plugins", "dcache.generate", "dcache.compare", "dcache.cli")
    assert breaches(modules("dcache.decode", "dcache.trace"), *above) == []


def test_the_contracts_use_the_engine_only_in_annotations():
    contracts = modules("dcache.policy", "dcache.state", "dcache.unmasking")
    assert breaches(contracts, "dcache.engine", typing_too=False) == []
    assert breaches(contracts, "dcache.policies", "dcache.decode", "dcache.generate", "dcache.compare") == []


def test_only_the_command_line_imports_the_command_line():
    others = [module for module in MODULES if not within(module.name, "dcache.cli", "dcache.__main__")]
    assert breaches(others, "dcache.cli") == []


def test_loop_engine_and_models_name_no_policy():
    names = names_of(plugins().policies) - {"none"}  # an English word: messages and knobs use it too
    assert {"elastic", "elasticcache", "dkv"} <= names
    shared = ("dcache.decode", "dcache.engine", "dcache.models", "dcache.state", "dcache.trace", "dcache.kernels")
    assert mentions(modules(*shared), names) == []


def test_policies_name_no_model_family():
    names = names_of(plugins().models)
    assert "llada" in names
    assert mentions(modules("dcache.policies"), names | {"dream", "llada-v"}) == []


def test_nothing_in_the_package_executes_what_it_reads():
    unsafe = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    found = [
        f"{module.at(imported.line)} imports {imported.target}"
        for module in MODULES
        for imported in module.imports
        if imported.target.split(".")[0] in unsafe
    ]
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if (
                    called in ("eval", "exec", "compile", "builtins.eval", "builtins.exec")
                    or (called == "torch.load" and options.get("weights_only") != "True")
                    or called.endswith(".read_pickle")
                    or options.get("allow_pickle", "False") != "False"
                ):
                    found.append(f"{module.at(node.lineno)} calls {called}")
        found += [f"{module.at(line)} says {word}" for word, line in words(module) if word == "trust_remote_code"]
    assert found == []


def test_importing_dcache_leaves_heavy_packages_alone():
    heavy = ["transformers", "PIL", "pandas", "matplotlib"]
    code = f"import sys, dcache; print([name for name in {heavy} if name in sys.modules])"
    home = Path(dcache.__file__).parents[1]  # site-packages, or the checkout when dcache is not installed
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(home)}, capture_output=True, text=True
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_the_loop_fits_on_one_screen():
    (loop,) = modules("dcache.decode")
    (decode,) = (node for node in loop.tree.body if isinstance(node, ast.FunctionDef) and node.name == "decode")
    assert decode.end_lineno - decode.lineno < 40


def test_a_policy_can_be_read_beside_its_paper():
    lengths = {module.path.name: len(module.path.read_text().splitlines()) for module in modules("dcache.policies")}
    assert {name: n for name, n in lengths.items() if n >= 200} == {}
    assert {"elastic.py", "dkv.py"} <= lengths.keys()
