"""Singular proxies: the directions in which a value projection stretches its input most (SPA-Cache).

With ``W_v = U S Vh``, the proxy of rank r is ``W_r = diag(S[:r]) Vh[:r]``: ``W_r h`` are the r leading coordinates of
the value ``W_v h`` in the basis U, so at full rank their cosines are those of the values themselves. Sign and rotation
do not matter. ``W_r = U[:, :r].T W_v``, and U are eigenvectors of ``W_v W_v.T``, which are found in float64.

For a large model that takes seconds on a GPU and longer on a CPU, so the result is kept in a file, named by a checksum
of the weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dcache.files import cache_folder, write_whole

if TYPE_CHECKING:
    from dcache.engine.network import Weights

log = logging.getLogger(__name__)

FORMAT = "1"  # part of the key: raise it when files of an earlier version must not be read


class Proxies(dict[int, Tensor]):
    """Layer to its proxy, (rank, d_model) in the dtype of the model; layer 0 has none."""


_held: WeakValueDictionary[tuple[str, str], Proxies] = WeakValueDictionary()  # those that some policy uses


def value_proxies(weights: Weights, rank: int) -> Proxies:
    """Proxies of the value projections of all layers above the first.

    Args:
        weights: of the model.
        rank: number of directions, at most that of the projection.

    Returns:
        from this process, from a file, or computed and then kept in one.
    """
    key = checksum(weights, rank)
    held = _held.get((key, str(weights.device)))
    if held is not None:
        return held
    file = folder() / f"{key}.safetensors"
    found = _read(file, weights, rank)
    if found is None:
        found = Proxies({layer: proxy(w, rank) for layer, w in _values(weights)})
        _keep(file, found)
    _held[key, str(weights.device)] = found
    return found


def proxy(w: Tensor, rank: int) -> Tensor:
    """``W_r`` of a projection ``w`` (width, d_model), up to signs: (rank, d_model) in its dtype."""
    wide = w.detach().to(torch.float64)
    directions: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors  # by ascending singular value
    return (directions[:, -rank:].flip(1).T @ wide).to(w.dtype)


def folder() -> Path:
    """Where proxies are kept: below $DCACHE_CACHE_DIR, or the user's cache folder."""
    return cache_folder() / "proxies"


def checksum(weights: Weights, rank: int) -> str:
    """sha256 of everything that the proxies depend on."""
    digest = hashlib.sha256(f"{FORMAT} {rank} {weights.dtype}".encode())
    for layer, w in _values(weights):
        digest.update(f" {layer} {tuple(w.shape)} ".encode())
        digest.update(w.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _values(weights: Weights) -> Iterator[tuple[int, Tensor]]:
    return ((layer, weights.weight(layer, "v")) for layer in range(1, weights.spec.n_layers))


def _read(file: Path, weights: Weights, rank: int) -> Proxies | None:
    """The proxies of a file; None if there is none, or if it does not hold what it should."""
    try:
        tensors = load(file.read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None
    shape = (rank, weights.spec.d_model)
    found = Proxies({layer: tensors[str(layer)] for layer, _ in _values(weights) if str(layer) in tensors})
    if len(found) != weights.spec.n_layers - 1:
        return None
    for x in found.values():
        if tuple(x.shape) != shape or x.dtype != weights.dtype or not bool(x.isfinite().all()):
            return None
    return Proxies({layer: x.to(weights.device) for layer, x in found.items()})


def _keep(file: Path, proxies: Proxies) -> None:
    """Write a file as a whole or not at all; a run goes on without it."""
    try:
        write_whole(file, save({str(layer): x.cpu().contiguous() for layer, x in proxies.items()}))
    except OSError as error:
        log.warning("singular proxies are not kept in %s (%s); the next run computes them again", file.parent, error)


__all__ = ["Proxies", "checksum", "folder", "proxy", "value_proxies"]
