"""The NumPy reference against what compressed-tensors and gguf themselves answered (stored)."""

from __future__ import annotations

import numpy as np
import pytest
from fq_testing import GoldenCase, golden_cases, same_bits

from flightquant import reference
from flightquant.schemes import SCHEMES
from flightquant.spec import Command


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case.name)
def test_reference_is_the_library_bit_for_bit(case: GoldenCase) -> None:
    spec = Command.build(**case.options).layer_spec()
    made = reference.quantize(case.weights, spec, case.dtype, importance=case.importance, measure=False)
    same_bits(made.data, case.data, "data")
    assert (made.scales is None) == (case.scales is None)
    assert (made.zero_points is None) == (case.zero_points is None)
    if case.scales is not None:
        same_bits(made.scales, case.scales, "scales")
    if case.zero_points is not None:
        # The library holds zero points as int8: no sign on its zeros, none on ours.
        same_bits(made.zero_points, case.zero_points, "zero points")


def test_golden_vectors_hold_what_they_are_for() -> None:
    cases = golden_cases()
    assert {case.dtype for case in cases} == {"float32", "float16", "bfloat16", "float64"}
    assert {case.options["scheme"] for case in cases} == set(SCHEMES)
    float32 = next(case.weights for case in cases if case.dtype == "float32" and case.weights.shape == (16, 256))
    assert np.any((float32 != 0) & (np.abs(float32) < np.finfo(np.float32).tiny)), "no denormals"
    assert np.abs(float32).max() > 3e38
    assert np.any(np.signbit(float32) & (float32 == 0)), "no negative zero"
    assert any(case.scales is not None and np.any(case.scales == 2.0**-23) for case in cases), "no scale became eps"
    for scheme in ("int8", "int7", "int6", "int5", "int4", "int3", "int2"):
        codes = [case.data for case in cases if case.options["scheme"] == scheme]
        first = np.concatenate(codes) & ((1 << int(scheme[3])) - 1)
        assert len(np.unique(first)) == 1 << int(scheme[3]), f"{scheme}: not every code occurs"
    for scheme in ("nf4", "fp4"):
        packed = np.concatenate([case.data for case in cases if case.options["scheme"] == scheme])
        assert len(np.unique([packed >> 4, packed & 15])) == 16, f"{scheme}: not every code occurs"
    for scheme, finite in (("fp8_e4m3", 2 * 0x7F), ("fp8_e5m2", 2 * 0x7C)):
        codes = [case.data for case in cases if case.options["scheme"] == scheme]
        assert len(np.unique(np.concatenate(codes))) == finite, f"{scheme}: not every value occurs, or more"
