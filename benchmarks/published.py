"""Published codes of four methods beside dcache: ms per denoising step on one GPU, at the shapes of LLaDA-8B.

``--code`` names a folder of checkouts, each with a file ``COMMIT``:

    LLaDA/generate.py                      ML-GSAI/LLaDA: the sampler without a cache
    LLaDA-model/timpateks/llada/*.py       the modelling file of GSAI-ML/LLaDA-8B-Instruct, which that sampler loads
    Fast-dLLM/llada/                       NVlabs/Fast-dLLM: dual cache
    dKV-Cache/                             horseee/dKV-Cache: LLaDA, variant decode
    d2Cache/                               Kamichanw/d2Cache; its tables of token frequencies are not needed

Nothing in them is edited; what they need of an older environment is put in place here and listed in the result. Each
code runs in a process of its own, which builds the model with random weights on the GPU, runs the published
``generate`` once to warm up and then `repeats` times, and reads the clock, after a synchronisation, each time
``generate`` calls the model. A step is the time from one call to the next: the forward, the choice and the commit of
tokens, and the work of the cache. A run ends with call `steps` + 1, that is after whole blocks. dcache is timed in the
same way, around `Engine.run`, in one more process, on weights of the same distribution.

A code that fails or runs out of time leaves its error in the result and does not stop the others.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import numpy as np
import torch

FOLDERS = {"llada": "LLaDA", "fast-dllm": "Fast-dLLM", "dkv": "dKV-Cache", "d2": "d2Cache"}
REPOSITORIES = {
    "llada": "ML-GSAI/LLaDA",
    "fast-dllm": "NVlabs/Fast-dLLM",
    "dkv": "horseee/dKV-Cache",
    "d2": "Kamichanw/d2Cache",
}
POLICIES = {  # of dcache: policy and unmasker with the settings under which the published code runs
    "llada": ("none", "low-confidence"),
    "fast-dllm": ("fast-dllm", "low-confidence"),
    "dkv": ("dkv(interval=8)", "low-confidence"),
    "d2": ("d2(inflate_w=4)", "certainty-prior(sigma=10)"),
}
WHOLE_BLOCKS = ("fast-dllm", "dkv")  # full and cached steps alternate in a block: the mean counts, not the median
OUR_WARM_UPS = 2  # a pass of a kind that is new runs as it is, the second one is recorded
MODULES_OF_THE_HARNESS = ("dill", "dotenv", "hydra", "lm_eval", "loguru", "omegaconf")  # d2Cache imports these


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the run."""

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464
    mask_id: int = 126336
    eos_id: int = 126081
    prompt: int = 1024
    gen: int = 256
    block: int = 32


TINY = Shape(64, 2, 4, 128, 300, 299, 298, prompt=16, gen=16, block=8)


@dataclass
class Subject:
    """A published code, ready to run.

    Attributes:
        model: an `nn.Module`; its call is one step.
        first: a module that sees the rows computed by the first layer.
        generate: prompt (1, prompt) to tokens (1, prompt + gen).
        how: the call and its settings.
        shims: what was put in place of something missing here.
    """

    model: Any
    first: Any
    generate: Callable[[torch.Tensor], torch.Tensor]
    how: str
    shims: list[str] = field(default_factory=list)


# Clock


class Enough(Exception):
    """The run has done the steps that are measured."""


class Clock:
    """Wall time between two calls of the model, and the rows that each computed."""

    def __init__(self, steps: int, device: str):
        self.steps, self.device = steps, device
        self.marks: list[float] = []
        self.rows: list[int] = []

    def tick(self) -> None:
        """A step begins, and the one before has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(perf_counter())
        if len(self.marks) > self.steps:
            raise Enough

    def run(self, work: Callable[[], Any]) -> tuple[list[float], Any]:
        """Milliseconds of each step of `work`, and its result; None if it was cut short."""
        self.marks, self.rows = [], []
        try:
            result = work()
            self.tick()
        except Enough:
            result = None
        return (np.diff(self.marks) * 1e3).tolist(), result


def summary(times: list[float]) -> dict[str, float]:
    """Percentiles and mean of one run, in ms."""
    p5, p50, p95 = np.percentile(times, [5, 50, 95])
    return {k: round(float(v), 3) for k, v in (("p50", p50), ("p5", p5), ("p95", p95), ("mean", np.mean(times)))}


def repeat(clock: Clock, work: Callable[[], Any], repeats: int, code: str, warm_ups: int = 1) -> dict[str, Any]:
    """Some runs to warm up and `repeats` that count."""
    began = perf_counter()
    for _ in range(warm_ups):
        _, result = clock.run(work)
    warm_up = perf_counter() - began
    runs = [clock.run(work)[0] for _ in range(repeats)]
    lines = [summary(times) for times in runs]
    kind = "mean" if code in WHOLE_BLOCKS else "p50"
    return {
        "ms_per_step": round(float(np.median([line[kind] for line in lines])), 3),
        "ms_per_step_is": f"median over runs of the {kind} over steps",
        "runs": lines,
        "steps": [len(times) for times in runs],
        "rows": clock.rows,
        "rows_mean": round(float(np.mean(clock.rows)), 1),
        "warm_up_s": round(warm_up, 1),
        "finished": result,
    }


# Shims: what the published codes import and this environment lacks


class _Anything(type):
    """Metaclass of stand-ins: every attribute exists, can be called and returns None."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _StandIn(ModuleType):
    """A module whose every name is a class without content; enough to be imported, annotated with and subclassed."""

    __path__: list[str] = []  # noqa: RUF012 - a package, so that its submodules can be imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Anything(name, (), {})
        setattr(self, name, found)
        return found


