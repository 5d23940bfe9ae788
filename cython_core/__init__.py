"""The quantization engine: RecordBatch in, RecordBatch out, kernels in between; no Flight inside."""

from __future__ import annotations

import os

# libgomp reads this when it loads: its idle threads must sleep, not spin, beside a server's own.
_policy = os.environ.get("OMP_WAIT_POLICY")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    from flightquant.cython_core._kernels import active_isa, available_isas
finally:
    if _policy is None:
        del os.environ["OMP_WAIT_POLICY"]

__all__ = ["active_isa", "available_isas"]
