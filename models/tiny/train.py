"""Train a tiny LLaDA on gsm-mini; `tiny-llada` was made in three runs, 13 minutes of one H200 together::

    python -m dcache.models.tiny.train --out first --steps 11136 --score-cap 1e6 --score-cap-start 1e6
    python -m dcache.models.tiny.train --out second --init first --seed 1 --steps 2978 \\
        --warmup-steps 100 --decay 1 --muon-lr 0.01 --adam-lr 0.0015 --score-cap 1e6 --score-cap-start 1e6
    python -m dcache.models.tiny.train --out tiny-llada --init second --seed 2 --steps 4310 \\
        --warmup-steps 100 --decay 0.6 --muon-lr 0.02 --adam-lr 0.002 --score-cap-start 300

The first two were made before scores were capped, which a cap of 1e6 reproduces; the third brings the cap down from
300 to 20. The schedules followed the clock (450, 140 and 205 s) and took these many steps: expect the accuracy, not the
bits.

The objective is LLaDA's supervised fine-tuning, from random weights. The prompt, in the chat template, is never masked.
The response is the solution, ``<|eot_id|>`` and ``<|endoftext|>`` up to the end of the canvas, all trained on alike. Of
its L tokens, k are masked, k uniform on 1..L, and the loss is the mean cross entropy of the masked ones: the form of
the likelihood bound with an exact count (LLaDA, arXiv 2502.09992, equation 14), whose variance is lower than that of a
masking probability t and the weight 1/t.

Departures, each for accuracy per minute of training:

* k is stratified over the batch.
* In half of the sequences the mask is one that block decoding meets: rows before a random span are known, rows after
  it are masked, k rows of the span are masked, and the loss is the mean over those k.
* Attention scores are bounded: after every step the query and key rows of a head whose largest score could exceed
  `score_cap` are scaled down ("QK-Clip", Kimi K2, arXiv 2507.20534). Muon alone drives scores of so small a model to
  several hundred; then most attention weights are below 1e-8, unlike those of any published checkpoint, and a cache
  policy that watches attention sees nothing but noise.
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, one_hot
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dcache.kernels.attend import attend
from dcache.models.tiny.tokenizer import EOS, EOT, MASK, render, save_tokenizer, special_id, train_tokenizer
from dcache.models.transformer import Block, ModelSpec, Transformer
from dcache.tasks.base import Problem
from dcache.tasks.gsm_mini import GsmMini

CANVAS_STEP = 16
LAYER_NAMES = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides library versions and the number of data workers."""

    seed: int = 0
    n_layers: int = 8
    d_model: int = 256
    mlp_size: int = 512
    vocab_size: int = 512
    batch: int = 1024
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay: float = 0.6
    block_share: float = 0.5
    score_cap: float = 20.0
    score_cap_start: float = 20.0


