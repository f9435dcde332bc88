"""dcache as a model of lm-evaluation-harness: what it is asked, what it answers, and what it reports."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

import dcache
from dcache import Model, ModelError, UsageError
from dcache.testing.models import random_model

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from dcache.evaluation.harness import DCacheLM

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "models" / "llada_mha"
TEXTS = ["Ann has 4 apples.", "How many pens does Ben have now?", "Tom", "Eva buys 4 bags of 6 eggs. How many?"]
SMALL = {"gen_length": 8, "block_length": 4}


@pytest.fixture
def log(caplog):
    """What the harness's logger, which keeps its records to itself, is told."""
    logger = logging.getLogger("lm_eval")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def model():
    return dcache.load_model(FOLDER, device="cpu")


def lm_of(model, policy="none", **arguments):
    return DCacheLM(loaded=model, policy=policy, **arguments)


def asked(texts, task="a", **kwargs):
    return [SimpleNamespace(args=(text, kwargs), task_name=task) for text in texts]


def written(model, texts, policy="none", **settings):
    ids = [model.tokenizer.encode(text) for text in texts]
    return dcache.generate(model, ids, policy, **settings)


@pytest.mark.parametrize("policy", ["none", "dkv(interval=3)"])
def test_texts_and_counters_are_those_of_the_library(model, policy):
    lm = lm_of(model, policy, **SMALL)
    outputs = written(model, TEXTS, policy, **SMALL)
    assert lm.generate_until(asked(TEXTS)) == [output.text for output in outputs]
    found = lm.get_model_info()["dcache"]["counters"]
    traces = [output.trace for output in outputs]
    assert found["texts"] == len(TEXTS)
    assert found["tokens"] == sum(len(output.tokens) for output in outputs)
    assert found["nfe"] == pytest.approx(sum(trace.nfe for trace in traces) / len(TEXTS), abs=1e-3)
    assert found["refreshes"] == pytest.approx(sum(trace.refreshes for trace in traces) / len(TEXTS), abs=1e-3)
    share = sum(trace.row_layers for trace in traces) / sum(trace.full_row_layers for trace in traces)
    assert found["row_share"] == pytest.approx(share, abs=1e-6)
    assert found["tok_s"] == pytest.approx(found["tokens"] / found["seconds"], rel=1e-2)


def test_batches_and_other_requests_change_no_text(model):
    """Prompts of a batch are sorted by length; sampled texts depend on their prompt and how often it came before."""
    sampled = {**SMALL, "temperature": 1.0}
    alone = {text: lm_of(model, **sampled).generate_until(asked([text]))[0] for text in TEXTS}
    together = lm_of(model, batch_size=3, **sampled).generate_until(asked(TEXTS[::-1]))
    assert dict(zip(TEXTS[::-1], together, strict=True)) == alone


def test_a_prompt_that_is_repeated_is_sampled_anew(model):
    texts = lm_of(model, temperature=1.0, **SMALL).generate_until(asked([TEXTS[0]] * 3))
    assert len(set(texts)) == 3


def test_an_answer_ends_where_the_task_says(model):
    lm = lm_of(model, "none")
    (whole,) = written(model, TEXTS[:1], gen_length=32)
    stop = whole.text[3:5]
    assert lm.generate_until(asked(TEXTS[:1], until=[stop], max_gen_toks=32)) == [whole.text[: whole.text.index(stop)]]
    (short,) = lm.generate_until(asked(TEXTS[:1], max_gen_toks=33))  # decoded on 64 rows
    tokens = written(model, TEXTS[:1], gen_length=64)[0].tokens
    assert short == model.text(tokens[:33])


