"""`DCacheLM`: dcache as a model of lm-evaluation-harness, ``lm_eval --model dcache``.

The harness asks three things of a model. `generate_until` decodes with the policy, `loglikelihood` is a Monte-Carlo
estimate that no policy takes part in, and `loglikelihood_rolling` is refused. `get_model_info` is how policy, knobs and
counters come into the results file.
"""

from __future__ import annotations

import logging
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from lm_eval.api.model import LM
from tqdm import tqdm

import dcache
from dcache.conditions import device_name, fingerprint, source_of, version_of, weights_of, written
from dcache.config import DecodeSettings
from dcache.errors import ModelError, UsageError
from dcache.evaluation.arguments import Arguments, Request, arguments_in
from dcache.evaluation.counters import Counters
from dcache.evaluation.likelihood import Likelihood
from dcache.generate import Output, Runner, settings_from
from dcache.models.loading import Model
from dcache.models.tokenizer import Tokenizer
from dcache.plugins import load_model

NAME = "dcache"
WARM_UP_ROWS = 8
log = logging.getLogger("lm_eval.dcache")  # below the harness's own logger, which has the handler


class DCacheLM(LM):  # type: ignore[misc]  # the harness is not typed
    """A model and a policy, as the harness wants them.

    Args:
        loaded: a model to use instead of loading one.
        likelihood: shared with another instance, which has the answers that were scored before.
        arguments: ``model``, ``policy``, ``device``, ``dtype``, ``family``, ``revision`` and the fields of
            `DecodeSettings` and `EvalSettings`.

    Attributes:
        model: the weights.
        counters: what decoding cost, by task.

    Raises:
        UsageError: for an argument that is none, and values out of bounds.
        ModelError: for a model that cannot be loaded or has no tokenizer.
    """

    def __init__(self, *, loaded: Model | None = None, likelihood: Likelihood | None = None, **arguments: Any):
        super().__init__()
        self.arguments = Arguments.read(arguments)
        if loaded is None and self.arguments.model is None:
            raise UsageError("the model arguments name no model; add model=..., a folder or a hub id")
        self.model = loaded or load_model(str(self.arguments.model), **self.arguments.loading)
        self.settings = settings_from(**self.arguments.decoding)
        how = self.arguments.evaluation
        self.likelihood = likelihood or Likelihood(
            self.model, how.mc_num, self.settings.batch_size, self.settings.sampling
        )
        self.counters: defaultdict[str, Counters] = defaultdict(Counters)
        self._used: dict[str, DecodeSettings] = {}  # with which each task was decoded
        self._tokenizer()
        self._runner = self._new_runner(self.settings)  # so that a policy which cannot run is refused now

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DCacheLM:
        """From ``model=tiny-llada,policy=elastic(gamma=0.95,window=8)``; commas inside parentheses do not separate."""
        return cls.create_from_arg_obj(arguments_in(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> DCacheLM:
        """From arguments, and the harness's own options, which yield to them."""
        options = {k: v for k, v in (additional_config or {}).items() if v is not None}
        options.pop("max_batch_size", None)
        if str(options.get("batch_size", "")).startswith("auto"):
            raise UsageError(
                f"batch_size is {options['batch_size']!r}; give a number: what fits shows in the error of a number "
                "that does not"
            )
        if str(options.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            del options["device"]  # it is the default of the harness's command line, on any machine
        return cls(**{**options, **arg_dict})

    # Text and tokens

    def _tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise ModelError(
                f"model {self.model.name!r} has no tokenizer, and tasks are texts; load a checkpoint that has one"
            )
        return self.model.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Names model and chat template in the harness's cache of requests."""
        return f"{self.model.name}-{fingerprint((self._tokenizer().template or '').encode())}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Source of the chat template; None unless it is asked for."""
        if isinstance(chat_template, str):
            raise UsageError(f"there is no chat template {chat_template!r}: a checkpoint has one; leave the name out")
        return self._tokenizer().template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` its last message is to be continued."""
        text = self._tokenizer().render(chat_history)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Token ids. The harness writes chat templates out, so special tokens spelled in a text are tokens.

        Args:
            text: what to encode.
            begins: whether the text is the beginning of a canvas; an empty one then becomes one token.
        """
        ids = self._tokenizer().encode(text)
        if not begins:
            return ids
        if not ids:
            return [self._first]
        if self.arguments.evaluation.add_bos_token and ids[0] != self._first:
            return [self._first, *ids]
        return ids

    @property
    def _first(self) -> int:
        """Begin-of-text, or if the checkpoint names none, end-of-text."""
        found = self._tokenizer().special_id("bos_token")
        return self.model.spec.eos_id if found is None else found

    def _fitted(self, ids: list[int], rows: int, task: str) -> list[int]:
        """The last tokens of a prompt, as many as the model has positions for beside `rows` others."""
        room = self.model.spec.max_positions - rows
        if room < 1:
            raise UsageError(f"{rows} rows leave no room for a prompt: the model was built for {room + rows} positions")
        if len(ids) > room:
            self.counters[task].truncated += 1
        return ids[-room:]

    # Generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode every request under the policy; texts in their order, cut at the task's stop texts."""
        plans = [Request.read(request.args[1], self.arguments.decoding) for request in requests]
        prompts = [
            self._fitted(self.encode(request.args[0]), plan.settings.gen_length or 0, _task_of(request))
            for request, plan in zip(requests, plans, strict=True)
        ]
        self._used |= {_task_of(request): plan.settings for request, plan in zip(requests, plans, strict=True)}
        self._warn(name for plan in plans for name in plan.ignored)
        texts = [""] * len(requests)
        numbers = _numbers(prompts)
        groups: defaultdict[DecodeSettings, list[int]] = defaultdict(list)
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):  # the batch that needs most comes first
            groups[plans[i].settings].append(i)
        with tqdm(total=len(requests), desc=written(self._runner.policy), disable=disable_tqdm or None) as bar:
            for settings, members in groups.items():
                self._enter(settings, [prompts[i] for i in members])
                for begin in range(0, len(members), settings.batch_size):
                    batch = members[begin : begin + settings.batch_size]
                    outputs, seconds = self._decode([prompts[i] for i in batch], [numbers[i] for i in batch])
                    for i, output in zip(batch, outputs, strict=True):
                        self.counters[_task_of(requests[i])].add(output, seconds / len(batch))
                        texts[i] = plans[i].cut(self.model.text(output.tokens[: plans[i].most]))
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(batch))
        return texts

    def _warn(self, ignored: Iterable[str] = ()) -> None:
        """Say what was asked for and is not done."""
        if names := sorted(set(ignored)):
            log.warning("generation arguments that dcache does not know are ignored: %s", ", ".join(names))
        if truncated := self.total.truncated:
            log.warning("%d prompts are too long for the model and lose tokens on the left", truncated)

    def _new_runner(self, settings: DecodeSettings) -> Runner:
        return Runner(self.model, self.arguments.policy, settings)

    def _enter(self, settings: DecodeSettings, prompts: Sequence[list[int]]) -> None:
        """Make the runner one of these settings, ready for these prompts, and warm."""
        if settings != self._runner.settings:
            self._runner = self._new_runner(settings)
        self._runner.reserve(prompts)
        first = prompts[: settings.batch_size]
        if self.model.device.type != "cpu":  # the first batch compiles kernels, and its second run records graphs
            self._runner.run(first)
            return
        rows = min(WARM_UP_ROWS, settings.gen_length or WARM_UP_ROWS)
        self._new_runner(settings.model_copy(update={"gen_length": rows, "block_length": None})).run(first)

    def _decode(self, prompts: Sequence[list[int]], numbers: Sequence[int]) -> tuple[list[Output], float]:
        """A batch, and its wall time in seconds without the recording of graphs."""
        began = perf_counter()
        outputs = self._runner.run(prompts, ids=numbers)
        return outputs, perf_counter() - began - sum(step.recording for step in outputs[0].trace.steps)

    # Likelihood

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Estimates for continuations, and whether each is the greedy one. No policy takes part."""
        log.info("loglikelihood: a Monte-Carlo estimate from whole forward passes; the policy does not matter")
        found = []
        for request in tqdm(requests, desc="loglikelihood", disable=disable_tqdm or None):
            context, answer = self._pair(*request.args)
            context = self._fitted(context, len(answer), _task_of(request))
            value = self.likelihood.of(context, answer)
            greedy = self.arguments.evaluation.check_greedy and self.likelihood.is_greedy(context, answer)
            found.append((value, greedy))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        self._warn()
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows; spaces between belong to the latter, as tokenizers have it."""
        bare = context.rstrip()
        if not bare:
            return self.encode(""), self.encode(context + continuation, begins=False)
        first = self.encode(bare)
        return first, self.encode(context + continuation)[len(first) :]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused."""
        raise UsageError(
            "task needs loglikelihood_rolling, the likelihood of whole texts token by token, which a masked diffusion "
            "model does not have: its estimate is a bound of one answer. Choose a task of generation or of choices"
        )

    # The results file

    def get_model_info(self) -> dict[str, Any]:
        """What goes into ``config`` of the results file: model, policy, knobs, settings, versions and counters."""
        model, runner, how = self.model, self._runner, self.arguments.evaluation
        policy, unmasker = runner.policy, runner.unmasker
        on_cpu = model.device.type == "cpu"
        info = {
            "version": dcache.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "device": model.device.type,
            "device_name": device_name(model.device),
            "threads": torch.get_num_threads() if on_cpu else None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "model": model.name,
            "n_parameters": model.n_parameters,
            "weights": weights_of(model),
            "policy": written(policy),
            "policy_name": policy.name,
            "policy_source": source_of(policy),
            "knobs": policy.config.model_dump(mode="json"),
            "unmask": written(unmasker),
            "unmask_knobs": unmasker.config.model_dump(mode="json"),
            "settings": self.settings.model_dump(mode="json", exclude={"unmask"}),
            "add_bos_token": how.add_bos_token,
            "likelihood": self._likelihood_info(),
            "counters": self.total.summary(),
            "tasks": {task: self._task_info(task) for task in sorted(self.counters)},
        }
        return {"model_num_parameters": model.n_parameters, "model_dtype": info["dtype"], NAME: info}

    def _task_info(self, task: str) -> dict[str, Any]:
        """Counters of a task, and its settings, with what the task itself asked for."""
        used = self._used.get(task)
        settings = None if used is None else used.model_dump(mode="json", exclude={"unmask"})
        return self.counters[task].summary() | {"settings": settings}

    def _likelihood_info(self) -> dict[str, Any] | None:
        """None if no likelihood was asked for."""
        if not self.likelihood.calls:
            return None
        how = self.arguments.evaluation
        return {
            "mc_num": how.mc_num,
            "check_greedy": how.check_greedy,
            "forward_calls": self.likelihood.calls,
            "policy": "none: whole forward passes, whatever the policy",
        }

    @property
    def total(self) -> Counters:
        """The counters of all tasks together."""
        parts = self.counters.values()
        return Counters(**{field: sum(getattr(part, field) for part in parts) for field in Counters.__annotations__})


def register() -> None:
    """Make the harness know the model by its name, if it did not find the entry point itself."""
    from lm_eval.api import registry

    try:
        registry.get_model(NAME)
    except (KeyError, ValueError):  # how versions of it say that there is no such model
        registry.register_model(NAME)(DCacheLM)


def _task_of(request: Any) -> str:
    return str(getattr(request, "task_name", None) or "unnamed")


def _numbers(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A number for the noise of each text: from its prompt and how often that came before, whatever the others are."""
    seen: Counter[str] = Counter()
    numbers = []
    for prompt in prompts:
        mark = fingerprint(repr(list(prompt)).encode())
        numbers.append((int(mark, 16) + seen[mark]) % 2**63)
        seen[mark] += 1
    return numbers
