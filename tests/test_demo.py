"""The demo from end to end on a very small scan: simulate, replay, compare, draw."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import image_groups
from quantitron.host.compare import compare
from quantitron.host.demo import Scan, demo


def test_demo_gives_numbers_and_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    scan = Scan("vfa_gre", (24, 24, 4), (224.0, 224.0, 32.0), 2.0, coils=4)
    folder.mkdir(parents=True)
    (folder / "vfa_gre_maps.h5").write_text("left by an earlier run")
    text = demo(folder, (scan,))
    assert "T1" in text
    assert "T2STAR" in text
    result = compare(folder / "vfa_gre_maps.h5", folder / "vfa_gre_raw.h5")["maps"]
    assert result["T1"]["nrmse"] < 0.25
    assert result["T2STAR"]["nrmse"] < 0.3
    assert result["FREQMAP"]["rmse"] < 2
    assert f"{100 * result['T1']['nrmse']:.2f} %" in text
    picture = matplotlib.image.imread(folder / "vfa_gre.png")
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture[..., :3].std() > 0.1
    assert len(image_groups(folder / "vfa_gre_maps.h5")) == 1


def test_demo_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ScanError, match="cannot make the folder"):
        demo(tmp_path / "file" / "demo")
