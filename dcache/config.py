"""Settings of a run: each default is defined here, once, and the help texts are made from these fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dcache.unmasking.base import MOST, Sampling

DEFAULT_GEN_LENGTH = 96
DEFAULT_POLICIES = ("elastic", "dkv")
CPUS_PER_WORKER = 4


class DecodeSettings(Sampling):
    """How every policy of a run decodes: the canvas, the unmasker, and the sampling."""

    gen_length: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description=f"rows to generate after the prompt; none: the task's, or {DEFAULT_GEN_LENGTH}",
    )
    block_length: int | None = Field(
        32,
        ge=1,
        le=MOST,
        description="rows of a semi-autoregressive block, decoded left to right; none: one block. Without it, a "
        "gen_length below the default is one block",
    )
    unmask: str = Field(
        "low-confidence",
        description="which masked rows a step commits, e.g. threshold(threshold=0.9); 'paired' takes the unmasker of "
        "each policy's own paper",
    )
    batch_size: int = Field(1, ge=1, le=MOST, description="prompts decoded together")
    no_graphs: bool = Field(
        False, description="launch every kernel by itself instead of replaying CUDA graphs; a CPU has none"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_generation_is_one_block(cls, given: Any) -> Any:
        if isinstance(given, dict) and "block_length" not in given:
            rows, default = given.get("gen_length"), cls.model_fields["block_length"].default
            if isinstance(rows, int) and 0 < rows < default:
                return {**given, "block_length": rows}
        return given

    @property
    def sampling(self) -> Sampling:
        """The part that an unmasker is given."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class CompareSettings(BaseModel):
    """Which problems a comparison decodes, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(
        "gsm-mini", description="task whose problems are decoded; scenes for a model that reads images, unless given"
    )
    split: str = Field("test", description="split of the task")
    limit: int | None = Field(
        12, ge=1, le=MOST, description="number of problems, from the first on; none: the whole split"
    )
    repeats: int = Field(
        1, ge=1, le=MOST, description="times that everything is decoded; 2 or more give tok/s a spread"
    )


class LaunchSettings(BaseModel):
    """Where a comparison runs. No result depends on it, only how soon there are results."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    launcher: Literal["local", "ray"] = Field(
        "local", description="where to decode: local, in this process; ray, in workers side by side, one per GPU"
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description=f"workers of the launcher ray; one per GPU, or per {CPUS_PER_WORKER} CPUs, unless given",
    )
    ray_address: str | None = Field(
        None, description="a running Ray cluster, as HOST:PORT or auto; a cluster of this machine alone unless given"
    )

    @model_validator(mode="after")
    def _ray_has_workers(self) -> LaunchSettings:
        for name in ("workers", "ray_address"):
            if self.launcher == "local" and getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} needs launcher=ray; local runs in this process alone")
        return self


class VerifySettings(BaseModel):
    """How hard `dcache verify` looks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int = Field(20, ge=1, le=MOST, description="canvases that are drawn per claim")
    seed: int = Field(0, ge=0, le=MOST, description="seed of the drawing")
    patience: int = Field(
        8, ge=1, le=MOST, description="steps within which a committed row must be computed with its token"
    )
