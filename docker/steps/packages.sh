#!/bin/sh
# Makes /opt/quantitron, the environment of an image, of what the requirements files pin; hashes are checked.
# usage: packages.sh PYTHON VARIANT TORCH_INDEX
set -eu
here=$(dirname "$0")
test -f "$here/requirements/$2.txt" || {
    echo "VARIANT=$2 is none of cpu, cuda12, cuda13" >&2
    exit 1
}
"$1" -m venv /opt/quantitron
# PyTorch's CPU builds are not on PyPI
index=
test "$2" != cpu || test -z "$3" || index="--extra-index-url $3"
# shellcheck disable=SC2086
/opt/quantitron/bin/python -m pip --disable-pip-version-check --no-cache-dir install --quiet --no-deps \
    --no-compile --require-hashes --only-binary :all: $index \
    -r "$here/requirements/packages.txt" -r "$here/requirements/$2.txt"
