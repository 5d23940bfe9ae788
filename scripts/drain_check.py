"""``drain_check.py ADDRESS COMMAND...``: a stream runs while COMMAND stops the server; it must end whole and exact.

Every answer is compared with the NumPy reference by hash. Exit code 1 if an answer is lost or wrong.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from flightquant import reference
from flightquant.client import QuantClient
from flightquant.layers import as_layer, layers_batch
from flightquant.spec import Command

BATCHES = 60


def main() -> None:
    """Stream slowly, stop the server in the middle, read the rest."""
    address, *stop = sys.argv[1:]
    weights = np.random.default_rng(1).standard_normal((256, 1024), np.float32)
    spec = Command.build(scheme="int4", group_size=128).layer_spec()
    wanted = hashlib.sha256(reference.quantize(weights, spec, "float32", measure=False).data.tobytes()).hexdigest()
    stopping: list[subprocess.Popen[bytes]] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(BATCHES):
            if number == BATCHES // 4:
                stopping.append(subprocess.Popen(stop, stdout=subprocess.DEVNULL))
            time.sleep(0.05)
            yield layers_batch([as_layer(f"layers.{number}.weight", weights)])

    answers = 0
    with QuantClient(address, timeout_s=60) as client:
        for batch in client.stream(batches(), scheme="int4", group_size=128):
            for row in batch.column("quantized_data"):
                answers += hashlib.sha256(row.as_buffer()).hexdigest() == wanted
    code = stopping[0].wait()
    print(f"stopped in mid-stream: {answers} of {BATCHES} answers, all exact; the stop ended with {code}")
    sys.exit(answers != BATCHES or code != 0)


if __name__ == "__main__":
    main()
