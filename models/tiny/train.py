"""Train a tiny model on gsm-mini and save it in the published layout of its family.

`tiny-dream` takes one run of eight minutes on one GPU::

    python -m dcache.models.tiny.train --family dream --out tiny-dream --seconds 480

`tiny-llada` was made in three, 13 minutes of one H200 together::

    python -m dcache.models.tiny.train --out first --steps 11136 --score-cap 1e6 --score-cap-start 1e6
    python -m dcache.models.tiny.train --out second --init first --seed 1 --steps 2978 \\
        --warmup-steps 100 --decay 1 --muon-lr 0.01 --adam-lr 0.0015 --score-cap 1e6 --score-cap-start 1e6
    python -m dcache.models.tiny.train --out tiny-llada --init second --seed 2 --steps 4310 \\
        --warmup-steps 100 --decay 0.6 --muon-lr 0.02 --adam-lr 0.002 --score-cap-start 300

The first two were made before scores were capped, which a cap of 1e6 reproduces; the third brings the cap down from
300 to 20. The schedules followed the clock (450, 140 and 205 s) and took these many steps: expect the accuracy, not the
bits.

The objective is LLaDA's supervised fine-tuning, from random weights. The prompt, in the chat template, is never masked.
The response is the solution, the end of the turn and ``<|endoftext|>`` up to the end of the canvas, all trained on
alike. Of its L tokens, k are masked, k uniform on 1..L, and the loss is the mean cross entropy of the masked ones: the
form of the likelihood bound with an exact count (LLaDA, arXiv 2502.09992, equation 14), whose variance is lower than
that of a masking probability t and the weight 1/t. Dream reads position p from row p - 1, and so does its loss.

Departures, each for accuracy per minute of training:

* k is stratified over the batch.
* In half of the sequences the mask is one that block decoding meets: rows before a random span are known, rows after
  it are masked, k rows of the span are masked, and the loss is the mean over those k.
* Attention scores are bounded: after every step, where the largest score of a KV head could exceed `score_cap`, its key
  rows and the query rows that read it, biases included, are scaled down ("QK-Clip", Kimi K2, arXiv 2507.20534). Muon
  alone drives scores of so small a model to several hundred; then most attention weights are below 1e-8, unlike those
  of any published checkpoint, and a cache policy that watches attention sees nothing but noise.
* Hidden matrices are trained with Muon (momentum, orthogonalised by Newton-Schulz iterations), the rest with AdamW.
* Canvases are padded to a multiple of 16 by more ``<|endoftext|>``, so a batch needs no attention mask.

Weights and residual stream are float32, matrix products bfloat16; the checkpoint is rounded to bfloat16 and measured
in float32, as a user runs it. `training.json` in the checkpoint records how it was made and how accurate it is.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, one_hot
from torch.utils.data import DataLoader

from dcache.kernels.attend import attend
from dcache.models.tiny.data import Canvases, choose_masks
from dcache.models.tiny.dream import DreamFormat
from dcache.models.tiny.formats import Format
from dcache.models.tiny.llada import LLaDAFormat
from dcache.models.tiny.measure import measure
from dcache.models.tiny.optimizers import clip_scores, lr_scale, make_optimizers, score_cap
from dcache.models.tiny.recipe import RECIPES, Recipe
from dcache.models.transformer import Block, Transformer

FORMATS: Mapping[str, Format] = {"llada": LLaDAFormat(), "dream": DreamFormat()}
FIELDS = [name for name in asdict(Recipe()) if name != "family"]
"""Of a recipe, those that are options of the command line."""


def block_forward(block: Block, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One layer on all rows (batch, seq, d_model), the body of `Transformer.forward`: the unit that is compiled.

    Returns:
        h, and a bound on the attention scores of each KV head, (kv_heads,): largest query of its group times largest
        key.
    """
    q, k, v = block.project(block.normed(h), cos, sin)
    longest = [x.detach().float().norm(dim=-1).amax((0, 2)).unflatten(0, (k.shape[1], -1)).amax(1) for x in (q, k)]
    h = h + block.output(attend(q, k, v).transpose(1, 2).flatten(2))
    return h + block.ffn(h), longest[0] * longest[1] * block.spec.head_dim**-0.5


