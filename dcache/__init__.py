"""Cache policies for diffusion language models, compared under one decoding loop and one engine."""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "policies").is_dir():  # a source checkout: the subpackages lie beside this folder
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
