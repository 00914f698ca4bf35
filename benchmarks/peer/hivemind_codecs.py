"""The peers' side of `benchmarks.codecs`: for each line on stdin one turn of every codec, one line of JSON on stdout.

Run by the Python of the peers' environment, with the vector as a .npy file. A turn is {codec: [encode, decode]}, in CPU
seconds; the first line says {codec: [bits per parameter, relative L2 error]}.
"""

import json
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import bitsandbytes.functional  # noqa: E402
import hivemind.compression  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

HIVEMIND = {
    "hivemind Float16": hivemind.compression.Float16Compression(),
    "hivemind Uniform8Bit": hivemind.compression.Uniform8BitQuantization(),
    "hivemind Quantile8Bit": hivemind.compression.Quantile8BitQuantization(),
}


def hivemind_trip(codec, values):
    """Return the bytes, the seconds to encode and decode, and the decoded vector."""
    info = hivemind.compression.CompressionInfo.from_tensor(values)
    began = time.process_time()
    message = codec.compress(values, info)
    encoded = time.process_time()
    decoded = codec.extract(message)
    return len(message.buffer), encoded - began, time.process_time() - encoded, decoded


def bitsandbytes_trip(values):
    """Return the same for blockwise 8-bit quantisation with the dynamic map, blocks of 2048."""
    began = time.process_time()
    codes, state = bitsandbytes.functional.quantize_blockwise(values, blocksize=2048)
    encoded = time.process_time()
    decoded = bitsandbytes.functional.dequantize_blockwise(codes, state)
    return codes.numel() + 4 * state.absmax.numel(), encoded - began, time.process_time() - encoded, decoded


def main():
    """Serve turns until stdin ends."""
    torch.set_num_threads(1)
    values = torch.from_numpy(np.load(sys.argv[1]))
    trips = {name: lambda codec=codec: hivemind_trip(codec, values) for name, codec in HIVEMIND.items()}
    trips["bitsandbytes blockwise"] = lambda: bitsandbytes_trip(values)
    measures = {}
    for name, trip in trips.items():
        nbytes, _, _, decoded = trip()
        measures[name] = [8 * nbytes / values.numel(), float((decoded - values).norm() / values.norm())]
    print(json.dumps(measures), flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: trip()[1:3] for name, trip in trips.items()}), flush=True)


if __name__ == "__main__":
    main()