def head_loss(model: Transformer, h: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of all rows, weighted by (batch, seq): dearer than picking the rows first, but without a sync."""
    loss = cross_entropy(model.logits(h).float().flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weight.flatten()).sum()


@dataclass(frozen=True)
class Images:
    """What stands in the prompts for their images.

    Attributes:
        rows: (batch, rows, d_model).
        at: the token that they stand before; no token before it is predicted.
    """

    rows: Tensor
    at: int

    def splice(self, h: Tensor) -> Tensor:
        """Put the rows between those of the tokens (batch, seq, d_model)."""
        return torch.cat([h[:, : self.at], self.rows.to(h.dtype), h[:, self.at :]], dim=1)


@dataclass(frozen=True)
class Objective:
    """The training loss: mean over sequences of the mean cross entropy of their counted rows.

    Attributes:
        block_share: share of sequences masked as block decoding would.
        generator: source of the masks.
        layer: `block_forward` or its compiled form.
        head: `head_loss` or its compiled form.
    """

    block_share: float
    generator: torch.Generator
    layer: Callable[[Block, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = block_forward
    head: Callable[[Transformer, Tensor, Tensor, Tensor], Tensor] = head_loss

    def __call__(
        self, model: Transformer, tokens: Tensor, n_prompt: Tensor, images: Images | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar loss of tokens (batch, seq) int64 with prompts of n_prompt (batch,) tokens.

        The second result bounds the attention scores: (layers, kv_heads).
        """
        masked, counted = choose_masks(n_prompt, tokens.shape[1], self.block_share, self.generator)
        # As a product: the backward of indexing adds up the many rows of one token (mask, padding) one after another.
        seen = one_hot(tokens.masked_fill(masked, model.spec.mask_id), model.spec.vocab_size).to(model.dtype)
        h = linear(seen, model.embedding.T).to(model.dtype)
        h = h if images is None else images.splice(h)
        cos, sin = model.angles(torch.arange(h.shape[1], device=tokens.device)[None])
        bounds = []
        for block in model.blocks():
            h, bound = self.layer(block, h, cos, sin)
            bounds.append(bound)
        weight = counted / counted.sum(1, keepdim=True) / len(tokens)
        # Row p - shift predicts position p; the prompt is never counted, so nothing that wraps round is.
        targets, weight = (x.roll(-model.spec.shift, dims=1) for x in (tokens, weight))
        if images is not None:
            h = h[:, images.at + images.rows.shape[1] :]
            targets, weight = targets[:, images.at :], weight[:, images.at :]
        return self.head(model, h, targets, weight), torch.stack(bounds)


def objective(recipe: Recipe, device: torch.device, compiled: bool) -> Objective:
    """The objective of a recipe, its masks drawn from the recipe's seed."""
    loss_of = Objective(recipe.block_share, torch.Generator(device).manual_seed(recipe.seed))
    if not compiled:
        return loss_of
    torch._dynamo.config.recompile_limit = 64  # one graph per canvas length
    layer, head = torch.compile(block_forward, dynamic=False), torch.compile(head_loss, dynamic=False)
    return replace(loss_of, layer=layer, head=head)


def rates(optimizers: list[torch.optim.Optimizer]) -> list[list[float]]:
    """The learning rate of every parameter group."""
    return [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(optimizers: list[torch.optim.Optimizer], base: list[list[float]], scale: float) -> None:
    """Set the learning rate of every parameter group to `scale` times its base."""
    for optimizer, lrs in zip(optimizers, base, strict=True):
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * scale


def descend(optimizers: list[torch.optim.Optimizer]) -> None:
    """Update the weights and drop the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(
    model: Transformer,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    recipe: Recipe,
    n_steps: int | None,
    seconds: float | None,
    compiled: bool,
) -> dict[str, Any]:
    """Train in place until `n_steps` or `seconds` are over, whichever is first; the schedule follows both."""
    device = model.device
    loss_of = objective(recipe, device, compiled)
    optimizers = make_optimizers(model, recipe)
    base = rates(optimizers)
    losses: dict[str, float] = {}
    running = torch.zeros((), device=device)
    step, since, start = 0, 0, time.monotonic()
    while True:
        elapsed = time.monotonic() - start
        progress = max(step / n_steps if n_steps else 0.0, elapsed / seconds if seconds else 0.0)
        if progress >= 1:
            break
        set_rates(optimizers, base, lr_scale(step, progress, recipe))
        tokens, n_prompt = (torch.from_numpy(part).to(device, non_blocking=True).long() for part in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, bounds = loss_of(model, tokens, n_prompt)
        loss.backward()  # type: ignore[no-untyped-call]
        descend(optimizers)
        clip_scores(model, bounds, score_cap(progress, recipe))
        running += loss.detach()
        step += 1
        if step in (1, 10, 50) or step % 200 == 0:
            mean = round(float(running) / (step - since), 5)
            print(f"step {step}  {time.monotonic() - start:.1f} s  loss {mean:.5f}", flush=True)
            losses[str(step)] = mean
            running.zero_()
            since = step
    return {"steps": step, "seconds": round(time.monotonic() - start, 1), "loss_by_step": losses}


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """The command line, and the recipe: the family's, with what was given."""
    parser = parser_of("Train a tiny model on gsm-mini and save it in the published format.", RECIPES)
    parser.add_argument(
        "--family", choices=RECIPES, default="llada", help="whose layout; it decides the defaults below"
    )
    given = parser.parse_args(arguments)
    return given, chosen(parser, given, RECIPES[given.family])


def parser_of(description: str, recipes: Mapping[str, Recipe]) -> argparse.ArgumentParser:
    """The options of every training: what a call does, and the fields of a recipe."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, created if missing")
    parser.add_argument("--init", type=Path, help="start from this checkpoint; give a new --seed")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seconds", type=float, help="training time; with --steps, whichever ends first")
    parser.add_argument(
        "--workers", type=int, default=max(0, min(15, (os.cpu_count() or 1) - 1)), help="data processes"
    )
    parser.add_argument("--problems", type=int, default=500, help="test problems to measure the accuracy on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run the layers uncompiled")
    for name in FIELDS:
        defaults = ", ".join(dict.fromkeys(str(getattr(recipe, name)) for recipe in recipes.values()))
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(getattr(Recipe(), name)), help=f"(default {defaults})"
        )
    return parser


def chosen(parser: argparse.ArgumentParser, given: argparse.Namespace, recipe: Recipe) -> Recipe:
    """A recipe with what was given on the command line."""
    if not (given.steps or given.seconds):
        parser.error("give --steps, --seconds or both")
    return replace(recipe, **{name: getattr(given, name) for name in FIELDS if getattr(given, name) is not None})


def start_loading(layout: Format, tokenizer: Tokenizer, recipe: Recipe, workers: int) -> Iterator[Any]:
    """Endless batches; starts the workers, so call it before this process opens the GPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    data = Canvases(layout, tokenizer, recipe.batch, recipe.seed)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))


