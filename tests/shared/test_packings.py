"""Layers in GPTQ's and AWQ's layouts, joined from parts."""

from __future__ import annotations

import numpy as np
import pytest

from flightquant import reference
from flightquant.reference import packings
from flightquant.spec import Command


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("scheme", "packing"),
    [("int8", "gptq-v2"), ("int4", "gptq"), ("int4", "awq"), ("int3", "gptq-v2"), ("int2", "gptq")],
)
def test_parts_joined_are_the_whole(scheme: str, packing: str, symmetric: bool) -> None:
    spec = Command.build(scheme=scheme, packing=packing, symmetric=symmetric, group_size=32).layer_spec()
    weights = np.random.default_rng(2).standard_normal((160, 96)).astype(np.float32)
    whole = reference.quantize(weights, spec, "float32").data
    rows = [32, 96, 32]
    ends = np.cumsum(rows)
    parts = [
        reference.quantize(weights[end - count : end], spec, "float32").data.tobytes()
        for end, count in zip(ends, rows, strict=True)
    ]
    assert packings.join(parts, rows, spec, 96) == whole.tobytes()
