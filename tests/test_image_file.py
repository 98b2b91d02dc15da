"""Map files: the layout of gadgetron_ismrmrd_client, read and written by others, and every bad file."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from quantitron.gadgets import image_file
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import image_groups, read_images, write_images
from quantitron.gadgets.uninterrupted import uninterrupted


def image(series: int, value: complex = 1, kind: type = np.float32, **meta: object) -> ismrmrd.Image:
    made = ismrmrd.Image.from_array(
        np.full((3, 4, 5), value, kind), transpose=False, image_series_index=series, position=(1.0, 2.0, 3.0)
    )
    made.meta = ismrmrd.Meta(meta)
    return made


def test_images_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    sent = [
        image(103, 7, a=1.5, list=["x", "y"], words="µ é <&>"),
        image(101, 2),
        image(101, 3),
        image(5, 9, np.uint16),
        image(1, 1 + 2j, np.complex64),
    ]
    assert write_images(path, "run", sent) == 5
    found = read_images(path, "run")
    assert [i.image_series_index for i in found] == [1, 5, 101, 101, 103]
    for received, original in zip(found, [sent[4], sent[3], sent[1], sent[2], sent[0]], strict=True):
        assert received.data.dtype == original.data.dtype
        assert np.array_equal(received.data, original.data)
        assert list(received.position) == [1, 2, 3]
    assert found[-1].meta == {"a": "1.5", "list": ["x", "y"], "words": "µ é <&>"}


def test_ismrmrd_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, "run", [image(101, 2, role="T1"), image(101, 3, role="T1é")])
    with ismrmrd.File(path, "r") as file:
        assert file.find_images() == {"run/image_101"}
        images = file["run"]["image_101"].images
        assert [float(i.data.max()) for i in images] == [2, 3]
        assert [i.meta["role"] for i in images] == ["T1", "T1é"]
        assert list(images[1].position) == [1, 2, 3]
    dataset = ismrmrd.Dataset(path, "run", False)
    assert dataset.number_of_images("image_101") == 2
    assert dataset.read_image("image_101", 1).data.max() == 3
    dataset.close()


def test_reads_what_the_ismrmrd_package_writes(tmp_path: Path) -> None:
    """The package's ``Dataset`` writes the layout of the C++ client: one resizable data set for each part."""
    path = tmp_path / "client.h5"
    dataset = ismrmrd.Dataset(path, "2026-01-01 10:00:00")
    for value in (4, 5):
        dataset.append_image("image_102", image(102, value, role="T2"))
    dataset.append_image("image_1", image(1, 1 + 2j, np.complex64, role="Image"))
    dataset.close()
    found = read_images(path)
    assert [(i.image_series_index, i.data.flat[0], i.meta["role"]) for i in found] == [
        (1, 1 + 2j, "Image"),
        (102, 4, "T2"),
        (102, 5, "T2"),
    ]
    write_images(path, "2026-01-01 11:00:00", [image(102, 6)])
    assert read_images(path)[0].data.flat[0] == 6


def test_a_rerun_appends_and_the_latest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, "truth", [image(101, 9)])
    assert read_images(path)[0].data.max() == 9
    write_images(path, "2026-01-02 10:00:00", [image(101, 2)])
    write_images(path, "2026-01-01 10:00:00", [image(101, 1)])
    assert image_groups(path) == ["2026-01-01 10:00:00", "2026-01-02 10:00:00", "truth"]
    assert read_images(path)[0].data.max() == 2
    assert read_images(path, "truth")[0].data.max() == 9


def test_default_group_is_the_date_and_time(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, None, [image(101)])
    (group,) = image_groups(path)
    assert len(group) == len("2026-01-01 10:00:00")
    assert group[4] == group[7] == "-"


def test_an_existing_group_needs_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, "truth", [image(101, 1), image(102, 1)])
    with pytest.raises(ScanError, match="already has a group 'truth'"):
        write_images(path, "truth", [image(101, 2)])
    assert len(read_images(path, "truth")) == 2
    write_images(path, "truth", [image(101, 2)], overwrite=True)
    (only,) = read_images(path, "truth")
    assert only.data.max() == 2


def test_raw_data_of_the_file_survive(tmp_path: Path) -> None:
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file["dataset/xml"] = "header"
    write_images(path, "truth", [image(101)])
    with h5py.File(path) as file:
        assert file["dataset/xml"][()] == b"header"
    assert image_groups(path) == ["truth"]