class Canvases(IterableDataset[tuple[np.ndarray, np.ndarray]]):
    """Endless batches of fresh train-split problems whose canvases have one length.

    Yields:
        tokens (batch, seq) int16 and n_prompt (batch,) int16. The response follows the prompt and fills the canvas.
    """

    def __init__(self, tokenizer: Tokenizer, batch: int, seed: int):
        self.tokenizer, self.batch, self.seed = tokenizer, batch, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Worker w of n makes problems w, w + n, w + 2n, ... and collects them by canvas length."""
        worker = get_worker_info()
        index, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        task = GsmMini()
        waiting: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        while True:
            problems = [task.problem("train", index + i * stride, self.seed) for i in range(512)]
            index += 512 * stride
            for tokens, n_prompt in canvases(self.tokenizer, problems):
                rows = waiting[len(tokens)]
                rows.append((tokens, n_prompt))
                if len(rows) == self.batch:
                    yield np.array([row for row, _ in rows], np.int16), np.array([n for _, n in rows], np.int16)
                    rows.clear()


def canvases(tokenizer: Tokenizer, problems: list[Problem]) -> Iterator[tuple[list[int], int]]:
    """The tokens of each problem's canvas and the length of its prompt."""
    eos, eot = special_id(tokenizer, EOS), special_id(tokenizer, EOT)
    prompts = tokenizer.encode_batch([render(problem.prompt) for problem in problems], add_special_tokens=False)
    solutions = tokenizer.encode_batch([problem.solution or "" for problem in problems], add_special_tokens=False)
    for prompt, solution in zip(prompts, solutions, strict=True):
        seq = -(-(len(prompt.ids) + GsmMini.gen_length) // CANVAS_STEP) * CANVAS_STEP
        tokens = [*prompt.ids, *solution.ids, eot]
        assert len(tokens) <= len(prompt.ids) + GsmMini.gen_length, "a solution does not fit gen_length"
        yield tokens + [eos] * (seq - len(tokens)), len(prompt.ids)


def choose_masks(n_prompt: Tensor, seq: int, block_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose what to mask and which of it to train on.

    Args:
        n_prompt: (batch,) int64.
        seq: length of the canvas.
        block_share: share of sequences masked as block decoding would.
        generator: on the device of `n_prompt`.

    Returns:
        masked (batch, seq) bool, and counted (batch, seq) bool, a part of it with at least one row per sequence.
    """
    batch, device = len(n_prompt), n_prompt.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    as_block = uniform(batch) < block_share
    length = seq - n_prompt
    start = torch.where(as_block, (uniform(batch) * length).long(), 0)
    width = torch.where(as_block, 8 + (uniform(batch) * 57).long(), length)
    end = torch.minimum(start + width, length)
    # One draw per stratum of (0, 1), strata in random order: the batch sees every share of masked rows evenly.
    stratum = torch.randperm(batch, generator=generator, device=device)
    n_masked = 1 + ((stratum + uniform(batch)) / batch * (end - start)).long().clamp(max=end - start - 1)
    place = torch.arange(seq, device=device) - n_prompt[:, None]  # (batch, seq), 0 at the first response row
    inside = (place >= start[:, None]) & (place < end[:, None])
    noise = uniform(batch, seq).masked_fill(~inside, 2.0)
    threshold = noise.sort(dim=1).values.gather(1, n_masked[:, None] - 1)
    counted = noise <= threshold
    return counted | (place >= end[:, None]), counted


def make_spec(recipe: Recipe, tokenizer: Tokenizer) -> ModelSpec:
    """The shape of the checkpoint."""
    return ModelSpec(
        family="llada",
        n_layers=recipe.n_layers,
        d_model=recipe.d_model,
        n_heads=recipe.d_model // 32,
        n_kv_heads=recipe.d_model // 32,
        head_dim=32,
        mlp_size=recipe.mlp_size,
        vocab_size=recipe.vocab_size,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_positions=1024,
        mask_id=special_id(tokenizer, MASK),
        eos_id=special_id(tokenizer, EOS),
        end_ids=(special_id(tokenizer, EOS), special_id(tokenizer, EOT)),
    )


def block_forward(block: Block, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One layer on all rows (batch, seq, d_model), the body of `Transformer.forward`: the unit that is compiled.

    Returns:
        h, and a bound on the attention scores of each head, (heads,): largest query times largest key.
    """
    q, k, v = block.project(block.normed(h), cos, sin)
    longest = [x.detach().float().norm(dim=-1).amax((0, 2)) for x in (q, k)]
    h = h + block.output(attend(q, k, v).transpose(1, 2).flatten(2))
    return h + block.ffn(h), longest[0] * longest[1] * block.spec.head_dim**-0.5


@torch.no_grad()
def clip_scores(model: Transformer, bounds: Tensor, cap: float) -> None:
    """Scale the query and key rows of each head so that its bound (layers, heads) would not have exceeded `cap`."""
    scales = (cap / bounds).clamp(max=1).sqrt().repeat_interleave(model.spec.head_dim, dim=1)
    for block, scale in zip(model.blocks(), scales, strict=True):
        for name in ("q", "k"):
            block.qkv[block.slices(name)] *= scale[:, None]


def score_cap(progress: float, recipe: Recipe) -> float:
    """From `score_cap_start` down to `score_cap`, geometrically, over the first half of the training."""
    return float(recipe.score_cap * (recipe.score_cap_start / recipe.score_cap) ** max(0.0, 1 - 2 * progress))


def head_loss(model: Transformer, h: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of all rows, weighted by (batch, seq): dearer than picking the rows first, but without a sync."""
    loss = cross_entropy(model.logits(h).float().flatten(0, 1), tokens.flatten(), reduction="none")
    return (loss * weight.flatten()).sum()


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

    def __call__(self, model: Transformer, tokens: Tensor, n_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scalar loss of tokens (batch, seq) int64 with prompts of n_prompt (batch,) rows.

        The second result bounds the attention scores: (layers, heads).
        """
        masked, counted = choose_masks(n_prompt, tokens.shape[1], self.block_share, self.generator)
        # As a product: the backward of indexing adds up the many rows of one token (mask, padding) one after another.
        seen = one_hot(tokens.masked_fill(masked, model.spec.mask_id), model.spec.vocab_size).to(model.dtype)
        h = linear(seen, model.embedding.T).to(model.dtype)
        cos, sin = model.angles(torch.arange(tokens.shape[1], device=tokens.device)[None])
        bounds = []
        for block in model.blocks():
            h, bound = self.layer(block, h, cos, sin)
            bounds.append(bound)
        weight = counted / counted.sum(1, keepdim=True) / len(tokens)
        return self.head(model, h, tokens, weight), torch.stack(bounds)


def orthogonalize(x: Tensor) -> Tensor:
    """Push the singular values of x (n, rows, cols) towards 1 by five quintic Newton-Schulz iterations, in bfloat16.

    The coefficients are those of Jordan et al., "Muon" (2024): singular values end between about 0.7 and 1.2.
    """
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised; each parameter group holds matrices of one shape.

    A fused matrix is orthogonalised in its `n_parts` (3 for qkv, 2 for gate and up): they are different maps.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is of no use here
        """Update all matrices."""
        for group in self.param_groups:
            grads = torch.stack([p.grad for p in group["params"]])  # (n, n_parts * rows, cols)
            state = self.state[group["params"][0]]
            velocity = state.setdefault("velocity", torch.zeros_like(grads))
            velocity.lerp_(grads, 1 - group["momentum"])
            parts = grads.lerp(velocity, group["momentum"]).reshape(len(grads) * group["n_parts"], -1, grads.shape[2])
            update = orthogonalize(parts).reshape(grads.shape).to(grads.dtype)
            scale = max(1.0, parts.shape[1] / parts.shape[2]) ** 0.5
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(group["params"], list(update.unbind()), alpha=-group["lr"] * scale)


def make_optimizers(model: Transformer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    parts = {"qkv": 3, "out": 1, "gate_up": 2, "down": 1}
    groups: list[dict[str, Any]] = [
        {"params": [getattr(b, name) for b in model.blocks()], "n_parts": n} for name, n in parts.items()
    ]
    hidden = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    return [
        Muon(groups, recipe.muon_lr, recipe.weight_decay),
        torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_scale(step: int, progress: float, recipe: Recipe) -> float:
    """Warm up linearly, stay, and decay linearly to zero over the last `decay` of the training; progress 0 to 1."""
    return min((step + 1) / recipe.warmup_steps, 1.0, max(0.0, 1 - progress) / recipe.decay)


def official_tensors(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of the published LLaDA checkpoints, fused matrices split."""
    root = "model.transformer."
    assert model.head is not None
    tensors: dict[str, Tensor] = {
        f"{root}wte.weight": model.embedding,
        f"{root}ln_f.weight": model.norm,
        f"{root}ff_out.weight": model.head,
    }
    for i, block in enumerate(model.blocks()):
        gate, up = block.gate_up.chunk(2)
        layer = {
            "attn_norm": block.norm1,
            "q_proj": block.qkv[block.slices("q")],
            "k_proj": block.qkv[block.slices("k")],
            "v_proj": block.qkv[block.slices("v")],
            "attn_out": block.out,
            "ff_norm": block.norm2,
            "ff_proj": gate,
            "up_proj": up,
            "ff_out": block.down,
        }
        tensors |= {f"{root}blocks.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def restore(model: Transformer, folder: Path) -> None:
    """Read the weights that `save` wrote back into a model of the same shape."""
    tensors = load_file(folder / "model.safetensors")
    root = "model.transformer."
    model.embedding.copy_(tensors[f"{root}wte.weight"])
    model.norm.copy_(tensors[f"{root}ln_f.weight"])
    assert model.head is not None
    model.head.copy_(tensors[f"{root}ff_out.weight"])
    for i, block in enumerate(model.blocks()):
        read = {name: tensors[f"{root}blocks.{i}.{name}.weight"] for name in LAYER_NAMES}
        block.norm1.copy_(read["attn_norm"])
        block.qkv.copy_(torch.cat([read["q_proj"], read["k_proj"], read["v_proj"]]))
        block.out.copy_(read["attn_out"])
        block.norm2.copy_(read["ff_norm"])
        block.gate_up.copy_(torch.cat([read["ff_proj"], read["up_proj"]]))
        block.down.copy_(read["ff_out"])


def official_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json with the fields of the published LLaDA checkpoints."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": spec.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": spec.vocab_size,
        "eos_token_id": spec.eos_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": spec.mask_id,
        "max_sequence_length": spec.max_positions,
        "mlp_hidden_size": spec.mlp_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "n_layers": spec.n_layers,
        "pad_token_id": spec.eos_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": spec.norm_eps,
        "rope": True,
        "rope_full_precision": spec.rope_full_precision,
        "rope_theta": spec.rope_theta,
        "scale_logits": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": spec.vocab_size,
        "weight_tying": False,
    }


def save(model: Transformer, tokenizer: Tokenizer, record: dict[str, Any], out: Path) -> None:
    """Write a checkpoint folder: config, weights, tokenizer and the record of the training."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(official_config(model.spec), indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    save_tokenizer(tokenizer, out)
    save_file(official_tensors(model), out / "model.safetensors", metadata={"format": "pt"})


def rounded(model: Transformer) -> Transformer:
    """A float32 copy with the weights of the checkpoint, which are rounded to bfloat16."""
    copy = Transformer(model.spec, model.device, torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.to(torch.bfloat16))
    return copy.requires_grad_(False)


@torch.inference_mode()
def decode(model: Transformer, prompts: list[list[int]], gen_length: int, block: int, per_step: int) -> list[list[int]]:
    """LLaDA's low-confidence decoding at temperature 0 without a cache, for measuring only; the generated ids."""
    n_prompt = torch.tensor([len(prompt) for prompt in prompts], device=model.device)[:, None]
    place = torch.arange(int(n_prompt.max()) + gen_length, device=model.device) - n_prompt  # (batch, seq)
    tokens = torch.full_like(place, model.spec.mask_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    valid = place < gen_length
    for step in range(0, gen_length, per_step):
        end = step // block * block + block
        open_rows = (tokens == model.spec.mask_id) & (place >= 0) & (place < end)
        logits = model(tokens, valid=valid)
        confidence, best = logits.softmax(-1).max(-1)
        picks = confidence.masked_fill(~open_rows, -1).topk(per_step, dim=1).indices
        tokens.scatter_(1, picks, best.gather(1, picks))
    return [row[n : n + gen_length].tolist() for row, n in zip(tokens, n_prompt[:, 0].tolist(), strict=True)]


def accuracy(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], block: int, per_step: int, gen_length: int = 96
) -> float:
    """Share of problems decoded to the right answer; the text ends at the first end token."""
    task = GsmMini()
    ids = [tokenizer.encode(render(problem.prompt), add_special_tokens=False).ids for problem in problems]
    n_right = 0
    for at in range(0, len(problems), 512):
        generated = decode(model, ids[at : at + 512], gen_length, block, per_step)
        for problem, row in zip(problems[at:], generated, strict=False):
            stop = next((i for i, token in enumerate(row) if token in model.spec.end_ids), len(row))
            n_right += bool(task.score(problem, tokenizer.decode(row[:stop])))
    return n_right / len(problems)


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
    loss_of = Objective(recipe.block_share, torch.Generator(device).manual_seed(recipe.seed))
    if compiled:
        layer, head = torch.compile(block_forward, dynamic=False), torch.compile(head_loss, dynamic=False)
        loss_of = replace(loss_of, layer=layer, head=head)
    optimizers = make_optimizers(model, recipe)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: dict[str, float] = {}
    running = torch.zeros((), device=device)
    step, since, start = 0, 0, time.monotonic()
    while True:
        elapsed = time.monotonic() - start
        progress = max(step / n_steps if n_steps else 0.0, elapsed / seconds if seconds else 0.0)
        if progress >= 1:
            break
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * lr_scale(step, progress, recipe)
        tokens, n_prompt = (torch.from_numpy(part).to(device, non_blocking=True).long() for part in next(batches))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, bounds = loss_of(model, tokens, n_prompt)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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


def measure(model: Transformer, tokenizer: Tokenizer, n_problems: int) -> dict[str, Any]:
    """Accuracy on the test split, seed 0, by block length and tokens per step."""
    problems = GsmMini().problems("test", n_problems, seed=0)
    copy = rounded(model)
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for block, per_step in ((32, 1), (96, 1), (32, 2), (32, 4), (32, 8), (96, 8)):
        shares[f"block {block}"][f"{per_step} per step"] = accuracy(copy, tokenizer, problems, block, per_step)
        print(f"accuracy, block {block}, {per_step} per step: {shares[f'block {block}'][f'{per_step} per step']:.3f}")
    longer = accuracy(copy, tokenizer, problems, 32, 1, gen_length=128)
    print(f"accuracy, block 32, 1 per step, gen_length 128: {longer:.3f}", flush=True)
    return {
        "conditions": f"{n_problems} problems, gsm-mini test split, seed 0, gen_length 96, low confidence, "
        "temperature 0, no cache, bfloat16 weights computed in float32",
        **shares,
        "block 32, 1 per step, gen_length 128": longer,
    }


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description="Train a tiny LLaDA on gsm-mini and save it in the published format.")
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
    for name, default in asdict(Recipe()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"(default {default})"
        )
    arguments = parser.parse_args()
    if not (arguments.steps or arguments.seconds):
        parser.error("give --steps, --seconds or both")
    recipe = Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})

    if arguments.init:
        tokenizer = Tokenizer.from_file(str(arguments.init / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(recipe.seed, recipe.vocab_size)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    data = Canvases(tokenizer, recipe.batch, recipe.seed)
    loader = DataLoader(data, batch_size=None, num_workers=arguments.workers, collate_fn=lambda batch: batch)
    batches = iter(loader)  # starts the workers, before this process opens the GPU
    torch._dynamo.config.recompile_limit = 64  # one graph per canvas length
    model = Transformer(make_spec(recipe, tokenizer), arguments.device).init_random(recipe.seed)
    if arguments.init:
        restore(model, arguments.init)
    on_gpu = model.device.type == "cuda"
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "n_parameters": model.spec.n_parameters,
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        "workers": arguments.workers,
    }
    if arguments.init:
        record["continued_from"] = json.loads((arguments.init / "training.json").read_text())
    record |= train(model, batches, recipe, arguments.steps, arguments.seconds, on_gpu and not arguments.no_compile)
    save(model, tokenizer, record, arguments.out)  # first of all: measuring may still fail
    record["accuracy"] = measure(model, tokenizer, arguments.problems)
    save(model, tokenizer, record, arguments.out)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print(
        f"{record['steps']} steps in {record['seconds']} s, {model.spec.n_parameters} parameters, peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
