"""A scan and gadgets small enough to test everything around a reconstruction without one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import h5py
import ismrmrd
import numpy as np
from ismrmrd.hdf5 import acquisition_dtype

from quantitron.gadgets.acquisition_block import HEADER_DTYPE, AcquisitionBlock, blocks_of
from quantitron.gadgets.errors import ScanError
from quantitron.gadgets.gadget import Context, Gadget
from quantitron.gadgets.image_metadata import provenance_meta
from quantitron.gadgets.read_ahead import read_ahead

HEADER = """<?xml version="1.0" encoding="UTF-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
  <subjectInformation><patientName>Doe^Jane</patientName><patientID>4711</patientID></subjectInformation>
  <acquisitionSystemInformation><systemFieldStrength_T>3</systemFieldStrength_T></acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding>
    <encodedSpace><matrixSize><x>32</x><y>16</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>320</x><y>160</y><z>5</z></fieldOfView_mm></encodedSpace>
    <reconSpace><matrixSize><x>16</x><y>16</y><z>1</z></matrixSize>
      <fieldOfView_mm><x>160</x><y>160</y><z>5</z></fieldOfView_mm></reconSpace>
    <encodingLimits>
      <kspace_encoding_step_1><minimum>0</minimum><maximum>15</maximum><center>8</center></kspace_encoding_step_1>
      <contrast><minimum>0</minimum><maximum>1</maximum><center>0</center></contrast>
    </encodingLimits>
    <trajectory>cartesian</trajectory>
  </encoding>
  <sequenceParameters><TR>30</TR><TE>4</TE><TE>9</TE><flipAngle_deg>15</flipAngle_deg></sequenceParameters>
</ismrmrdHeader>"""


def scan(lines: int = 32, channels: int = 3, samples: int = 32, dimensions: int = 0) -> AcquisitionBlock:
    """Random lines that fit ``HEADER``, as one array."""
    random = np.random.default_rng(1)
    head = np.zeros(lines, dtype=HEADER_DTYPE)
    head["version"] = 1
    head["number_of_samples"] = samples
    head["active_channels"] = head["available_channels"] = channels
    head["trajectory_dimensions"] = dimensions
    head["center_sample"] = samples // 2
    head["sample_time_us"] = 5
    head["scan_counter"] = np.arange(lines)
    head["read_dir"][:, 0] = head["phase_dir"][:, 1] = head["slice_dir"][:, 2] = 1
    head["idx"]["kspace_encode_step_1"] = np.arange(lines) // 2 % 16
    head["idx"]["contrast"] = np.arange(lines) % 2
    data = random.standard_normal((lines, channels, samples, 2), dtype=np.float32).view(np.complex64)[..., 0]
    trajectory = random.standard_normal((lines, samples, dimensions), dtype=np.float32)
    return AcquisitionBlock(head, data, trajectory)


def acquisitions(block: AcquisitionBlock) -> list[ismrmrd.Acquisition]:
    """The same lines one by one, as ISMRMRD knows them."""
    singles = []
    for head, data, trajectory in zip(block.head, block.data, block.trajectory, strict=True):
        single = ismrmrd.Acquisition(head.tobytes())
        single.data[:] = data
        single.traj[:] = trajectory
        singles.append(single)
    return singles


def write_raw(path: Path, *blocks: AcquisitionBlock, header: str | None = HEADER) -> Path:
    """An ISMRMRD raw file, contiguous rows as ISMRMRD's own library writes them."""
    rows = np.zeros(sum(len(block) for block in blocks), dtype=acquisition_dtype)
    row = 0
    for block in blocks:
        for head, data, trajectory in zip(block.head, block.data, block.trajectory, strict=True):
            rows[row] = (head, trajectory.ravel(), np.ascontiguousarray(data).view(np.float32).ravel())
            row += 1
    with h5py.File(path, "w") as file:
        if header is not None:
            file.create_dataset("dataset/xml", data=np.array([header.encode()], dtype=h5py.string_dtype()))
        file.create_dataset("dataset/data", data=rows, maxshape=(None,), chunks=(16,))
    return path


@dataclass(frozen=True)
class Scale(Gadget):
    """Multiplies the samples."""

    name: ClassVar[str] = "scale"
    factor: float = field(default=1.0, metadata={"minimum": 0.0, "maximum": 100.0})

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[AcquisitionBlock]:
        for block in blocks_of(items):
            yield AcquisitionBlock(
                block.head, (block.data * np.float32(self.factor)), block.trajectory, block.first
            )


@dataclass(frozen=True)
class Gather(Gadget):
    """Sums the samples of a scan into images; can be told to fail in the ways gadgets do."""

    name: ClassVar[str] = "gather"
    images: int = field(default=2, metadata={"minimum": 0})
    least: int = 1
    fail: Literal["no", "known", "unknown", "memory", "hang"] = "no"
    output: Literal["uint16", "float32"] = "uint16"
    points: int = 64

    def __call__(self, items: Iterable[AcquisitionBlock], context: Context) -> Iterator[ismrmrd.Image]:
        total = np.zeros(self.points, dtype=np.float32)
        lines = 0
        with closing(read_ahead(blocks_of(items))) as blocks:  # as accumulate does
            for block in blocks:
                # one sum a block, so that the order of summing depends on where blocks are cut
                total[: block.data.shape[-1]] += np.abs(block.data).sum(axis=(0, 1), dtype=np.float32)
                lines += len(block)
        if lines < self.least:
            raise ScanError(f"only {lines} of {self.least} lines came")
        for index in range(self.images):
            image = ismrmrd.Image.from_array(total.reshape(1, -1), transpose=False)
            image.image_series_index = 101 + index
            image.meta = ismrmrd.Meta(
                {
                    **provenance_meta(settings_hash=context.settings_hash, notes=context.notes),
                    "GADGETRON_DataRole": "T1",
                    "Settings": context.settings_hash,
                }
            )
            yield image
        if self.fail == "known":
            raise ScanError("the gather gadget was told to fail")
        if self.fail == "memory":
            raise MemoryError
        if self.fail == "hang":
            time.sleep(60)
        if self.fail == "unknown":
            raise RuntimeError("something nobody foresaw\nwith a second line")


GADGETS = (Scale, Gather)


def pipeline(gadgets: str = "<gadget name='scale'/><gadget name='gather'/>", around: str = "") -> str:
    """A pipeline in Gadgetron's grammar."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<configuration>
  <version>2</version>
  <readers><reader><dll>gadgetron_core_readers</dll><classname>AcquisitionReader</classname></reader></readers>
  <writers><writer><dll>gadgetron_core_writers</dll><classname>ImageWriter</classname></writer></writers>
  <stream>{around}<external>
    <execute name="quantitron.gadgets.chain" target="run" type="python"/>
    <configuration>{gadgets}</configuration>
  </external></stream>
</configuration>"""


def gather(**properties: object) -> str:
    """The gadgets of a chain that gathers, with properties of ``gather``."""
    inner = "".join(f"<property name='{name}' value='{value}'/>" for name, value in properties.items())
    return f"<gadget name='scale'/><gadget name='gather'>{inner}</gadget>"
