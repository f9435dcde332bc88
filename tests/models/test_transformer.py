from dataclasses import replace

import pytest
import torch

from dcache.models.transformer import ModelSpec, Transformer

SPEC = ModelSpec(
    family="test",
    n_layers=2,
    d_model=16,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    mlp_size=24,
    vocab_size=32,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=32,
    mask_id=31,
    eos_id=30,
    end_ids=(30,),
)
TOKENS = torch.arange(10)[None] % 32


def random(spec: ModelSpec = SPEC, seed: int = 0) -> Transformer:
    return Transformer(spec).init_random(seed, std=0.3).requires_grad_(False)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tied_head", [False, True])
def test_the_spec_counts_the_parameters(qkv_bias: bool, tied_head: bool) -> None:
    spec = replace(SPEC, qkv_bias=qkv_bias, tied_head=tied_head)
    assert spec.n_parameters == sum(p.numel() for p in Transformer(spec, "meta").parameters())


def test_random_weights_depend_on_the_seed_alone() -> None:
    assert torch.equal(random()(TOKENS), random()(TOKENS))
    assert not torch.equal(random(seed=0)(TOKENS), random(seed=1)(TOKENS))


def test_every_row_sees_every_other() -> None:
    model = random()
    changed = TOKENS.clone()
    changed[0, -1] = 20
    assert (model(TOKENS) - model(changed)).abs().amax(-1).min() > 0


def test_a_hidden_key_changes_no_valid_row() -> None:
    model = random()
    valid = torch.ones(1, 10, dtype=torch.bool)
    valid[0, :3] = False
    changed = TOKENS.clone()
    changed[0, :3] = 20
    torch.testing.assert_close(model(TOKENS, valid=valid)[:, 3:], model(changed, valid=valid)[:, 3:])


def test_hidden_padding_on_the_left_leaves_a_text_as_it_is_alone() -> None:
    model = random()
    padded = torch.cat([torch.full((1, 4), 30), TOKENS], dim=1)
    valid = torch.arange(14)[None] >= 4
    torch.testing.assert_close(model(padded, valid=valid)[:, 4:], model(TOKENS), atol=1e-5, rtol=0)


def test_embeddings_may_stand_in_for_tokens() -> None:
    model = random()
    assert torch.equal(model(TOKENS), model(embeddings=model.embed(TOKENS)))
    with pytest.raises(ValueError, match="tokens or embeddings"):
        model()


def test_a_tied_head_is_the_embedding() -> None:
    tied = random(replace(SPEC, tied_head=True))
    untied = Transformer(SPEC)
    untied.load_state_dict(tied.state_dict() | {"head": tied.embedding})
    assert torch.equal(tied(TOKENS), untied(TOKENS))


def test_a_bias_is_added_to_queries_keys_and_values() -> None:
    plain = random()
    biased = Transformer(replace(SPEC, qkv_bias=True))
    width = SPEC.q_width + 2 * SPEC.kv_width
    biased.load_state_dict(plain.state_dict() | {f"layers.{i}.qkv_bias": torch.zeros(width) for i in range(2)})
    torch.testing.assert_close(biased(TOKENS), plain(TOKENS))
    with torch.no_grad():
        block = next(biased.blocks())
        assert block.qkv_bias is not None
        block.qkv_bias[block.slices("v")] = 1.0
    kept: dict[str, torch.Tensor] = {}
    base: dict[str, torch.Tensor] = {}
    biased(TOKENS, keep=kept)
    plain(TOKENS, keep=base)
    torch.testing.assert_close(kept["v.0"], base["v.0"] + 1)
    torch.testing.assert_close(kept["k.0"], base["k.0"])


def test_values_alone_equal_the_values_of_a_projection() -> None:
    model = random()
    block = next(model.blocks())
    y = block.normed(model.embed(TOKENS))
    cos, sin = model.angles(torch.arange(10)[None])
    torch.testing.assert_close(block.project(y, cos, sin, "v")[0], block.project(y, cos, sin)[2])


def test_what_is_kept_has_the_documented_shapes() -> None:
    kept: dict[str, torch.Tensor] = {}
    random()(TOKENS, keep=kept)
    assert kept["q.1"].shape == (1, 4, 10, 4)
    assert kept["k.1"].shape == kept["v.1"].shape == (1, 2, 10, 4)
    assert kept["hidden.1"].shape == kept["embeds"].shape == kept["final_norm"].shape == (1, 10, 16)
