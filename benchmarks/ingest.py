"""Acquisitions per second from raw data to the reduced problem, and the memory that it takes.

    python benchmarks/ingest.py [--lines 20000] [--folder DIR] [--json FILE]

Random lines of 16 channels x 256 samples (readout oversampled twice) of a T2-prepared inversion recovery with
3 echoes pass through noise_adjust, remove_oversampling and accumulate; the basis comes from the protocol, so
that the reduced problem is summed while lines arrive. They come from an HDF5 file, and over a loopback socket
from a second process. Each figure is measured in a process of its own. Targets: 20 000 a second from file,
10 000 over the socket, and peak memory under 1.3 times the reduced problem.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np

CHANNELS, SAMPLES = 16, 256
MATRIX = (16, 96, 128)
"""(z, y, x) after oversampling is removed."""
CHUNK = 128


def scan_header() -> ismrmrd.xsd.ismrmrdHeader:
    from quantitron.gadgets.header import make_header
    from quantitron.recon.data import Encoding, Protocol

    encoding = Encoding(MATRIX, (0.064, 0.192, 0.256), MATRIX, 1, CHANNELS)
    protocol = Protocol(
        "t2ir_gre",
        echo_time=(4.5e-3, 11.2e-3, 17.9e-3),
        repetition_time=(0.03,),
        flip_angle=(math.radians(10),),
        preparation_time=(0.025, 0.05, 0.07, 0.09),
        excitations=40,
        field_strength=3.0,
    )
    return make_header(encoding, protocol)


def lines(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Noise lines, then lines of random frames and positions: (head (n,), samples (n, c, sample))."""
    from quantitron.gadgets.acquisition_block import HEADER_DTYPE

    rng = np.random.default_rng(0)
    samples = rng.standard_normal((CHUNK, CHANNELS, SAMPLES, 2), dtype=np.float32).view(np.complex64)[..., 0]
    for start in range(-CHUNK, count, CHUNK):
        n = min(CHUNK, count - start)
        head = np.zeros(n, dtype=HEADER_DTYPE)
        head["version"] = 1
        head["number_of_samples"], head["active_channels"], head["available_channels"] = (
            SAMPLES,
            CHANNELS,
            CHANNELS,
        )
        head["center_sample"] = SAMPLES // 2
        head["sample_time_us"] = 5
        head["read_dir"], head["phase_dir"], head["slice_dir"] = np.eye(3)
        if start < 0:
            head["flags"] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
        else:
            index = head["idx"]
            index["segment"] = (np.arange(start, start + n) // 3) % 40
            index["contrast"] = np.arange(start, start + n) % 3
            index["set"] = rng.integers(0, 4, n)
            index["kspace_encode_step_1"] = rng.integers(0, MATRIX[1], n)
            index["kspace_encode_step_2"] = rng.integers(0, MATRIX[0], n)
            if start + n == count:
                head["flags"][-1] = 1 << (ismrmrd.ACQ_LAST_IN_MEASUREMENT - 1)
        yield head, samples[:n]


def write_file(path: Path, count: int) -> None:
    from quantitron.phantoms.raw_file import RawFile

    file = RawFile(path, scan_header())
    for head, samples in lines(count):
        file.append(head, samples)


def send_lines(port: int, count: int) -> None:
    """The sending side, in a process of its own: everything is ready before the first byte goes out."""
    from quantitron.gadgets.acquisition_block import AcquisitionBlock
    from quantitron.gadgets.wire import Wire

    blocks = [
        AcquisitionBlock(head, samples, np.zeros((len(head), SAMPLES, 0), np.float32))
        for head, samples in lines(count)
    ]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        wire = Wire(connection)
        for block in blocks:
            wire.send_block(block)
        wire.send_close()
        connection.recv(1)  # stay until the receiver has read everything


# ------------------------------------------------------------------------------------------------- measuring


def memory(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (highest) of this process [bytes]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def supply_memory(size: int = 1 << 30) -> None:
    """Touch memory and give it back.

    A virtual machine gets memory from its host at the first touch and hands it back some seconds after it was
    freed. That takes up to 2 s for the reduced problem alone, at random, and is not what is measured here.
    """
    np.zeros(size, dtype=np.uint8)[:: 1 << 12] = 1


def run(gadget_names: list[str], source: Callable[[], Iterable[Any]], count: int) -> dict[str, float]:
    """Pass the source through the named gadgets; rate, and peak memory above that before the first line."""
    from quantitron.gadgets.accumulate import Accumulate
    from quantitron.gadgets.acquisition_block import AcquisitionBlock
    from quantitron.gadgets.basis import BasisGadget
    from quantitron.gadgets.header import make_context
    from quantitron.gadgets.prepare import NoiseAdjust, RemoveOversampling

    known = {gadget.name: gadget for gadget in (NoiseAdjust, RemoveOversampling, Accumulate)}

    def chain(items: Iterable[Any]) -> Any:
        context = make_context(scan_header())
        BasisGadget(rank=0.9999).prepare(context)  # as in settings/subspace.yaml
        for name in gadget_names:
            items = known[name]()(items, context)
        return deque(items, maxlen=1)[-1]

    # one short scan first: libraries allocate their own working memory on first use
    chain(
        AcquisitionBlock(head, samples, np.zeros((len(head), SAMPLES, 0), np.float32))
        for head, samples in lines(8 * CHUNK)
    )
    supply_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = memory("VmRSS")
    began, worked = time.perf_counter(), time.process_time()
    result = chain(source())
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    found = {
        "acquisitions_per_second": count / seconds,
        "processor_us_per_acquisition": 1e6 * worked / count,
        "peak_bytes": float(memory("VmHWM") - before),
    }
    if "accumulate" in gadget_names:
        reduced = result.reduced
        found["reduced_bytes"] = float(
            sum(
                part.numel() * part.element_size()
                for part in (reduced.gram, reduced.projected, reduced.count)
            )
        )
        found["rank"] = reduced.basis.rank
        found["peak_over_reduced"] = found["peak_bytes"] / found["reduced_bytes"]
        found["lines_bytes"] = float(count * CHANNELS * MATRIX[2] * 8)
    return found


def from_file(path: str, gadget_names: list[str], count: int) -> dict[str, float]:
    from quantitron.host.raw_file import read_blocks

    return run(gadget_names, lambda: read_blocks(path), count)


def over_socket(gadget_names: list[str], count: int) -> dict[str, float]:
    from quantitron.gadgets.wire import Wire

    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = multiprocessing.get_context("spawn").Process(
            target=send_lines, args=(server.getsockname()[1], count)
        )

        def source() -> Iterator[Any]:
            connection, _ = server.accept()
            with connection:
                yield from Wire(connection).blocks(lambda sentence: sys.exit(sentence))
                connection.sendall(b"x")

        sender.start()
        time.sleep(3 + count / 20_000)  # the sender makes its lines first
        found = run(gadget_names, source, count)
        sender.join()
    return found


def apart(target: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Run in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(target, arguments)


def _non_daemonic_over_socket(gadget_names: list[str], count: int, queue: Any) -> None:
    queue.put(over_socket(gadget_names, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--folder", help="where the raw file is written (default: temporary)")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    everything = ["noise_adjust", "remove_oversampling", "accumulate"]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "raw.h5"
        write_file(path, options.lines)
        for length in range(len(everything) + 1):
            name = "file: read" + "".join(f" + {gadget}" for gadget in everything[:length])
            results[name] = apart(from_file, str(path), everything[:length], options.lines)
    context = multiprocessing.get_context("spawn")
    for length in (0, len(everything)):
        queue = context.Queue()
        process = context.Process(
            target=_non_daemonic_over_socket, args=(everything[:length], options.lines, queue)
        )
        process.start()
        name = "socket: receive" + "".join(f" + {gadget}" for gadget in everything[:length])
        results[name] = queue.get()
        process.join()
    for name, found in results.items():
        text = (
            f"{found['acquisitions_per_second']:9.0f} /s  "
            f"{found['processor_us_per_acquisition']:6.1f} us of processor each  "
            f"peak {found['peak_bytes'] / 1e6:7.1f} MB"
        )
        if "reduced_bytes" in found:
            text += (
                f"  reduced problem {found['reduced_bytes'] / 1e6:.1f} MB (rank {found['rank']:.0f}), "
                f"ratio {found['peak_over_reduced']:.3f}; lines alone {found['lines_bytes'] / 1e6:.0f} MB"
            )
        print(f"{name:62s}{text}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
