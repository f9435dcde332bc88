"""The random numbers of recorded runs: drawn from torch's generator in the order and shapes of the programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcache.unmasking.base import Asked, Noise


class Replayed(Noise):
    """Draws that a recorded program made for its whole canvas.

    Args:
        seed: of the generator.
        pads: left padding of each sequence, which dcache does not have.
        slots: width of the recorded canvas, padding included.
    """

    def __init__(self, seed: int, pads: Sequence[int], slots: int):
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._pads, self._size = torch.tensor(pads), (len(pads), slots)

    def _read(self, drawn: Tensor, at: Asked) -> Tensor:
        """The draws (batch, slots, ...) of the read positions, (batch, w, ...).

        The two sequences of a guided text share them: the program draws after it has combined their logits.
        """
        text = at.lanes[:, None] % self._size[0]
        return drawn[text, (at.where + self._pads[text]).clamp_max(self._size[1] - 1)]


class ReplayedLLaDA(Replayed):
    """In every forward, a draw per token if it samples (`vocab` is given), then one per position if it ranks at random.

    Args:
        seed: of the generator.
        pads: left padding of each sequence.
        slots: width of the recorded canvas.
        vocab: ids that a token is drawn from; None if none is drawn.
        positions: whether positions are drawn.
        forwards: calls that the program makes for a block, and the first of them, which commit something. The rest
            draws too, and dcache does not make it.
    """

    def __init__(
        self,
        seed: int,
        pads: Sequence[int],
        slots: int,
        vocab: int | None,
        positions: bool,
        forwards: tuple[int, int] = (1, 1),
    ):
        super().__init__(seed, pads, slots)
        self._vocab, self._positions, self._forwards = vocab, positions, forwards
        self._drawn: list[tuple[Tensor | None, Tensor | None]] = []

    def _at(self, at: Asked) -> tuple[Tensor | None, Tensor | None]:
        made, useful = self._forwards
        block, step = divmod(int(at.step.max()), useful)
        forward = block * made + step
        while len(self._drawn) <= forward:
            tokens = positions = None
            if self._vocab is not None:
                tokens = torch.rand(*self._size, self._vocab, dtype=torch.float64, generator=self._generator)
            if self._positions:
                positions = torch.rand(self._size, generator=self._generator)
            self._drawn.append((tokens, positions))
        return self._drawn[forward]

    def tokens(self, at: Asked, vocab: int) -> Tensor:
        """The recorded draw of this step."""
        drawn = self._at(at)[0]
        assert drawn is not None
        return self._read(drawn, at)

    def positions(self, at: Asked) -> Tensor:
        """The recorded draw of this step."""
        drawn = self._at(at)[1]
        assert drawn is not None
        return self._read(drawn, at)


class ReplayedDream(Replayed):
    """Exponential draws over the masked rows, in the program's order.

    ``torch.multinomial`` of one sample is ``argmax(p / q)`` with q exponential, and the largest of it without
    replacement; ``exp(-q)`` is the uniform number that gives the same as Gumbel noise.
    """

    def __init__(self, seed: int, pads: Sequence[int], slots: int):
        super().__init__(seed, pads, slots)
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
                drawn = self._read(self._exponential(*self._size), at)
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