def test_what_came_before_a_failure_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"

    def failing() -> Iterator[ismrmrd.Image]:
        yield image(101, 4)
        raise ScanError("the solver gave up")

    with pytest.raises(ScanError, match="the solver gave up"):
        write_images(path, "run", failing())
    assert read_images(path)[0].data.max() == 4


def test_each_image_is_on_disk_before_the_next_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    seen = []

    def watching() -> Iterator[ismrmrd.Image]:
        for series in (101, 102, 103):
            yield image(series)
            seen.append([i.image_series_index for i in read_images(path)])

    write_images(path, "run", watching())
    assert seen == [[101], [101, 102], [101, 102, 103]]


def test_images_of_a_series_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    other = ismrmrd.Image.from_array(np.ones((3, 4, 6), np.float32), transpose=False, image_series_index=101)
    with pytest.raises(ScanError, match="images of series 101 differ"):
        write_images(path, "run", [image(101), other])
    with pytest.raises(ScanError, match="images of series 101 differ"):
        write_images(path, "again", [image(101), image(101, 1, np.uint16)])


def test_unreadable_files_give_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"none\.h5 does not exist"):
        read_images(tmp_path / "none.h5")
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(ScanError, match=r"text\.h5 is not an HDF5 file"):
        read_images(text)
    with pytest.raises(ScanError, match=r"cannot write .*text\.h5: it exists and is not"):
        write_images(text, "run", [image(101)])
    with pytest.raises(ScanError, match=r"cannot write .*: No such file"):
        write_images(tmp_path / "no" / "folder.h5", "run", [image(101)])
    with pytest.raises(ScanError, match="cannot read"):
        read_images(tmp_path)
    empty = tmp_path / "empty.h5"
    h5py.File(empty, "w").close()
    with pytest.raises(ScanError, match="holds no images"):
        read_images(empty)
    write_images(empty, "run", [image(101)])
    with pytest.raises(ScanError, match=r"no images in a group 'truth' \(groups with images: 'run'\)"):
        read_images(empty, "truth")


def test_damaged_series_are_named(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, "run", [image(101), image(102)])
    with h5py.File(path, "a") as file:
        del file["run/image_102/data"]
        file["run/image_102/data"] = np.zeros((1, 1, 3, 4, 6), np.float32)
    with pytest.raises(ScanError, match="series /run/image_102 is damaged: header says"):
        read_images(path)
    with h5py.File(path, "a") as file:
        del file["run/image_102/data"]
    with pytest.raises(ScanError, match="series /run/image_102 is damaged"):
        read_images(path)


def test_a_full_disk_gives_one_sentence(tmp_path: Path) -> None:
    """A limit on the size of files fails a write as a full disk does, wherever HDF5 happens to be."""
    pytest.importorskip("resource", reason="limits on file size are POSIX")
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
import ismrmrd
import numpy as np
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import write_images

images = [
    ismrmrd.Image.from_array(np.ones((64, 64, 64), np.float32), transpose=False, image_series_index=s)
    for s in (101, 102)
]
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
try:
    write_images({str(tmp_path / "maps.h5")!r}, "run", images)
except ScanError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write ")
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    (first,) = read_images(tmp_path / "maps.h5")
    assert first.image_series_index == 101
    assert first.data.min() == 1


def test_reserved_room_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "maps.h5"
    write_images(path, "run", [image(101 + s) for s in range(20)])
    assert path.stat().st_size < 20 * 32768


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_image_that_is_being_written_when_somebody_stops_the_process_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "maps.h5"
    given: list[int] = []
    plain = image_file._ascii

    def stopped_here(text: str) -> str:
        if len(given) == 2:
            signal.raise_signal(number)
        return plain(text)

    def images() -> Iterator[ismrmrd.Image]:
        for value in range(4):
            given.append(value)
            yield image(101, value)

    def ends(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_file, "_ascii", stopped_here)
    before = {each: signal.signal(each, ends) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            write_images(path, "run", images())
        assert all(signal.getsignal(each) is ends for each in before)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert given == [0, 1]
    assert [float(found.data.max()) for found in read_images(path)] == [0, 1]


def test_nothing_is_held_back_in_other_threads_nor_from_who_ignores_it() -> None:
    done: list[bool] = []

    def work() -> None:
        with uninterrupted():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
