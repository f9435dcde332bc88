"""Recorded runs of the published methods, and the check that dcache reproduces them.

A golden folder holds one JSON file per case beside a safetensors file of the same name with logits, and the weights of
the tiny model they were recorded on, in the published format. Integers (rows, commits, tokens, layers) must be equal at
every step; floats within the tolerance that the folder states. Left padding, which a recorded batch may have, is
stripped: dcache runs sequences of different lengths, each from slot 0.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.loading import Model, load_model
from dcache.policies.dkv import DKVCache
from dcache.policies.elastic import ElasticCache
from dcache.policies.none import NoCache
from dcache.policy import CachePolicy
from dcache.state import State
from dcache.trace import Step
from dcache.unmasking.base import Ask, Asked, Noise, Picks, Sampling, Unmasker
from dcache.unmasking.confidence import LowConfidence, Random, Threshold

LOGITS_TOLERANCE = 2e-4  # absolute, float32; recorded logits reach about 20
CONFIDENCE_TOLERANCE = 1e-4
SIMILARITY_TOLERANCE = 2e-5


@lru_cache(maxsize=8)
def _weights(folder: Path) -> Model:
    return load_model(folder, device="cpu", dtype=torch.float32)


class Replayed(Noise):
    """The random numbers of a recorded run: drawn from torch's generator in the order and shapes of that program."""

    def __init__(self, seed: int, batch: int, slots: int, vocab: int, temperature: bool, positions: bool):
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._size = (batch, slots, vocab)
        self._temperature, self._positions = temperature, positions
        self._drawn: list[tuple[Tensor | None, Tensor | None]] = []

    def _at(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        while len(self._drawn) <= step:
            tokens = positions = None
            if self._temperature:
                tokens = torch.rand(self._size, dtype=torch.float64, generator=self._generator)
            if self._positions:
                positions = torch.rand(self._size[:2], generator=self._generator)
            self._drawn.append((tokens, positions))
        return self._drawn[step]

    def tokens(self, at: Asked, vocab: int) -> Tensor:
        """The recorded draw of this step."""
        drawn = self._at(int(at.step.max()))[0]
        assert drawn is not None
        where = at.where.clamp_max(drawn.shape[1] - 1)
        return drawn.gather(1, where[..., None].expand(*where.shape, vocab))

    def positions(self, at: Asked) -> Tensor:
        """The recorded draw of this step."""
        drawn = self._at(int(at.step.max()))[1]
        assert drawn is not None
        return drawn.gather(1, at.where.clamp_max(drawn.shape[1] - 1))


class Watched(Unmasker):
    """An unmasker that also reads every computed row and keeps the logits of each step."""

    def __init__(self, inner: Unmasker):
        super().__init__(inner.config, inner.sampling, inner.noise)
        self.inner = inner
        self.logits: list[dict[int, dict[int, Tensor]]] = []  # step -> sequence -> position -> (vocab,)

    def begin(self, net: Any, state: State) -> None:
        """Begin the inner unmasker."""
        super().begin(net, state)
        self.inner.begin(net, state)
        self.logits = []

    def ask(self, state: State) -> Ask:
        """Read everything; the window stays."""
        self.logits.append({b: {} for b in range(state.batch)})
        return replace(self.inner.ask(state), read=state.valid)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Keep the logits of computed rows; a second pass overwrites the first."""
        for b, i in at.predicted.nonzero().tolist():
            self.logits[-1][b][int(at.where[b, i])] = logits[b, i]
        return self.inner.pick(logits, at)


def equal(what: str, found: object, expected: object) -> None:
    """Assert equality with a message that says where."""
    assert found == expected, f"{what}: found {found}, expected {expected}"


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert closeness where `expected` is finite, with a message that says where; NaN never passes."""
    told = expected.isfinite()  # a record of logits after a suppression holds -inf
    worst = float((found - expected)[told].abs().nan_to_num(float("inf")).max()) if told.any() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.3g}, allowed {tolerance:.3g}"


