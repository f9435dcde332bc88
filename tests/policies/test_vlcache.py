"""Images that come again: on a random model with vision, and the keys that are put to other positions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcache
from dcache import Filter, ReuseCache, UsageError
from dcache.decode import decode as run_loop
from dcache.engine import Engine
from dcache.generate import Runner, image_prompt, settings_from
from dcache.plugins import make_policy, make_unmasker
from dcache.policies.vlcache import VLCache
from dcache.spans import Kept
from dcache.state import Embeddings, Span, State
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.trace import Step

Image = pytest.importorskip("PIL.Image")
FOLDER = Path(__file__).parents[1] / "golden" / "models" / "llada_v"
SMALL = {"gen_length": 8, "block_length": 4, "after_end": "decode"}
INNER = ["none", "fast-dllm", "elastic(gamma=0.97)", "dkv(interval=3)", "d2(current_k=3)", "es-dllm", "freecache"]
INNER += ["sparse-dllm", "suffix(window=1)", "elastic(refresh=always)"]


@pytest.fixture(scope="module")
def model() -> dcache.Model:
    return dcache.load_model(FOLDER, device="cpu", dtype="float32")


def picture(seed: int, size: tuple[int, int] = (20, 14)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def decode(model, policy, *asked, **settings):
    """Outputs of one batch of (text, images)."""
    prompts = [image_prompt(model, text, images) for text, images in asked]
    return Runner(model, policy, settings_from(**{**SMALL, **settings}), maps=True).run(prompts)


def rows(output) -> int:
    return output.trace.row_layers


def warmed(model, inner="fast-dllm", **knobs) -> VLCache:
    """A policy that has seen pictures 1 and 2, each alone."""
    policy = VLCache(inner, **knobs)
    for seed in (1, 2):
        decode(model, policy, ("what is this", [picture(seed)]))
    return policy


@pytest.mark.parametrize("inner", INNER)
def test_with_all_rows_computed_it_is_its_inner_policy(model, inner):
    policy = VLCache(inner, ratio=1)
    for _ in range(2):
        found = decode(model, policy, ("what", [picture(1)]))[0]
        expected = decode(model, inner, ("what", [picture(1)]))[0]
        one, two = ((x.canvas, rows(x), x.trace.kv_row_layers, x.trace.nfe) for x in (found, expected))
        assert one == two
    assert set(policy.statistics.values()) == {0}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("select", ["first", "mask-attention"])
def test_the_first_request_is_that_of_the_inner_policy_and_the_second_computes_fewer_rows(model, inner, select):
    policy, asked = VLCache(inner, ratio=0.1, select=select, fill="first"), ("what is this", [picture(1)])
    first, plain = (decode(model, p, asked)[0] for p in (policy, inner))
    assert (first.canvas, rows(first)) == (plain.canvas, rows(plain))
    again, other = decode(model, policy, asked)[0], decode(model, policy, ("what is this", [picture(2)]))[0]
    assert len(again.canvas) == 8
    if select == "first":  # the probe is worth its pass only for large images
        assert rows(again) < rows(first)
    assert rows(other) == rows(decode(model, inner, ("what is this", [picture(2)]))[0])
    assert policy.statistics["hits"] == 1
    assert policy.statistics["misses"] == 2
    assert policy.statistics["saved_row_layers"] > 0


def computed(output, prompt, step: int) -> np.ndarray:
    """Which rows of the only image of a prompt a step computed, in any layer."""
    span = prompt.embeddings.spans[0]
    return output.trace.mine[step].maps["rows"].any(0)[0, span.start : span.stop]


def test_of_a_known_image_a_share_of_the_rows_is_computed(model):
    prompt = image_prompt(model, "what is this", [picture(1)])
    span = prompt.embeddings.spans[0]
    n = -(-(span.stop - span.start) // 5)
    for select in ("first", "mask-attention"):
        output = decode(model, warmed(model, "none", ratio=0.2, select=select), ("what is this", [picture(1)]))[0]
        anchors = computed(output, prompt, 0)
        assert anchors.sum() == n
        assert (computed(output, prompt, 3) == anchors).all()
        assert (output.trace.mine[0].again is None) == (select == "first")
        if select == "first":
            assert anchors[:n].all()


def test_without_anchors_no_row_of_a_known_image_is_computed_and_there_is_no_probe(model):
    output = decode(model, warmed(model, "none", ratio=0), ("what is this", [picture(1)]))[0]
    assert not computed(output, image_prompt(model, "what is this", [picture(1)]), 0).any()
    assert output.trace.mine[0].again is None


def test_the_same_request_again_starts_from_the_logits_of_the_first(model):
    """Whatever it was kept from is unchanged in the first pass; text above the image would see the same keys."""
    policy = VLCache("none", ratio=0, fill="first")
    one, two = (decode(model, policy, ("what", [picture(1)]))[0].trace.mine[0].confidence for _ in range(2))
    assert np.isfinite(one).any()
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", ["fast-dllm", "elastic(gamma=0.97)", "es-dllm"])
@pytest.mark.parametrize("select", ["first", "mask-attention"])
def test_a_batch_with_hits_and_misses_gives_what_single_runs_give(model, inner, select):
    asked = [
        ("what is this", [picture(1)]),
        ("<image><image> are these alike", [picture(2), picture(1)]),
        ("which", [picture(5, (30, 10))]),
        ("and now", [picture(2)]),
        ("how", []),
    ]
    knobs = {"ratio": 0.2, "select": select}
    together = decode(model, warmed(model, inner, **knobs), *asked)
    alone = [decode(model, warmed(model, inner, **knobs), one)[0] for one in asked]
    assert [x.canvas for x in together] == [x.canvas for x in alone]
    assert [rows(x) for x in together] == [rows(x) for x in alone]
    assert rows(together[3]) != rows(decode(model, inner, asked[3])[0])


@pytest.mark.parametrize("texts", [("a <image> what", "a b c <image> what"), ("a b c <image> what", "<image> what")])
def test_an_image_at_another_place_is_known_and_its_keys_are_turned(model, texts):
    """The keys of layer 0 do not depend on anything but the image, so there they equal computed ones."""
    policy = VLCache("none", ratio=0)
    prompts = [image_prompt(model, text, [picture(1)]) for text in texts]
    assert prompts[0].embeddings.spans[0].key == prompts[1].embeddings.spans[0].key
    assert prompts[0].embeddings.spans[0].start != prompts[1].embeddings.spans[0].start
    span, stores = prompts[1].embeddings.spans[0], []
    Runner(model, policy, settings_from(**SMALL)).run(prompts[:1])
    for one in (policy, "none"):
        runner = Runner(model, one, settings_from(**SMALL))
        runner.run(prompts[1:])
        stores.append([runner.engine.stores.tensors[name][0][0, :, span.start : span.stop] for name in "KV"])
    assert policy.statistics["hits"] == 1
    for found, expected in zip(*stores, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_eviction_keeps_the_budget_and_forgets_what_was_used_longest_ago(model):
    size = warmed(model).statistics["bytes"] // 2
    policy = VLCache(spans=ReuseCache[Kept](2 * size))
    for seed in (1, 2, 1, 3):
        decode(model, policy, ("what", [picture(seed)]))
    assert policy.statistics["evictions"] == 1
    assert policy.statistics["bytes"] == 2 * size
    decode(model, policy, ("what", [picture(1)]))
    assert (policy.statistics["hits"], policy.statistics["misses"]) == (2, 3)
    decode(model, policy, ("what", [picture(2)]))
    assert policy.statistics["misses"] == 4


def test_an_image_larger_than_the_budget_is_not_kept(model):
    policy = VLCache(budget_mib=0)
    decode(model, policy, ("what", [picture(1)]))
    assert policy.statistics["entries"] == 0


def test_other_weights_do_not_find_what_was_kept(model):
    other = dcache.load_model(FOLDER, device="cpu", dtype="float32")
    with torch.no_grad():
        other.transformer.layers[0].qkv += 0.01
    policy = warmed(model)
    decode(other, policy, ("what", [picture(1)]))
    assert policy.statistics["hits"] == 0
    with torch.no_grad():
        other.vision.newline += 0.01
    keys = [image_prompt(m, "what", [picture(1)]).embeddings.spans[0].key for m in (model, other)]
    assert keys[0] != keys[1]


def test_several_policy_objects_share_what_outlives_a_request(model):
    shared = ReuseCache[Kept](2**30)
    decode(model, VLCache(spans=shared), ("what", [picture(1)]))
    decode(model, VLCache(inner="dkv", spans=shared), ("which", [picture(1)]))
    assert shared.statistics["hits"] == 1


def test_guidance_computes_the_masked_prompt_and_reuses_the_image(model):
    for inner in ("fast-dllm", "elastic(gamma=0.97)"):
        policy, asked = VLCache(inner, ratio=0.2), [("what", [picture(1)]), ("which", []), ("how", [picture(2)])]
        decode(model, policy, asked[0])
        decode(model, policy, asked[2])
        together = decode(model, policy, *asked, guidance=0.5)
        assert policy.statistics["hits"] == 2
        alone = [decode(model, policy, one, guidance=0.5)[0] for one in asked]
        assert [x.canvas for x in together] == [x.canvas for x in alone]
        assert [rows(x) for x in together] == [rows(x) for x in alone]


@pytest.mark.parametrize("inner", ["dllm-cache", "spa(rank=4)"])
def test_policies_that_replay_outputs_are_refused(model, inner):
    with pytest.raises(UsageError, match="a reused row has none"):
        decode(model, VLCache(inner), ("what", [picture(1)]))


def test_an_inner_policy_that_frees_keys_is_refused_with_images(model):
    with pytest.raises(UsageError, match="frees some"):
        decode(model, VLCache("sparse-dllm(compact=true)"), ("what", [picture(1)]))


def test_text_is_left_to_the_inner_policy(model):
    policy = VLCache()
    assert isinstance(policy, Filter)
    found, expected = (dcache.generate(model, "what", p, **SMALL) for p in (policy, "fast-dllm"))
    assert found.canvas == expected.canvas
    assert set(policy.statistics.values()) == {0}


# Keys and values of an image alone

TEXTS = ("..aaaaa..", "..aaaaa.....", "....aaaaa.", "..bbb...aaaaa.", "..aaaaabbb.", "......bbb..")
"""Prompts; a letter is a row of that image, and the two rows in front are the preamble."""


def request(model, text: str, token: int = 5) -> State:
    """A prompt that holds `token` where there is no image, and 4 masks behind it."""
    ids = [1, 2, *(token for _ in text[2:])]
    draw = torch.Generator().manual_seed(0)
    rows = {key: torch.randn(n, model.spec.d_model, generator=draw) for key, n in (("a", 5), ("b", 3))}
    spans = [Span(text.index(key), text.rindex(key) + 1, key) for key in sorted(set(text) - {"."}, key=text.index)]
    where = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    values = torch.cat([rows[span.key] for span in spans])
    return State(model.spec, [ids], 4, embeddings=[Embeddings(where, values, tuple(spans), preamble=(1, 2))])


def told(steps: list[Step]) -> list[tuple]:
    """What a run computed and found, bit for bit, without the forward calls of `begin`."""
    return [(s.rows.tolist(), s.commit.tolist(), s.tokens.tolist(), s.confidence.tolist()) for s in steps]


@given(
    order=st.lists(st.sampled_from(range(len(TEXTS))), min_size=2, max_size=6),
    budget=st.sampled_from([0, 2000, 1 << 20]),
)
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("knobs", ["inner=none,select=first,ratio=0.2", "inner=elastic(gamma=0.97),ratio=0.3"])
def test_what_an_image_is_alone_does_not_depend_on_the_requests_before(knobs, order, budget):
    model = random_model(3)
    policy = make_policy(f"vlcache({knobs})")
    policy.spans = ReuseCache[Kept](budget)  # 0 keeps nothing, 2000 one image of the two
    for which in order:
        policies = policy, make_policy(f"vlcache({knobs})")
        engines = [Engine(model, one, make_unmasker("low-confidence"), debug=True) for one in policies]
        found, expected = (run_loop(engine, request(model, TEXTS[which], which)) for engine in engines)
        assert told(found) == told(expected)
    assert policy.statistics["misses"] > 0


def test_the_first_request_alone_is_as_the_second_but_for_one_call(model):
    for select in ("first", "mask-attention"):
        policy, asked = VLCache("none", ratio=0.1, select=select), ("what is this", [picture(1)])
        prompt = image_prompt(model, *asked)
        first, second = (decode(model, policy, asked)[0] for _ in range(2))
        assert told(first.trace.mine) == told(second.trace.mine)
        span, layers = prompt.embeddings.spans[0], model.spec.n_layers
        n = len(prompt.embeddings.preamble) + span.stop - span.start
        assert (first.trace.nfe, second.trace.nfe) == (9, 8)
        assert rows(first) == rows(second) + n * (layers - 1)
        assert first.trace.kv_row_layers == second.trace.kv_row_layers + n * layers
        assert first.trace.full_row_layers == second.trace.full_row_layers
        assert first.trace.refreshes == second.trace.refreshes == 0
        assert (policy.statistics["hits"], policy.statistics["misses"]) == (1, 1)


def test_what_is_kept_of_an_image_alone_is_what_a_model_makes_of_preamble_and_image(model):
    prompt = image_prompt(model, "a b <image> what", [picture(1)])
    given, span = prompt.embeddings, prompt.embeddings.spans[0]
    assert given.preamble == tuple(prompt.ids[: len(given.preamble)])
    assert len(given.preamble) < span.start
    policy = VLCache("none", ratio=0)
    Runner(model, policy, settings_from(**SMALL)).run([prompt])
    (kept,) = [kept for kept, _ in policy.spans._held.values()]
    h, keep = torch.cat([model.transformer.embed(torch.tensor(given.preamble)), given.values]), {}
    model.transformer(embeddings=h[None], keep=keep)
    assert kept.start == len(given.preamble)
    for name, found in (("k", kept.k), ("v", kept.v)):
        expected = torch.stack([keep[f"{name}.{layer}"][0, :, kept.start :] for layer in range(model.spec.n_layers)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.untyped_storage().nbytes() == found.nbytes  # nothing of the preamble is held


def test_the_preamble_is_that_of_the_conversation_whatever_is_asked(model):
    asked = [("what", [picture(1)]), ("<image> and <image>", [picture(2), picture(1)]), ("a <image>?", [picture(3)])]
    prompts = [image_prompt(model, *one) for one in asked]
    (preamble,) = {prompt.embeddings.preamble for prompt in prompts}
    assert prompts[0].embeddings.spans[0].start == len(preamble) > 0
    assert all(tuple(prompt.ids[: len(preamble)]) == preamble for prompt in prompts)


def test_what_is_kept_alone_and_in_a_request_is_kept_apart(model):
    shared = ReuseCache[Kept](2**30)
    for fill in ("alone", "first", "alone", "first"):
        decode(model, VLCache(fill=fill, spans=shared), ("what", [picture(1)]))
    assert (shared.statistics["hits"], shared.statistics["entries"]) == (2, 2)


def engine_runs(spec_model, policy, **more) -> list[Step]:
    """A batch of two with the span "a" at other places, on poisoned stores; the first time both miss."""
    engine = Engine(spec_model, policy, make_unmasker("low-confidence"), debug=True, **more)
    rows, found = torch.randn(4, spec_model.spec.d_model, generator=torch.Generator().manual_seed(0)), []
    for key in ("ab", "ab", "ac"):
        given = [Embeddings(np.arange(p, p + 4), rows, (Span(p, p + 4, k),)) for p, k in zip((3, 1), key, strict=True)]
        state = State(spec_model.spec, [[1, 2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 5]], [8, 4], 4, embeddings=given)
        found += run_loop(engine, state)
    return found


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("inner", ["fast-dllm", "elastic(gamma=0.97)"])
def test_recorded_passes_give_what_eager_ones_give_and_read_nothing_that_nobody_wrote(shift, inner):
    model = random_model(3, shift=shift)
    eager = engine_runs(model, VLCache(inner, ratio=0.3), buckets=(8, 64))
    policy, recorder = VLCache(inner, ratio=0.3), Recorder()
    recorded = engine_runs(model, policy, buckets=(8, 64), executor=recorder)
    assert recorder.replayed > 0
    assert (policy.statistics["hits"], policy.statistics["misses"]) == (3, 3)
    for one, two in zip(eager, recorded, strict=True):
        for name in ("rows", "commit", "tokens", "row_layers"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name


def span_state(model, embedding: torch.Tensor) -> State:
    """A prompt of 9 tokens, 1 to 6 of them one span, and 4 masks."""
    given = [Embeddings(np.arange(1, 7), embedding, (Span(1, 7, "a"),))]
    return State(model.spec, [[1, 0, 0, 0, 0, 0, 0, 2, 3]], 4, embeddings=given)


def test_the_anchors_are_the_rows_that_masks_attend_to_most():
    model, policy, attention = random_model(3), VLCache("none", ratio=0.3, fill="first"), []
    layer, embedding = policy.layer, torch.randn(6, model.spec.d_model, generator=torch.Generator().manual_seed(1))

    def listening(at, rows, h):
        out = layer(at, rows, h)
        masks = (rows >= 9) & (rows < at.dump)
        attention.append(at.probs(at.q).sum(1)[masks].sum(0)[1:7])
        return out

    engine = Engine(model, policy, make_unmasker("low-confidence"), debug=True)
    run_loop(engine, span_state(model, embedding))
    policy.layer = listening
    (step,) = run_loop(engine, span_state(model, embedding), limit=1)
    best = torch.stack(attention[: model.spec.n_layers]).sum(0).topk(2).indices.sort().values + 1
    assert np.flatnonzero(step.again[0, 1:7]).tolist() == (best - 1).tolist()
    assert step.rows[0, [0, 7, 8, 9, 10, 11, 12]].all()


def test_a_reused_row_is_in_no_set_of_the_inner_policy():
    model, policy, found = random_model(3), VLCache("elastic(track_num=8)", ratio=0), []
    plan, embedding = policy.plan, torch.randn(6, model.spec.d_model, generator=torch.Generator().manual_seed(1))

    def planning(state):
        made, inner = plan(state), policy.inner._tracked(state)
        found.append((inner[0, 1:7].any(), made.sets["tracked"][0, 1:7].any()))
        return made

    engine = Engine(model, policy, make_unmasker("low-confidence"), debug=True)
    run_loop(engine, span_state(model, embedding))
    policy.plan = planning
    run_loop(engine, span_state(model, embedding))
    assert any(inner for inner, _ in found)
    assert not any(outer for _, outer in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("inner", ["fast-dllm", "elastic(gamma=0.97)"])
def test_graphs_give_what_the_eager_run_gives(inner):
    model = random_model(3).to("cuda")
    eager, graphs = (engine_runs(model, VLCache(inner, ratio=0.3), graphs=on) for on in (False, True))
    for one, two in zip(eager, graphs, strict=True):
        for name in ("rows", "commit", "tokens", "confidence", "row_layers"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_a_row_that_predicts_the_window_is_computed_though_it_is_one_of_a_known_image():
    """Where a row predicts the next position and the prompt ends with the image."""
    model = random_model(3, shift=1)
    engine = Engine(model, VLCache("none", ratio=0), make_unmasker("low-confidence"), debug=True)
    given = [Embeddings(np.arange(1, 4), torch.randn(3, model.spec.d_model), (Span(1, 4, "a"),))]
    for _ in range(2):
        steps = run_loop(engine, State(model.spec, [[1, 0, 0, 0]], 4, embeddings=given))
    assert steps[0].rows[0].tolist() == [True, False, False, True, True, True, True, True]
