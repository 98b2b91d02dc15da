"""Sources of anatomy: MNI152, NIST phantom, FILE.npz, and in-vivo maps turned into one."""

import importlib.util
import socket
from pathlib import Path

import numpy as np
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.phantoms.anatomy import CSF, GREY_MATTER, SPHERES, WHITE_MATTER, Anatomy
from quantitron.phantoms.file import read_anatomy
from quantitron.phantoms.mni import mni_brain
from quantitron.phantoms.nist import PLATES, nist_phantom, reference_values, sphere_number
from quantitron.phantoms.simulate import load_anatomy

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def test_mni_brain_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    mni_brain.cache_clear()
    assert load_anatomy("mni").shape == (189, 233, 197)


@pytest.mark.parametrize(
    ("label", "name", "low", "high"),
    [
        (GREY_MATTER, "t1", 1.350, 1.560),
        (GREY_MATTER, "t2", 0.070, 0.092),
        (GREY_MATTER, "t2star", 0.060, 0.072),
        (WHITE_MATTER, "t1", 0.760, 0.870),
        (WHITE_MATTER, "t2", 0.055, 0.075),
        (WHITE_MATTER, "t2star", 0.048, 0.058),
        (CSF, "t1", 3.9, 4.4),
        (CSF, "t2", 1.5, 1.8),
    ],
)
def test_mni_tissues_have_values_of_3_tesla(label, name, low, high):
    brain = mni_brain()
    values = getattr(brain, name)[brain.labels == label]
    assert low < np.median(values) < high
    assert 0.005 < values.std() / values.mean() < 0.08  # varies, but as one tissue does


def test_mni_brain_is_a_brain():
    brain = mni_brain()
    tissue = brain.labels > 0
    assert np.array_equal(tissue, brain.mask)
    assert np.array_equal(brain.pd > 0, brain.mask)
    assert (brain.t2star[tissue] < brain.t2[tissue]).all()
    volume = brain.mask.sum() * 1e-3  # ml
    assert 1500 < volume < 2100  # the template's brain, with its fluid
    grey, white = (brain.labels == GREY_MATTER).sum(), (brain.labels == WHITE_MATTER).sum()
    assert 1 < grey / white < 2.5
    # Axes: left and right are alike, front and back are not; the cerebellum is low and at the back (+y).
    halves = brain.mask.sum(axis=(0, 1))
    assert abs(int(halves[:98].sum()) - int(halves[99:].sum())) < 0.05 * brain.mask.sum()
    low = brain.mask[:30].sum(axis=(0, 2))
    assert low[117:].sum() > 1.5 * low[:116].sum()


def test_nist_spheres_have_their_reference_values():
    phantom = nist_phantom()
    numbers = np.unique(phantom.labels)
    assert numbers.tolist() == [0, *range(SPHERES + 1, SPHERES + 43)]
    for plate in PLATES:
        reference = reference_values(plate)
        for sphere in (1, 7, 14):
            inside = phantom.labels == SPHERES + sphere_number(plate, sphere)
            assert inside.sum() == pytest.approx(4 / 3 * np.pi * 7.5**3, rel=0.03)  # 1 mm voxels
            for name, values in reference.items():
                assert np.allclose(getattr(phantom, name)[inside], values[sphere - 1])
    t1_plate, t2_plate = reference_values("t1"), reference_values("t2")
    assert (t1_plate["t1"][0], t1_plate["t2"][13]) == pytest.approx((1.989, 0.01583))
    assert (t2_plate["t1"][13], t2_plate["t2"][0]) == pytest.approx((0.0909, 0.5813))
    assert t2_plate["t2star"][13] == pytest.approx(1 / (1 / 0.00559 + 2.0))
    assert reference_values("pd")["pd"][0] == pytest.approx(0.05)


def maps(shape=(4, 6, 8)):
    ones = np.ones(shape, dtype=np.float32)
    return {
        "t1": 1.0 * ones,
        "t2": 0.1 * ones,
        "t2star": 0.05 * ones,
        "pd": ones,
        "labels": 2 * ones.astype(np.uint8),
        "voxel_size": np.array([0.003, 0.002, 0.001]),
    }


def test_file_is_read_as_written(tmp_path):
    path = tmp_path / "phantom.npz"
    content = maps() | {"pd": np.full((4, 6, 8), 1 - 2j), "b0": np.full((4, 6, 8), -7.5)}
    content["pd"][0] = 0
    np.savez(path, **content)
    anatomy = load_anatomy(path)
    assert anatomy.voxel_size == (0.003, 0.002, 0.001)
    assert anatomy.pd.dtype == np.complex64
    assert anatomy.pd[1, 0, 0] == np.complex64(1 - 2j)
    assert anatomy.b0[1, 0, 0] == -7.5
    assert not anatomy.mask[0].any()
    assert anatomy.mask[1:].all()
    assert anatomy.b1 is None


