"""Hand-over of a network to other runtimes: `torch.export` programs (.pt2) and ONNX files, each compared with the network it came from.

A program is exported in evaluation mode, on the device and in the data type of the network; the network itself is left as it was. With
`dynamic_batch` the first dimension of every input is free, and the comparison is repeated at other batch sizes than the example's. The
relative difference of two outputs a, b is max|a - b| / max|a|.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import RunError, UserError
from .files import write_bytes

TOLERANCE = 1e-3
# Protocol buffers hold less than 2 GiB; the graph itself needs some of it.
LARGEST_SINGLE_FILE = 1_900_000_000


def to_exported_program(
    model: nn.Module, example_inputs: Tensor | tuple, dynamic_batch: bool = True, check: bool = True
) -> ExportedProgram:
    """Export `model` as it runs in evaluation mode.

    `example_inputs` is a tensor [n, ...] or a tuple of positional arguments. UserError: the network cannot be exported (its forward depends
    on values or fixes the batch size). RunError: the program computes something else.
    """
    inputs = _as_tuple(example_inputs)
    with _evaluation(model):
        example = _example(inputs) if dynamic_batch else inputs
        shapes = _dynamic_shapes(example) if dynamic_batch else None
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, example, dynamic_shapes=shapes)
        except Exception as error:
            raise UserError(
                f"torch.export cannot export {type(model).__name__}{' with a free batch size' if dynamic_batch else ''}: "
                f"{_first_line(error)}; try dynamic_batch=False or a forward without value-dependent branches."
            ) from error
        if check:
            module = program.module()
            _compare(model, lambda args: module(*args), _cases(inputs, dynamic_batch), "the exported program")
    return program


def save_exported(model: nn.Module, example_inputs: Tensor | tuple, path: Path | str, dynamic_batch: bool = True) -> Path:
    """Write the exported program to `path` (.pt2) for `torch.export.load`; the file is complete or not there. Errors as above."""
    buffer = io.BytesIO()
    torch.export.save(to_exported_program(model, example_inputs, dynamic_batch), buffer)
    write_bytes(Path(path), buffer.getvalue())
    return Path(path)


def to_onnx(
    model: nn.Module, example_inputs: Tensor | tuple, path: Path | str, dynamic_batch: bool = True, check: bool = True
) -> float | None:
    """Write `model` as an ONNX file and return the largest relative difference of onnxruntime's outputs, None without `check`.

    Weights beyond 1.9 GB go to a second file beside it, `<path>.data`. UserError: the extra `export` is not installed, or the network
    cannot be exported. RunError: the outputs differ by more than 1e-3, relative; the file is then removed.
    """
    _require(["onnx", "onnxscript"] + (["onnxruntime"] if check else []))
    path, inputs = Path(path), _as_tuple(example_inputs)
    program = to_exported_program(model, inputs, dynamic_batch, check=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise UserError(f"torch.onnx cannot export {type(model).__name__}: {_first_line(error)}; torch.export may still work.") from error
    if size > LARGEST_SINGLE_FILE:
        exported.save(str(path), external_data=True)
    else:
        write_bytes(path, exported.model_proto.SerializeToString())
    if not check:
        return None
    try:
        with _evaluation(model):
            return _compare(model, _runtime(path), _cases(inputs, dynamic_batch), "the ONNX network")
    except RunError:
        path.unlink(missing_ok=True)
        Path(f"{path}.data").unlink(missing_ok=True)
        raise


def _runtime(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(f"onnxruntime cannot load {path}: {_first_line(error)}") from error
    names = [entry.name for entry in session.get_inputs()]

    def run(args: tuple) -> list[Tensor]:
        arrays = [arg.detach().cpu().numpy() for arg in args if isinstance(arg, Tensor)]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _compare(model: nn.Module, other: Any, cases: Sequence[tuple], what: str) -> float:
    """Largest relative difference over `cases`; RunError above the tolerance."""
    worst = 0.0
    with torch.no_grad():
        for args in cases:
            expected = _tensors(model(*args))
            try:
                found = _tensors(other(args))
            except Exception as error:
                raise RunError(
                    f"{what} of {type(model).__name__} does not run at batch size {_batch(args)}: {_first_line(error)}"
                ) from error
            if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
                raise RunError(f"{what} of {type(model).__name__} gives outputs of other shapes at batch size {_batch(args)}.")
            for a, b in zip(expected, found):
                a, b = a.double().cpu(), b.double().cpu()
                difference = float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)) if a.numel() else 0.0
                # A NaN is a difference too.
                if not difference <= TOLERANCE:
                    raise RunError(
                        f"{what} of {type(model).__name__} differs from the network by {difference:.3g} (relative) "
                        f"at batch size {_batch(args)}."
                    )
                worst = max(worst, difference)
    return worst


def _cases(inputs: tuple, dynamic_batch: bool) -> list[tuple]:
    """The example inputs, and with a free batch size also one more image and a single one."""
    if not dynamic_batch:
        return [inputs]
    batch = _batch(inputs)
    return [inputs] + [_resize(inputs, other) for other in dict.fromkeys((batch + 1, 1)) if other != batch]


def _example(inputs: tuple) -> tuple:
    """Inputs with at least two images: torch.export fixes a size of 1."""
    return _resize(inputs, 2) if _batch(inputs) == 1 else inputs


def _resize(inputs: tuple, batch: int) -> tuple:
    old = _batch(inputs)
    rows = torch.arange(batch) % old
    return tuple(arg[rows.to(arg.device)] if _batched(arg, old) else arg for arg in inputs)


def _dynamic_shapes(inputs: tuple) -> tuple:
    batch = Dim("batch", min=1)
    return tuple(({0: batch} if _batched(arg, _batch(inputs)) else {}) if isinstance(arg, Tensor) else None for arg in inputs)


def _batched(arg: Any, batch: int) -> bool:
    return isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch


def _batch(inputs: tuple) -> int:
    return next(arg.shape[0] for arg in inputs if isinstance(arg, Tensor) and arg.dim() > 0)


def _as_tuple(example_inputs: Any) -> tuple:
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not any(isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] > 0 for arg in inputs):
        raise UserError(
            "export needs example inputs with a tensor [n, ...], n > 0, got "
            f"{', '.join(type(arg).__name__ for arg in inputs) or 'nothing'}."
        )
    return inputs


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's flag is as before afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _require(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'ONNX export needs {", ".join(missing)}; install with: pip install "compress-toolkit[export]" '
            '(in a checkout: pip install -e ".[export]").'
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
