"""Files of processes that were killed go; those of living ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import gather, pipeline, scan, write_raw
from test_faults import is_written

from quantitron.gadgets.image_file import read_images
from quantitron.gadgets.network_weights import _put
from quantitron.gadgets.unfinished_file import unfinished_file
from quantitron.phantoms.simulate import simulate
from quantitron.training.series_pairs import SeriesPair, _read, _write

pytestmark = pytest.mark.timeout(120)

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]


def replay(raw: Path, name: Path, target: Path) -> list[str]:
    return [*RUN, "--stand-in", "replay", str(raw), "-p", str(name), "-o", str(target)]


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


def test_maps_of_a_killed_replay_go_when_the_next_one_is_done_and_those_of_a_living_one_stay(
    tmp_path: Path,
) -> None:
    raw, target = write_raw(tmp_path / "raw.h5", scan(40)), tmp_path / "maps.h5"
    for fail in ("hang", "known", "no"):
        (tmp_path / f"{fail}.xml").write_text(pipeline(gather(images=0 if fail == "known" else 2, fail=fail)))
    killed, living = (
        subprocess.Popen(replay(raw, tmp_path / "hang.xml", target), stderr=subprocess.DEVNULL)
        for _ in range(2)
    )
    try:
        deadline = time.monotonic() + 60
        while sum(is_written(path, 2) for path in hidden(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        both = hidden(tmp_path)
        killed.kill()
        killed.wait()
        left = next(path for path in both if f"-{killed.pid}." in path.name)
        # one that fails keeps what may be all there is
        failed = subprocess.run(replay(raw, tmp_path / "known.xml", target), capture_output=True, text=True)
        assert failed.returncode == 1
        assert f"{left} is of a replay that was killed" in failed.stderr
        assert hidden(tmp_path) == both
        done = subprocess.run(replay(raw, tmp_path / "no.xml", target), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [path for path in both if path != left] == hidden(tmp_path)
        assert len(read_images(target)) == 2
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()


def test_raw_data_of_a_killed_simulation_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    """Both were under one name: a second simulation took the file of the first away."""
    shape = (12, 12, 12)
    ones = np.ones(shape, dtype=np.float32)
    phantom, output = tmp_path / "phantom.npz", tmp_path / "raw.h5"
    np.savez(phantom, t1=ones, t2star=0.05 * ones, pd=ones, voxel_size=np.array([2e-3] * 3))
    long = ["simulate", "megre", "-o", output, "--phantom", phantom, "--matrix", "256,256,12"]
    command = [*RUN, *map(str, long), "--fov", "24,24,24", "--coils", "16", "--supersampling", "1"]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while len(hidden(tmp_path)) < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in both)
            time.sleep(0.02)
        for process in both:
            process.send_signal(signal.SIGSTOP)
        both[0].kill()
        both[0].wait()
        stays = next(path for path in hidden(tmp_path) if f"-{both[1].pid}." in path.name)
        small = {"matrix": (8, 8, 4), "fov": (24.0, 24.0, 24.0), "coils": 1, "supersampling": 1}
        simulate(sequence="megre", output=output, phantom=phantom, **small)
        assert hidden(tmp_path) == [stays]
        assert output.exists()
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_pairs_and_weights_of_killed_processes_go(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    pair, weights = tmp_path / "0a.npz", tmp_path / "a.safetensors"
    for path in (pair, weights):
        mine = unfinished_file(path)
        mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{gone.pid}.")).write_bytes(b"half")
        mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{os.getppid()}.")).write_bytes(b"of a living")
        mine.with_name(f".{path.name}.00000000-{gone.pid}.part").write_bytes(b"of another machine")
    _write(pair, SeriesPair(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)))
    _put(weights, b"whole")
    kept = _read(pair)
    assert kept is not None
    assert bool((kept.perfect == 1).all())
    assert weights.read_bytes() == b"whole"
    assert len(hidden(tmp_path)) == 4
    assert not [path for path in hidden(tmp_path) if path.read_bytes() == b"half"]
