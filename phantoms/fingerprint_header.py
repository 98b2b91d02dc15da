"""ISMRMRD header of a simulated fingerprint."""

from __future__ import annotations

from dataclasses import replace

import ismrmrd.xsd as xsd

from quantitron.gadgets.header import make_header
from quantitron.recon.data import Encoding, Protocol


def fingerprint_header(
    encoding: Encoding, protocol: Protocol, interleaves: int, calibration: bool
) -> xsd.ismrmrdHeader:
    """Header of spirals: one value of TR and flip angle a time point, counted by ``repetition``.

    Args:
        encoding: grids; ``trajectory`` is ``spiral``.
        protocol: the fingerprint.
        interleaves: values of ``kspace_encode_step_1``.
        calibration: whether calibration readouts come with the scan.
    """
    header = make_header(
        replace(encoding, trajectory="cartesian"),
        replace(protocol, sequence="vfa_gre"),
        readout_oversampling=1,
        relative_receiver_noise_bandwidth=1.0,
        protocol_name=protocol.sequence,
    )
    space = header.encoding[0]
    space.trajectory = xsd.trajectoryType.SPIRAL
    limits = space.encodingLimits
    limits.set.maximum = 0
    limits.repetition.maximum = len(protocol.flip_angle) - 1
    limits.kspace_encoding_step_0 = None
    limits.kspace_encoding_step_1 = xsd.limitType(minimum=0, maximum=interleaves - 1, center=0)
    if calibration:
        space.parallelImaging.calibrationMode = xsd.calibrationModeType.SEPARATE
    header.sequenceParameters.sequence_type = protocol.sequence
    return header
