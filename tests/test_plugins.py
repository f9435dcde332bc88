"""Registration by the one door, and the messages that users and plugin authors get from it."""

import textwrap

import pytest
from pydantic import Field

from dcache import CachePolicy, Plan, PluginError, PolicyConfig, UsageError, hookimpl
from dcache.plugins import Plugins, make_policy, make_unmasker, plugins
from dcache.policies.elastic import ElasticCache


class Periodic(CachePolicy):
    class Config(PolicyConfig):
        period: int = Field(8, ge=1, description="denoising steps between two full refreshes")

    config: Config

    def plan(self, state):
        return Plan.all(state)


class Hooks:
    """A plugin that registers policies."""

    def __init__(self, **policies):
        self.policies = policies

    @hookimpl
    def register_policies(self, register):
        for name, policy in self.policies.items():
            register(name.replace("_", "-"), policy)


def refusal(*extra):
    with pytest.raises(PluginError) as caught:
        Plugins(extra=extra, entry_points=False)
    return str(caught.value)


def test_an_unknown_policy_gets_a_did_you_mean_and_the_installed_names():
    with pytest.raises(UsageError) as caught:
        make_policy("elatsic")
    assert str(caught.value) == (
        f"unknown policy 'elatsic'. Did you mean 'elastic'?  Installed: {', '.join(plugins().policies.names())}"
    )


def test_a_name_like_no_other_gets_the_installed_names_alone():
    with pytest.raises(UsageError, match=r"^unknown unmasker 'xyzzy'\.  Installed: .*threshold"):
        make_unmasker("xyzzy")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dkv(interval=0)", "policy 'dkv': interval=0: input should be greater than or equal to 1"),
        ("dkv(interval=soon)", "policy 'dkv': interval='soon': input should be a valid integer"),
        (
            "dkv(intervall=3)",
            "policy 'dkv' has no knob 'intervall'. Did you mean 'interval'?  Knobs: variant, interval, neighbours, "
            "cacheable",
        ),
        ("none(gamma=1)", "policy 'none' has no knob 'gamma'.  Knobs: none"),
        ("elastic(variant=flatt)", "policy 'elastic': variant='flatt': input should be 'published', 'paper' or 'flat'"),
    ],
)
def test_a_bad_knob_names_the_policy_the_field_the_value_and_the_bound(text, said):
    with pytest.raises(UsageError) as caught:
        make_policy(text)
    assert str(caught.value).startswith(said)


def test_two_bad_knobs_are_both_named():
    with pytest.raises(UsageError, match=r"track_num=-1.*; .*window=0"):
        make_policy("elastic(track_num=-1,window=0)")


def test_a_second_policy_of_a_name_is_refused_naming_both_sources():
    assert refusal(Hooks(periodic=Periodic), Hooks(periodic=Periodic)).startswith("policy 'periodic' is registered by ")
    said = refusal(Hooks(elastic=Periodic))
    assert said.startswith("policy 'elastic' is registered by ")
    assert " dcache" in said
    assert "rename one, or uninstall it" in said


def test_an_abstract_policy_is_refused_naming_the_method_it_lacks():
    class Unfinished(CachePolicy):
        pass

    assert refusal(Hooks(unfinished=Unfinished)).endswith("policy 'unfinished' (Unfinished) does not define plan")


@pytest.mark.parametrize("thing", [dict, Periodic(), None])
def test_what_is_no_policy_class_is_refused(thing):
    assert "expected a subclass of CachePolicy" in refusal(Hooks(thing=thing))


def test_a_name_that_cannot_be_written_is_refused():
    assert "is not lower-case words joined by hyphens" in refusal(Hooks(Periodic=Periodic))


def test_a_hook_of_another_name_is_refused():
    class Misspelt:
        @hookimpl
        def register_polices(self, register):
            pass

    assert "register_polices" in refusal(Misspelt())


def test_a_hook_with_another_argument_is_refused():
    class Wrong:
        @hookimpl
        def register_policies(self, registry):
            pass

    assert "registry" in refusal(Wrong())


def test_a_hook_that_raises_is_refused_naming_the_error():
    class Broken:
        @hookimpl
        def register_policies(self, register):
            raise KeyError("lost")

    assert refusal(Broken()).endswith("register_policies failed: KeyError: 'lost'")


def test_built_ins_show_no_distribution_and_carry_their_name():
    assert "elastic" in plugins().policies.names()
    assert ElasticCache.name == "elastic"


def install(folder, monkeypatch, code):
    """A package on the path with an entry point, as an installer leaves it."""
    (folder / "rhythm.py").write_text(textwrap.dedent(code))
    info = folder / "my_package-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[dcache]\nrhythm = rhythm\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "rhythm", raising=False)


def test_an_installed_plugin_shows_its_distribution(tmp_path, monkeypatch):
    code = """
        from dcache import CachePolicy, Plan, hookimpl

        class Rhythm(CachePolicy):
            def plan(self, state):
                return Plan.all(state)

        @hookimpl
        def register_policies(register):
            register("rhythm", Rhythm)
    """
    install(tmp_path, monkeypatch, code)
    policies = Plugins().policies
    assert policies.get("rhythm").source == "my-package 0.1"
    assert "rhythm (my-package 0.1)" in policies.names()
    with pytest.raises(UsageError, match=r"Did you mean 'rhythm'\?  Installed: .*rhythm \(my-package 0\.1\)"):
        policies.get("rythm")


def test_an_installed_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "import a_module_that_nobody_has")
    with pytest.raises(PluginError) as caught:
        Plugins()
    assert str(caught.value) == (
        "plugin 'rhythm' (my-package 0.1) cannot be imported: "
        "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    )
