"""How accurate a tiny checkpoint is: a plain decoder, without a cache, and gsm-mini's test split."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from dcache.models.tiny.formats import Format
from dcache.models.transformer import Transformer
from dcache.models.vision import Spliced
from dcache.tasks.base import Problem
from dcache.tasks.gsm_mini import GsmMini


def rounded(model: Transformer) -> Transformer:
    """A float32 copy with the weights of the checkpoint, which are rounded to bfloat16."""
    copy = Transformer(model.spec, model.device, torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.to(torch.bfloat16))
    return copy.requires_grad_(False)


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: list[list[int]],
    gen_length: int,
    block: int,
    per_step: int,
    shown: Sequence[Spliced] = (),
) -> list[list[int]]:
    """Low-confidence decoding at temperature 0 without a cache, for measuring only; the generated ids.

    With images, `shown` has the same prompts and the rows of their images.
    """
    n_prompt = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    place = torch.arange(int(n_prompt.max()) + gen_length, device=model.device) - n_prompt  # (batch, seq)
    tokens = torch.full_like(place, model.spec.mask_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    valid = place < gen_length
    is_image = torch.zeros_like(valid)
    for row, spliced in zip(is_image, shown, strict=False):
        row[: len(spliced.tokens)] = spliced.is_image
    rows = torch.cat([model.embedding.new_empty(0, model.spec.d_model), *(spliced.embeddings for spliced in shown)])
    row_of = (torch.arange(place.shape[1], device=model.device) - model.spec.shift).clamp_min(0)
    for step in range(0, gen_length, per_step):
        end = step // block * block + block
        open_rows = (tokens == model.spec.mask_id) & (place >= 0) & (place < end)
        embeddings = model.embed(tokens).masked_scatter(is_image[..., None], rows)
        logits = model(embeddings=embeddings, valid=valid)[:, row_of]
        logits[..., list(model.spec.forbidden)] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        picks = confidence.masked_fill(~open_rows, -1).topk(per_step, dim=1).indices
        tokens.scatter_(1, picks, best.gather(1, picks))
    return [row[n : n + gen_length].tolist() for row, n in zip(tokens, n_prompt[:, 0].tolist(), strict=True)]


def accuracy(
    model: Transformer,
    layout: Format,
    tokenizer: Tokenizer,
    problems: list[Problem],
    block: int,
    per_step: int,
    gen_length: int = 96,
) -> float:
    """Share of problems decoded to the right answer; the text ends at the first end token."""
    task = GsmMini()
    ids = [tokenizer.encode(layout.render(problem.prompt), add_special_tokens=False).ids for problem in problems]
    n_right = 0
    for at in range(0, len(problems), 512):
        generated = decode(model, ids[at : at + 512], gen_length, block, per_step)
        for problem, row in zip(problems[at:], generated, strict=False):
            stop = next((i for i, token in enumerate(row) if token in model.spec.end_ids), len(row))
            n_right += bool(task.score(problem, tokenizer.decode(row[:stop])))
    return n_right / len(problems)


def measure(model: Transformer, layout: Format, tokenizer: Tokenizer, n_problems: int) -> dict[str, Any]:
    """Accuracy on the test split, seed 0, by block length and tokens per step."""
    problems = GsmMini().problems("test", n_problems, seed=0)
    copy = rounded(model)
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for block, per_step in ((32, 1), (96, 1), (32, 2), (32, 4), (32, 8), (96, 8)):
        shares[f"block {block}"][f"{per_step} per step"] = accuracy(copy, layout, tokenizer, problems, block, per_step)
        print(f"accuracy, block {block}, {per_step} per step: {shares[f'block {block}'][f'{per_step} per step']:.3f}")
    longer = accuracy(copy, layout, tokenizer, problems, 32, 1, gen_length=128)
    print(f"accuracy, block 32, 1 per step, gen_length 128: {longer:.3f}", flush=True)
    return {
        "conditions": f"{n_problems} problems, gsm-mini test split, seed 0, gen_length 96, low confidence, "
        "temperature 0, no cache, bfloat16 weights computed in float32",
        **shares,
        "block 32, 1 per step, gen_length 128": longer,
    }
