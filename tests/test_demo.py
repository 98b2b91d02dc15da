"""The demo from end to end on a very small scan: simulate, replay, compare, draw."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.image_file import image_groups
from quantitron.host.compare import compare
from quantitron.host.demo import FINGERPRINT_PIPELINES, PIPELINES, Scan, demo


def test_demo_gives_numbers_and_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    scan = Scan("vfa_gre", (32, 40, 4), (160.0, 200.0, 16.0), 6.0, coils=6)
    folder.mkdir(parents=True)
    (folder / "vfa_gre_subspace.h5").write_text("left by an earlier run")
    text = demo(folder, (scan,))
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    errors = {}
    for pipeline, method in PIPELINES.items():
        maps = folder / f"vfa_gre_{pipeline}.h5"
        assert len(image_groups(maps)) == 1
        result = compare(maps, folder / "vfa_gre_raw.h5")["maps"]
        assert result["T1"]["nrmse"] < 0.25
        assert result["T2STAR"]["nrmse"] < 0.3
        assert result["FREQMAP"]["rmse"] < 2
        t1, t2, t2star, tissue_t1, tissue_t2, tissue_t2star, seconds = lines[method]
        assert (t2, tissue_t2) == ("-", "-")
        assert t1 == f"{100 * result['T1']['nrmse']:.2f}"
        assert t2star == f"{100 * result['T2STAR']['nrmse']:.2f}"
        assert tissue_t1 == f"{50 * (result['T1']['mape_wm'] + result['T1']['mape_gm']):.2f}"
        assert 0 < float(tissue_t2star) < 20
        assert float(seconds) > 0
        errors[method] = float(tissue_t1)
    assert errors["LoREIN"] < errors["subspace"]
    picture = matplotlib.image.imread(folder / "vfa_gre.png")
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture[..., :3].std() > 0.1
    assert (folder / "vfa_gre.png").name in text


def test_demo_of_a_fingerprint(tmp_path: Path) -> None:
    scan = Scan("fisp_mrf", (48, 48, 1), (200.0, 200.0, 5.0), 6.0, coils=4, snr=20.0, points=120)
    text = demo(tmp_path, (scan,))
    errors = {}
    for pipeline, method in FINGERPRINT_PIPELINES.items():
        result = compare(tmp_path / f"fisp_mrf_{pipeline}.h5", tmp_path / "fisp_mrf_raw.h5")["maps"]
        errors[method] = result["T2"]["mape_wm"]
        assert method in text
    assert errors["LLR"] < errors["SVDMRF"]
    assert matplotlib.image.imread(tmp_path / "fisp_mrf.png").shape[1] > 300


def test_demo_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ScanError, match="cannot make the folder"):
        demo(tmp_path / "file" / "demo")
