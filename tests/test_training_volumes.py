"""Reading volumes to train on, varying patches of them, holding some out."""

from __future__ import annotations

import gzip
import math

import nibabel
import numpy as np
import pytest
import torch
from training_volumes import blobs, write_nifti

from quantitron.gadgets.errors import ScanError
from quantitron.training.augmentation import UNCHANGED, Augmentation, random_crop, shading, turned
from quantitron.training.batch import step_generator
from quantitron.training.noise_batches import NoiseSampler, PatchPlan, hold_out, validation_batches
from quantitron.training.volumes import Volume, VolumeCollection, modality_of, read_volumes


def image(seed=0, shape=(24, 28, 20)):
    return (500 * blobs(seed, shape)).astype(np.float32)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ reading


def test_names_tell_the_modality(tmp_path):
    for name, modality in {
        "sub-01_ses-2_acq-mprage_T1w.nii.gz": "T1w",
        "sub-01_T2w.nii": "T2w",
        "sub-01_desc-brain_PDw.nii.gz": "PDw",
        "IXI002-Guys-0828-T1.nii.gz": "T1w",
        "x-PD.nii": "PDw",
        "sub-01_T1map.nii.gz": "",
        "sub-01_T1w_mask.nii.gz": "",
        "sub-01_bold.nii.gz": "",
        "T1w_sub-01_dseg.nii.gz": "",
    }.items():
        assert modality_of(tmp_path / name) == modality, name


def test_a_folder_is_read_and_other_images_are_passed_over(tmp_path, caplog):
    caplog.set_level("INFO", logger="quantitron")
    deep = tmp_path / "sub-02" / "anat"
    deep.mkdir(parents=True)
    write_nifti(tmp_path / "sub-01_T1w.nii.gz", image(0))
    write_nifti(deep / "sub-02_PDw.nii", image(1))
    write_nifti(deep / "sub-02_T1map.nii.gz", image(2))
    (deep / "._sub-02_T2w.nii.gz").write_bytes(b"left behind by a file manager")
    found = read_volumes(tmp_path)
    assert found.counts == {"T1w": 1, "PDw": 1}
    assert found.modalities == ("T1w", "PDw")
    assert found.skipped == 1
    assert "1 NIfTI files are passed over" in caplog.text
    assert "sub-0" not in caplog.text


def test_axes_are_canonical_and_intensity_is_normalised(tmp_path):
    """The same head stored in another orientation is the same volume."""
    values = image()
    values[:2] = 0  # a side that tells left from right
    write_nifti(tmp_path / "a_T1w.nii.gz", values)
    straight = read_volumes(tmp_path).volumes[0]
    assert straight.values.dtype == torch.float16
    ordered = straight.values.float().flatten().sort().values
    assert float(ordered[math.ceil(0.995 * len(ordered)) - 1]) == pytest.approx(1, abs=0.02)
    other = tmp_path / "other"
    other.mkdir()
    affine = np.array([[0, 0, -1.0, 23], [-1, 0, 0, 27], [0, 1, 0, 0], [0, 0, 0, 1]])
    write_nifti(other / "b_T1w.nii.gz", 7 * values[::-1, ::-1].transpose(1, 2, 0), affine)
    again = read_volumes(other).volumes[0]
    assert again.values.shape == straight.values.shape
    torch.testing.assert_close(again.values, straight.values, rtol=0, atol=1e-3)
    # (z, y, x): slices run along the third axis of the file
    assert straight.values.shape[0] <= 20 < straight.values.shape[1]


def test_thick_slices_become_axis_z_and_a_voxel_size_is_reached(tmp_path):
    values = image(shape=(6, 30, 40))  # sagittal slices of 4 mm
    write_nifti(tmp_path / "a_T2w.nii.gz", values, np.diag([4.0, 1, 1, 1]))
    assert read_volumes(tmp_path).volumes[0].values.shape == (6, 40, 30)
    even = read_volumes(tmp_path, voxel_size=1.0).volumes[0].values
    assert even.shape == (40, 30, 24)
    coarse = read_volumes(tmp_path, voxel_size=1.5).volumes[0].values
    assert coarse.shape == (27, 20, 16)


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1e3), ("micron", 1e-3), ("unknown", 1.0)])
def test_lengths_are_in_the_unit_that_the_file_names(tmp_path, unit, millimetres):
    values = blobs(0).astype(np.float32)
    write_nifti(tmp_path / "mm_T1w.nii", values, np.diag([1.0, 1.0, 2.0, 1.0]))
    other = nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 2.0, millimetres]) / millimetres)
    other.header.set_xyzt_units(unit)
    nibabel.save(other, tmp_path / "other_T1w.nii")
    one, two = (part.values for part in read_volumes(tmp_path, voxel_size=1.5).volumes)
    torch.testing.assert_close(two, one)


