"""Decode prompts with one policy: the library call, and the runner that `compare` shares with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from pydantic import ValidationError

from dcache.calls import Call
from dcache.config import DEFAULT_GEN_LENGTH, DecodeSettings
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.network import ALIGN_SLOTS
from dcache.errors import UsageError
from dcache.models.loading import Model
from dcache.plugins import explain, make_policy, make_unmasker
from dcache.policy import CachePolicy
from dcache.reuse import ReuseCache
from dcache.state import Embeddings, Span, State
from dcache.tasks.base import Problem
from dcache.text import printable
from dcache.trace import Step, Trace
from dcache.unmasking.base import Unmasker

if TYPE_CHECKING:
    from dcache.engine.engine import Executor

PAIRED = "paired"
PROMPTS = "give a text, or a list of texts or of token-id lists"


class Prompt(Sequence[int]):
    """Token ids of a prompt, and what the rows of its images start from.

    Args:
        ids: one for every row; those of image rows stand in for none.
        embeddings: of the image rows; None without images.
    """

    def __init__(self, ids: Sequence[int], embeddings: Embeddings | None = None):
        self.ids, self.embeddings = list(ids), embeddings

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.ids[index]


@dataclass(frozen=True)
class Output:
    """One generated text.

    Attributes:
        text: up to the first end-of-text, special tokens left out; None if the model has no tokenizer.
        tokens: generated ids up to the first end-of-text, which is not included.
        canvas: all generated ids; rows that were never decoded hold the end-of-text.
        trace: what was computed and committed, step by step.
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    trace: Trace = field(repr=False)

    @property
    def summary(self) -> str:
        """What it cost, in a line."""
        trace, n = self.trace, len(self.tokens)
        regions = trace.regions
        rate = n / trace.seconds if trace.seconds else 0.0
        parts = ", ".join(f"{name} {100 * region.row_share:.0f} %" for name, region in regions.items())
        return (
            f"{n} tokens, {trace.nfe} forward calls, {100 * trace.row_share:.0f} % of the rows"
            f"{f' ({parts})' if regions['image'].rows else ''}, "
            f"{trace.refreshes} refreshes, {trace.seconds:.2f} s, {rate:.1f} tok/s"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, as text whatever it holds, and what it cost."""
        shown = escape(printable("no tokenizer" if self.text is None else self.text))
        return f'<div><div style="white-space:pre-wrap">{shown}</div><small>{escape(self.summary)}</small></div>'


def settings_from(**settings: Any) -> DecodeSettings:
    """Validate run settings; raises UsageError naming the field, the value and the bound."""
    try:
        return DecodeSettings.model_validate(settings)
    except ValidationError as error:
        raise UsageError("; ".join(explain("the run", DecodeSettings, e) for e in error.errors())) from None


def policy_of(policy: str | Call | CachePolicy) -> CachePolicy:
    """The policy that a caller means; raises UsageError for what is none."""
    if not isinstance(policy, str | Call | CachePolicy):
        raise UsageError(
            f"a policy is {policy!r}; give a name, a call such as 'elastic(gamma=0.95)', or an instance of CachePolicy"
        )
    return make_policy(policy)


def unmasker_of(policy: CachePolicy, settings: DecodeSettings) -> Unmasker:
    """The unmasker of a run, or the one that the policy's paper pairs it with."""
    text = settings.unmask
    if text == PAIRED:
        text = policy.pairs_with or "low-confidence"
    return make_unmasker(text, settings.sampling)


class Runner:
    """A model and a policy, ready to decode batches; buffers are kept while their shape stays the same.

    Args:
        model: weights, and a tokenizer if prompts are to be text.
        policy: a policy, or how it is written: ``"elastic(gamma=0.95)"``.
        settings: of the run.
        unmasker: an instance instead of ``settings.unmask``.
        executor: how passes are run; None: by CUDA graphs on a GPU unless ``settings.no_graphs``, else as they stand.
        maps: keep recompute maps in the trace.

    Raises:
        UsageError: for a policy that is none, weights without values, and a gen_length that no prompt could fit.
    """

    def __init__(
        self,
        model: Model,
        policy: str | Call | CachePolicy,
        settings: DecodeSettings,
        *,
        unmasker: Unmasker | None = None,
        executor: Executor | None = None,
        maps: bool = False,
    ):
        self.model, self.settings = model, settings
        self.policy = policy_of(policy)
        self._check_model()
        self.unmasker = unmasker_of(self.policy, settings) if unmasker is None else unmasker
        self._check_pair()
        graphs = False if settings.no_graphs else None
        self.engine = Engine(model.transformer, self.policy, self.unmasker, maps=maps, executor=executor, graphs=graphs)
        self._slots: int | None = None

    def _check_pair(self) -> None:
        spec = self.model.spec
        refusals = (
            ("unmasker", self.unmasker, self.unmasker.refuses(spec)),
            ("policy", self.policy, self.policy.refuses(spec, self.unmasker)),
        )
        for kind, plugin, reason in refusals:
            if reason is not None:
                raise UsageError(f"{kind} {plugin.name or type(plugin).__name__!r} cannot run like this: {reason}")

    def _check_model(self) -> None:
        if self.model.device.type == "meta":
            raise UsageError("weights on the device 'meta' have shapes only; load the model on another to run it")
        if self.gen_length > (most := self.model.spec.max_positions):
            raise UsageError(
                f"gen_length {self.gen_length} alone exceeds the {most} positions that the model was built for; "
                "choose a smaller one, which leaves room for the prompt"
            )

    @property
    def gen_length(self) -> int:
        """Rows to generate after each prompt."""
        return self.settings.gen_length or DEFAULT_GEN_LENGTH

    def reserve(self, prompts: Sequence[Sequence[int]]) -> None:
        """Make the canvas wide enough for all of `prompts`, so that buffers and graphs serve every batch of them.

        On a CPU nothing is kept back: a canvas there is as wide as its longest sequence.
        """
        if self.model.device.type != "cpu":
            longest = max(map(len, prompts), default=0) + self.gen_length
            wide = min(-(-longest // ALIGN_SLOTS) * ALIGN_SLOTS, self.model.spec.max_positions)
            self._slots = max(self._slots or 0, wide)

    def state(self, prompts: Sequence[Sequence[int]], ids: Sequence[int] | None = None) -> State:
        """The canvas of a batch of prompts, each a `Prompt` or token ids; raises UsageError if it does not fit."""
        guided, spec = self.unmasker.sampling.guidance > 0, self.model.spec
        given = [prompt.embeddings if isinstance(prompt, Prompt) else None for prompt in prompts]
        if max(map(len, prompts), default=0) + self.gen_length <= spec.max_positions:  # else State says what is wrong
            self.reserve(prompts)
        return State(
            spec,
            prompts,
            self.gen_length,
            self.settings.block_length,
            ids=ids,
            guided=guided,
            slots=self._slots,
            embeddings=given,
        )

    def run(self, prompts: Sequence[Sequence[int]], ids: Sequence[int] | None = None) -> list[Output]:
        """Decode one batch of prompts; `ids` number them within the whole run, for their noise."""
        state = self.state(prompts, ids)
        steps = decode(self.engine, state)
        return [self.output(state, steps, b) for b in range(state.n_texts)]

    def output(self, state: State, steps: list[Step], b: int) -> Output:
        """Text `b` of a batch that has been decoded."""
        spec = self.model.spec
        begin, end = int(state.gen_start[b]), int(state.lengths[b])
        canvas = [spec.eos_id if i == spec.mask_id else i for i in state.tokens[b, begin:end].tolist()]
        stop = next((n for n, i in enumerate(canvas) if i in spec.end_ids), len(canvas))
        text = None if self.model.tokenizer is None else self.model.text(canvas)
        twin = b + state.n_texts if state.guided else None
        return Output(text, canvas[:stop], canvas, Trace(steps, b, end, spec.n_layers, twin))


def prompt_ids(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt: text through the model's chat template, ids as they are."""
    if isinstance(prompt, str):
        return model.prompt_ids(prompt)
    if not isinstance(prompt, Sequence) and np.ndim(prompt) != 1:
        raise UsageError(f"a prompt is {prompt!r}; {PROMPTS}")
    ids: list[Any] = list(prompt)
    outside = [i for i in ids if not isinstance(i, int | np.integer) or not 0 <= i < model.spec.vocab_size]
    if outside:
        raise UsageError(f"a prompt holds {outside[0]!r}, which is no token id; ids run to {model.spec.vocab_size - 1}")
    return [int(i) for i in ids]


def image_prompt(
    model: Model, text: str, images: Sequence[Any], features: ReuseCache[torch.Tensor] | None = None
) -> Prompt:
    """A text and its images as the family writes them, the images encoded; UsageError if the model has no vision.

    With `features`, an image that it holds is not encoded again.
    """
    with torch.inference_mode():
        spliced = model.image_prompt(text, images, features=features)
    spans = tuple(Span(*span, key) for span, key in zip(spliced.spans, spliced.keys, strict=True))
    positions = np.flatnonzero(spliced.is_image.numpy())
    return Prompt(spliced.tokens, Embeddings(positions, spliced.embeddings, spans, spliced.preamble))


def problem_prompt(model: Model, problem: Problem) -> Prompt:
    """The prompt of a problem."""
    if not len(problem.images):
        return Prompt(prompt_ids(model, problem.prompt))
    try:
        return image_prompt(model, problem.prompt, list(problem.images))
    except UsageError as error:
        raise UsageError(f"problem {problem.id!r}: {error}") from error


@overload
def generate(
    model: Model,
    prompts: str,
    policy: str | CachePolicy = ...,
    *,
    images: Sequence[Any] | None = ...,
    features: ReuseCache[torch.Tensor] | None = ...,
    **settings: Any,
) -> Output: ...
@overload
def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    policy: str | CachePolicy = ...,
    *,
    images: Sequence[Any] | None = ...,
    features: ReuseCache[torch.Tensor] | None = ...,
    **settings: Any,
) -> list[Output]: ...


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    policy: str | CachePolicy = "none",
    *,
    images: Sequence[Any] | None = None,
    features: ReuseCache[torch.Tensor] | None = None,
    **settings: Any,
) -> Output | list[Output]:
    """Decode one prompt, or several.

    Args:
        model: from `load_model`.
        prompts: a text; or a list of texts, or of token-id lists.
        policy: ``"none"``, ``"elastic(gamma=0.95)"``, or an instance.
        images: for one text its images (files, Pillow images, or tensors (3, height, width) of uint8); for a list of
            texts a list of such lists, empty where a text has none. A text may say by ``<image>`` where each goes.
        features: ``dcache.ReuseCache(2**28)``, given to several calls, keeps what the vision part makes of images, so
            that one that comes again is not encoded again. Tokens are the same with and without.
        settings: fields of `dcache.config.DecodeSettings`: gen_length, block_length, unmask, temperature, seed, ...
            `unmask` may also be an instance, which then keeps its own sampling.

    Returns:
        an `Output`, or a list of them in the order of the prompts.

    Raises:
        UsageError: for unknown names, knobs out of bounds, and prompts that do not fit the model.
    """
    unmasker = settings.pop("unmask") if isinstance(settings.get("unmask"), Unmasker) else None
    run = settings_from(**settings)
    runner = Runner(model, policy, run, unmasker=unmasker)
    if not isinstance(prompts, Iterable):
        raise UsageError(f"prompts is {prompts!r}; {PROMPTS}")
    many: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    shown = [images or ()] if isinstance(prompts, str) else [() for _ in many] if images is None else list(images)
    if len(shown) != len(many):
        raise UsageError(f"images has {len(shown)} lists for {len(many)} prompts; give one for each, empty or not")
    ids = [_prompt(model, prompt, mine, features) for prompt, mine in zip(many, shown, strict=True)]
    runner.reserve(ids)
    outputs: list[Output] = []
    for begin in range(0, len(ids), run.batch_size):
        batch = ids[begin : begin + run.batch_size]
        outputs += runner.run(batch, ids=range(begin, begin + len(batch)))
    return outputs[0] if isinstance(prompts, str) else outputs


def _prompt(
    model: Model, prompt: str | Sequence[int], images: Sequence[Any], features: ReuseCache[torch.Tensor] | None
) -> Prompt:
    if not len(images):
        return Prompt(prompt_ids(model, prompt))
    if not isinstance(prompt, str):
        raise UsageError("images go with a text, not with token ids; give the prompt as a text")
    return image_prompt(model, prompt, images, features)
