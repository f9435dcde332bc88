"""The unmasker that a recorded run used, from the settings that it states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcache.testing.golden.base import Replayed
from dcache.unmasking.base import Asked, Noise, Sampling, Unmasker
from dcache.unmasking.confidence import CertaintyPrior, Entropy, LowConfidence, Margin, Random, Threshold
from dcache.unmasking.klass import KLASS
from dcache.unmasking.order import LeftToRight, RandomOrder
from dcache.unmasking.origin import Origin
from dcache.unmasking.parallel import EntropyBounded, Factor
from dcache.unmasking.pc import PCSampler
from dcache.unmasking.wino import WINO

SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy", "random": "random"}
RANKED: dict[str, type[Unmasker]] = {"maskgit_plus": LowConfidence, "topk_margin": Margin, "entropy": Entropy}


class ReplayedDream(Noise):
    """The random numbers of a recorded Dream run: exponential draws over the masked rows, in the program's order.

    ``torch.multinomial`` of one sample is ``argmax(p / q)`` with q exponential, and the largest of it without
    replacement; ``exp(-q)`` is the uniform number that gives the same as Gumbel noise.
    """

    def __init__(self, seed: int, batch: int, slots: int):
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._size = (batch, slots)
        self._tokens: dict[int, Tensor] = {}
        self._positions: dict[int, Tensor] = {}

    def _exponential(self, *size: int) -> Tensor:
        return (-torch.empty(size).exponential_(generator=self._generator).to(torch.float64)).exp()

    def _spread(self, rows: Tensor, values: Tensor) -> Tensor:
        """Values of some rows in order, 1/2 elsewhere."""
        full = torch.full((*rows.shape, *values.shape[1:]), 0.5, dtype=torch.float64)
        full[rows] = values.to(torch.float64)
        return full

    def tokens(self, at: Asked, vocab: int) -> Tensor:
        """One categorical sample over the masked rows; under ``origin`` over those that were drawn."""
        step, rows = int(at.step.max()), at.eligible
        if step not in self._tokens:
            if "share" in at.flags:
                rows = rows & (self.positions(at) < at.flags["share"][:, None])
            self._tokens[step] = self._spread(rows, self._exponential(int(rows.sum()), vocab))
        return self._tokens[step]

    def positions(self, at: Asked) -> Tensor:
        """``origin``: one uniform number per masked row; ``alg_temp``: one multinomial over the canvas."""
        step, rows = int(at.step.max()), at.eligible
        if step not in self._positions:
            if "share" in at.flags:
                drawn = self._spread(rows, torch.rand(int(rows.sum()), generator=self._generator))
            elif bool((at.flags["quota"] > 0).any()):
                canvas = self._exponential(*self._size)[at.lanes]
                drawn = canvas.gather(1, at.where.clamp_max(self._size[1] - 1))
            else:
                drawn = torch.full(rows.shape, 0.5, dtype=torch.float64)
            self._positions[step] = drawn
        return self._positions[step]


class ReplayedOrder(Noise):
    """The decoding order of a recorded run, by block and sequence, in place of a drawn one."""

    def __init__(self, order: Sequence[Sequence[Sequence[int]]]):
        super().__init__(0)
        self._blocks = order

    def order(self, sequence: Tensor, start: Tensor, slots: int) -> Tensor:
        """Draws that fall along the recorded order."""
        drawn = torch.zeros(len(start), slots, dtype=torch.float64)
        for b, begin in enumerate(start[:, 0].tolist()):
            for block in self._blocks:
                if begin in block[b]:
                    drawn[b, block[b]] = torch.linspace(0.9, 0.1, len(block[b]), dtype=torch.float64)
        return drawn


def unknown_settings(data: Mapping[str, Any]) -> str | None:
    """Why no unmasker does what was recorded; None if one does."""
    if data.get("defect"):
        return f"the run shows a defect that is not reproduced: {data['defect']}"
    strategy = data.get("strategy", "vanilla")
    if strategy not in ("vanilla", "klass", "wino", "ar"):
        return f"strategy {strategy!r} is not installed"
    return None


def recorded_unmasker(data: Mapping[str, Any], slots: int, vocab: int) -> Unmasker:
    """The unmasker of a recorded run.

    Args:
        data: the case.
        slots: width of its canvas.
        vocab: size of the vocabulary.
    """
    s = data["settings"]
    if "strategy" in data or "num_transfer_tokens" in s or s.get("variant") == "shifted":
        return _framework(data)
    if "remasking" in s:
        return _llada(data, slots, vocab)
    return _dream(data, slots)


def _sampling(data: Mapping[str, Any], rule: str) -> Sampling:
    s = data["settings"]
    return Sampling(
        temperature=float(s.get("temperature", 0)),
        forbid_eos=s.get("logits_eos_inf", False),
        eos_last="published" if s.get("confidence_eos_eot_inf") else "off",
        after_end="drop" if s.get("stop_until_eos") else "decode",
        guidance=float(s.get("cfg_scale") or 0),
        confidence=rule,
        top_p=s.get("top_p"),
        top_k=s.get("top_k"),
    )


def _llada(data: Mapping[str, Any], slots: int, vocab: int) -> Unmasker:
    """LLaDA's ``generate`` and its descendants: an even split, or a rule that ignores the steps."""
    s, sampling = data["settings"], _sampling(data, "plain")
    random = s["remasking"] == "random"
    if "denoising_order" in data:
        return RandomOrder(sampling=sampling, noise=ReplayedOrder(data["denoising_order"]), steps=s["steps"])
    noise = None
    if data.get("stochastic"):
        noise = Replayed(data["torch_seed"], data["batch"], slots, vocab, sampling.temperature > 0, random)
    if s.get("threshold") is not None:
        return Threshold(sampling=sampling, noise=noise, threshold=s["threshold"])
    factor = s.get("factor") if s.get("factor") is not None else s.get("dynamic_threshold_factor")
    if factor is not None:
        return Factor(sampling=sampling, noise=noise, factor=factor, variant="fast-dllm")
    return (Random if random else LowConfidence)(sampling=sampling, noise=noise, steps=s["steps"])


