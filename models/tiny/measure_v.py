"""How accurate a tiny LLaDA-V is: its checkpoint as a user loads it, a plain decoder, and the test split of scenes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from dcache.images import PLACEHOLDER, pillow
from dcache.models.loading import Model, load_model
from dcache.models.tiny.measure import decode
from dcache.tasks.base import Problem
from dcache.tasks.scenes import Scenes

KINDS = {"How many": "count", "What is the sum": "sum", "What is directly": "position"}
"""Questions by how they begin."""
BLOCK = 32


@torch.inference_mode()
def answers(model: Model, problems: Sequence[Problem], grey: bool) -> list[str]:
    """The texts for scenes, or for a grey image in their place: blocks of 32, one token per step."""
    texts = []
    for at in range(0, len(problems), 128):
        batch = problems[at : at + 128]
        images = [[pillow().new("RGB", p.images[0].size, (128,) * 3)] if grey else list(p.images) for p in batch]
        shown = [model.image_prompt(problem.prompt, mine) for problem, mine in zip(batch, images, strict=True)]
        prompts = [prompt.tokens for prompt in shown]
        rows = decode(model.transformer, prompts, Scenes.gen_length, BLOCK, 1, shown)
        texts += [model.text(row) for row in rows]
    return texts


def accuracy(model: Model, problems: Sequence[Problem], grey: bool = False) -> dict[str, float]:
    """Share of scenes answered right: of all, and by kind of question."""
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, text in zip(problems, answers(model, problems, grey), strict=True):
        question = problem.prompt.removeprefix(f"{PLACEHOLDER}\n")
        for name in ("all", *(kind for begin, kind in KINDS.items() if question.startswith(begin))):
            right[name].append(bool(Scenes().score(problem, text)))
    return {name: round(sum(found) / len(found), 4) for name, found in sorted(right.items())}


def measure(folder: Path, device: str, n_problems: int) -> dict[str, dict[str, float]]:
    """Accuracy of a checkpoint on the test split, seed 0, in float32, with the images and with grey ones."""
    model = load_model(folder, device=device, dtype="float32")
    problems = Scenes().problems("test", n_problems, seed=0)
    shares = {name: accuracy(model, problems, name == "grey") for name in ("image", "grey")}
    for name, found in shares.items():
        told = ", ".join(f"{kind} {share:.3f}" for kind, share in found.items())
        print(f"accuracy on {n_problems} test scenes, {name}: {told}", flush=True)
    return shares