class _Finder:
    """Finds stand-ins for packages that are not installed."""

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A spec for one of `packages` or a module in it."""
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.util.spec_from_loader(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> ModuleType:
        """An empty stand-in."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def stand_in(packages: tuple[str, ...]) -> list[str]:
    """Put stand-ins in place of those of `packages` that are not installed; name them."""
    missing = tuple(name for name in packages if importlib.util.find_spec(name) is None)
    sys.meta_path.append(_Finder(missing))
    return [f"{name}: not installed, an empty stand-in (configuration, logging or evaluation only)" for name in missing]


# Published models


def settings(shape: Shape, device: str) -> dict[str, Any]:
    """Fields of the published ``config.json`` of LLaDA-8B-Instruct, with the sizes of `shape`."""
    return {
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "mask_token_id": shape.mask_id,
        "eos_token_id": shape.eos_id,
        "pad_token_id": shape.eos_id,
        "max_sequence_length": 4096,
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": device,
        "init_fn": "normal",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "weight_tying": False,
    }


@contextmanager
def born_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are created here have this device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(model: Any, shape: Shape) -> None:
    """Random weights as those of dcache's ``llada-8b:random``; the mask's own logit is 0, so it is never predicted."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            ends = "attn_out" in name or ("blocks." in name and "ff_out" in name)
            parameter.normal_(0, 0.02 / (2 * shape.n_layers) ** 0.5 if ends else 0.02)
    model.model.transformer["ff_out"].weight[shape.mask_id] = 0


def build(module: ModuleType, config_of: ModuleType, shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """The published ``LLaDAModelLM``, its inner model built on the device (the class itself would build on the CPU)."""
    config = config_of.LLaDAConfig(**settings(shape, device))
    config.use_cache = False  # the base class of this transformers takes no such argument
    with born_on(device, dtype):
        inner = module.LLaDAModel(module.create_model_config_from_pretrained_config(config), init_params=False)
        model = module.LLaDAModelLM(config, model=inner)
    fill(model, shape)
    return model.eval()


BUILT = (
    "model: built on the device from the published config with random weights, not loaded from a checkpoint; "
    "config.use_cache set to False, as published, after construction"
)


COPY = "the copy in rayendito/dlm_steer, whose additions to it, steering vectors, are off"


def commit_of(folder: Path) -> str:
    """The commit of a checkout."""
    path = folder / "COMMIT"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "unknown"


# One function per published code: import it, build its model, say how it is called


def llada(code: Path, shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """The sampler of LLaDA, every row at every step."""
    sys.path[:0] = [str(code / "LLaDA"), str(code / "LLaDA-model" / "timpateks")]
    module = importlib.import_module("llada.modeling_llada")
    model = build(module, importlib.import_module("llada.configuration_llada"), shape, device, dtype)
    sampler = importlib.import_module("generate").generate
    options = {"steps": shape.gen, "gen_length": shape.gen, "block_length": shape.block, "temperature": 0.0}
    return Subject(
        model,
        model.model.transformer["blocks"][0].ff_out,
        lambda prompt: sampler(model, prompt, mask_id=shape.mask_id, **options),
        f"generate.generate, {options}, remasking low_confidence",
        [BUILT, f"modelling file: {COPY}, commit {commit_of(code / 'LLaDA-model')}, since the original is on a hub"],
    )


def fast_dllm(code: Path, shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """The dual cache of Fast-dLLM, fixed number of tokens per step."""
    sys.path.insert(0, str(code / "Fast-dLLM" / "llada"))
    module = importlib.import_module("model.modeling_llada")
    model = build(module, importlib.import_module("model.configuration_llada"), shape, device, dtype)
    sampler = importlib.import_module("generate").generate_with_dual_cache
    options = {"steps": shape.gen, "gen_length": shape.gen, "block_length": shape.block, "temperature": 0.0}
    return Subject(
        model,
        model.model.transformer["blocks"][0].ff_out,
        lambda prompt: sampler(model, prompt, mask_id=shape.mask_id, **options)[0],
        f"generate.generate_with_dual_cache, {options}, remasking low_confidence, threshold None",
        [BUILT],
    )


def dkv(code: Path, shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """dKV-Cache, variant decode, refreshed every 8 steps as its README does."""
    sys.path.insert(0, str(code / "dKV-Cache"))
    module = importlib.import_module("models.modeling_llada_dkv_cache_decode")
    model = build(module, importlib.import_module("models.configuration_llada"), shape, device, dtype)
    sampler = importlib.import_module("generation_utils.llada_dkv_cache_decode").generate
    options = {"steps": shape.gen, "gen_length": shape.gen, "block_length": shape.block, "temperature": 0.0}
    cached = {"enable_cache": True, "cache_reloading_step": 8}
    return Subject(
        model,
        model.model.transformer["blocks"][0].ff_out,
        lambda prompt: sampler(model, None, prompt, mask_id=shape.mask_id, **options, **cached),
        f"generation_utils.llada_dkv_cache_decode.generate, {options | cached}, remasking low_confidence",
        [BUILT],
    )


def d2(code: Path, shape: Shape, device: str, dtype: torch.dtype) -> Subject:
    """d2Cache in blocks, with its certainty prior, as its documentation sets it for blocks."""
    sys.path.insert(0, str(code / "d2Cache"))
    os.environ["MASK_TOKEN_ID"] = str(shape.mask_id)
    shims = [BUILT, *stand_in(MODULES_OF_THE_HARNESS)]
    sampler = importlib.import_module("src.generation").generate
    module = importlib.import_module("src.models.llada")
    config = module.LLaDAConfig(**settings(shape, device))
    config.use_cache = False
    config._attn_implementation = "eager"  # d2Cache reads the attention weights
    tie = module.LLaDAModelLM.tie_weights
    module.LLaDAModelLM.tie_weights = lambda self, *args, **kwargs: tie(self)
    shims.append("LLaDAModelLM.tie_weights: takes the arguments that this transformers passes; there is nothing to tie")
    with born_on(device, dtype):
        model = module.LLaDAModelLM(config)
    fill(model, shape)
    knobs = {"rollout_p": 0.1, "current_k": 32, "sigma": 10.0, "inflate_w": 4}
    options = {"gen_length": shape.gen, "block_length": shape.block, "num_transfer_tokens": 1, "sigma": 10.0}
    cache = partial(importlib.import_module("src.cache").d2Cache, **knobs)

    def generate(prompt: torch.Tensor) -> torch.Tensor:
        record = sampler(model, prompt, strategy="vanilla", cache_cls=cache, mask_token_id=shape.mask_id, **options)
        frame = record[-1]
        return torch.cat([frame.prompts, frame.generated_tokens], -1)

    how = f"src.generation.generate, strategy vanilla, {options}, d2Cache({knobs}), alg maskgit_plus, temperature 0"
    return Subject(model.eval(), model.model.transformer["blocks"][0].ff_out, generate, how, shims)


SUBJECTS = {"llada": llada, "fast-dllm": fast_dllm, "dkv": dkv, "d2": d2}


# The two kinds of child process


def published(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time one published code."""
    torch.manual_seed(0)
    shape, device = (TINY, "cpu") if given.tiny else (Shape(), "cuda")
    subject = SUBJECTS[name](given.code.resolve(), shape, device, torch.float32 if given.tiny else torch.bfloat16)
    clock = Clock(given.steps, device)
    subject.model.register_forward_pre_hook(lambda *call: clock.tick())
    subject.first.register_forward_pre_hook(lambda _, args: clock.rows.append(args[0].shape[:-1].numel()))
    draw = np.random.default_rng(0)
    prompt = torch.from_numpy(draw.integers(0, shape.eos_id, size=(1, shape.prompt))).to(device)
    line = repeat(clock, lambda: subject.generate(prompt), given.repeats, name)
    tokens = line.pop("finished")
    if tokens is not None:  # the run went to its end
        line["left_masked"] = int((tokens == shape.mask_id).sum())
    line |= {
        "repository": REPOSITORIES[name],
        "commit": commit_of(given.code / FOLDERS[name]),
        "how": subject.how,
        "shims": subject.shims,
    }
    return line


