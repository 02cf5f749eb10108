"""Exported models as modules: TorchScript and ONNX files, which run without the code of their network."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapValueError, missing_extra


def extra_library(module: str, purpose: str) -> Any:
    """Return a module of the extra ``export``, such as ``onnxruntime``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.partition(".")[0]
        raise missing_extra("export", f"{purpose} needs {package}") from e


def load_model(path: Path, where: str) -> nn.Module:
    """Load a TorchScript or ONNX file; neither runs Python code from it.

    Args:
        path: the file; ``.onnx`` is ONNX, every other ending TorchScript.
        where: the setting that names it, for messages.

    Returns:
        A module from ``[N, 1, ...]`` to ``[N, C, ...]``, in evaluation mode, on the CPU.

    Raises:
        CellMapValueError: the file cannot be read.
        MissingExtraError: onnxruntime is needed and not installed.
    """
    if path.suffix == ".onnx":
        return OnnxModel(path, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated in torch
            return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-any-return, no-untyped-call]
    except (RuntimeError, ValueError) as e:
        raise CellMapValueError(
            f"{where}: {path} is not a TorchScript file ({str(e).strip().splitlines()[0]}); export one with "
            "cellmap-export to=torchscript"
        ) from e


class OnnxModel(nn.Module):
    """An ONNX file as a module, run by onnxruntime on the device of its input where onnxruntime has a provider for it.

    Args:
        path: the file.
        where: the setting that names it, for messages.

    Raises:
        CellMapValueError: the file cannot be read, or has several inputs or outputs.
        MissingExtraError: onnxruntime is not installed.

    Example:
        >>> OnnxModel(Path("mito/model.onnx"), "ckpt=mito")(torch.zeros(1, 1, 64, 64, 64))  # doctest: +SKIP
    """

    def __init__(self, path: Path, where: str) -> None:
        super().__init__()
        self.runtime = extra_library("onnxruntime", f"{where}: an ONNX model")
        self.path, self.where = path, where
        self._sessions: dict[str, Any] = {}
        session = self._session("cpu")
        inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
        if len(inputs) != 1 or len(outputs) != 1:
            raise CellMapValueError(f"{where}: {path} must have one input and one output, got {inputs} and {outputs}")
        self.input_name = inputs[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for ``[N, 1, ...]``, float32."""
        session = self._session(x.device.type)
        (output,) = session.run(None, {self.input_name: x.detach().float().cpu().numpy()})
        return torch.from_numpy(output).to(x.device)

    def _session(self, device: str) -> Any:
        """Return the session of a device, created at its first use."""
        if device not in self._sessions:
            available = self.runtime.get_available_providers()
            cuda = ["CUDAExecutionProvider"] if device == "cuda" and "CUDAExecutionProvider" in available else []
            options = self.runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            try:
                self._sessions[device] = self.runtime.InferenceSession(
                    str(self.path), options, providers=[*cuda, "CPUExecutionProvider"]
                )
            except Exception as e:  # onnxruntime raises classes of its C extension
                raise CellMapValueError(
                    f"{self.where}: {self.path} is not an ONNX file that onnxruntime can run "
                    f"({str(e).strip().splitlines()[0]}); export one with cellmap-export to=onnx"
                ) from e
        return self._sessions[device]