def origin(model: Transformer, recipe: Recipe, given: argparse.Namespace) -> dict[str, Any]:
    """The record of a training before it begins."""
    record = {
        "recipe": asdict(recipe),
        "n_parameters": model.spec.n_parameters,
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        "workers": given.workers,
    }
    if given.init:
        record["continued_from"] = json.loads((given.init / "training.json").read_text())
    return record


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and save."""
    given, recipe = parse(arguments)
    layout = FORMATS[recipe.family]
    tokenizer = (
        layout.read_tokenizer(given.init) if given.init else layout.train_tokenizer(recipe.seed, recipe.vocab_size)
    )
    batches = start_loading(layout, tokenizer, recipe, given.workers)
    model = Transformer(layout.spec(recipe, tokenizer), given.device).init_random(recipe.seed)
    if given.init:
        layout.restore(model, given.init)
    on_gpu = model.device.type == "cuda"
    record = origin(model, recipe, given)
    record |= train(model, batches, recipe, given.steps, given.seconds, on_gpu and not given.no_compile)
    layout.save(model, tokenizer, recipe, record, given.out)  # first of all: measuring may still fail
    record["accuracy"] = measure(model, layout, tokenizer, given.problems)
    layout.save(model, tokenizer, recipe, record, given.out)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print(
        f"{record['steps']} steps in {record['seconds']} s, {model.spec.n_parameters} parameters, peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