def test_the_checksum_knows_the_data_and_not_their_names(tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    for folder, names in ((first, ("x", "y")), (second, ("Meier_Anna", "Abel_Kurt")), (third, ("x", "y"))):
        folder.mkdir()
        for seed, name in enumerate(names):
            write_nifti(folder / f"{name}_T1w.nii.gz", image(seed + (folder == third)))
    one, two, three = (read_volumes(folder) for folder in (first, second, third))
    assert one.checksum == two.checksum != three.checksum
    assert [v.digest for v in one.volumes] == [v.digest for v in two.volumes]
    assert "Anna" not in repr(two)


def test_a_table_names_files_modalities_and_weights(tmp_path):
    write_nifti(tmp_path / "one.nii.gz", image(0))
    write_nifti(tmp_path / "two.nii.gz", image(1))
    table = tmp_path / "list.csv"
    table.write_text("file,modality,weight\none.nii.gz,T1w,2.5\ntwo.nii.gz,FLAIR,\n")
    found = read_volumes(table)
    assert {v.modality: v.weight for v in found.volumes} == {"T1w": 2.5, "FLAIR": 1.0}
    assert found.modalities == ("T1w", "FLAIR")
    for text, said in {
        "file,kind\na,b\n": "no column 'modality'",
        "file,modality\n": "lists no files",
        "file,modality\n,T1w\n": "line 2 .* names no file",
        "file,modality\none.nii.gz,T1 w!\n": "line 2 .* is no modality",
        "file,modality,weight\none.nii.gz,T1w,-1\n": "line 2 .* weight must be a number above zero",
        "file,modality\ngone.nii.gz,T1w\n": "gone.nii.gz does not exist",
    }.items():
        table.write_text(text)
        with pytest.raises(ScanError, match=said):
            read_volumes(table)


def test_files_that_cannot_be_trained_on_are_named(tmp_path):
    def refused(said, voxel_size=None):
        with pytest.raises(ScanError, match=said) as caught:
            read_volumes(tmp_path, voxel_size)
        assert "\n" not in str(caught.value)
        for file in tmp_path.iterdir():
            file.unlink()

    refused("holds no NIfTI files")
    write_nifti(tmp_path / "sub-1_T1map.nii.gz", image())
    refused("none of the 1 NIfTI files")
    with pytest.raises(ScanError, match="does not exist"):
        read_volumes(tmp_path / "gone")
    good = tmp_path / "a_T1w.nii.gz"
    write_nifti(good, np.stack([image(), image(1)], -1))
    refused("a_T1w.nii.gz is 24 x 28 x 20 x 2: not one volume")
    holed = image()
    holed[3, 3, 3] = np.nan
    write_nifti(good, holed)
    refused("a_T1w.nii.gz holds 1 voxels that are no numbers")
    write_nifti(good, np.full((24, 28, 20), 3, np.int16))
    refused("a_T1w.nii.gz is empty: every voxel is 3")
    write_nifti(good, image().astype(np.complex64))
    refused("a_T1w.nii.gz holds complex64 values")
    write_nifti(good, image(shape=(8, 28, 20)))
    refused("a_T1w.nii.gz has slices of only 28 x 8 voxels")
    good.write_bytes(b"this is no NIfTI file")
    refused("a_T1w.nii.gz cannot be read as NIfTI")
    write_nifti(good, image())
    good.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    refused("a_T1w.nii.gz cannot be read as NIfTI")
    write_nifti(good, image())
    plain = tmp_path / "a_T1w.nii"
    plain.write_bytes(gzip.decompress(good.read_bytes())[:-1000])
    good.unlink()
    refused("a_T1w.nii cannot be read as NIfTI")
    write_nifti(good, image())
    (tmp_path / "b_T1w.nii.gz").symlink_to("content that was never fetched")
    refused("b_T1w.nii.gz does not exist")
    write_nifti(good, image())
    refused("voxel size of 0 mm", 0.0)
    # a header that promises more voxels than the file could hold
    content = bytearray(gzip.compress(b""))
    write_nifti(good, image())
    content = bytearray(gzip.decompress(good.read_bytes()))
    content[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], "<i2").tobytes()
    good.write_bytes(gzip.compress(bytes(content)))
    refused("a_T1w.nii.gz says that it has 2.7e\\+13 voxels")


def test_one_volume_in_four_dimensions_is_one(tmp_path):
    write_nifti(tmp_path / "a_T1w.nii.gz", image()[..., None])
    assert read_volumes(tmp_path).volumes[0].values.ndim == 3


# ------------------------------------------------------------------ variation


