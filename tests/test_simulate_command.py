"""``quantitron simulate fisp_mrf``: its options arrive, and those of other sequences are refused."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from quantitron.gadgets.header import make_context, parse_header

RUN = [sys.executable, str(Path(__file__).with_name("run_command.py"))]
SMALL = ["--matrix", "16,16,1", "--fov", "32,32,4", "--coils", "2", "--supersampling", "1"]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "phantom.npz"
    ones = np.ones((6, 10, 10), dtype=np.float32)
    np.savez(path, t1=ones, t2=0.08 * ones, pd=ones, voxel_size=np.array([2e-3, 2e-3, 2e-3]))
    return path


def simulate(*arguments):
    command = [*RUN, "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def read(path):
    with h5py.File(path) as file:
        return make_context(parse_header(file["dataset/xml"][0])), file["dataset/data"][()]["head"]


def test_options_of_a_fingerprint_reach_the_file(tmp_path, phantom):
    schedule = tmp_path / "own.csv"
    schedule.write_text(
        "flip_angle_deg,tr_ms\n" + "".join(f"{10 + 2 * t},{11 + t / 10}\n" for t in range(12))
    )
    options = ["--schedule", schedule, "--points", 9, "--interleaves", 8, "--acquired", 4, "--step", 3]
    options += ["--slices", 2]
    timing = ["--te", "0.9", "--ti", "15", "--snr", "0", "--height", "1", "--calibration", "separate"]
    output = tmp_path / "raw.h5"
    done = simulate("fisp_mrf", "-o", output, "--phantom", phantom, *SMALL, *options, *timing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: 34 spirals, 0 of noise, R = ")
    context, head = read(output)
    protocol = context.protocol
    assert np.allclose(np.degrees(protocol.flip_angle), 10 + 2 * np.arange(9))
    assert np.allclose(protocol.repetition_time, 1e-3 * (11 + np.arange(9) / 10))
    assert np.allclose([protocol.echo_time, protocol.inversion_time], [[0.9e-3], [15e-3]])
    assert context.encoding.slices == 2
    imaging = head["idx"][8:17]
    assert np.array_equal(imaging["repetition"], np.arange(9))
    assert np.array_equal(imaging["kspace_encode_step_1"], 2 * (3 * np.arange(9) % 4))
    assert np.allclose(np.unique(head["position"][:, 2]), [-3.0, 1.0])


def test_volume_of_tilted_spirals(tmp_path, phantom):
    output = tmp_path / "raw.h5"
    matrix = ["--matrix", "16,16,4", "--fov", "32,32,12", "--coils", "1", "--supersampling", "1"]
    tilted = ["--volume", "tilted", "--trains", 2, "--points", 6, "--order", "shuffled", "--schedule", "tgas"]
    done = simulate("fisp_mrf", "-o", output, "--phantom", phantom, *matrix, *tilted)
    assert done.returncode == 0, done.stderr
    context, head = read(output)
    assert context.encoding.matrix == (4, 16, 16)
    assert (head["trajectory_dimensions"][-12:] == 3).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fisp_mrf", "-R", "4"], "--acceleration"),
        (["fisp_mrf", "--tau", "20,40"], "--tau"),
        (["fisp_mrf", "--flip", "5,10"], "--flip"),
        (["fisp_mrf", "--b0", "20"], "--b0"),
        (["fisp_mrf", "--te", "1,2"], "--te"),
        (["vfa_gre", "--points", "100"], "--points"),
        (["megre", "--schedule", "tgas"], "--schedule"),
        (["t2ir_gre", "--interleaves", "12"], "--interleaves"),
        (["megre", "--acquired", "12"], "--acquired"),
    ],
)
def test_options_of_other_sequences_are_wrong_usage(tmp_path, arguments, named):
    done = simulate(*arguments, "-o", tmp_path / "raw.h5")
    assert done.returncode == 2
    assert named in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_values_are_one_sentence(tmp_path, phantom):
    done = simulate("fisp_mrf", "-o", tmp_path / "raw.h5", "--phantom", phantom, "--schedule", "yang")
    assert done.returncode == 1
    assert done.stderr.strip() == "quantitron: schedule 'yang' is neither jiang, tgas nor a FILE.csv"


def test_the_phantom_and_the_schedule_are_never_replaced(tmp_path, phantom):
    schedule = tmp_path / "own.csv"
    schedule.write_text("flip_angle_deg,tr_ms\n10,11\n12,11\n")
    raw = tmp_path / "raw.h5"
    before = phantom.read_bytes(), schedule.read_bytes()
    for replaced, arguments in (
        (phantom, ["megre", "-o", phantom]),
        (phantom, ["fisp_mrf", "-o", phantom]),
        (phantom, ["fisp_mrf", "-o", raw, "--b1-map", phantom]),
        (schedule, ["fisp_mrf", "-o", schedule, "--schedule", schedule]),
    ):
        done = simulate(*arguments, "--phantom", phantom, "--overwrite")
        assert done.returncode == 1
        assert done.stderr.strip() == f"quantitron: {replaced} is read and cannot be the output as well"
    assert (phantom.read_bytes(), schedule.read_bytes()) == before
