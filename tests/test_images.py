"""Maps to ISMRMRD images: scale, series, geometry, both families of metadata, provenance, no patient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ismrmrd
import numpy as np
import pytest
import torch
from ismrmrd.xsd import CreateFromDocument

from quantitron.gadgets.gadget import Context
from quantitron.gadgets.image_file import read_images, write_images
from quantitron.gadgets.image_geometry import axial_header, place
from quantitron.gadgets.image_metadata import notes_of
from quantitron.gadgets.images import Images, map_images, store
from quantitron.gadgets.map_roles import MAP_ROLES, role_named, standard_deviation_role
from quantitron.gadgets.map_volume import magnitude_volumes, map_volumes
from quantitron.recon.data import Encoding, Maps, Protocol

GADGETRON_KEYS = [
    "GADGETRON_DataRole",
    "GADGETRON_ScaleRatio",
    "GADGETRON_ScaleOffset",
    "GADGETRON_WindowCenter",
    "GADGETRON_WindowWidth",
    "GADGETRON_ImageComment",
    "GADGETRON_SeqDescription",
    "GADGETRON_ImageProcessingHistory",
    "GADGETRON_ColorMap",
    "Skip_processing_after_recon",
    "Use_dedicated_scaling_factor",
    "Keep_image_geometry",
    "GADGETRON_ImageNumber",
]
FIRE_KEYS = [
    "DataRole",
    "SeriesDescription",
    "SeriesDescriptionAdditional",
    "SequenceDescriptionAdditional",
    "ImageComments",
    "ImageType",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "LUTFileName",
    "ImageRowDir",
    "ImageColumnDir",
    "SeriesInstanceUID",
]
PROVENANCE_KEYS = [
    f"Quantitron_{name}"
    for name in [
        "Unit",
        "Version",
        "Pipeline",
        "SettingsHash",
        "Seed",
        "Device",
        "Rank",
        "RetainedEnergy",
        "ResidualToNoise",
        "ClippedVoxels",
        "FailedVoxels",
        "Disclaimer",
    ]
]
HEADER = """<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<subjectInformation><patientName>Jane Roe</patientName><patientID>X-4711</patientID>
<patientBirthdate>1970-01-02</patientBirthdate></subjectInformation>
<studyInformation><studyDate>2026-01-01</studyDate></studyInformation>
<experimentalConditions><H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions>
</ismrmrdHeader>"""

SHAPE = (1, 4, 6, 5)


def scan_header(position: tuple[float, float, float] = (5.0, -3.0, 20.0)) -> np.ndarray:
    """An oblique slab: read along +y, phase along +z, slice along +x of the patient."""
    header = axial_header()
    header["read_dir"], header["phase_dir"], header["slice_dir"] = (0, 1, 0), (0, 0, 1), (1, 0, 0)
    header["position"] = position
    header["measurement_uid"] = 77
    header["acquisition_time_stamp"] = 1234
    header["patient_table_position"] = (0, 0, -50)
    return header


def context(**changes: Any) -> Context:
    made = Context(
        header=CreateFromDocument(HEADER),
        encoding=Encoding(SHAPE[1:], (0.020, 0.060, 0.050), SHAPE[1:]),
        protocol=Protocol("t2ir_gre", (0.004, 0.010), (0.03,), (0.17,), (0.0, 0.05), (0.015,), 40),
        axes={},
        pipeline="subspace",
        settings_hash="0123abcd",
        seed=3,
        device="cpu",
        geometry={0: scan_header()},
    )
    return replace(made, **changes)


def full_maps(**changes: Any) -> Maps:
    """Every map that a t2ir_gre scan gives, with values that storage can hold."""
    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(SHAPE, generator=generator)

    values = {
        "t1": between(0.3, 3.0),
        "t2": between(0.02, 0.3),
        "t2star": between(0.01, 0.2),
        "pd": between(0.1, 40.0),
        "b0": between(-200, 200),
        "phase": between(-3.14, 3.14),
        "inversion": between(0.7, 1.0),
    }
    made = Maps(
        values=values,
        mask=between(0, 1) > 0.2,
        standard_deviation={
            name: 0.01 * value.abs() for name, value in values.items() if name != "inversion"
        },
        magnitude=torch.rand(2, *SHAPE, generator=generator) * 7,
        rank=12,
        retained_energy=0.9999,
        residual_to_noise=1.02,
        failed_voxels=3,
    )
    return replace(made, **changes)


def produce(maps: Maps, **properties: Any) -> list[ismrmrd.Image]:
    return list(Images(**properties)([maps], context()))


def by_series(images: list[ismrmrd.Image]) -> Mapping[int, ismrmrd.Image]:
    assert len({i.image_series_index for i in images}) == len(images)
    return {i.image_series_index: i for i in images}


@pytest.mark.parametrize("output", ["float32", "uint16"])
@pytest.mark.parametrize("layout", ["volume", "slices"])
def test_maps_survive_storage(output: str, layout: str, tmp_path: Path) -> None:
    """To half a code of the storage, through a file, in either layout."""
    maps = full_maps()
    write_images(tmp_path / "maps.h5", "run", produce(maps, output=output, layout=layout))
    found = map_volumes(read_images(tmp_path / "maps.h5"))
    pd_scale = 1000 / np.percentile(maps.values["pd"][maps.mask].numpy(), 99)
    for name, value in maps.values.items():
        role = MAP_ROLES[name]
        expected = value[0].numpy() * role.per_si * (pd_scale if name == "pd" else 1)
        volume = found[role.name]
        assert volume.unit == role.unit
        step = 0.51 / role.ratio if output == "uint16" else 2e-6 * np.abs(expected).max()
        assert np.abs(volume.values - expected).max() <= step, name
        assert volume.voxel_size == pytest.approx((5, 10, 10))
        assert volume.first_voxel == pytest.approx((5 - 2 * 5, -3 - 2 * 10, 20 - 3 * 10))
    assert np.array_equal(found["MASK"].values, maps.mask[0].numpy())


def test_series_and_types_are_those_of_the_contract() -> None:
    images = by_series(produce(full_maps(), output="float32"))
    roles = {index: image.meta["GADGETRON_DataRole"] for index, image in images.items()}
    assert roles == {
        101: "T1",
        102: "T2",
        103: "T2STAR",
        104: "PD",
        105: "FREQMAP",
        106: "PHASE",
        111: "INVERSION",
        112: "MASK",
        121: "T1SD",
        122: "T2SD",
        123: "T2STARSD",
        124: "PDSD",
        125: "FREQMAPSD",
        126: "PHASESD",
        1: "Image",
        2: "Image",
    }
    real = {index for index, image in images.items() if image.image_type == ismrmrd.IMTYPE_REAL}
    assert real == {105, 106}
    assert all(images[i].image_type == ismrmrd.IMTYPE_MAGNITUDE for i in set(images) - real)
    units = {index: image.meta["Quantitron_Unit"] for index, image in images.items()}
    assert [units[i] for i in (101, 102, 103, 104, 105, 106, 111)] == ["ms"] * 3 + [
        "a.u.",
        "Hz",
        "rad",
        "a.u.",
    ]
    assert all(units[i] == units[i - 20] for i in images if 120 < i < 140)
    assert {role.name: role.series for role in MAP_ROLES.values() if 107 <= role.series <= 110} == {
        "CHI": 107,
        "CHIPOS": 108,
        "CHINEG": 109,
        "R2STAR": 110,
    }


def test_scales_of_uint16_are_those_of_the_contract() -> None:
    scales = {role.name: (role.ratio, role.offset) for role in MAP_ROLES.values()}
    assert scales["T1"] == (1, 0)
    assert scales["T2"] == scales["T2STAR"] == scales["R2STAR"] == (10, 0)
    assert scales["PD"] == (1, 0)
    assert scales["FREQMAP"] == (4, 2048)
    assert scales["PHASE"] == (600, 2048)
    assert scales["CHI"] == scales["CHIPOS"] == scales["CHINEG"] == (2, 2048)
    assert scales["INVERSION"] == (4000, 0)
    for name in ("t1", "t2", "t2star"):
        deviation = standard_deviation_role(MAP_ROLES[name])
        assert (deviation.ratio, deviation.offset, deviation.unit) == (100, 0, "ms")


def test_series_of_roles_never_collide() -> None:
    final = [role.series for role in MAP_ROLES.values()]
    deviations = [standard_deviation_role(role).series for role in MAP_ROLES.values() if not role.background]
    previews = [role.series - 10 for role in MAP_ROLES.values() if role.previewed]
    every = final + deviations + previews
    assert len(set(every)) == len(every)
    assert sorted(previews) == list(range(91, 101))


@pytest.mark.parametrize("output", ["float32", "uint16"])
@pytest.mark.parametrize("layout", ["volume", "slices"])
def test_every_image_carries_all_metadata(output: str, layout: str) -> None:
    images = produce(full_maps(), output=output, layout=layout)
    assert len(images) == 16 * (1 if layout == "volume" else 4)
    for image in images:
        meta = image.meta
        missing = [key for key in (*GADGETRON_KEYS, *FIRE_KEYS, *PROVENANCE_KEYS) if key not in meta]
        assert not missing
        assert image.attribute_string.isascii()
        for value in meta.values():
            assert isinstance(value, str) or all(isinstance(part, str) for part in value)
        ratio, offset = float(meta["GADGETRON_ScaleRatio"]), float(meta["GADGETRON_ScaleOffset"])
        assert float(meta["RescaleSlope"]) == pytest.approx(1 / ratio)
        assert float(meta["RescaleIntercept"]) == pytest.approx(-offset / ratio)
        # the two families give the same window in stored and in rescaled units, both in whole numbers
        stored = int(meta["GADGETRON_WindowCenter"]), int(meta["GADGETRON_WindowWidth"])
        rescaled = int(meta["WindowCenter"]), int(meta["WindowWidth"])
        slack = 0.5 + 0.5 * ratio
        assert stored[0] == pytest.approx(rescaled[0] * ratio + offset, abs=slack)
        assert stored[1] == pytest.approx(rescaled[1] * ratio, abs=slack)
        quantitative = meta["GADGETRON_DataRole"] != "Image"
        assert ("Quantitative" in meta["DataRole"]) == quantitative
        assert len(meta["ImageRowDir"]) == len(meta["ImageColumnDir"]) == 3
        assert [float(v) for v in meta["ImageRowDir"]] == list(image.read_dir) == [0, 1, 0]
        assert [float(v) for v in meta["ImageColumnDir"]] == list(image.phase_dir) == [0, 0, 1]
    t1 = images[0].meta
    assert t1["GADGETRON_ImageComment"] == t1["ImageComments"] == "T1_x1_1ms"
    assert t1["GADGETRON_SeqDescription"][-1] == t1["GADGETRON_ImageProcessingHistory"][-1] == "T1"
    assert (t1["GADGETRON_ColorMap"], t1["LUTFileName"]) == ("lipari.pal", "lipari.pal")
    t2star = next(i for i in images if i.meta["GADGETRON_DataRole"] == "T2STAR").meta
    assert t2star["GADGETRON_ImageComment"] == ("T2STAR_x10_0.1ms" if output == "uint16" else "T2STAR_x1_1ms")
    assert t2star["GADGETRON_ColorMap"] == "navia.pal"


def test_provenance_says_how_the_map_was_made() -> None:
    made = context()
    made.notes.append("TR is taken to be in ms")
    meta = next(iter(Images(output="float32")([full_maps()], made))).meta
    assert meta["Quantitron_Pipeline"] == "subspace"
    assert meta["Quantitron_SettingsHash"] == "0123abcd"
    assert (meta["Quantitron_Seed"], meta["Quantitron_Device"], meta["Quantitron_Rank"]) == ("3", "cpu", "12")
    assert float(meta["Quantitron_RetainedEnergy"]) == pytest.approx(0.9999)
    assert float(meta["Quantitron_ResidualToNoise"]) == pytest.approx(1.02)
    assert meta["Quantitron_FailedVoxels"] == "3"
    assert meta["Quantitron_Disclaimer"] == "research use only"
    assert meta["Quantitron_Notes"] == "TR is taken to be in ms"


@pytest.mark.parametrize("notes", [[], ["TR < 1 is in s"], ["two echoes", "B1 & T1 <unknown>", "3"]])
def test_notes_are_read_from_images_as_they_were_written(notes: list[str]) -> None:
    made = context()
    made.notes.extend(notes)
    image = next(iter(Images(output="float32")([full_maps()], made)))
    assert notes_of(image.attribute_string) == notes
    assert notes_of(image.attribute_string[:-20]) == []  # cut on the way
    assert notes_of("") == []


def test_nothing_about_the_patient_is_sent() -> None:
    for image in produce(full_maps()):
        # A series' UID is random and may hold any number.
        sent = image.attribute_string.replace(image.meta["SeriesInstanceUID"], "")
        for secret in ("Jane", "Roe", "4711", "1970", "patient"):
            assert secret not in sent


def test_each_series_has_a_uid_of_its_own_and_a_number_for_each_image() -> None:
    images = produce(full_maps(), layout="slices")
    uids: dict[int, set[str]] = {}
    for image in images:
        uids.setdefault(image.image_series_index, set()).add(image.meta["SeriesInstanceUID"])
    assert all(len(held) == 1 for held in uids.values())
    assert len({next(iter(held)) for held in uids.values()}) == len(uids)
    t1 = [i for i in images if i.image_series_index == 101]
    assert [i.image_index for i in t1] == [1, 2, 3, 4] == [int(i.meta["GADGETRON_ImageNumber"]) for i in t1]


def test_previews_have_series_of_their_own() -> None:
    images = by_series(produce(full_maps(preview=True)))
    assert sorted(images) == [91, 92, 93, 94, 95, 96]
    for index, image in images.items():
        role = image.meta["GADGETRON_DataRole"]
        assert index == role_named(role).series - 10
        assert image.meta["SeriesDescription"] == f"{role}_preview"
    assert map_volumes(images.values()) == {}
    final = produce(full_maps())
    assert not any("_preview" in i.meta["SeriesDescription"] for i in final)


def test_missing_values_and_clipping() -> None:
    role = MAP_ROLES["t1"]
    values = np.array([np.nan, np.inf, 1200.4, 0.2, -30, 4095.4, 5000, 0], np.float32)
    stored, storage = store(values, role, "uint16")
    assert stored.dtype == np.uint16
    assert stored.tolist() == [0, 0, 1200, 1, 1, 4095, 4095, 1]
    assert storage.clipped == 4
    stored, storage = store(values, role, "float32")
    assert np.array_equal(np.isnan(stored), [True, True] + 6 * [False])
    assert np.array_equal(stored[2:], values[2:])
    assert storage.clipped == 0
    field, storage = store(np.array([-512, -511.75, 0, 511.75, 600], np.float32), MAP_ROLES["b0"], "uint16")
    assert field.tolist() == [1, 1, 2048, 4095, 4095]
    assert storage.clipped == 2
    tissue, storage = store(np.array([0, 0.5, 1], np.float32), MAP_ROLES["wm"], "uint16")
    assert tissue.tolist() == [0, 2000, 4000]
    assert storage.clipped == 0
    mask, _ = store(np.array([0, 1], np.float32), MAP_ROLES["mask"], "float32")
    assert mask.tolist() == [0, 1]


def test_clipped_voxels_are_counted_in_the_image_they_are_in() -> None:
    maps = full_maps()
    maps.values["t2"][0, 1, 0, :3] = 1.5  # beyond 409.5 ms
    counts = [
        int(i.meta["Quantitron_ClippedVoxels"])
        for i in produce(maps, output="uint16", layout="slices")
        if i.image_series_index == 102
    ]
    assert counts == [0, 3, 0, 0]


def test_pd_is_scaled_by_what_lies_inside_the_mask() -> None:
    maps = full_maps()
    maps.values["pd"][~maps.mask] = 1e6
    maps.values["pd"][0, 0, 0, 0] = float("nan")
    images = by_series(produce(maps, output="float32"))
    inside = images[104].data[0][maps.mask[0].numpy()]
    assert np.percentile(inside[np.isfinite(inside)], 99) == pytest.approx(1000, rel=1e-5)
    factor = 1000 / np.nanpercentile(maps.values["pd"][maps.mask].numpy(), 99)
    deviation = maps.standard_deviation["pd"][0].numpy() * factor
    assert np.allclose(images[124].data[0], deviation, rtol=1e-5)
    nothing = full_maps(mask=torch.zeros(SHAPE, dtype=torch.bool))
    assert by_series(produce(nothing, output="float32"))[104].data.max() < 41


def test_volume_geometry() -> None:
    image = produce(full_maps())[0]
    assert tuple(image.matrix_size) == (5, 6, 4)
    assert image.field_of_view[:] == pytest.approx([50, 60, 20])
    assert list(image.position) == [5, -3, 20]
    assert list(image.slice_dir) == [1, 0, 0]
    assert (image.slice, image.measurement_uid, image.acquisition_time_stamp) == (0, 77, 1234)
    assert list(image.patient_table_position) == [0, 0, -50]


def test_slices_ascend_along_the_slice_direction() -> None:
    t1 = [i for i in produce(full_maps(), layout="slices") if i.image_series_index == 101]
    assert [i.slice for i in t1] == [0, 1, 2, 3]
    assert [list(i.position) for i in t1] == [[x, -3, 20] for x in (-5, 0, 5, 10)]
    assert all(i.field_of_view[:] == pytest.approx([50, 60, 5]) for i in t1)


def stack_of_slices(positions: list[float]) -> dict[int, np.ndarray]:
    return {s: scan_header((x, -3.0, 20.0)) for s, x in enumerate(positions)}


@pytest.mark.parametrize("layout", ["volume", "slices"])
def test_slices_of_a_multislice_scan_are_sorted(layout: Any) -> None:
    """The slice counter runs against the slice direction here: the images must not."""
    values = np.arange(3, dtype=np.float32)[:, None, None, None] * np.ones((3, 1, 6, 5), np.float32) + 1
    images = list(
        map_images({"pd": values}, stack_of_slices([8.0, 4.0, 0.0]), (0.003, 0.06, 0.05), layout=layout)
    )
    if layout == "volume":
        (image,) = images
        assert image.data[0, :, 0, 0].tolist() == [3, 2, 1]
        assert list(image.position) == [4, -3, 20]
        assert image.field_of_view[2] == pytest.approx(12)
    else:
        assert [i.data.flat[0] for i in images] == [3, 2, 1]
        assert [i.position[0] for i in images] == [0, 4, 8]
        assert all(i.field_of_view[2] == pytest.approx(3) for i in images)
    (volume,) = map_volumes(images).values()
    assert volume.values[:, 0, 0].tolist() == [3, 2, 1]
    assert volume.voxel_size[0] == pytest.approx(4)


def test_uneven_slices_stay_images_of_their_own() -> None:
    placements = place(stack_of_slices([0.0, 4.0, 20.0]), (3, 1, 6, 5), (0.003, 0.06, 0.05), "volume")
    assert [p.slabs for p in placements] == [(0,), (1,), (2,)]
    assert [p.slice_index for p in placements] == [0, 1, 2]
    assert all(p.field_of_view[2] == pytest.approx(3) for p in placements)


def test_geometry_that_the_scan_leaves_out() -> None:
    """A slab without lines lies beside its neighbour; directions that are zero become axial ones."""
    known = {0: scan_header((10.0, 0.0, 0.0))}
    placements = place(known, (2, 4, 6, 5), (0.02, 0.06, 0.05), "volume")
    assert [p.position.tolist() for p in placements] == [[10, 0, 0], [30, 0, 0]]
    blank = scan_header()
    for name in ("read_dir", "phase_dir", "slice_dir"):
        blank[name] = 0
    (placement,) = place({0: blank}, SHAPE, (0.02, 0.06, 0.05), "volume")
    assert placement.header["read_dir"].tolist() == [1, 0, 0]
    (placement,) = place({}, SHAPE, (0.02, 0.06, 0.05), "volume")
    assert placement.position.tolist() == [0, 0, 0]
    assert blank["read_dir"].tolist() == [0, 0, 0]  # the scan's own header is not changed


@pytest.mark.parametrize("output", ["float32", "uint16"])
def test_magnitude_images(output: str) -> None:
    maps = full_maps()
    assert maps.magnitude is not None
    maps.magnitude[1, 0, 0, 0, 0] = float("nan")
    images = [i for i in produce(maps, output=output) if i.meta["GADGETRON_DataRole"] == "Image"]
    assert [(i.image_series_index, i.contrast) for i in images] == [(1, 0), (2, 1)]
    assert [i.meta["EchoTime"] for i in images] == ["4", "10"] == [i.meta["GADGETRON_TE"] for i in images]
    assert images[0].meta["GADGETRON_TI"] == images[0].meta["InversionTime"] == "15"
    found = magnitude_volumes(images)
    expected = np.nan_to_num(maps.magnitude[:, 0].numpy())
    step = 0.51 * expected.max() / 4095 if output == "uint16" else 0
    for volume, echo in zip(found, expected, strict=True):
        assert np.abs(volume.values - echo).max() <= step
    assert (found[0].echo_time, found[1].echo_time) == (4, 10)


def test_truth_of_a_phantom_has_the_same_roles() -> None:
    inside = np.zeros(SHAPE, bool)
    inside[0, 1:3, 1:5, 1:4] = True
    truth = {
        "t1": np.where(inside, 1.3, np.nan),
        "mask": inside,
        "wm": inside * 0.25,
        "gm": inside * 0.75,
        "spheres": inside * 3,
        "chi": np.full(SHAPE, -0.03),
    }
    found = map_volumes(map_images(truth, {}, (0.02, 0.06, 0.05)))
    assert list(found) == ["T1", "MASK", "WM", "GM", "SPHERES", "CHI"]
    assert np.nanmax(found["T1"].values) == np.nanmin(found["T1"].values) == 1300
    assert found["GM"].values.max() == 0.75
    assert found["SPHERES"].values.max() == 3
    assert found["CHI"].values.max() == pytest.approx(-30)
