"""The unmasker that a recorded run used, from the settings that it states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcache.testing.golden.base import Replayed
from dcache.unmasking.base import Sampling, Unmasker
from dcache.unmasking.confidence import LowConfidence, Random, Threshold

KNOWN = {
    "gen_length", "block_length", "steps", "temperature", "cfg_scale", "remasking", "logits_eos_inf",
    "confidence_eos_eot_inf", "eos_token_id", "eot_token_id", "cache_reloading_step", "enable_cache",
    "threshold", "stop_until_eos", "num_transfer_tokens",
}  # fmt: skip


def unknown_settings(data: Mapping[str, Any]) -> str | None:
    """Why no installed unmasker does what was recorded; None if one does."""
    s = data["settings"]
    if s.get("cfg_scale"):
        return "classifier-free guidance is not part of dcache yet"
    other = sorted(k for k in set(s) - KNOWN if s[k] not in (None, False) and (k, s[k]) != ("alg", "maskgit_plus"))
    if other:
        return f"settings {other} need an unmasker that is not installed"
    if data.get("strategy", "vanilla") != "vanilla":
        return f"strategy {data['strategy']!r} is not installed"
    return None


def recorded_unmasker(data: Mapping[str, Any], slots: int, vocab: int) -> Unmasker:
    """The unmasker of a recorded run.

    Args:
        data: the case.
        slots: width of its canvas.
        vocab: size of the vocabulary.
    """
    s = data["settings"]
    random, temperature = s.get("remasking") == "random", float(s.get("temperature", 0))
    sampling = Sampling(
        temperature=temperature,
        forbid_eos=s.get("logits_eos_inf", False),
        eos_last="published" if s.get("confidence_eos_eot_inf") else "off",
        after_end="drop" if s.get("stop_until_eos") else "decode",
    )
    noise = None
    if data.get("stochastic"):
        seed, batch = data["torch_seed"], data["batch"]
        noise = Replayed(seed, batch, slots, vocab, temperature > 0, random)
    if s.get("threshold") is not None:
        least = s.get("num_transfer_tokens", 1)
        return Threshold(sampling=sampling, noise=noise, threshold=s["threshold"], at_least=least)
    if "steps" in s:
        return (Random if random else LowConfidence)(sampling=sampling, noise=noise, steps=s["steps"])
    return LowConfidence(sampling=sampling, noise=noise, tokens_per_step=s.get("num_transfer_tokens", 1))
