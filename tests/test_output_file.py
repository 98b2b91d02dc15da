"""No output replaces what its run reads, whatever it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_in import GADGETS, gather, pipeline, scan, write_raw

from quantitron.gadgets import chain
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.output_file import check_no_input
from quantitron.host.replay import replay

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw file that ``pipeline.xml`` beside it turns into maps."""
    monkeypatch.setattr(chain, "GADGETS", GADGETS)
    (tmp_path / "pipeline.xml").write_text(pipeline(gather()))
    return write_raw(tmp_path / "raw.h5", scan(30))


@pytest.mark.parametrize("called", ["raw.h5", "folder/../raw.h5", "soft.h5", "hard.h5"])
def test_replay_never_replaces_raw_data(tmp_path: Path, raw: Path, called: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.h5").symlink_to(raw)
    (tmp_path / "hard.h5").hardlink_to(raw)
    before = raw.read_bytes()
    with pytest.raises(ScanError, match=r"raw\.h5.* cannot be the output as well$"):
        replay(raw, str(tmp_path / "pipeline.xml"), f"{tmp_path}/{called}", overwrite=True)
    assert raw.read_bytes() == before


def test_replay_never_replaces_its_pipeline_nor_a_file_of_its_settings(tmp_path: Path, raw: Path) -> None:
    name, other = tmp_path / "pipeline.xml", tmp_path / "b1.npz"
    other.write_bytes(b"precious")
    with pytest.raises(ScanError, match=r"pipeline\.xml is read and cannot be the output as well"):
        replay(raw, str(name), name, overwrite=True)
    with pytest.raises(ScanError, match=r"b1\.npz is read and cannot be the output as well"):
        replay(raw, str(name), other, [f"gather.fail={other}"], overwrite=True)
    assert other.read_bytes() == b"precious"


def test_other_files_and_what_is_no_file_are_fine(tmp_path: Path, raw: Path) -> None:
    check_no_input(tmp_path / "maps.h5", raw, "subspace", "", "x" * 5000, "\0")
    replay(raw, str(tmp_path / "pipeline.xml"), tmp_path / "maps.h5")
    replay(raw, str(tmp_path / "pipeline.xml"), tmp_path / "maps.h5", overwrite=True)
