"""The unmasker that a recorded run used, from the settings that it states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dcache.testing.golden.base import left_padding
from dcache.testing.golden.noise import ReplayedDream, ReplayedLLaDA, ReplayedOrder
from dcache.unmasking.base import Sampling, Unmasker
from dcache.unmasking.confidence import CertaintyPrior, Entropy, LowConfidence, Margin, Random, Threshold
from dcache.unmasking.klass import KLASS
from dcache.unmasking.order import LeftToRight, RandomOrder
from dcache.unmasking.origin import Origin
from dcache.unmasking.parallel import EntropyBounded, Factor
from dcache.unmasking.pc import PCSampler
from dcache.unmasking.wino import WINO

SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy", "random": "random"}
TINY = 1e-9
CLIP = 10.0  # of the released PC-sampler, where none is given
RANKED: dict[str, type[Unmasker]] = {"maskgit_plus": LowConfidence, "topk_margin": Margin, "entropy": Entropy}


def unknown_settings(data: Mapping[str, Any]) -> str | None:
    """Why no unmasker does what was recorded; None if one does."""
    if data.get("defect"):
        return f"the run shows a defect that is not reproduced: {data['defect']}"
    strategy = data.get("strategy", "vanilla")
    if strategy not in ("vanilla", "klass", "wino", "ar"):
        return f"strategy {strategy!r} is not installed"
    return _unknown_rule(data, strategy) or _unreplayed(data)


def _unknown_rule(data: Mapping[str, Any], strategy: str) -> str | None:
    s = data["settings"]
    rule = next((name for name in ("factor", "gamma") if s.get(name) is not None), None)
    if rule and (strategy == "klass" or _debiased(s)):
        return f"{'klass' if strategy == 'klass' else 'pc'} has no variant with {rule}"
    if s.get("gamma") is not None and data["batch"] > 1:
        return "gamma in a batch: the released maximum of entropies runs over its sequences, which couples them"
    if s.get("sampler_sigma", s.get("sigma")) and s.get("alg") == "entropy":
        return "the certainty prior weighs probabilities, and the released product of it with an entropy is refused"
    if strategy == "wino":
        odd = [name for name in ("sigma", "stop_until_eos") if s.get(name)]
        odd += ["alg"] * (s.get("alg", "maskgit_plus") != "maskgit_plus")
        odd += ["a shifted model"] * str(data["model"]).startswith("dream")
        return f"wino has no variant with {', '.join(odd)}" if odd else None
    return None


def _unreplayed(data: Mapping[str, Any]) -> str | None:
    """Why the random numbers of a run cannot be drawn again; None if they can, or there are none."""
    s, method = data["settings"], data["method"]
    ordered = "denoising_order" in data  # what ranks at random is recorded, what samples is not
    if not s.get("temperature") and (ordered or "random" not in (s.get("remasking"), s.get("alg"))):
        return None
    dream = str(data["model"]).startswith("dream")
    whole = method == "none" or (dream and method.startswith("dkv"))  # programs that draw for the whole canvas
    if data.get("stochastic") and "strategy" not in data and whole and not ordered:
        return None
    return "it draws random numbers for some rows of its own, or states no seed, so they cannot be drawn again"


def _debiased(settings: Mapping[str, Any]) -> bool:
    """Whether the score is weighed by token frequencies; margin and entropy take its place in the released code."""
    return bool(settings.get("debias")) and settings.get("alg") not in ("topk_margin", "entropy")


def recorded_unmasker(data: Mapping[str, Any], vocab: int) -> Unmasker:
    """The unmasker of a recorded run, on a vocabulary of `vocab` ids."""
    s = data["settings"]
    if "strategy" in data or "num_transfer_tokens" in s or s.get("variant") == "shifted":
        return _framework(data)
    if "remasking" in s:
        return _llada(data, vocab)
    return _dream(data)


def _sampling(data: Mapping[str, Any], rule: str) -> Sampling:
    s = data["settings"]
    stop = s.get("early_stop_steps")
    return Sampling(
        temperature=float(s.get("temperature", 0)),
        forbid_eos=s.get("logits_eos_inf", False),
        eos_last="published" if s.get("confidence_eos_eot_inf") else "off",
        after_end="fill" if stop else "drop" if s.get("stop_until_eos") else "decode",
        fill_every=stop or 1,
        guidance=float(s.get("cfg_scale") or 0),
        confidence=rule,
        top_p=None if s.get("top_p") is None else max(s["top_p"], TINY),  # at 0 the best token is left, as released
        top_k=s.get("top_k"),
    )


def _llada(data: Mapping[str, Any], vocab: int) -> Unmasker:
    """LLaDA's ``generate`` and its descendants: an even split, or a rule that ignores the steps."""
    s, sampling = data["settings"], _sampling(data, "plain")
    random = s["remasking"] == "random"
    if "denoising_order" in data:
        return RandomOrder(sampling=sampling, noise=ReplayedOrder(data["denoising_order"]), steps=s["steps"])
    noise = None
    if data.get("stochastic"):
        noise = ReplayedLLaDA(
            data["torch_seed"],
            left_padding(data),
            len(data["final"][0]),
            vocab if sampling.temperature > 0 else None,
            random,
            _forwards(data),
        )
    score = "random" if random else "confidence"
    if s.get("threshold") is not None:
        return Threshold(sampling=sampling, noise=noise, threshold=s["threshold"], score=score)
    factor = s.get("factor") if s.get("factor") is not None else s.get("dynamic_threshold_factor")
    if factor is not None:
        return Factor(sampling=sampling, noise=noise, factor=factor, variant="fast-dllm", score=score)
    return (Random if random else LowConfidence)(sampling=sampling, noise=noise, steps=s["steps"])


def _forwards(data: Mapping[str, Any]) -> tuple[int, int]:
    """Forward calls that LLaDA's program makes for a block, and those of them that commit something."""
    s = data["settings"]
    size = s.get("block_length") or s["gen_length"]
    made = s["steps"] // (s["gen_length"] // size)
    return made, made if _by_rule(s) else min(made, size)


def _by_rule(settings: Mapping[str, Any]) -> bool:
    """Whether a threshold or a factor decides how many rows a step commits."""
    return any(settings.get(name) is not None for name in ("threshold", "factor", "dynamic_threshold_factor"))


def _dream(data: Mapping[str, Any]) -> Unmasker:
    """Dream's ``diffusion_generate`` and its descendants.

    Caches that work in blocks (Fast-dLLM, Sparse-dLLM) commit the first row of a block alone in its first step;
    SPA-Cache commits at least one row per step, the others make the idle forward calls too.
    """
    s, sampling, method = data["settings"], _sampling(data, "filtered"), data["method"]
    noise = None
    if data.get("stochastic"):
        noise = ReplayedDream(data["torch_seed"], left_padding(data), len(data["final"][0]))
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
        threshold = s.get("threshold")  # without one the released program commits a whole run of rows
        return LeftToRight(**common, threshold=-1e9 if threshold is None else threshold)
    if _debiased(s):
        table = np.array(data["token_freq"])
        return PCSampler(**common, table=table, clip_alpha=s.get("clip_alpha") or CLIP, threshold=s.get("threshold"))
    if s.get("threshold") is not None:
        return Threshold(**common, threshold=s["threshold"])
    if s.get("factor") is not None:
        return Factor(**common, factor=s["factor"], variant="d2")
    if s.get("gamma") is not None:
        return EntropyBounded(**common, gamma=s["gamma"], largest="published")
    return CertaintyPrior(**common)
