"""What each scheme takes, for people and programs that choose one: ``DoAction("schemes")``, ``flightquant schemes``."""

from __future__ import annotations

from typing import Any

from flightquant.schemes import FALLBACKS, SCHEMES, WEIGHT_DTYPES, LayerSpec, Scheme
from flightquant.spec import Command


def describe() -> list[dict[str, Any]]:
    """One object per scheme, in the order of their table; every value that a command may give it stands there.

    What depends on the packing is said of the default one, and under ``packings`` of each: ``granularities``,
    ``group_sizes``, ``default_group_size``, ``scale_dtypes``, ``calibrations``, ``options`` (keys of a command that may
    mean more than one thing), ``defaults``, ``exact_with``, ``summary``.
    """
    return [_scheme(scheme) for scheme in SCHEMES.values()]


def _scheme(scheme: Scheme) -> dict[str, Any]:
    variants = {each.packing: each for each in (*scheme.variants, scheme)}
    return {
        "name": scheme.name,
        "bits": scheme.bits,
        "bit_widths": list(scheme.bit_widths),
        "packing": scheme.packing,
        **_packing(scheme, scheme),
        "packings": {name: _packing(scheme, variants[name]) for name in scheme.packings},
        "weights": list(WEIGHT_DTYPES),
    }


def _packing(scheme: Scheme, variant: Scheme) -> dict[str, Any]:
    default = Command.build(scheme=scheme.name, packing=variant.packing).layer_spec()
    choices = {
        "granularity": len(variant.granularities) > 1,
        "group_size": len(variant.group_sizes) > 1,
        "bit_width": scheme.bit_widths,
        "packing": len(scheme.packings) > 1,
        "calibration": len(variant.calibrations) > 1,
        "symmetric": variant.asymmetric and not variant.always_zero_points,
        "scale_dtype": len(variant.scale_dtypes) > 1,
        "fallback": variant.name in FALLBACKS,
    }
    return {
        "granularities": list(variant.granularities),
        "group_sizes": sorted(variant.group_sizes),
        "default_group_size": variant.group_sizes[0] if variant.group_sizes else None,
        "scale_dtypes": list(variant.scale_dtypes),
        "calibrations": list(variant.calibrations),
        "options": [key for key, chosen in choices.items() if chosen],
        "defaults": {
            "bit_width": default.scheme.bits,
            "packing": default.scheme.packing,
            "granularity": default.granularity,
            "group_size": default.group_size or None,
            "symmetric": default.symmetric,
            "calibration": default.calibration,
            "scale_dtype": _scale_dtype(default),
        },
        "exact_with": variant.exact_with,
        "summary": variant.summary,
    }


def _scale_dtype(default: LayerSpec) -> str:
    chosen = {default.scale_dtype_for(dtype) for dtype in ("float32", "float16")}
    return "the weights' own" if len(chosen) > 1 else chosen.pop()
