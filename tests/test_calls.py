"""The little language of policies: what is written can be read again, and nothing but UsageError comes out of junk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache import UsageError
from dcache.calls import (
    CONSTANTS,
    KNOB,
    NAME,
    WORD,
    Call,
    parse_call,
    parse_value,
    policy_calls,
    split_list,
    write_value,
)

words = st.from_regex(WORD, fullmatch=True).filter(lambda w: w.lower() not in {*CONSTANTS, "nan", "inf", "infinity"})
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
calls = st.builds(
    Call,
    st.from_regex(NAME, fullmatch=True),
    st.dictionaries(st.from_regex(KNOB, fullmatch=True), values, max_size=4),
)
junk = st.text("ab1.,=()+-_ \nnaif\u0663\u00b2é", max_size=20) | st.text(max_size=20)


def refusal(parse, *arguments, **keywords):
    """The message of a refusal; None where there is none. Any other exception comes through."""
    try:
        parse(*arguments, **keywords)
    except UsageError as error:
        return str(error)
    return None


@given(calls)
def test_what_a_call_writes_parses_to_an_equal_call(call):
    again = parse_call(str(call))
    assert again == call
    assert [type(v) for v in again.knobs.values()] == [type(v) for v in call.knobs.values()]


@given(st.lists(calls, min_size=1, max_size=4))
def test_a_list_of_calls_splits_at_the_commas_between_them(many):
    assert policy_calls(",".join(map(str, many))) == many


@given(junk)
def test_junk_is_parsed_or_refused_with_a_usage_error(text):
    for parse in (parse_call, parse_value, split_list, policy_calls):
        assert refusal(parse, text) != ""


@given(junk, junk)
def test_junk_in_set_and_sweep_is_refused_with_a_usage_error(text, value):
    for flags in ({"sets": [text]}, {"sweeps": [text]}, {"sets": [f"a.b={value}"]}, {"sweeps": [f"a.b={value}"]}):
        said = refusal(policy_calls, "a", **flags)
        assert said is None or said.startswith("--s")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("elastic(gamma=0.9", "the '(' is not closed"),
        ("elastic(gamma=0.9)x", "the '(' is not closed"),
        ("elastic)", "a ')' without '('"),
        ("elastic(gamma=0.9,gamma=0.8)", "gamma is given twice"),
        ("elastic(gamma)", "'gamma' is not knob=value"),
        ("elastic(gamma=)", "'' is not a value"),
        ("elastic(gamma=0.9,)", "'' is not knob=value"),
        ("elastic(gamma=nan)", "'nan' is not a value"),
        ("elastic(gamma=-inf)", "'-inf' is not a value"),
        ("elastic(gamma=1e999)", "'1e999' is not a value"),
        (f"elastic(gamma={'9' * 5000})", "is not a value"),
        ("Elastic", "'Elastic' is not a name, which is lower-case words"),
        ("elastic,dkv", "'elastic,dkv' is not a name"),
        ("", "does not begin with a name"),
        ("(gamma=1)", "does not begin with a name"),
    ],
)
def test_a_malformed_call_is_refused_saying_what_is_wrong(text, said):
    with pytest.raises(UsageError, match=r".") as caught:
        parse_call(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("a(b=1,c", "is not closed"), ("a,b)", "without '('")])
def test_a_list_with_unmatched_parentheses_is_refused(text, said):
    with pytest.raises(UsageError) as caught:
        split_list(text)
    assert said in str(caught.value)


def test_spaces_around_names_knobs_and_values_do_not_matter():
    assert parse_call("  elastic ( gamma = 0.9 , window = none ) ") == Call("elastic", {"gamma": 0.9, "window": None})
    assert parse_call("elastic()") == Call("elastic")


@pytest.mark.parametrize("value", [None, True, 3, -0.5, 1e22, "published"])
def test_a_value_is_read_back_with_its_type(value):
    again = parse_value(write_value(value))
    assert again == value
    assert type(again) is type(value)


def test_set_changes_every_listed_policy_of_its_name_and_no_other():
    found = policy_calls("a(x=1),b,a(x=2)", sets=["a.y=3"])
    assert list(map(str, found)) == ["a(x=1,y=3)", "b", "a(x=2,y=3)"]


def test_sweep_replaces_a_listed_policy_by_one_per_value_in_its_place():
    assert list(map(str, policy_calls("a,b", sweeps=["a.x=1,2"]))) == ["a(x=1)", "a(x=2)", "b"]


def test_sweep_adds_a_policy_that_is_not_listed():
    assert list(map(str, policy_calls("b", sweeps=["a.x=1,2"]))) == ["b", "a(x=1)", "a(x=2)"]


def test_two_sweeps_of_one_policy_give_all_combinations_on_top_of_set():
    found = policy_calls("a", sets=["a.z=0"], sweeps=["a.x=1,2", "a.y=true,none"])
    assert list(map(str, found)) == [
        f"a(z=0,x={x},y={y})" for x, y in [(1, "true"), (1, "none"), (2, "true"), (2, "none")]
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sets": ["c.x=1"]}, "--set c.x=1: 'c' is not one of --policies a(x=1),b; add it there"),
        ({"sets": ["a.x=2"]}, "--set a.x=2: a(x=1) has its x already; give it once"),
        ({"sets": ["b.x"]}, "--set b.x: write --set policy.knob=value, e.g. --set elastic.gamma=0.95"),
        ({"sets": ["x=1"]}, "--set x=1: write --set policy.knob=value"),
        ({"sets": ["b.x=nan"]}, "--set b.x=nan: 'nan' is not a value"),
        ({"sweeps": ["b.x=1,,2"]}, "--sweep b.x=1,,2: '' is not a value"),
        ({"sweeps": ["b.x="]}, "--sweep b.x=: write --sweep policy.knob=v1,v2,..."),
        ({"sweeps": ["a.x=2"]}, "--sweep a.x=2: a(x=1) has its x already"),
    ],
)
def test_a_bad_set_or_sweep_is_refused_quoting_it(flags, said):
    with pytest.raises(UsageError) as caught:
        policy_calls("a(x=1),b", **flags)
    assert str(caught.value).startswith(said)


def test_a_value_may_be_a_call():
    call = parse_call("suffix(window=8, inner=elastic(gamma=0.9, window=4))")
    assert call.knobs == {"window": 8, "inner": "elastic(gamma=0.9,window=4)"}
    assert parse_call(str(call)) == call
    assert [str(c) for c in policy_calls("suffix", sweeps=["suffix.inner=elastic(gamma=0.9,window=4),dkv"])] == [
        "suffix(inner=elastic(gamma=0.9,window=4))",
        "suffix(inner=dkv)",
    ]


def test_calls_within_each_other_end_somewhere():
    with pytest.raises(UsageError, match="more than 16 calls"):
        parse_call("a(b=" * 2000 + "1" + ")" * 2000)
