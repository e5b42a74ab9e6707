"""Adapted networks for other programs: a plain state dict; torch.export and ONNX, checked against the original."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import save_weights
from .files import write_atomically

SUFFIXES = (".safetensors", ".pt2", ".onnx")
_ENTRY = "signmaml.json"
# Of float32 results; other runtimes add in another order.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


class _WithSoftmax(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).softmax(-1)


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    x: Tensor,
    *,
    probabilities: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network for other programs, on the CPU and for any number of examples.

    A program or model is read again and compared with the network on 1, 3 and 4 random inputs before its file appears.

    Args:
        module: A network in evaluation mode, such as `FewShotClassifier.module()`.
        path: ``*.safetensors``: its state dict. ``*.pt2``: a program of `torch.export`. ``*.onnx``: an ONNX model with
            input "x" and output "scores" or "probabilities"; it needs the packages onnx and onnxscript.
        x: Some inputs ``[n, ...]``, for their shape and dtype.
        probabilities: Whether the softmax is part of the network; not with a state dict.
        metadata: JSON to keep in the file: in the header of safetensors, in ``signmaml.json`` of a .pt2, in the
            properties of an ONNX model.

    Raises:
        ValueError: The suffix is another.
        FileNotFoundError: The folder does not exist.
        ModuleNotFoundError: A package is missing.
        RuntimeError: torch cannot export the module, or the result does not agree with it.
    """
    path = Path(path)
    check_place(path)
    network = copy.deepcopy(module).cpu().eval()
    if path.suffix == ".safetensors":
        if probabilities:
            raise ValueError("probabilities: expected False for a state dict, which holds no softmax, found True")
        save_weights(network, path, metadata)
        return
    if probabilities:
        network = _WithSoftmax(network)
    make = _torch_program if path.suffix == ".pt2" else _onnx_model
    inputs = _like(x, 3)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about what it will change
            content, run = make(network, inputs, dict(metadata or {}), "probabilities" if probabilities else "scores")
    except Exception as error:  # torch's exporters raise errors of many classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"export: torch cannot export this {type(module).__name__}: {first}") from error
    for count in (1, 3, 4):
        _compare(network, run, _like(x, count))
    write_atomically(path, content)


def check_place(path: Path) -> None:
    """Checks what `export` needs for a file, before any work.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: As `export`.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export: expected a name ending in {', '.join(SUFFIXES)}, found {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: expected a file in an existing folder, found none at {path}")
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and absent:
        raise ModuleNotFoundError(
            f"export: expected the packages onnx and onnxscript for a .onnx file, found no {' and no '.join(absent)}"
        )


def _torch_program(
    network: nn.Module, x: Tensor, metadata: dict[str, Any], output: str
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_ENTRY: json.dumps({"output": output, **metadata})})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx_model(
    network: nn.Module, x: Tensor, metadata: dict[str, Any], output: str
) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    import onnx

    made = torch.onnx.export(
        network,
        (x,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=["x"],
        output_names=[output],
        external_data=False,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    for name, value in {"output": output, **metadata}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"signmaml.{name}", json.dumps(value)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    return content, _onnx_runner(content)


def _onnx_runner(content: bytes) -> Callable[[Tensor], Tensor]:
    """Runs a model with onnxruntime if it is there, else with onnx's own evaluator."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator: Any = ReferenceEvaluator(onnx.load_from_string(content))
    return lambda x: torch.from_numpy(evaluator.run(None, {"x": x.numpy()})[0])


def _compare(network: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        wanted, found = network(x), run(x)
    if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=_RELATIVE, atol=_ABSOLUTE):
        apart = float((wanted - found).abs().max()) if wanted.shape == found.shape else float("nan")
        raise RuntimeError(
            f"export: expected the network's own predictions for {len(x)} examples, found ones up to {apart:.3g} apart"
        )


def _like(x: Tensor, count: int) -> Tensor:
    """Repeatable inputs of a shape and dtype: numbers in 0..1, or zeros for integers."""
    shape = (count, *x.shape[1:])
    if not x.is_floating_point():
        return torch.zeros(shape, dtype=x.dtype, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(count)
    return torch.rand(shape, dtype=x.dtype, generator=generator, device="cpu")
