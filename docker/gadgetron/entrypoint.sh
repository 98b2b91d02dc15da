#!/bin/bash
# Gadgetron's own start, with quantitron's python before that of Gadgetron's environment.
set -eo pipefail
# shellcheck source=/dev/null
. /opt/conda/etc/profile.d/conda.sh
conda activate gadgetron
export PATH="/opt/quantitron-path:$PATH"
exec gadgetron "$@"
