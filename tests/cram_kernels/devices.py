"""Where Triton tests run: CPU tensors under its interpreter, CUDA tensors compiled (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from cram_kernels.dispatch import triton_missing
from cram_kernels.library import library_missing

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
_NO_CPU = triton_missing(torch.device("cpu"), FP32)

# On a module or test that needs the interpreter, or a CUDA device.
needs_interpreter = pytest.mark.skipif(_NO_CPU is not None, reason=_NO_CPU or "")
# numpy, which computes under the interpreter, warns where Inf or NaN meet, in unwritten memory as well.
quiet_numpy = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
needs_native = pytest.mark.skipif(
    library_missing("cpu") is not None, reason=f"no native library: {library_missing('cpu')}"
)
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_devices(
    cpu: tuple[torch.dtype, ...] = (FP32, FP16), cuda: tuple[torch.dtype, ...] = (BF16, FP16, FP32)
) -> pytest.MarkDecorator:
    """Parametrise a test over ("device", "dtype"); CUDA entries carry the gpu marker."""
    places = [("cpu", dtype, needs_interpreter) for dtype in cpu]
    places += [("cuda", dtype, needs_cuda) for dtype in cuda]
    return pytest.mark.parametrize(
        ("device", "dtype"),
        [pytest.param(device, dtype, marks=m, id=f"{device}-{_NAMES[dtype]}") for device, dtype, m in places],
    )
