"""What may stand in model_args, and how a task's own generation arguments come in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache import UsageError
from dcache.config import DecodeSettings
from dcache.evaluation.arguments import Arguments, Request, arguments_in


def read(**given):
    return Arguments.read({"model": "tiny-llada", **given})


def refused(**given):
    with pytest.raises(UsageError) as caught:
        read(**given)
    return str(caught.value)


def test_commas_inside_parentheses_do_not_separate():
    text = (
        "model=tiny-llada, policy=elastic(gamma=0.95,window=8),unmask=threshold(threshold=0.8,window=4),gen_length=64"
    )
    found = Arguments.read(arguments_in(text))
    assert found.model == "tiny-llada"
    assert str(found.policy) == "elastic(gamma=0.95,window=8)"
    assert found.decoding == {"gen_length": 64, "unmask": "threshold(threshold=0.8,window=4)"}


def test_semicolons_separate_knobs_too():
    assert str(read(policy="suffix(inner=elastic(gamma=0.9;window=8))").policy) == (
        "suffix(inner=elastic(gamma=0.9,window=8))"
    )
    assert read(unmask="threshold(threshold=0.8;window=4)").decoding["unmask"] == "threshold(threshold=0.8,window=4)"


def test_what_the_harness_cut_at_a_comma_is_refused_with_the_way_to_write_it():
    said = refused(policy="elastic(gamma=0.95", window="8)")
    assert said.startswith("policy='elastic(gamma=0.95' has lost a parenthesis")
    assert said.endswith("policy=elastic(knob=1;other=2)")


@pytest.mark.parametrize("value", [None, "none"])
def test_no_cache_is_none_however_the_harness_reads_it(value):
    assert str(read(policy=value).policy) == "none"


def test_text_becomes_numbers_and_none():
    found = read(
        gen_length="16", block_length="none", temperature="0.5", forbid_eos="True", top_k=5, mc_num="4"
    ).decoding
    assert found == {"gen_length": 16, "block_length": None, "temperature": 0.5, "forbid_eos": True, "top_k": 5}


def test_every_setting_of_a_run_is_an_argument():
    usual = {name: field.default for name, field in DecodeSettings.model_fields.items()}
    assert read(**usual).decoding == usual


def test_loading_arguments_are_kept_apart():
    found = read(device="cpu", dtype="float32", revision=None)
    assert (found.loading, found.decoding) == ({"device": "cpu", "dtype": "float32"}, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"policy": "elastic", "gamma": 0.9},
            "gamma is a knob of the policy; write it in its parentheses: policy=elastic(",
        ),
        ({"gen_lenght": 8}, "there is no model argument 'gen_lenght'. Did you mean 'gen_length'?"),
        ({"policy": "elatsic"}, "unknown policy 'elatsic'. Did you mean 'elastic'?"),
        ({"gen_length": 0}, "the run: gen_length=0: input should be greater than or equal to 1"),
        ({"mc_num": 0}, "the evaluation: mc_num=0: input should be greater than or equal to 1"),
        ({"pretrained": "other"}, "model and pretrained are two names of the same argument"),
    ],
)
def test_a_bad_argument_is_named(given, said):
    assert refused(**given).startswith(said)


def test_an_argument_without_a_value_is_refused():
    with pytest.raises(UsageError, match=r"'elastic' in the model arguments .* is not name=value"):
        arguments_in("model=tiny-llada,elastic")


# Requests


def test_a_task_says_how_long_an_answer_may_be_and_what_ends_it():
    found = Request.read({"until": ["\n\n", "Q:"], "max_gen_toks": 64, "do_sample": False}, {})
    assert (found.settings.gen_length, found.settings.block_length, found.most) == (64, 32, 64)
    assert found.cut("4 + 5 = 9 Q: what\n\nis") == "4 + 5 = 9 "
    assert found.cut("nine") == "nine"
    assert Request.read({"until": "Q:"}, {}).cut("a Q: b") == "a "
    assert Request.read({"until": None}, {}).cut("a Q: b") == "a Q: b"
    assert Request.read({"until": [""]}, {}).cut("a") == "a"


@given(most=st.integers(1, 500), block=st.one_of(st.none(), st.integers(1, 80)))
def test_a_canvas_is_whole_blocks_and_not_one_more_than_needed(most, block):
    found = Request.read({"max_gen_toks": most}, {"block_length": block}).settings
    size = block or found.gen_length
    assert found.gen_length % size == 0
    assert found.gen_length - size < most <= found.gen_length


def test_an_answer_below_a_block_is_one_block():
    found = Request.read({"max_new_tokens": 5}, {})
    assert (found.settings.gen_length, found.settings.block_length, found.most) == (5, 5, 5)


def test_the_model_arguments_win_over_the_task():
    found = Request.read(
        {"max_gen_toks": 8, "temperature": 0.7, "do_sample": True}, {"gen_length": 64, "temperature": 0.1}
    )
    assert (found.settings.gen_length, found.settings.temperature, found.most) == (64, 0.1, None)


@pytest.mark.parametrize(
    ("asked", "temperature", "top_p"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, 0.7, 0.9),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, 0.7, 0.9),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": False}, 0.0, None),
        ({"temperature": 0.0, "top_p": 0.9}, 0.0, None),
        ({"do_sample": True, "top_p": 0.9}, 0.0, None),
    ],
)
def test_a_task_samples_only_if_it_says_so(asked, temperature, top_p):
    found = Request.read(asked, {}).settings
    assert (found.temperature, found.top_p) == (temperature, top_p)


def test_generation_arguments_that_mean_nothing_are_listed():
    found = Request.read({"num_beams": 4, "block_length": 16, "until": []}, {})
    assert (found.ignored, found.settings.block_length, found.settings.gen_length) == (("num_beams",), 16, 256)