BAD_FILES = {
    "no 'pd'": lambda m: m.pop("pd"),
    "no 'voxel_size'": lambda m: m.pop("voxel_size"),
    r"t1 in phantom .* shape \(4, 6, 7\) but pd has \(4, 6, 8\)": lambda m: m.update(t1=np.ones((4, 6, 7))),
    "three axes": lambda m: m.update(pd=np.ones((6, 8))),
    "in metres, not millimetres": lambda m: m.update(voxel_size=np.array([3.0, 2.0, 1.0])),
    "three positive numbers": lambda m: m.update(voxel_size=np.array([0.003, 0.0, 0.001])),
    "t2star in phantom .* not positive and finite in 1 voxels": lambda m: m["t2star"].__setitem__(
        (1, 1, 1), 0
    ),
    "t1 in phantom .* not positive and finite in 6 voxels": lambda m: m["t1"].__setitem__(
        (0, slice(6), 0), np.nan
    ),
    "pd in phantom .* not finite": lambda m: m["pd"].__setitem__((0, 0, 0), np.inf),
    "zero everywhere": lambda m: m.update(pd=np.zeros((4, 6, 8))),
    "no voxel with signal": lambda m: m.update(mask=np.zeros((4, 6, 8), bool)),
    "not real numbers": lambda m: m.update(t2=np.full((4, 6, 8), 1j)),
}


@pytest.mark.parametrize("sentence", BAD_FILES)
def test_bad_file_is_named_in_one_sentence(tmp_path, sentence):
    content = maps()
    BAD_FILES[sentence](content)
    np.savez(tmp_path / "phantom.npz", **content)
    with pytest.raises(ScanError, match=sentence):
        read_anatomy(tmp_path / "phantom.npz")


def test_what_is_no_archive_is_an_error(tmp_path):
    with pytest.raises(ScanError, match="does not exist"):
        load_anatomy(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("maps")
    with pytest.raises(ScanError, match=r"not an \.npz archive"):
        load_anatomy(tmp_path / "text.npz")
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ScanError, match=r"not an \.npz archive"):
        load_anatomy(tmp_path / "single.npz")
    np.savez(tmp_path / "objects.npz", pd=np.array([{}], dtype=object))
    with pytest.raises(ScanError, match=r"not an \.npz archive of plain arrays"):
        load_anatomy(tmp_path / "objects.npz")
    with pytest.raises(ScanError, match=r"neither mni, nist nor a FILE\.npz"):
        load_anatomy("head")


def test_same_voxel_size_only_crops_and_pads():
    values = np.arange(1, 1 + 30 * 23 * 10, dtype=np.float32).reshape(10, 23, 30)
    anatomy = Anatomy(
        pd=values, voxel_size=(1e-3, 1e-3, 1e-3), mask=values > 0, labels=np.ones(values.shape, np.uint8)
    )
    moved = anatomy.on_grid((12, 16, 30), (1e-3, 1e-3, 1e-3), (6, 8, 15))
    assert moved.pd.shape == (12, 16, 30)
    assert np.array_equal(moved.pd[1:11], values[:, 3:19, :])  # centre 23 // 2 = 11 lands on 8
    assert not moved.pd[[0, 11]].any()
    assert not moved.mask[[0, 11]].any()


def test_grid_twice_finer_repeats_voxels():
    values = np.arange(1.0, 9.0).reshape(2, 2, 2)
    anatomy = Anatomy(pd=values, voxel_size=(2e-3,) * 3, mask=values > 0, labels=values.astype(int))
    fine = anatomy.on_grid((4, 4, 4), (1e-3,) * 3, (2, 2, 2), offset=(0.5e-3,) * 3)
    # Fine voxels lie at -1.5, -0.5, 0.5, 1.5 mm, old ones at -2 and 0 mm with edges at -1 and 1.
    assert np.unique(fine.pd[1:3, 1:3, 1:3]).tolist() == [8.0]
    assert fine.pd[0, 0, 0] == 1.0


@pytest.mark.skipif(not (SHARED / "data" / "delics_vol00.npz").exists(), reason="in-vivo maps not present")
def test_in_vivo_maps_become_a_phantom(tmp_path):
    spec = importlib.util.spec_from_file_location("invivo", ROOT / "benchmarks" / "invivo.py")
    invivo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(invivo)
    np.savez(tmp_path / "volume.npz", **invivo.phantom(SHARED / "data" / "delics_vol00.npz"))
    brain = load_anatomy(tmp_path / "volume.npz")
    assert brain.shape == (34, 230, 230)
    assert brain.pd.dtype.kind == "c"
    share = brain.mask.mean()
    assert 0.3 < share < 0.42
    assert np.array_equal(brain.labels > 0, brain.mask)
    fractions = [
        (brain.labels == tissue).sum() / brain.mask.sum() for tissue in (CSF, GREY_MATTER, WHITE_MATTER)
    ]
    assert fractions == pytest.approx([0.1, 0.43, 0.47], abs=0.06)
    rate = 1 / brain.t2star[brain.mask] - 1 / brain.t2[brain.mask]
    assert rate.min() > 0.3
    white = (brain.labels == WHITE_MATTER)[brain.mask]
    assert np.median(rate[white]) == pytest.approx(3.5, rel=0.1)
