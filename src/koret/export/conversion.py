"""Other engines' files, made with their own tools: ONNX by torch, int8 by ONNX Runtime, OpenVINO by its converter."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from koret.retrieval.encoder import TextEncoder

ONNX_FILE, ONNX_INT8_FILE = "onnx/model.onnx", "onnx/model_qint8.onnx"
OPENVINO_FILE, OPENVINO_INT8_FILE = "openvino/openvino_model.xml", "openvino/openvino_model_qint8_quantized.xml"
LARGEST_ONNX = 2_000_000_000  # bytes a single protobuf file may have; beyond, the weights lie beside it
NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "openvino-int8": ("onnx", "onnxscript", "openvino", "nncf"),
}


class Tokens(nn.Module):
    """What is exported: token ids and mask (N, L) -> the vector of every token (N, L, C)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def require_packages(kind: str) -> None:
    """Raise RuntimeError naming the extra where a library that ``kind`` of export needs is missing."""
    missing = []
    for name in NEEDED.get(kind, NEEDED.get(kind.removesuffix("-int8"), ())):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise RuntimeError(f"this export needs {', '.join(missing)}: pip install 'koret[export]'")


def write_onnx(encoder: TextEncoder, file: Path) -> None:
    """The transformer as ONNX with free batch size and length: input_ids, attention_mask -> last_hidden_state."""
    module = Tokens(encoder.backbone).eval()
    example = torch.ones(2, 8, dtype=torch.long)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=encoder.max_seq_length)
    free = {0: batch, 1: length}
    file.parent.mkdir(parents=True, exist_ok=True)
    device = encoder.device
    with _quiet():
        program = torch.onnx.export(
            module.cpu(),
            (example, torch.ones_like(example)),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
            verbose=False,
        )
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        program.save(str(file), external_data=size > LARGEST_ONNX)
    encoder.backbone.to(device)


def quantize_onnx(source: Path, file: Path) -> None:
    """Weights of products and of the embedding table in int8, a scale per channel; activations scaled as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(str(source), str(file), per_channel=True, weight_type=QuantType.QInt8)


def write_openvino(onnx_file: Path, file: Path, *, int8: bool) -> None:
    """The ONNX file as OpenVINO's, weights float32 or (``int8``) 8 bits with a scale per channel (NNCF)."""
    import openvino

    file.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        model = openvino.convert_model(str(onnx_file))
        if int8:
            import nncf

            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        openvino.save_model(model, str(file), compress_to_fp16=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters print progress, tables and advice of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
