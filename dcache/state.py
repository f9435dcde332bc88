"""What the host knows of a batch while it is decoded: the mirror of the canvas that `plan` and `ask` read.

The loop alone writes it. Sequences start at slot 0 of their row; a shorter one leaves slots at the end that do not
exist (`valid` is false there). Every array has shape (batch, slots) or (batch,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dcache.arrays import Bools, Bytes, Floats, Ints, first, places
from dcache.errors import UnmaskerError, UsageError
from dcache.models.transformer import ModelSpec
from dcache.regions import NOWHERE, region_of

if TYPE_CHECKING:
    from torch import Tensor

    from dcache.unmasking.base import Ask, Update

FLAG_DTYPES = (np.dtype(np.bool_), np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class Seen:
    """What the last pass of a step brought back to the host.

    Attributes:
        tokens: (batch, slots) int64 candidate, -1 where nothing was predicted.
        taken: (batch, slots) bool, picked by the unmasker.
        confidence: (batch, slots) float32 before priors, -inf where nothing was predicted.
        remask: (batch, slots) bool, committed rows that the unmasker puts back to the mask.
        reports: what the policy's layers reported in this step, by name: (layers, batch, ...), or (batch, ...).
    """

    tokens: Ints
    taken: Bools
    confidence: Floats
    remask: Bools
    reports: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def predicted(self) -> Bools:
        """(batch, slots) bool: positions that have a candidate."""
        return self.tokens >= 0


class Moment(NamedTuple):
    """A state before a step was applied, as far as records need it: see `State` for the fields."""

    step: Ints
    active: Bools
    valid: Bools
    region_sizes: Ints
    eos_id: int


class Span(NamedTuple):
    """Consecutive rows of a prompt whose embeddings are known by their content, such as those of an image.

    Attributes:
        start: first position.
        stop: the position behind the last.
        key: the same for the same embeddings, in any prompt.
    """

    start: int
    stop: int
    key: str


class Embeddings(NamedTuple):
    """Prompt rows of a sequence that start from an embedding and not from a token, such as those of an image.

    Attributes:
        positions: (k,) int64, ascending.
        values: (k, d_model), on the device of the model.
        spans: parts of these positions that may come again in other prompts, ascending.
        preamble: tokens that stand in front of all text in every prompt, whatever is asked, such as a system turn.
    """

    positions: Ints
    values: Tensor
    spans: tuple[Span, ...] = ()
    preamble: tuple[int, ...] = ()


class State:
    """The canvas of a batch and how far its decoding has come.

    Args:
        spec: the model's sizes and ids.
        prompts: token ids of each prompt; they may differ in length.
        gen_length: masked rows after each prompt, one number or one per sequence.
        block_length: rows of a semi-autoregressive block, left to right; None makes the generation one block.
        ids: number of each sequence within the run, part of the seed of its noise; 0, 1, ... by default. A batch
            gives the same tokens as single runs because the noise depends on this number and not on the batch.
        slots: width of the canvas; the longest sequence by default.
        guided: for classifier-free guidance, double the batch: sequence ``n + b`` is text b with every prompt token
            replaced by the mask (LLaDA). The engine combines their logits, so both make the same commits.
        embeddings: for each prompt what replaces the embeddings of its tokens at some positions, or None. The token
            ids given there stand in for rows that have none, and are never embedded.

    Attributes:
        batch: number of sequences.
        slots: width of the canvas.
        tokens: (batch, slots) int64.
        valid: (batch, slots) bool: the slot belongs to the sequence.
        prompt: (batch, slots) bool: the slot is prompt.
        embedded: (batch, slots) bool: prompt slots that start from an embedding of their own.
        region: (batch, slots) uint8: what the slot stands for, by number, see `dcache.regions`. That of a guided text's
            masked prompt is that of the prompt.
        region_sizes: (batch, regions) int64: slots of each region.
        masked: (batch, slots) bool: still to decode. A list of its own, not ``tokens == mask_id``: rows dropped
            behind an end-of-text hold the mask and are not decoded, and a model may predict the mask id.
        known: (batch, slots) bool: prompt, or committed and not put back; rows dropped undecoded are neither masked
            nor known.
        changed: (batch, slots) bool: token written by the previous step (committed, re-masked, or overwritten with
            end-of-text; only then may a row change that was known and stays so).
        window: (batch, slots) bool: what the unmasker may commit in this step.
        order: (batch, slots) int64: place of each window row in the order of commits, for an unmasker that announces
            them; otherwise left to right.
        block: (batch, slots) bool: current block, decoded rows included.
        step: (batch,) int64: steps done by this sequence.
        block_step: (batch,) int64: steps since its block began; 0 in the first pass of a block.
        seen: results of the previous step; None before the first.
    """

    def __init__(
        self,
        spec: ModelSpec,
        prompts: Sequence[Sequence[int]],
        gen_length: int | Sequence[int],
        block_length: int | None = None,
        ids: Sequence[int] | None = None,
        slots: int | None = None,
        guided: bool = False,
        embeddings: Sequence[Embeddings | None] | None = None,
    ):
        self.guided, self.n_texts = guided, len(prompts)
        self.embeddings = tuple(embeddings or [None] * len(prompts))
        ids = range(len(prompts)) if ids is None else ids
        if guided:
            prompts = [*prompts, *([spec.mask_id] * len(p) for p in prompts)]
            ids = [*ids, *ids]
            gen_length = gen_length if isinstance(gen_length, int | np.integer) else [*gen_length, *gen_length]
        batch = len(prompts)
        lengths = np.array([len(p) for p in prompts], dtype=np.int64)
        gen = np.broadcast_to(np.asarray(gen_length, dtype=np.int64), (batch,)).copy()
        total = lengths + gen
        self._check(spec, lengths, gen, block_length)
        longest = int(total.max())
        if slots is not None and slots < longest:
            raise UsageError(f"slots is {slots}, but the longest sequence has {longest} positions; leave it out")
        slots = longest if slots is None else slots
        self.batch, self.slots = batch, slots
        place = np.arange(slots)
        self._row_starts = slots * np.arange(batch)  # in a flattened array
        self._left_to_right: Ints = np.broadcast_to(place, (batch, slots))
        self.spec = spec
        self.ids = np.asarray(ids, dtype=np.int64)
        self.lengths, self.gen_start, self.gen_length = total, lengths, gen
        self.block_length = block_length
        self.valid: Bools = place < total[:, None]
        self.prompt: Bools = place < lengths[:, None]
        self.tokens: Ints = np.full((batch, slots), spec.mask_id, dtype=np.int64)
        for b, ids_ in enumerate(prompts):
            self.tokens[b, : len(ids_)] = ids_
        self.embedded: Bools = self._embedded()
        images = np.tile(self.embedded[: self.n_texts], (batch // self.n_texts, 1))
        self.region: Bytes = region_of(self.valid, self.prompt, images)
        self.region_sizes: Ints = np.stack([(self.region == r).sum(1) for r in range(NOWHERE)], axis=1)
        self._generated: Bools = self.valid & ~self.prompt
        self.masked: Bools = self._generated.copy()
        self._looked_at: Bools | None = None  # the mask that `_leftmost` and `_active` were read from
        self._active: Bools = np.zeros(batch, dtype=bool)
        self.known: Bools = self.prompt.copy()
        self.changed: Bools = np.zeros_like(self.valid)
        self.window: Bools = np.zeros_like(self.valid)
        self.order: Ints = self._left_to_right
        self.step: Ints = np.zeros(batch, dtype=np.int64)
        self.block_step: Ints = np.zeros(batch, dtype=np.int64)
        self.block: Bools = np.zeros_like(self.valid)
        self.seen: Seen | None = None
        self._own_blocks = False
        self._block_start = np.full(batch, -1, dtype=np.int64)
        self._enter(self._fixed_block())

    @staticmethod
    def _check(spec: ModelSpec, lengths: Ints, gen: Ints, block_length: int | None) -> None:
        if len(lengths) == 0:
            raise UsageError("there is no prompt to decode; give at least one")
        if (lengths < 1).any():
            raise UsageError(f"prompt {int((lengths < 1).argmax())} is empty; a canvas needs at least one prompt token")
        if (gen < 1).any():
            raise UsageError(f"gen_length is {int(gen.min())}; it must be at least 1")
        if block_length is not None and (block_length < 1 or (gen % block_length).any()):
            bad = int(gen[(gen % max(block_length, 1) != 0)][0]) if block_length > 0 else int(gen[0])
            raise UsageError(
                f"gen_length {bad} is not divisible by block_length {block_length}; "
                "blocks are equal spans, so choose a divisor"
            )
        longest = int((lengths + gen).argmax())
        if lengths[longest] + gen[longest] > spec.max_positions:
            raise UsageError(
                f"prompt {longest} has {lengths[longest]} tokens and gen_length is {gen[longest]}: "
                f"{lengths[longest] + gen[longest]} positions, but the model was built for {spec.max_positions}; "
                "shorten the prompt or gen_length"
            )

    def _embedded(self) -> Bools:
        """Where prompts start from embeddings; the masked prompt of a guided text (LLaDA-V) does nowhere."""
        if len(self.embeddings) != self.n_texts:
            raise UsageError(f"{len(self.embeddings)} prompts have embeddings, or None, but there are {self.n_texts}")
        where = np.zeros_like(self.valid)
        for b, given in enumerate(self.embeddings):
            if given is None:
                continue
            expected = (len(given.positions), self.spec.d_model)
            if tuple(given.values.shape) != expected:
                raise UsageError(
                    f"prompt {b} has {expected[0]} positions with embeddings of shape {tuple(given.values.shape)}, "
                    f"expected {expected}"
                )
            outside = [int(p) for p in given.positions if not 0 <= p < self.gen_start[b]]
            if outside or len(np.unique(given.positions)) != len(given.positions):
                told = f"position {outside[0]}" if outside else "a position twice"
                raise UsageError(f"the embeddings of prompt {b} name {told}; it has {self.gen_start[b]} tokens")
            where[b, given.positions] = True
        return where

    @property
    def finished(self) -> bool:
        """Whether nothing is left to decode in any sequence."""
        return not any(self.active.tolist())

    @property
    def active(self) -> Bools:
        """(batch,) bool: sequences that still have something to decode."""
        if self._looked_at is not self.masked:  # asked for a dozen times per step
            self._look()
        return self._active

    @property
    def moment(self) -> Moment:
        """Where the batch stands, to be looked at later."""
        return Moment(self.step, self.active, self.valid, self.region_sizes, self.spec.eos_id)

    @property
    def needed(self) -> Bools:
        """(batch, slots) bool: the rows whose logits predict the window."""
        return self.rows_for(self.window)

    def rows_for(self, positions: Bools) -> Bools:
        """Rows whose logits predict `positions` (batch, slots): the same, or each one `spec.shift` to the left.

        Position 0 is predicted by row 0. Positions that do not exist are dropped before the shift, so that a mask
        that runs into another sequence's padding cannot add a row.
        """
        rows: Bools = positions & self.valid
        for _ in range(self.spec.shift):
            rows = np.concatenate([rows[:, :1] | rows[:, 1:2], rows[:, 2:], np.zeros_like(rows[:, :1])], axis=1)
        return rows

    def predicted_by(self, rows: Bools) -> Bools:
        """Positions that `rows` (batch, slots) predict: the same, or each one `spec.shift` to the right."""
        for _ in range(self.spec.shift):
            rows = np.concatenate([rows[:, :1], rows[:, :-1]], axis=1)
        return rows & self.valid

    def expect(self, ask: Ask) -> Ask:
        """Take over what the unmasker asks for in this step; returns it, its form checked.

        That the window holds masked rows alone is checked while the pass runs, by the engine.
        """
        masks = ("window", ask.window), ("block", ask.block), ("read", ask.read), ("shadow", ask.shadow)
        for name, mask in masks:
            if mask is not None and (mask.shape != self.valid.shape or mask.dtype != np.bool_):
                raise UnmaskerError(
                    f"Ask.{name} has shape {mask.shape} and dtype {mask.dtype}, "
                    f"expected (batch={self.batch}, slots={self.slots}) bool"
                )
        if (order := ask.order) is not None and (order.shape != self.valid.shape or order.dtype != np.int64):
            raise UnmaskerError(
                f"Ask.order has shape {order.shape} and dtype {order.dtype}, "
                f"expected (batch={self.batch}, slots={self.slots}) int64"
            )
        if (due := ask.commits) is not None and (due.shape != (self.batch,) or due.dtype != np.bool_):
            raise UnmaskerError(
                f"Ask.commits has shape {due.shape} and dtype {due.dtype}, expected (batch={self.batch},) bool"
            )
        for name, flag in ask.flags.items():
            if not isinstance(flag, np.ndarray) or flag.dtype not in FLAG_DTYPES:
                found = f"dtype {flag.dtype}" if isinstance(flag, np.ndarray) else f"type {type(flag).__name__}"
                raise UnmaskerError(f"Ask.flags[{name!r}] has {found}, expected bool, int64 or floats of numpy")
        self.window = ask.window
        self.order = self._left_to_right if ask.order is None else ask.order
        if ask.block is not None:  # blocks of the unmasker's own, from now on
            if not self._own_blocks:
                self._own_blocks, self._block_start = True, np.full(self.batch, -1, dtype=np.int64)
            self._enter(ask.block)
        return ask

    def apply(self, update: Update, seen: Seen) -> None:
        """Write what the step decided and move on: tokens, masked, changed, step and block."""
        active = self.active
        remasks = bool(np.count_nonzero(update.remask))  # a third of the time of `any`; so wherever the device waits
        at = places(update.commit)
        new = update.tokens.take(at)
        self._check_update(update, at, new, remasks, seen)
        written, tokens = update.written(self.spec.eos_id)
        if written is not update.commit:
            at = places(written)
            new = tokens.take(at)
        self.changed = written
        self.tokens = self.tokens.copy()
        self.tokens.put(at, new)
        self.masked = self.masked > (written | update.drop)  # and not, in one call
        self.known = self.known | written
        if remasks:
            self.changed = written | update.remask
            self.tokens[update.remask] = self.spec.mask_id
            self.masked |= update.remask
            self.known &= ~update.remask
        self.step = self.step + active
        self.seen = seen
        if not self._own_blocks:
            block = self._fixed_block()
            if block is self.block:  # no sequence has left its own
                self.block_step = self.block_step + 1
            else:
                self._enter(block)

    def _check_update(self, update: Update, at: Ints, new: Ints, remasks: bool, seen: Seen) -> None:
        self._check_commits(at, new)
        if update.tokens is not seen.tokens:  # then -1 no longer shows what was not predicted
            self._check_guesses(update, seen)
        if remasks or update.fill is not None:
            self._check_rewritten(update)
        if self.guided:
            self._check_pairs(update)

    def _check_commits(self, at: Ints, new: Ints) -> None:
        """What is committed: the tokens `new` (n,) at the places `at` (n,). The next pass waits for this."""
        inside: list[bool] = self.window.take(at).tolist()
        if not all(inside):
            b, p = divmod(int(at[inside.index(False)]), self.slots)
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: position {p} was committed outside the window; "
                "commit positions of State.window alone"
            )
        mask_id, n_ids = self.spec.mask_id, self.spec.vocab_size
        tokens: list[int] = new.tolist()
        if mask_id in tokens:
            b, p = divmod(int(at[tokens.index(mask_id)]), self.slots)
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: the mask token was committed at position {p}; "
                f"take id {mask_id} out of the candidates before one is picked"
            )
        if tokens and not 0 <= min(tokens) <= max(tokens) < n_ids:
            token = next(i for i in tokens if not 0 <= i < n_ids)
            b, p = divmod(int(at[tokens.index(token)]), self.slots)
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: token {token} was committed at position {p}; "
                f"the vocabulary has {n_ids} ids, and -1 means that the position was not predicted; "
                "commit rows of Seen.predicted alone"
            )

    def _check_guesses(self, update: Update, seen: Seen) -> None:
        """What was picked and is committed had a candidate, whatever token it gets."""
        guessed = update.commit & seen.taken & ~seen.predicted
        if guessed.any():
            b, p = (int(i[0]) for i in np.nonzero(guessed))
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: position {p} was picked and committed, but not predicted; "
                "commit rows of Seen.predicted alone"
            )

    def _check_rewritten(self, update: Update) -> None:
        """Rows that are put back or overwritten."""
        b = p = 0

        def found(mask: Bools) -> bool:
            nonlocal b, p
            if mask.any():
                b, p = (int(i[0]) for i in np.nonzero(mask))
                return True
            return False

        if found(update.remask & ~self._generated):
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: position {p} is not generated, yet re-masked; "
                "put rows behind the prompt back alone"
            )
        if update.fill is not None and found(update.fill & (~self._generated | update.remask)):
            raise UnmaskerError(
                f"step {self.step[b]}, sequence {b}: position {p} is overwritten with end-of-text, but it is "
                f"{'re-masked too' if update.remask[b, p] else 'not generated'}; "
                "overwrite generated rows that are not put back"
            )

    @staticmethod
    def _check_pairs(update: Update) -> None:
        first, second = (x.reshape(2, -1) for x in (update.commit, np.where(update.commit, update.tokens, -1)))
        if (first[0] != first[1]).any() or (second[0] != second[1]).any():
            raise UnmaskerError(
                "the unmasker treats the two sequences of a guided text differently; its decisions may depend on "
                "the logits, the state and `Asked.sequence`, not on the number of the lane"
            )

    def _look(self) -> None:
        """Find the leftmost masked row of each sequence, in a flattened canvas; the first row where there is none.

        Whether it is masked says whether the sequence is active: right after a pass less than half the time of
        ``any(1)``.
        """
        self._looked_at = self.masked
        self._leftmost: Ints = self.masked.argmax(1) + self._row_starts  # row 0 is prompt: not masked, and in no block
        self._active = self.masked.take(self._leftmost)

    def _fixed_block(self) -> Bools:
        """Blocks of the leftmost masked rows, none for finished sequences; `block` itself while they are the same."""
        self._look()
        if np.count_nonzero(self.block.take(self._leftmost)) == self.batch:
            return self.block
        leftmost = self._leftmost - self._row_starts
        size = self.gen_length if self.block_length is None else self.block_length
        start = np.where(self.active, leftmost - (leftmost - self.gen_start) % size, -1)
        moved = start != self._block_start
        if not moved.any():
            return self.block
        block, end = self.block.copy(), start + size
        for b in np.flatnonzero(moved):
            block[b] = False
            if start[b] >= 0:
                block[b, start[b] : end[b]] = True
        return block

    def _enter(self, block: Bools) -> None:
        start = first(block, -1)
        self.block_step = np.where(start == self._block_start, self.block_step + 1, 0)
        self.block, self._block_start = block, start