@dataclass(frozen=True)
class Case(ABC):
    """One recorded run.

    Attributes:
        file: its JSON file.
        data: the content.
    """

    file: Path
    data: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Folder and file, for test ids."""
        return f"{self.file.parent.name}/{self.file.stem}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Arguments of the recorded call."""
        settings: Mapping[str, Any] = self.data["settings"]
        return settings

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What was recorded beside the JSON."""
        file = self.file.with_suffix(".safetensors")
        return load_file(file) if file.exists() else {}

    @property
    @abstractmethod
    def unsupported(self) -> str | None:
        """Why this case cannot run with what is installed; None if it can."""

    @abstractmethod
    def check(self) -> None:
        """Run the case and compare; raises AssertionError naming the step."""

    def model(self, folder: Path, mask_id: int, end_ids: tuple[int, ...]) -> Model:
        """The tiny model with the ids that this case uses."""
        model = _weights(folder)
        spec = replace(model.spec, mask_id=mask_id, eos_id=end_ids[0], end_ids=end_ids)
        transformer = type(model.transformer)(spec)
        transformer.load_state_dict(model.transformer.state_dict(), assign=True)
        return replace(model, spec=spec, transformer=transformer)


class LoopCase(Case):
    """A case of the ``none`` and ``dkv`` folders: LLaDA's loop and what was built on it."""

    @property
    def unsupported(self) -> str | None:
        """Families, policies and unmaskers that other folders of this format use."""
        s = self.settings
        known = {
            "gen_length", "block_length", "steps", "temperature", "cfg_scale", "remasking", "logits_eos_inf",
            "confidence_eos_eot_inf", "eos_token_id", "eot_token_id", "cache_reloading_step", "enable_cache",
            "threshold", "stop_until_eos", "num_transfer_tokens",
        }  # fmt: skip
        method = self.data["method"]
        if not str(self.data["model"]).startswith("llada"):
            return f"model family of {self.data['model']!r} is not installed"
        if method not in ("none", "dkv-cache-decode"):
            return f"method {method!r} is not installed"
        if s.get("cfg_scale"):
            return "classifier-free guidance is not part of dcache yet"
        other = sorted(k for k in set(s) - known if s[k] not in (None, False) and (k, s[k]) != ("alg", "maskgit_plus"))
        if other:
            return f"settings {other} need an unmasker that is not installed"
        if self.data.get("strategy", "vanilla") != "vanilla":
            return f"strategy {self.data['strategy']!r} is not installed"
        return None

    @property
    def pads(self) -> list[int]:
        """Left padding of each recorded sequence."""
        mask = self.data.get("attention_mask")
        return [0] * self.data["batch"] if mask is None else [row.index(1) for row in mask]

    def _policy(self) -> CachePolicy:
        if self.data["method"] == "none":
            return NoCache()
        return DKVCache(interval=self.settings["cache_reloading_step"])

    def _unmasker(self, slots: int, vocab: int) -> Unmasker:
        s = self.settings
        random, temperature = s.get("remasking") == "random", float(s.get("temperature", 0))
        sampling = Sampling(
            temperature=temperature,
            forbid_eos=s.get("logits_eos_inf", False),
            eos_last="published" if s.get("confidence_eos_eot_inf") else "off",
            after_end="drop" if s.get("stop_until_eos") else "decode",
        )
        noise = None
        if self.data.get("stochastic"):
            seed, batch = self.data["torch_seed"], self.data["batch"]
            noise = Replayed(seed, batch, slots, vocab, temperature > 0, random)
        if s.get("threshold") is not None:
            least = s.get("num_transfer_tokens", 1)
            return Threshold(sampling=sampling, noise=noise, threshold=s["threshold"], at_least=least)
        if "steps" in s:
            return (Random if random else LowConfidence)(sampling=sampling, noise=noise, steps=s["steps"])
        return LowConfidence(sampling=sampling, noise=noise, tokens_per_step=s.get("num_transfer_tokens", 1))

    def check(self) -> None:
        """Rows, commits and tokens of every step; logits where recorded; the final canvas."""
        s = self.settings
        ends = tuple(i for i in (s.get("eos_token_id"), s.get("eot_token_id")) if i is not None)
        model = self.model((self.file.parent / self.data["weights"]).resolve(), self.data["mask_id"], ends or (126,))
        prompts = [row[pad:] for row, pad in zip(self.data["prompt"], self.pads, strict=True)]
        state = State(model.spec, prompts, s["gen_length"], s["block_length"])
        watched = Watched(self._unmasker(state.slots, model.spec.vocab_size))
        trace = decode(Engine(model.transformer, self._policy(), watched, debug=True), state)
        self._compare_commits(trace)
        for b, pad in enumerate(self.pads):
            final = state.tokens[b, : state.lengths[b]].tolist()
            equal(f"sequence {b}: final canvas", final, self.data["final"][b][pad:])
        if "strategy" not in self.data:
            self._compare_passes(trace, watched)

    def _compare_commits(self, trace: list[Step]) -> None:
        for b, pad in enumerate(self.pads):
            recorded = [sorted((p - pad, t) for p, t in step["commit"][b]) for step in self.data["steps"]]
            found = [[(int(p), int(s.tokens[b, p])) for p in np.flatnonzero(s.commit[b])] for s in trace]
            if "strategy" in self.data:  # its sequences wait for each other at block ends: same steps, other numbers
                recorded, found = [x for x in recorded if x], [x for x in found if x]
            for i, (now, then) in enumerate(zip(found, recorded, strict=False)):
                equal(f"step {i}, sequence {b}: commits", now, then)
            equal(f"sequence {b}: number of steps", len(found), len(recorded))

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        for i, (step, recorded) in enumerate(zip(trace, self.data["steps"], strict=True)):
            for b, pad in enumerate(self.pads):
                total = len(self.data["final"][b])
                rows = recorded["rows"][b] if "rows" in recorded else range(total)
                computed = [p - pad for p in rows if p >= pad]
                equal(f"step {i}, sequence {b}: rows", np.flatnonzero(step.rows[b]).tolist(), computed)
                if (logits := self.tensors.get(f"logits.{i}")) is not None:
                    for n, p in enumerate(p - pad for p in rows):
                        if p >= 0:
                            close(f"step {i}, row {p}", watched.logits[i][b][p], logits[b, n], LOGITS_TOLERANCE)
                confidence = self.tensors["confidence"][i, b, pad:]
                scored = confidence.isfinite() & torch.from_numpy(step.rows[b, : len(confidence)])
                if self.settings.get("remasking") != "random":
                    now = torch.from_numpy(step.confidence[b, : len(confidence)])
                    close(f"step {i}: confidence", now[scored], confidence[scored], CONFIDENCE_TOLERANCE)


