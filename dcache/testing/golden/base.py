"""What all recorded runs share: reading a case, the model it was recorded on, the comparison.

A golden folder holds one JSON file per case beside a safetensors file of the same name with logits, and the weights of
the tiny model they were recorded on, in the published format. Integers (rows, commits, tokens, layers) must be equal at
every step; floats within the tolerance that the folder states. Left padding, which a recorded batch may have, is
stripped: dcache runs sequences of different lengths, each from slot 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcache.models.loading import Model
from dcache.plugins import load_model, plugins
from dcache.state import Seen, State
from dcache.unmasking.base import Ask, Asked, Picks, Unmasker, Update

LOGITS_TOLERANCE = 2e-4  # absolute, float32; recorded logits reach about 20
CONFIDENCE_TOLERANCE = 1e-4
SIMILARITY_TOLERANCE = 2e-5


@lru_cache(maxsize=8)
def _weights(folder: Path) -> Model:
    return load_model(folder, device="cpu", dtype=torch.float32)


class Watched(Unmasker):
    """An unmasker that also reads every position and keeps the logits of each step."""

    def __init__(self, inner: Unmasker):
        super().__init__(inner.config, inner.sampling, inner.noise)
        self.inner = inner
        self.logits: list[dict[int, dict[int, Tensor]]] = []  # step -> sequence -> position -> (vocab,)
        self.shift, self.end = 0, [0]

    def begin(self, net: Any, state: State) -> None:
        """Begin the inner unmasker."""
        super().begin(net, state)
        self.inner.begin(net, state)
        self.logits, self.shift, self.end = [], state.spec.shift, state.lengths.tolist()

    def ask(self, state: State) -> Ask:
        """Read everything; the window stays."""
        self.logits.append({b: {} for b in range(state.batch)})
        return replace(self.inner.ask(state), read=state.valid)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Keep the logits of computed rows; a second pass overwrites the first."""
        lanes = at.lanes.tolist()
        for b, i in at.predicted.nonzero().tolist():
            self.logits[-1][lanes[b]][int(at.where[b, i])] = logits[b, i]
        return self.inner.pick(logits, at)

    def settle(self, state: State, seen: Seen) -> Update:
        """As the inner unmasker does."""
        return self.inner.settle(state, seen)

    def of_row(self, step: int, b: int, row: int) -> Tensor | None:
        """Logits (vocab,) that a row gave in a step; None for a last row that predicts no position of the canvas."""
        kept = self.logits[step][b]
        return kept.get(row + self.shift) if row + self.shift == self.end[b] else kept[row + self.shift]


class Stored(Watched):
    """Also keeps what some stores hold after each step: name to (layers, batch, ...)."""

    def __init__(self, inner: Unmasker, names: Iterable[str]):
        super().__init__(inner)
        self.names = tuple(names)
        self.stores: list[dict[str, Tensor]] = []

    def begin(self, net: Any, state: State) -> None:
        """Begin, with the layers at hand."""
        super().begin(net, state)
        self._layers, self.stores = net.layers, []

    def settle(self, state: State, seen: Seen) -> Update:
        """After the passes of the step."""
        self.stores.append({name: torch.stack([at.stores[name] for at in self._layers]) for name in self.names})
        return super().settle(state, seen)


def left_padding(data: Mapping[str, Any]) -> list[int]:
    """Padding before each recorded prompt."""
    mask = data.get("attention_mask")
    return [0] * data["batch"] if mask is None else [row.index(1) for row in mask]


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
    def unsupported(self) -> str | None:
        """Why this case cannot run with what is installed; None if it can."""
        family = str(self.data["model"]).replace("_", "-").split("-")[0]
        known = plugins().models.entries
        return None if family in known else f"model family of {self.data['model']!r} is not installed"

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
