"""``ArrowQuantV2``: arrow_quant_v2's calls, computed by this machine's kernels."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from flightquant.compat.config import DiffusionQuantConfig, check_bit_width
from flightquant.compat.tables import RESULT_SCHEMA, grouping, with_groupings
from flightquant.errors import InvalidRequestError, LayerError
from flightquant.layers import Layer, as_layer, as_reader

log = logging.getLogger("flightquant.compat")

Progress = Callable[[str, float], object]
"""Called with a layer's name (or a message) and the share of the whole call that is done, up to 1."""
MODES = ("diffusion", "base")
FAILED_KEY = "flightquant.failed_layers"
_NAMED_FAILURES = 10
RUN_BYTES = 16 << 20
"""Layers are quantized together until they have as many bytes, and progress is told then."""


class Results(dict[str, dict[str, Any]]):
    """Layer names to their results, in the order given.

    Attributes
    ----------
    failed : dict of str to str
        Layers left out because they cannot be quantized, each with the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, str] = {}


class ArrowQuantV2:
    """arrow_quant_v2's quantizer. One object serves any number of calls and threads; it holds nothing of them.

    Parameters
    ----------
    mode : {"diffusion", "base"}
        Both do the same: weights have no time steps.

    Notes
    -----
    Every layer gets asymmetric integers of ``bit_width`` bits with a scale and a zero point for each group of 128
    weights of a row; rows that 128 does not divide take groups of 64 or 32, else one group for the row.

    Where ``continue_on_error`` is true, layers that cannot be quantized are left out, with a warning, and named: in
    ``failed`` of a dict result, in the metadata key ``flightquant.failed_layers`` (JSON) of a table's schema.
    """

    def __init__(self, mode: str = "diffusion") -> None:
        if mode not in MODES:
            raise InvalidRequestError(
                f'there is no mode "{mode}"; expected one of {", ".join(MODES)}', field="mode", got=mode, expected=MODES
            )
        self.mode = mode

    def quantize(self, weights: Mapping[str, Any], bit_width: int | None = None) -> Results:
        """Quantize a dict of lists of floats (or of arrays), layer by layer.

        Converting lists costs many times what quantizing does: use :meth:`quantize_batch` with arrays.

        Parameters
        ----------
        weights : mapping of str to sequence of float
        bit_width : {2, 4, 8}, optional
            Default 4.

        Returns
        -------
        Results
            For each layer ``quantized_data`` (bytes), ``scales`` and ``zero_points`` (lists of float), ``shape`` (list
            of int) and ``bit_width``.

        Raises
        ------
        InvalidRequestError
            The width is none of the three.
        LayerError
            A layer cannot be quantized, by a NaN for instance.
        """
        return self.quantize_batch(weights, bit_width)

    def quantize_batch(
        self,
        weights_dict: Mapping[str, Any],
        bit_width: int | None = None,
        continue_on_error: bool | None = None,
        parallel: bool | None = None,
    ) -> Results:
        """Quantize a dict of arrays; see :meth:`quantize` for what comes back and what is raised.

        Parameters
        ----------
        weights_dict : mapping of str to array
            NumPy or torch, float32, float16, bfloat16 or float64, of any shape.
        continue_on_error : bool, optional
            Leave out layers that cannot be quantized. Default false.
        parallel : bool, optional
            False: use one thread. Default true.
        """
        return self.quantize_batch_with_progress(weights_dict, bit_width, None, continue_on_error, parallel)

    def quantize_batch_with_progress(
        self,
        weights_dict: Mapping[str, Any],
        bit_width: int | None = None,
        progress_callback: Progress | None = None,
        continue_on_error: bool | None = None,
        parallel: bool | None = None,
    ) -> Results:
        """:meth:`quantize_batch` that calls ``progress_callback(layer_name, share)`` after each layer.

        An exception of the callback is logged and does not end the call.
        """
        bits = check_bit_width(4 if bit_width is None else bit_width)
        if not isinstance(weights_dict, Mapping):
            raise InvalidRequestError(
                f"the weights are a {type(weights_dict).__name__}; expected a dict of arrays", field="weights_dict"
            )
        results = Results()
        places = {name: place for place, name in enumerate(weights_dict, 1)}
        for layers, options in _alike(weights_dict, results.failed):
            _quantize_layers(layers, bits, options, 1 if parallel is False else None, results)
            if results.failed and not continue_on_error:
                break
            for layer in layers:
                tell(progress_callback, layer.name, places[layer.name] / len(weights_dict))
        if results.failed and not continue_on_error:
            raise _failure(results.failed)
        _warn(results.failed)
        return results

    def quantize_arrow(self, weights_table: Any, bit_width: int | None = None) -> pa.Table:
        """Quantize a table of ``layer_name``, ``weights`` (list of float) and, if you like, ``shape``.

        Parameters
        ----------
        weights_table : Table, RecordBatch, reader or any object with ``__arrow_c_stream__``
            All its chunks are read; other columns are left aside.

        Returns
        -------
        Table
            ``layer_name``, ``quantized_data`` (binary), ``scales``, ``zero_points`` (list<float>), ``shape``
            (list<int64>) and ``bit_width`` (uint8), one row for each layer, in order.

        Raises
        ------
        InvalidRequestError, LayerError
            As :meth:`quantize`.
        """
        return self.quantize_batch_arrow(weights_table, bit_width)

    def quantize_arrow_batch(self, record_batch: pa.RecordBatch, bit_width: int | None = None) -> pa.RecordBatch:
        """:meth:`quantize_arrow` for one RecordBatch, answered by one."""
        table = self.quantize_batch_arrow(record_batch, bit_width)
        batches = table.combine_chunks().to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], table.schema)

    def quantize_batch_arrow(
        self, weights_table: Any, bit_width: int | None = None, continue_on_error: bool | None = None
    ) -> pa.Table:
        """:meth:`quantize_arrow` that can leave out layers which cannot be quantized."""
        bits = check_bit_width(4 if bit_width is None else bit_width)
        from flightquant import quantize

        good: list[pa.RecordBatch] = []
        failed: dict[str, str] = {}
        for batch in as_reader(weights_table):
            if not batch.num_rows:
                continue
            answers = quantize(with_groupings(batch), bit_width=bits, symmetric=False, metrics=False)
            good.extend(_good_rows(answer, failed) for answer in answers.to_batches())
        if failed and not continue_on_error:
            raise _failure(failed)
        _warn(failed)
        schema = RESULT_SCHEMA.with_metadata({FAILED_KEY: json.dumps(failed)}) if failed else RESULT_SCHEMA
        return pa.Table.from_batches([batch.replace_schema_metadata(schema.metadata) for batch in good], schema)

    def quantize_batch_smart(self, weights: Any, bit_width: int | None = 4) -> pa.Table:
        """Quantize whatever it is given, a dict of arrays or Arrow data, into the table of :meth:`quantize_arrow`."""
        if not isinstance(weights, Mapping):
            return self.quantize_arrow(weights, bit_width)
        results = self.quantize_batch(weights, bit_width)
        return pa.Table.from_pylist([{"layer_name": name, **row} for name, row in results.items()], RESULT_SCHEMA)

    def quantize_from_safetensors(
        self,
        safetensors_path: str,
        output_path: str,
        config: DiffusionQuantConfig | None = None,
        progress_callback: Progress | None = None,
        bit_width: int | None = None,
    ) -> dict[str, Any]:
        """Convert a safetensors file or folder to a folder that vLLM and transformers load.

        Parameters
        ----------
        output_path : str
            Where the folder appears, whole or not at all.
        config : DiffusionQuantConfig, optional
            Default: four bits, groups of 128.
        bit_width : {2, 4, 8}, optional
            In place of the configuration's.

        Returns
        -------
        dict
            ``quantized_path``, ``compression_ratio`` (tensors before by files after), ``cosine_similarity`` (of the
            quantized layers, weighed by their weights), ``model_size_mb`` (MiB), ``modality`` (the configuration's),
            ``bit_width`` and ``quantization_time_s``.

        Raises
        ------
        InvalidRequestError
            There is nothing to quantize, or an option cannot be.
        LayerError
            A layer cannot be quantized; with ``fail_fast``, the result is under ``min_accuracy``.
        OSError
            A file cannot be read or written.
        """
        from flightquant.compat.models import quantize_from_safetensors

        def told(text: str, share: float) -> None:
            tell(progress_callback, text, share)

        return quantize_from_safetensors(safetensors_path, output_path, config, bit_width, told)

    def validate_quality(self, original_path: str, quantized_path: str) -> dict[str, Any]:
        """Compare a quantized model with its original.

        Returns
        -------
        dict
            ``cosine_similarity``, ``compression_ratio``, ``model_size_mb`` (MiB), ``passed`` (a cosine of 0.70 or more)
            and ``per_layer_accuracy`` (cosine by layer name).

        Raises
        ------
        InvalidRequestError
            The second holds no quantized layers, or others than the first.
        OSError
            A file cannot be read.
        """
        from flightquant.compat.models import validate_quality

        return validate_quality(original_path, quantized_path)

    def quantize_diffusion_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: weights alone do not tell how they are used at each time step."""
        raise _unsupported("quantize_diffusion_model", "quantize_from_safetensors(path, output_path, config)")

    def quantize_diffusion_model_arrow(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: as :meth:`quantize_diffusion_model`."""
        raise _unsupported("quantize_diffusion_model_arrow", "quantize_from_safetensors(path, output_path, config)")

    def quantize_layer_auto(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: scales of the caller's own for each group of time steps."""
        raise _unsupported("quantize_layer_auto", "quantize_batch({name: weights}, bit_width)")

    def get_markov_metrics(self) -> NoReturn:
        """Not supported: scores of made-up time groups."""
        raise _unsupported("get_markov_metrics", "validate_quality, or the columns sqnr_db and cosine of an answer")


def _alike(weights: Mapping[str, Any], failed: dict[str, str]) -> Iterator[tuple[list[Layer], dict[str, Any]]]:
    """Runs of layers that take the same options, bounded in bytes; what is no layer goes into ``failed``."""
    run: list[Layer] = []
    options: dict[str, Any] = {}
    for name, tensor in weights.items():
        try:
            layer = as_layer(name, np.asarray(tensor, np.float32) if isinstance(tensor, list | tuple) else tensor)
        except ValueError as error:
            failed[name] = str(error)
            continue
        own = grouping(layer.shape)
        if run and (own != options or sum(held.nbytes for held in run) >= RUN_BYTES):
            yield run, options
            run = []
        run.append(layer)
        options = own
    if run:
        yield run, options


def _quantize_layers(
    layers: list[Layer], bits: int, options: dict[str, Any], n_threads: int | None, results: Results
) -> None:
    """Put each layer's result, or the reason why it has none, into ``results``."""
    from flightquant import quantize

    weights = {layer.name: layer for layer in layers}
    answers = quantize(weights, bit_width=bits, symmetric=False, metrics=False, n_threads=n_threads, **options)
    for row in answers.select([*RESULT_SCHEMA.names, "status", "error"]).to_pylist():
        name, status, error = row.pop("layer_name"), row.pop("status"), row.pop("error")
        if status == "ok":
            results[name] = row
        else:
            results.failed[name] = error


def _good_rows(answer: pa.RecordBatch, failed: dict[str, str]) -> pa.RecordBatch:
    """The rows that are ok, in the result's columns; of the others the names and reasons go into ``failed``."""
    columns = pa.RecordBatch.from_arrays([answer.column(name) for name in RESULT_SCHEMA.names], schema=RESULT_SCHEMA)
    bad = [row for row, status in enumerate(answer.column("status").to_pylist()) if status != "ok"]
    if not bad:
        return columns
    for row in bad:
        failed[answer.column("layer_name")[row].as_py() or f"row {row}"] = answer.column("error")[row].as_py()
    keep = np.ones(answer.num_rows, bool)
    keep[bad] = False
    return columns.filter(pa.array(keep))


def tell(progress: Progress | None, text: str, share: float) -> None:
    """Call a progress callback whose own failures are none of the call's."""
    if progress is None:
        return
    try:
        progress(text, share)
    except Exception:
        log.warning("the progress callback failed", exc_info=True)


def _failure(failed: Mapping[str, str]) -> LayerError:
    named = "; ".join(f'layer "{name}": {reason}' for name, reason in list(failed.items())[:_NAMED_FAILURES])
    more = f"; and {len(failed) - _NAMED_FAILURES} more" if len(failed) > _NAMED_FAILURES else ""
    return LayerError("unsupported", f"{named}{more}")


def _warn(failed: Mapping[str, str]) -> None:
    if failed:
        warnings.warn(str(_failure(failed)), stacklevel=3)


def _unsupported(call: str, instead: str) -> InvalidRequestError:
    return InvalidRequestError(f"{call} is not supported; use {instead}", field=call)
