"""Small random models for tests: weights scaled so that confidences spread, and so do the decisions."""

import torch

from dcache.models.transformer import ModelSpec, Transformer


def random_model(
    seed: int = 0,
    *,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 8,
    vocab_size: int = 32,
    shift: int = 0,
    max_positions: int = 128,
) -> Transformer:
    """A float32 transformer on the CPU whose best tokens and most-attended keys differ from position to position."""
    width = n_heads * head_dim
    spec = ModelSpec(
        family="random",
        n_layers=n_layers,
        d_model=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mlp_size=2 * width,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        max_positions=max_positions,
        mask_id=vocab_size - 1,
        eos_id=vocab_size - 2,
        end_ids=(vocab_size - 2,),
        shift=shift,
    )
    model = Transformer(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "norm" in name:
                x.fill_(1)
            else:
                gain = {"embedding": 1.0, "qkv": 1.6, "head": 2.0}.get(name.rsplit(".", 1)[-1], 0.8)
                x.normal_(0, gain if name == "embedding" else gain * x.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()
