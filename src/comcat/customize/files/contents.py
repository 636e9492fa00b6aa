"""What an adapter file holds, against what it says of itself: its checksum, and every tensor against the header.

No model is needed. The metadata entry ``comcat_sha256`` covers the header's text and all tensors; files of earlier
versions have none, and damage inside of their numbers goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError
from ...storage.atomic import tensor_bytes
from ...wording import some
from .header import KEY, Header

CHECKSUM = "comcat_sha256"
_KINDS = ("query", "key", "value", "output")


def pack(header: Header, stored: Mapping[str, Tensor]) -> bytes:
    """The file: tensors as they are stored, the header, and the checksum of both; errors of :func:`check_finite`."""
    check_finite(header, stored)
    text = header.to_json()
    return tensor_bytes(stored, {KEY: text, CHECKSUM: checksum(text, stored)})


def check_finite(header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a number is not finite, perhaps because the storage does not reach so far."""
    bad = not_finite(tensors)
    if bad:
        raise CheckpointError(
            f"adapter {header.name!r} has NaN or infinite values in {some(bad)}, or values too large for "
            f"{header.storage}; nothing was written"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]


def checksum(text: str, stored: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header's text and of names, dtypes, shapes and bytes of all tensors."""
    sha = hashlib.sha256(text.encode())
    sha.update(tensor_bytes(dict(sorted(stored.items()))))
    return sha.hexdigest()


def check_checksum(metadata: Mapping[str, str], stored: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError where a file is not as it was written; one without a checksum passes."""
    wanted = metadata.get(CHECKSUM)
    if wanted is not None and checksum(metadata[KEY], stored) != wanted:
        raise CheckpointError(f"'{path}' does not match its checksum: it was damaged or changed; use an intact file")


def check_contents(header: Header, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the tensors are those that the header speaks of, as far as it says."""
    missing, wrong, seen = [], [], set()
    for component, part in header.components.items():
        if not part.layers:
            missing.append(f"layers of {component}")
        for layer, entry in part.layers.items():
            prefix = f"{component}.{layer}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            own = {name: t for name, t in own.items() if name.count(".") == 2}
            seen |= {prefix + name for name in own}
            if not any(name.endswith(".weight") for name in own):
                missing.append(prefix.rstrip("."))
            streams = {name.partition(".")[0] for name in own}
            needed = [f"{stream}.{kind}.weight" for stream in streams for kind in _KINDS[:3]]
            missing += [prefix + name for name in needed if name not in own]
            if streams and not any(name.endswith(".output.weight") for name in own):  # not every stream has one
                missing.append(f"{prefix}output")
            biases = {f"{name}.bias" for name in entry.biases}
            missing += [prefix + name for name in biases if name not in own]
            wrong += [prefix + name for name, t in own.items() if not _fits(name, t, entry.rank, biases)]
            heads = {_width(name, t) for name, t in own.items() if name.endswith(".weight") and t.dim() == 2}
            if len(heads) > 1:  # all of a layer's products have the same heads and rank
                wrong.append(prefix.rstrip("."))
    if header.token is not None:
        rows = {name: t for name, t in tensors.items() if name.startswith("token.")}
        seen |= set(rows)
        wrong += [name for name, t in rows.items() if t.dim() != 2 or t.shape[0] != header.token["vectors"]]
        if not rows:
            missing.append("token")
    extra = [name for name in tensors if name not in seen]
    said = (("missing", missing), ("too many", extra), ("of another shape", wrong))
    found = [f"{what} ({some(names)})" for what, names in said if names]
    if found:
        raise CheckpointError(f"the tensors of '{path}' are not those that its metadata say: {', '.join(found)}")


def _fits(name: str, tensor: Tensor, rank: int, biases: set[str]) -> bool:
    """Whether a tensor can be ``STREAM.KIND.weight`` or ``.bias`` of products of this rank."""
    _, kind, what = name.split(".")
    if kind not in _KINDS or rank < 1 or not tensor.numel():
        return False
    if what == "bias":
        return tensor.dim() == 1 and name in biases and tensor.shape[0] % rank == 0
    return what == "weight" and tensor.dim() == 2 and _width(name, tensor) % rank == 0


def _width(name: str, tensor: Tensor) -> int:
    """Heads times rank: the rows of A_q, A_k, A_v and the columns of A_o."""
    return int(tensor.shape[1 if name.endswith("output.weight") else 0])