class ElasticCase(Case):
    """A case of the ``elastic`` folder."""

    @property
    def folder(self) -> Path:
        """Where the weights are: beside the case."""
        return self.file.parent

    @property
    def unsupported(self) -> str | None:
        """Other families."""
        if not str(self.data["model"]).startswith("llada"):
            return f"model family of {self.data['model']!r} is not installed"
        return None

    def _unmasker(self) -> Unmasker:
        s, sampling = self.settings, Sampling(after_end="drop-once")
        if s["threshold"] is None:
            return LowConfidence(sampling=sampling, tokens_per_step=s["tokens_per_iter"], window=s["window_length"])
        return Threshold(sampling=sampling, threshold=s["threshold"], window=s["window_length"])

    def check(self) -> None:
        """Rows, picks, start layers, commits, drops, accounts, similarities, logits; and the uncached run."""
        s = self.settings
        model = self.model(self.folder, s["mask_id"], (s["eos_id"],))
        prompts = [self.data["prompt_ids"]]
        state = State(model.spec, prompts, s["gen_length"])
        policy = ElasticCache(gamma=s["gamma"], track_num=s["track_num"], block_caching=s["block_caching"])
        watched = Watched(self._unmasker())
        engine = Engine(model.transformer, policy, watched, debug=True)
        trace = decode(engine, state)
        for step, recorded in zip(trace, self.data["steps"], strict=False):
            self._compare_step(step, recorded)
        equal("number of steps", len(trace), self.data["nfe"])
        equal("final canvas", state.tokens[0].tolist(), self.data["final_sequence"])
        self._compare_floats(trace, watched)
        uncached = State(model.spec, prompts, s["gen_length"])
        steps = decode(Engine(model.transformer, NoCache(), self._unmasker()), uncached)
        reference = self.data["no_cache_reference"]
        equal("without cache: final canvas", uncached.tokens[0].tolist(), reference["final_sequence"])
        equal("without cache: number of steps", len(steps), reference["nfe"])

    def _compare_step(self, step: Step, recorded: Mapping[str, Any]) -> None:
        i, layers, total = recorded["step"], self.data["num_layers"], self.data["total_length"]
        equal(f"step {i}: rows", np.flatnonzero(step.rows[0]).tolist(), sorted(set(recorded["query"])))
        begun = -1 if i == 0 else layers if step.start is None else int(step.start[0])
        equal(f"step {i}: first refreshed layer", begun, recorded["start_layer"])
        dump = step.rows.shape[1]
        picks = [sorted(set(row.tolist()) - {dump}) for row in step.reports["picks"][:, 0]]
        equal(f"step {i}: picks by layer", picks, [sorted(row) for row in recorded["tracked_by_layer"]])
        committed = dict(zip(recorded["committed"], recorded["tokens"], strict=True))
        found = {int(p): int(step.tokens[0, p]) for p in np.flatnonzero(step.commit[0])}
        equal(f"step {i}: commits", found, committed)
        n_rows, begin = int(step.rows[0].sum()), max(begun, 0)
        queried = [n_rows + (total if begun > 0 and layer >= begin else 0) for layer in range(layers)]
        equal(f"step {i}: row-layers, both passes", step.row_layers[:, 0].tolist(), queried)
        published = [total if layer >= begin else n_rows for layer in range(layers)]
        equal(f"step {i}: row-layers as published", published, recorded["rows_per_layer"])

    def _compare_floats(self, trace: list[Step], watched: Watched) -> None:
        for step, recorded, logits in zip(trace, self.data["steps"], watched.logits, strict=True):
            i = recorded["step"]
            for layer, value in enumerate(recorded["similarity"]):
                if value is not None:
                    found = torch.tensor(float(step.reports["similarity"][layer, 0]))
                    close(f"step {i}, layer {layer}: similarity", found, torch.tensor(value), SIMILARITY_TOLERANCE)
            for position, value in zip(recorded["predict"], recorded["confidence"], strict=True):
                found = torch.tensor(float(step.confidence[0, position]))
                close(f"step {i}, row {position}: confidence", found, torch.tensor(value), CONFIDENCE_TOLERANCE)
            positions = self.tensors.get(f"step_{i:03d}.positions")
            if positions is not None:
                kept = torch.stack([logits[0][p] for p in positions.tolist()])
                close(f"step {i}: logits", kept, self.tensors[f"step_{i:03d}.logits"], LOGITS_TOLERANCE)


def cases(root: Path) -> Iterator[Case]:
    """All recorded runs below `root`, in order of path."""
    for file in sorted(root.rglob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "steps" not in data or "settings" not in data:
            continue
        yield (ElasticCase if data.get("method") == "elastic-cache" else LoopCase)(file, data)