def test_tasks_of_other_settings_are_decoded_and_counted_apart(model):
    lm = lm_of(model)
    found = lm.generate_until([*asked(TEXTS[:2], "long", max_gen_toks=16), *asked(TEXTS[2:], "short", max_gen_toks=4)])
    longer, shorter = written(model, TEXTS[:2], gen_length=16), written(model, TEXTS[2:], gen_length=4)
    assert found == [output.text for output in [*longer, *shorter]]
    tasks = lm.get_model_info()["dcache"]["tasks"]
    assert {name: (task["texts"], task["settings"]["gen_length"]) for name, task in tasks.items()} == {
        "long": (2, 16),
        "short": (2, 4),
    }


def test_a_prompt_that_does_not_fit_loses_its_beginning_and_is_counted(model, log):
    room = model.spec.max_positions - SMALL["gen_length"]
    long = "Ann has 4 apples. " * room
    lm = lm_of(model, **SMALL)
    (text,) = lm.generate_until(asked([long]))
    ids = model.tokenizer.encode(long)[-room:]
    assert text == dcache.generate(model, [ids], **SMALL)[0].text
    assert lm.get_model_info()["dcache"]["counters"]["truncated"] == 1
    assert "1 prompts are too long for the model" in log.text
    lm.loglikelihood([SimpleNamespace(args=(long, " 4"), task_name="b")])
    assert lm.total.truncated == 2


def test_generation_arguments_that_mean_nothing_are_named(model, log):
    lm_of(model, **SMALL).generate_until(asked(TEXTS[:1], num_beams=4, until=[]))
    assert "generation arguments that dcache does not know are ignored: num_beams" in log.text


def test_the_report_has_policy_all_knobs_unmasker_settings_and_versions(model):
    info = lm_of(model, "dkv(interval=3)", unmask="threshold(threshold=0.8)", temperature=0.5, seed=7).get_model_info()
    found = json.loads(json.dumps(info))["dcache"]
    assert (found["policy"], found["policy_name"], found["policy_source"]) == ("dkv(interval=3)", "dkv", "dcache")
    assert found["knobs"] == {"variant": "decode", "interval": 3, "neighbours": 0, "cacheable": "un"}
    assert (found["unmask"], found["unmask_knobs"]["threshold"]) == ("threshold(threshold=0.8)", 0.8)
    assert (found["settings"]["temperature"], found["settings"]["seed"]) == (0.5, 7)
    assert (found["version"], found["model"], found["dtype"]) == (dcache.__version__, "llada_mha", "float32")
    assert (found["likelihood"], found["tasks"]) == (None, {})
    assert found["counters"]["nfe"] is None


def test_the_harness_keeps_what_it_is_told_to_keep(model):
    lm = lm_of(model, **SMALL)
    kept = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *call: kept.append(call)))
    requests = asked(TEXTS[:2])
    texts = lm.generate_until(requests)
    lm.loglikelihood([SimpleNamespace(args=("Ann has", " 4"), task_name="a")])
    expected = {("generate_until", *request.args[:1], text) for request, text in zip(requests, texts, strict=True)}
    assert {(name, arguments[0], found) for name, arguments, found in kept[:2]} == expected
    assert kept[2][:2] == ("loglikelihood", ("Ann has", " 4"))


# Likelihood


def test_likelihoods_are_of_the_tokens_behind_the_context(model):
    lm = lm_of(model, mc_num=4)
    requests = [
        SimpleNamespace(args=pair, task_name="a") for pair in [("Ann has ", "4"), ("Ann has", " 4"), ("", "Ann")]
    ]
    spaced, same, alone = lm.loglikelihood(requests)
    ids = model.tokenizer.encode("Ann has 4")
    n = len(model.tokenizer.encode("Ann has"))
    assert spaced == same == (lm.likelihood.of(ids[:n], ids[n:]), lm.likelihood.is_greedy(ids[:n], ids[n:]))
    begin = model.tokenizer.special_id("bos_token")
    assert alone[0] == lm.likelihood.of([begin], model.tokenizer.encode("Ann"))
    assert lm.get_model_info()["dcache"]["likelihood"]["mc_num"] == 4