def watch(engine: Any, clock: Clock) -> None:
    """Every pass of `engine` begins a step of `clock`."""
    run = engine.run

    def timed(plan: Any, ask: Any) -> Any:
        clock.tick()
        clock.rows.append(int((plan.row_mask & engine.state.valid).sum()))
        return run(plan, ask)

    engine.run = timed


def tiny_model() -> Any:
    """dcache's model of the tiny shape, with random weights."""
    from dcache.models.llada import LLaDA
    from dcache.models.transformer import Transformer

    return Transformer(LLaDA().spec(settings(TINY, "cpu"), {}, None)).init_random().eval().requires_grad_(False)


def our_line(name: str, model: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Time one policy of dcache."""
    import dcache
    from dcache.decode import decode
    from dcache.engine import Engine
    from dcache.plugins import make_policy, make_unmasker

    shape = TINY if given.tiny else Shape()
    ids = np.random.default_rng(0).integers(0, shape.eos_id, size=shape.prompt).tolist()
    policy, unmasker = POLICIES[name]
    sampling = dcache.Sampling(after_end="decode")  # the published codes decode on behind an end of the text
    engine = Engine(model, make_policy(policy), make_unmasker(unmasker, sampling))
    clock = Clock(given.steps, model.device.type)
    watch(engine, clock)

    def work() -> None:
        decode(engine, dcache.State(model.spec, [ids], shape.gen, shape.block))

    line = repeat(clock, work, given.repeats, name, OUR_WARM_UPS)
    line.pop("finished")
    return line


def ours(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time dcache under the settings of each published code; yield all lines so far after each."""
    import dcache

    model = tiny_model() if given.tiny else dcache.load_model("llada-8b:random").transformer
    lines: dict[str, Any] = {}
    for name in given.codes:
        policy, unmasker = POLICIES[name]
        try:
            line = our_line(name, model, given)
        except Exception:  # one policy must not stop the others
            line = {"error": traceback.format_exc()[-3000:]}
        lines[name] = {"policy": policy, "unmasker": unmasker, **line}
        yield lines


# The parent process


def child(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run `name` in a process of its own: its last line, with {"error": text} if it failed or ran out of time."""
    command = [sys.executable, __file__, "--child", name, "--code", str(given.code), "--codes", *given.codes]
    command += ["--steps", str(given.steps), "--repeats", str(given.repeats), *(["--tiny"] if given.tiny else [])]
    began = perf_counter()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8") as process,
    ):
        try:
            out, error = process.communicate(timeout=given.timeout)[0], ""
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = process.communicate()[0], f"did not end within {given.timeout:g} s"
        if process.returncode and not error:
            error = f"exit status {process.returncode}"
        lines = [line for line in out.splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if error:
            log.seek(0)
            found |= {"error": error, "stderr": log.read()[-3000:]}
    return found | {"process_s": round(perf_counter() - began, 1)}


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": sys.version.split()[0],
        "shape": asdict(TINY if given.tiny else Shape()),
        "dtype": "float32" if given.tiny else "bfloat16",
        "batch": 1,
        "tokens_per_step": 1,
        "temperature": 0,
        "steps": given.steps,
        "repeats": given.repeats,
        "warm_up_runs": {"published": 1, "dcache": OUR_WARM_UPS},
    }


def ratios(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Published over dcache for each code that both sides ran."""
    found = {}
    for name, line in theirs.items():
        other = mine.get(name, {})
        if "ms_per_step" in line and "ms_per_step" in other:
            found[name] = {
                "published_ms": line["ms_per_step"],
                "dcache_ms": other["ms_per_step"],
                "ratio": round(line["ms_per_step"] / other["ms_per_step"], 2),
                "published_rows": line["rows_mean"],
                "dcache_rows": other["rows_mean"],
            }
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="folder of the checkouts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/published.json"))
    parser.add_argument("--codes", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--steps", type=int, default=64, help="steps measured of each run, whole blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each process")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in float32 on the CPU, whole runs: a test")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    block = (TINY if given.tiny else Shape()).block
    if given.steps % block:
        parser.error(f"--steps {given.steps} must be a multiple of the block length, {block}")
    return given


def main() -> None:
    """Run every code and then dcache; write the result after each."""
    given = arguments()
    if given.child:
        for lines in ours(given) if given.child == "dcache" else [published(given.child, given)]:
            print(json.dumps(lines), flush=True)
        return
    result: dict[str, Any] = {"conditions": conditions(given), "published": {}, "dcache": {}, "ratios": {}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in [*given.codes, "dcache"]:
        line = child(name, given)
        if name == "dcache":
            result["dcache"] = line
        else:
            result["published"][name] = line
        result["ratios"] = ratios(result["published"], result["dcache"])
        text = json.dumps(result, indent=1)
        text = re.sub(r"\[[-\d.,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list on one line
        given.out.write_text(text + "\n", encoding="utf-8")
        print(name, json.dumps(line)[:4000], flush=True)
    print(json.dumps(result["ratios"], indent=1))


if __name__ == "__main__":
    sys.exit(main())