def test_crops_are_parts_of_the_volume_and_avoid_air():
    volume = torch.zeros(10, 80, 80, dtype=torch.float16)
    volume[:, 50:, 50:] = torch.rand(10, 30, 30, generator=chance()).half() + 0.5
    for seed in range(20):
        part, (z, y, x) = random_crop(volume, (4, 16, 16), chance(seed))
        assert part.shape == (4, 16, 16)
        assert part.dtype == torch.float32
        assert torch.equal(part, volume[z : z + 4, y : y + 16, x : x + 16].float())
    filled = [
        float((random_crop(volume, (1, 16, 16), chance(seed))[0] > 0.1).float().mean()) for seed in range(40)
    ]
    by_chance = (30 / 80) ** 2
    assert np.mean(filled) > 2 * by_chance


def test_crops_larger_than_the_plane_are_filled_with_air():
    volume = torch.ones(3, 10, 40)
    part, place = random_crop(volume, (2, 16, 16), chance())
    assert part.shape == (2, 16, 16)
    assert place[1] <= 0
    assert float(part.sum()) == 2 * 10 * 16
    with pytest.raises(ValueError, match="3 slices"):
        random_crop(volume, (4, 8, 8), chance())


def test_chance_is_the_generator_s_alone():
    volume = torch.rand(6, 40, 40, generator=chance())
    one, two, other = (Augmentation().patch(volume, (4, 24, 24), chance(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_without_variation_a_patch_is_a_crop():
    volume = torch.rand(6, 40, 40, generator=chance())
    patch = UNCHANGED.patch(volume, (2, 16, 16), chance(1))
    corners = volume.unfold(0, 2, 1).unfold(1, 16, 1).unfold(2, 16, 1)
    assert bool((corners == patch).flatten(3).all(-1).any())


def test_flips_and_factors_do_what_they_say():
    volume = torch.arange(16.0)[None, None, :].expand(2, 16, 16) + 1
    seen = set()
    flips = Augmentation(flips=(2,), bias=0, intensity=(1, 1), turned=0)
    for seed in range(20):
        patch = flips.patch(volume, (2, 16, 16), chance(seed))
        seen.add(bool(patch[0, 0, 0] > patch[0, 0, -1]))
        assert torch.equal(patch.sort().values, volume)
    assert seen == {True, False}
    scaled = Augmentation(flips=(), bias=0, intensity=(0.5, 1.5), turned=0)
    ratios = [float(scaled.patch(volume, (2, 16, 16), chance(seed))[0, 0, 3] / 4) for seed in range(50)]
    assert 0.5 <= min(ratios) < 0.7
    assert 1.3 < max(ratios) <= 1.5


def test_shading_is_smooth_and_belongs_to_the_volume():
    """Neighbouring patches of one field fit together, and from voxel to voxel little changes."""
    coefficients = 0.3 * torch.randn(9, generator=chance(5))
    whole = shading(coefficients, (0, 0, 0), (8, 64, 64), (8, 64, 64))
    part = shading(coefficients, (2, 10, 30), (8, 64, 64), (4, 20, 20))
    torch.testing.assert_close(part, whole[2:6, 10:30, 30:50])
    assert float(whole.min()) > 0
    assert 1.05 < float(whole.max() / whole.min()) < 20
    assert float((whole[:, 1:] / whole[:, :-1] - 1).abs().max()) < 0.1


def test_turning_keeps_place_and_size():
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")

    def spot(row, column):
        return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / 18)[None]

    def centre(picture):
        total = picture.sum()
        rows, columns = torch.arange(picture.shape[1]), torch.arange(picture.shape[2])
        return float((picture[0].sum(1) * rows).sum() / total), float(
            (picture[0].sum(0) * columns).sum() / total
        )

    same = turned(spot(20, 26), (48, 48), 0.0, 1.0)
    torch.testing.assert_close(same, spot(20, 26), rtol=0, atol=1e-5)
    quarter = turned(spot(23.5, 33.5), (48, 48), math.pi / 2, 1.0)
    assert centre(quarter) == pytest.approx((13.5, 23.5), abs=0.05)
    larger = turned(spot(23.5, 33.5), (48, 48), 0.0, 1.2)
    assert centre(larger) == pytest.approx((23.5, 35.5), abs=0.05)
    assert turned(spot(24, 24), (32, 30), 0.1, 1.1).shape == (1, 32, 30)


def test_turned_patches_have_no_corners_of_air():
    volume = torch.ones(2, 120, 120)
    vary = Augmentation(flips=(), bias=0, intensity=(1, 1), turned=1)
    for seed in range(10):
        patch = vary.patch(volume, (1, 64, 64), chance(seed))
        torch.testing.assert_close(patch, torch.ones(1, 64, 64), rtol=0, atol=1e-4)


# ------------------------------------------------------------------ batches and what is held out


def collection(subjects, slices=20, modalities=("T1w", "T2w")):
    """Volumes whose values say subject and slice."""
    volumes = []
    for subject in range(subjects):
        for name in modalities:
            z = torch.arange(slices)[:, None, None] + 100.0 * subject + 1
            volumes.append(
                Volume(z.expand(slices, 32, 32).half(), name, f"s{subject}", 1.0, f"{name}{subject}")
            )
    return VolumeCollection(tuple(volumes))


def test_of_many_subjects_whole_subjects_are_held_out():
    learned, held, how = hold_out(collection(10), 0.2, seed=1)
    assert how == "subjects"
    assert {v.subject for v in learned} | {v.subject for v in held} == {f"s{n}" for n in range(10)}
    assert not {v.subject for v in learned} & {v.subject for v in held}
    assert len({v.subject for v in held}) == 2
    again = hold_out(collection(10), 0.2, seed=1)[1]
    assert [v.digest for v in again] == [v.digest for v in held]


def test_of_few_subjects_slices_are_held_out_and_never_learned_from():
    learned, held, how = hold_out(collection(3), 0.15, seed=0)
    assert how == "slices"
    for subject in range(3):
        values = [
            {int(n) for v in part if v.subject == f"s{subject}" for n in v.values[:, 0, 0].tolist()}
            for part in (learned, held)
        ]
        assert not values[0] & values[1]
        assert len(values[1]) == 3
        nearest = min(abs(a - b) for a in values[0] for b in values[1])
        assert nearest > 2  # neighbours look alike
    with pytest.raises(ScanError, match="nothing can be held out"):
        hold_out(collection(1, slices=3), 0.1, seed=0)
    with pytest.raises(ScanError, match="not within"):
        hold_out(collection(1), 0.0, seed=0)


def test_batches_are_even_over_modalities_and_hold_the_noise_that_they_say():
    volumes = collection(2).volumes
    plan = PatchPlan((1, 16, 16), 6, (8, 16, 16), 2, slab_share=0.25)
    flat = Augmentation(flips=(), bias=0, intensity=(1, 1), turned=0)
    sampler = NoiseSampler(volumes, ("T1w", "T2w"), (0.01, 0.1, 0.4), plan, flat)
    slabs = 0
    for step in range(40):
        batch = sampler(step, step_generator(0, step))
        slab = batch.input.shape[2] == 8
        slabs += slab
        assert batch.input.shape == ((2, 1, 8, 16, 16) if slab else (6, 1, 1, 16, 16))
        assert batch.modality.bincount(minlength=2).tolist() == ([1, 1] if slab else [3, 3])
        assert {round(level, 6) for level in batch.level.tolist()} <= {0.01, 0.1, 0.4}
        clean = batch.input - batch.level[:, None, None, None, None] * batch.target
        torch.testing.assert_close(clean, clean.round(), rtol=0, atol=2e-3)  # the volumes hold whole numbers
        assert float(batch.target.std()) == pytest.approx(1, abs=0.1)
        again = sampler(step, step_generator(0, step))
        assert torch.equal(again.input, batch.input)
    assert slabs == 10


def test_volumes_too_thin_for_slabs_are_left_to_slices():
    thin = collection(2, slices=4)
    plan = PatchPlan((1, 16, 16), 2, (8, 16, 16), 2, slab_share=0.5)
    with pytest.raises(ScanError, match=r"no T1w volume has the 8 slices .* the most is 4"):
        NoiseSampler(thin.volumes, ("T1w", "T2w"), (0.1,), plan, Augmentation())
    mixed = (*thin.volumes, *collection(1, slices=16).volumes)
    sampler = NoiseSampler(mixed, ("T1w", "T2w"), (0.1,), plan, Augmentation())
    assert sampler(1, step_generator(0, 1)).input.shape == (2, 1, 8, 16, 16)
    held = validation_batches(thin.volumes, ("T1w", "T2w"), (8, 16, 16), 2, seed=0)
    assert held == {}


def test_weights_say_how_often_a_volume_is_drawn():
    often, seldom = collection(2, modalities=("T1w",)).volumes
    weighted = (
        Volume(often.values, "T1w", "s0", 9.0, "a"),
        Volume(seldom.values, "T1w", "s1", 1.0, "b"),
    )
    plan = PatchPlan((1, 16, 16), 10, slab_share=0)
    flat = Augmentation(flips=(), bias=0, intensity=(1, 1), turned=0)
    sampler = NoiseSampler(weighted, ("T1w",), (1e-3,), plan, flat)
    values = torch.cat([sampler(n, step_generator(0, n)).input[:, 0, 0, 0, 0] for n in range(30)])
    assert 0.85 < float((values < 90).float().mean()) < 0.95
