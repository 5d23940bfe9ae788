"""``DiffusionQuantConfig``: every option of arrow_quant_v2's, those with an effect told from those without."""

from __future__ import annotations

from dataclasses import dataclass

from flightquant.errors import InvalidRequestError

BIT_WIDTHS = (2, 4, 8)
PROFILES = {
    "edge": {"bit_width": 2, "group_size": 256, "num_time_groups": 5, "min_accuracy": 0.65, "calibration_samples": 32},
    "local": {"bit_width": 4, "group_size": 128, "num_time_groups": 10, "min_accuracy": 0.85},
    "cloud": {
        "bit_width": 8,
        "group_size": 64,
        "num_time_groups": 20,
        "min_accuracy": 0.95,
        "calibration_samples": 512,
    },
}
_MODALITIES = (None, "text", "code", "image", "audio")
_INSTEAD = {
    "enable_transition_optimization": "nothing: weights alone do not tell how steps of a diffusion follow one another",
    "enable_mixed_precision": "a recipe, or a scheme for each layer in the table's scheme column",
}


def check_bit_width(bit_width: object) -> int:
    """The width, if it is one.

    Raises
    ------
    InvalidRequestError
        It is not 2, 4 or 8.
    """
    if type(bit_width) is not int or bit_width not in BIT_WIDTHS:
        raise InvalidRequestError(
            f"bit_width is {bit_width!r}; expected 2, 4 or 8", field="bit_width", got=bit_width, expected=BIT_WIDTHS
        )
    return bit_width


@dataclass(kw_only=False)
class DiffusionQuantConfig:
    """How a model is quantized, in arrow_quant_v2's words.

    Attributes
    ----------
    bit_width : int
        2, 4 or 8.
    modality : {None, "text", "code", "image", "audio"}
        Handed on into the result.
    group_size : int
        Weights for each scale along a row: 32, 64, 128 or 256. Rows that it does not divide take the next smaller one
        that does, else one scale for the whole row.
    min_accuracy : float
        Cosine similarity of the whole model below which a warning is given, or with ``fail_fast`` an error raised,
        before anything is written.
    fail_fast : bool
        See ``min_accuracy``.
    deployment_profile : {"edge", "local", "cloud"}
        A name; :meth:`from_profile` sets what stands behind it.
    num_threads : int
        Compute threads; 0: all CPUs that the process may use.
    enable_transition_optimization, enable_mixed_precision : bool
        True raises: they had no sound meaning for weights alone.
    num_time_groups, enable_time_aware, enable_spatial, calibration_samples, enable_entropy_adaptation, markov_weight
        No effect: quantized weights are one set of weights, whatever the time step and without samples.
    entropy_weight, learning_rate, max_iterations, convergence_threshold, beta_schedule
        No effect without ``enable_transition_optimization``.
    enable_streaming, enable_memory_aware_scheduling, max_memory_limit_mb, enable_simd, simd_threshold
        No effect: memory is always bounded by a few layers, vector instructions are always used.
    skip_sensitive_layers : bool
        No effect: embeddings, norms and output layers always stay as they are.

    Raises
    ------
    InvalidRequestError
        A value is none of those above.
    """

    bit_width: int = 4
    modality: str | None = None
    num_time_groups: int = 10
    group_size: int = 128
    enable_time_aware: bool = True
    enable_spatial: bool = True
    min_accuracy: float = 0.85
    calibration_samples: int = 128
    deployment_profile: str = "local"
    fail_fast: bool = False
    enable_entropy_adaptation: bool = True
    enable_transition_optimization: bool = False
    markov_weight: float = 0.1
    entropy_weight: float = 0.05
    learning_rate: float = 0.01
    max_iterations: int = 50
    convergence_threshold: float = 1e-4
    beta_schedule: str = "linear"
    num_threads: int = 0
    enable_streaming: bool = True
    enable_memory_aware_scheduling: bool = True
    max_memory_limit_mb: int | None = None
    enable_mixed_precision: bool = False
    skip_sensitive_layers: bool = False
    enable_simd: bool = True
    simd_threshold: int = 128

    def __post_init__(self) -> None:
        check_bit_width(self.bit_width)
        for name, allowed in (
            ("modality", _MODALITIES),
            ("deployment_profile", tuple(PROFILES)),
            ("beta_schedule", ("linear", "cosine")),
            ("group_size", (32, 64, 128, 256)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidRequestError(
                    f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}",
                    field=name,
                    got=value,
                    expected=allowed,
                )
        if not 0.0 <= self.min_accuracy <= 1.0:
            raise InvalidRequestError(
                f"min_accuracy is {self.min_accuracy}; expected 0 to 1", field="min_accuracy", got=self.min_accuracy
            )
        for name, instead in _INSTEAD.items():
            if getattr(self, name):
                raise InvalidRequestError(f"{name} is not supported; use {instead}", field=name, got=True)

    @classmethod
    def from_profile(cls, profile: str) -> DiffusionQuantConfig:
        """The settings of ``"edge"`` (2 bits, groups of 256), ``"local"`` (4, 128) or ``"cloud"`` (8, 64).

        Raises
        ------
        InvalidRequestError
            There is no such profile.
        """
        if profile not in PROFILES:
            raise InvalidRequestError(
                f'there is no profile "{profile}"; expected one of {", ".join(PROFILES)}',
                field="profile",
                got=profile,
                expected=tuple(PROFILES),
            )
        settings: dict[str, object] = {**PROFILES[profile], "deployment_profile": profile}
        return cls(**settings, enable_spatial=profile != "edge", enable_entropy_adaptation=False)  # type: ignore[arg-type]
