"""Single precision that is meant: no TF32 and no bfloat16 inside of matrix products, whatever the process asked for.

A feature is at most one long, and the sensitivity of a release rests on that; with reduced products it nearly is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_single_precision() -> Iterator[None]:
    """Let float32 products be float32 on every backend, and as before afterwards."""
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