def _dream(data: Mapping[str, Any], slots: int) -> Unmasker:
    """Dream's ``diffusion_generate`` and its descendants.

    Caches that work in blocks (Fast-dLLM, Sparse-dLLM) commit the first row of a block alone in its first step;
    SPA-Cache commits at least one row per step, the others make the idle forward calls too.
    """
    s, sampling, method = data["settings"], _sampling(data, "filtered"), data["method"]
    noise = ReplayedDream(data["torch_seed"], data["batch"], slots) if data.get("stochastic") else None
    blocks = s.get("cache") in ("prefix", "dual") or method == "sparse_dllm"
    first = "alone" if blocks else "free"
    common: dict[str, Any] = {"sampling": sampling, "noise": noise}
    if s["alg"] == "confidence_threshold":
        budget = None if blocks else s["steps"]
        return Threshold(**common, threshold=s["threshold"], first=first, budget=budget)
    if s["alg"] == "origin" and not blocks:
        return Origin(**common, steps=s["steps"], eps=s["eps"])
    kind = Entropy if blocks and method == "fast_dllm" else RANKED[s["alg"]]  # Fast-dLLM ranks by entropy, always
    return kind(
        **common,
        schedule="linear",
        steps=s["steps"],
        eps=s["eps"],
        idle_steps=method != "spa",
        alg_temp=s.get("alg_temp") or 0.0,
        first=first,
    )


def _framework(data: Mapping[str, Any]) -> Unmasker:
    """d2Cache's framework: at least `num_transfer_tokens` per step, and one of its rules."""
    s = data["settings"]
    sigma = s.get("sampler_sigma", s.get("sigma")) or None
    common: dict[str, Any] = {
        "sampling": _sampling(data, "filtered"),
        "at_least": s.get("num_transfer_tokens") or 1,
        "at_most": s.get("max_transfer_tokens"),
        "score": SCORES[s.get("alg", "maskgit_plus")],
        "sigma": sigma,
    }
    if data.get("strategy") == "klass":
        knobs = {"kl_threshold": s.get("kl_threshold"), "history": s.get("kl_history_length")}
        given = {name: value for name, value in knobs.items() if value is not None}
        return KLASS(**common, threshold=s.get("threshold"), **given)
    if data.get("strategy") == "wino":
        return WINO(
            sampling=common["sampling"],
            at_least=common["at_least"],
            wide_in=s["wide_in_thres"],
            narrow_out=s["narrow_out_thres"],
        )
    if data.get("strategy") == "ar":
        return LeftToRight(**common, threshold=s.get("threshold"))
    if s.get("debias"):
        table = np.array(data["token_freq"])
        return PCSampler(**common, table=table, clip_alpha=s["clip_alpha"], threshold=s.get("threshold"))
    if s.get("threshold") is not None:
        return Threshold(**common, threshold=s["threshold"])
    if s.get("factor") is not None:
        return Factor(**common, factor=s["factor"], variant="d2")
    if s.get("gamma") is not None:
        return EntropyBounded(**common, gamma=s["gamma"], largest="published")
    return CertaintyPrior(**common)
