"""Quantize weights with nothing of flightquant: pyarrow and NumPy, from the wire contract alone.

Usage: python stock_client.py grpc://127.0.0.1:8815
"""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

layers = {f"layers.{i}.weight": np.random.default_rng(i).standard_normal((64, 256), np.float32) for i in range(4)}
command = {"op": "quantize", "scheme": "int4", "group_size": 128}
client = flight.connect(sys.argv[1])
writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(json.dumps(command)))

for name, weights in layers.items():  # write one batch, read one answer: this order never deadlocks
    batch = pa.record_batch(
        {
            "layer_name": [name],
            "weights": pa.ListArray.from_arrays(pa.array([0, weights.size], pa.int32()), weights.ravel()),
            "shape": pa.array([weights.shape], pa.list_(pa.int64())),
        }
    )
    if name == "layers.0.weight":
        writer.begin(batch.schema)
    writer.write_batch(batch)
    (row,) = reader.read_chunk().data.to_pylist()
    print(name, row["status"], row["error"] or f"{len(row['quantized_data'])} bytes, {row['sqnr_db']:.2f} dB")

writer.done_writing()
end = json.loads(reader.read_chunk().app_metadata.to_pybytes())
if end["rows"] != len(layers):  # a cut stream can look complete: the server says what it received
    sys.exit("the stream was cut")
print(f"{end['bytes_in']} bytes in, {end['bytes_out']} out, {end['bytes_copied']} copied")
client.close()
