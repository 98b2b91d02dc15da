#!/bin/sh
# What FIRE / OpenRecon starts: it connects to port 9002 and always sends the config name 'openrecon'.
exec quantitron serve --host 0.0.0.0 --port 9002 --default-pipeline "${QUANTITRON_PIPELINE:-subspace}"
