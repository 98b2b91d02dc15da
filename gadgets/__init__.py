"""What the pipeline XML names: ISMRMRD acquisitions in, ISMRMRD images out, as generators."""

import os

# Before torch loads OpenMP: its threads spin while they wait, and two reconstructions at once on one
# machine then take ten times as long (measured: 13 to 30 s instead of 1 s). GNU's, which torch brings, may
# spin for some microseconds, which bridges the gaps within a step: a fifth less time for one reconstruction
# alone, a fifth more for each of two at once.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
