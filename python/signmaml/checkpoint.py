"""Checkpoints: safetensors files with JSON in their header. Nothing here pickles or unpickles.

A *weights* file holds a model's state dict under its own names, so that any safetensors reader can use it. A
*training* file holds the trainer's tensors under prefixed names, an *adapted* file a learner adapted to one task. The
header's entry "signmaml" is JSON with `kind`, `version` and the caller's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import write_atomically

FORMAT_VERSION = 1
_ENTRY = "signmaml"
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
# Names of tensors in a weights file that are not the model's begin so. No module's name has a slash.
BESIDE_WEIGHTS = "inner_rates/"


def save(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, metadata: Mapping[str, Any]) -> None:
    """Writes tensors and metadata atomically.

    Args:
        path: File to write; its folder must exist.
        tensors: Name -> tensor, on any device; tied tensors are stored once per name.
        kind: "weights", "training" or "adapted".
        metadata: Anything that JSON can hold. Floats are restored exactly.

    Raises:
        OSError: Writing failed; a previous file at `path` is untouched.
    """
    from safetensors.torch import save as to_bytes

    # Clone: safetensors rejects tensors that share storage, as tied parameters do.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {"kind": kind, "version": FORMAT_VERSION, **metadata}
    write_atomically(path, to_bytes(plain, metadata={_ENTRY: json.dumps(header)}))


def load(path: str | Path, *, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file: its tensors, on the CPU, and its metadata ({} for a file of another program).

    Args:
        path: File to read.
        kind: "weights", "training" or "adapted" to accept only a file of signmaml of that kind; None: any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, not a safetensors file, written by another program (if `kind` is given), of
            another kind, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a .safetensors file, found nothing at {path}")
    return parse(path.read_bytes(), path, kind=kind)


def kind_of(path: Path) -> str | None:
    """The kind of a file, from its header alone; None if signmaml did not write it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    try:
        kind: str | None = json.loads(json.loads(header)["__metadata__"][_ENTRY])["kind"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind


def parse(content: bytes, path: Path, *, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`load` for the content of a file; `path` is for messages.

    Raises:
        ValueError: As `load`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        tensors = from_bytes(content)  # checks the header: its length, every offset, shape and dtype
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(
            f"checkpoint: expected a complete safetensors file, found {path} truncated or of another format ({error})"
        ) from error
    return tensors, _metadata(header.get("__metadata__", {}).get(_ENTRY), path, kind)


def _metadata(text: str | None, path: Path, kind: str | None) -> dict[str, Any]:
    if text is None:
        if kind is not None:
            raise ValueError(f"checkpoint: expected {_a(kind)} file of signmaml, found one of another program: {path}")
        return {}
    try:
        metadata = json.loads(text)
        version, found_kind = metadata["version"], metadata["kind"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint: expected signmaml's JSON header, found a damaged one in {path}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"checkpoint: expected format version {FORMAT_VERSION}, found {version} in {path}")
    if kind is not None and found_kind != kind:
        raise ValueError(f"checkpoint: expected {_a(kind)} file, found {_a(found_kind)} file: {path}")
    return dict(metadata)


def _a(kind: str) -> str:
    return f"an {kind}" if kind == "adapted" else f"a {kind}"


def save_weights(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model's state dict (parameters and persistent buffers) under its own names, atomically.

    Args:
        model: Any module, on any device.
        path: File to write, usually `*.safetensors`; its folder must exist.
        metadata: Optional JSON to keep with the weights.
        beside: Optional further tensors, whose names begin with `BESIDE_WEIGHTS`.

    Raises:
        OSError: Writing failed; a previous file at `path` is untouched.

    Example:
        >>> import tempfile, signmaml
        >>> model = signmaml.MLP(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(model, f"{folder}/mlp.safetensors")
        ...     load_weights(signmaml.MLP(1, 1), f"{folder}/mlp.safetensors")
        {'kind': 'weights', 'version': 1}
    """
    save(path, {**model.state_dict(), **(beside or {})}, kind="weights", metadata=metadata or {})


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads a weights file into a model by name: one of `save_weights` or any other safetensors state dict.

    Args:
        model: Module to load into, on any device.
        path: The file.

    Returns:
        The file's metadata; {} if another program wrote it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or its names, shapes or dtypes differ from the model's; the message lists
            every difference, and the model is unchanged.
    """
    tensors, metadata = load(path)
    if metadata.get("kind", "weights") != "weights":
        raise ValueError(f"checkpoint: expected a weights file, found {_a(metadata['kind'])} file: {path}")
    copy_into(model.state_dict(), of_model(tensors), str(path))
    return metadata


def of_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weights file that are the model's own."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(BESIDE_WEIGHTS)}


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors by name if names, shapes and dtypes equal the target's.

    Raises:
        ValueError: Listing every difference; nothing has been changed.
    """
    problems = [f"nothing for {name!r}" for name in target if name not in source]
    problems += [f"unexpected {name!r}" for name in source if name not in target]
    for name, tensor in source.items():
        if name in target and (tensor.shape, tensor.dtype) != (target[name].shape, target[name].dtype):
            own = target[name]
            problems.append(f"{name!r} is {_kind_of(tensor)}, the model's is {_kind_of(own)}")
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"checkpoint: expected the tensors of this model in {where}, found:{listed}")
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


def _kind_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
