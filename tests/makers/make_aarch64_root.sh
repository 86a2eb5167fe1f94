#!/bin/sh
# Unpack a Debian arm64 userland with python3 and numpy, for the tests marked aarch64: make_aarch64_root.sh [FOLDER]
# Needs qemu-user-static and debootstrap; nothing of it is run while it is made, so no root rights either.
set -eu
root=${1:-/opt/aarch64-numpy}
debootstrap --arch=arm64 --foreign --variant=minbase \
  --include=python3-minimal,python3-numpy,libopenblas0-pthread bookworm "$root"
for package in "$root"/var/cache/apt/archives/*.deb; do
  dpkg-deb -x "$package" "$root"
done
