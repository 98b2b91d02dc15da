#!/bin/sh
# Installs the checkout into /opt/quantitron and takes out what an image does not need.
set -eu
here=$(dirname "$0")
environment=/opt/quantitron
"$environment/bin/python" -m pip --disable-pip-version-check --no-cache-dir install --quiet --no-deps \
    --no-compile --no-index --no-build-isolation "$here/source"
"$environment/bin/python" -m pip --disable-pip-version-check check
# headers, static libraries, programs and tests of packages, and pip itself
packages=$(echo "$environment"/lib/python3*/site-packages)
rm -rf "$packages/torch/include" "$packages/torch/share" "$packages/torch/test"
find "$packages/torch/bin" -type f ! -name torch_shm_manager -delete
find "$packages" -name '*.a' -delete
# (numpy 2.2, the last for Python 3.10, imports a part of its own tests)
find "$packages" -type d -name tests ! -path "$packages/numpy/_core/*" -prune -exec rm -rf {} +
"$environment/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes pip
rm -rf "$here/source"
# try it, which also compiles the modules that are used, and only those: nothing can be written later
cd /
PATH="$environment/bin:$PATH" "$environment/bin/quantitron" doctor