def test_no_policy_changes_a_likelihood(model):
    request = [SimpleNamespace(args=("Ann has", " 4 apples and no pears"), task_name="a")]
    found = {
        policy: lm_of(model, policy, mc_num=4).loglikelihood(request)[0][0] for policy in ("none", "elastic", "dkv")
    }
    assert len(set(found.values())) == 1


def test_whether_an_answer_is_greedy_need_not_be_found_out(model):
    lm = lm_of(model, mc_num=4, check_greedy=False)
    context = model.tokenizer.encode("Ann has")
    answer = written(model, ["Ann has"], gen_length=4, block_length=None, after_end="decode")[0].canvas
    assert lm.likelihood.is_greedy(context, answer)
    assert lm.loglikelihood([SimpleNamespace(args=("Ann has", " 4"), task_name="a")])[0][1] is False


def test_rolling_likelihoods_are_refused_with_the_reason(model):
    with pytest.raises(UsageError, match=r"loglikelihood_rolling, .* which a masked diffusion model does not have"):
        lm_of(model).loglikelihood_rolling([])


# Prompts


def test_a_conversation_is_written_by_the_checkpoints_template(model):
    lm = lm_of(model)
    turns = [{"role": "user", "content": TEXTS[0]}]
    text = lm.apply_chat_template(turns)
    assert lm.encode(text) == model.prompt_ids(TEXTS[0])
    assert lm.chat_template(True) == model.tokenizer.template
    assert lm.chat_template(False) is None
    begun = lm.apply_chat_template([*turns, {"role": "assistant", "content": " It is"}], add_generation_prompt=False)
    assert begun == text + "It is"
    with pytest.raises(UsageError, match="there is no chat template 'tools'"):
        lm.chat_template("tools")


def test_the_name_of_the_tokenizer_changes_with_the_template(model):
    tiny = dcache.load_model("tiny-llada", device="cpu")
    assert lm_of(model).tokenizer_name != lm_of(tiny).tokenizer_name
    assert "/" not in lm_of(model).tokenizer_name


def test_begin_of_text_is_put_before_a_prompt_once(model):
    lm = lm_of(model, add_bos_token=True)
    begin = model.tokenizer.special_id("bos_token")
    ids = model.tokenizer.encode(TEXTS[0])
    assert lm.encode(TEXTS[0]) == [begin, *ids]
    assert lm.encode(lm.apply_chat_template([{"role": "user", "content": "a"}])).count(begin) == 1
    assert lm_of(model).encode(TEXTS[0]) == ids
    assert lm_of(model).encode("") == [begin]


# Making one


def test_arguments_of_the_model_win_over_options_of_the_harness():
    given = {"model": str(FOLDER), "policy": "dkv", "batch_size": 3}
    lm = DCacheLM.create_from_arg_obj(given, {"batch_size": "1", "max_batch_size": 8, "device": "cpu"})
    assert (lm.settings.batch_size, lm.model.device.type) == (3, "cpu")
    text = f"model={FOLDER},policy=elastic(gamma=0.8,window=4)"
    lm = DCacheLM.create_from_arg_string(text, {"batch_size": 2, "device": "cpu"})
    assert (lm.settings.batch_size, str(lm.arguments.policy)) == (2, "elastic(gamma=0.8,window=4)")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy": "dkv"}, "the model arguments name no model"),
        ({"model": "tiny-lada"}, "no model 'tiny-lada'"),
        ({"model": str(FOLDER), "batch_size": "auto:4"}, "batch_size is 'auto:4'; give a number"),
    ],
)
def test_what_cannot_be_made_is_refused(given, said):
    options = {"batch_size": given.pop("batch_size", 1)}
    with pytest.raises(UsageError, match=said):
        DCacheLM.create_from_arg_obj(given, options)


def test_a_model_without_a_tokenizer_is_refused():
    transformer = random_model()
    with pytest.raises(ModelError, match="model 'random' has no tokenizer"):
        lm_of(Model("random", transformer.spec, transformer))
