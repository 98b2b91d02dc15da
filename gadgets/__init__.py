"""What the pipeline XML names: ISMRMRD acquisitions in, ISMRMRD images out, as generators."""

import os

# Before torch loads OpenMP: its threads spin while they wait, and two reconstructions at once on one
# machine then take ten times as long (measured: 13 to 30 s instead of 1 s). Waiting passively costs nothing
# that was measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
