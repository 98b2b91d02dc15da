"""Part of smoke.sh, run in the image: sends the scan as OpenRecon does, and judges all maps.

usage: smoke_client.py FOLDER HOST PORT; the folder holds scan.h5, maps.h5 and errors.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ismrmrd
import numpy as np

from quantitron.gadgets.image_file import read_images
from quantitron.host.client import send_scan
from quantitron.host.raw_file import read_blocks, read_header

LARGEST_ERROR = {"T1": 0.20, "T2STAR": 0.35, "PD": 0.15}
"""NRMSE inside the mask; about twice what voxels of 4 x 4 x 8 mm have at best (10.5, 18.6 and 5.3 %)."""


def main(folder: Path, host: str, port: int) -> None:
    """Exit with a sentence if anything is not as it must be."""
    errors = json.loads((folder / "errors.json").read_text())["maps"]
    for role, largest in LARGEST_ERROR.items():
        if not errors[role]["nrmse"] < largest:
            sys.exit(f"smoke: NRMSE of {role} is {errors[role]['nrmse']:.3f}, not below {largest}")
    scan = folder / "scan.h5"
    sent = send_scan((host, port), "openrecon", read_header(scan), read_blocks(scan), by_name=True)
    images = {image.image_series_index: image for image in sent}
    others = {image.image_series_index: image for image in read_images(folder / "maps.h5")}
    if not images or images.keys() != others.keys():
        sys.exit(f"smoke: series {sorted(images)} came for FIRE, {sorted(others)} for Gadgetron")
    for series, image in images.items():
        meta = ismrmrd.Meta.deserialize(image.attribute_string)
        role = meta["GADGETRON_DataRole"]
        if "Quantitative" not in meta["DataRole"]:
            sys.exit(f"smoke: series {series} does not say that it is quantitative: {meta['DataRole']}")
        # the scanner's default is 12-bit codes, the file's float32: they agree to the rounding of the codes
        ratio, offset = float(meta["GADGETRON_ScaleRatio"]), float(meta["GADGETRON_ScaleOffset"])
        value = (np.float64(image.data) - offset) / ratio
        other = np.nan_to_num(np.float64(others[series].data))
        told = (image.data > 0) & (image.data < 4095)
        if image.data.dtype == np.uint16 and np.abs(value - other)[told].max(initial=0.0) > 0.51 / ratio:
            sys.exit(f"smoke: {role} differs between the two ways")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
