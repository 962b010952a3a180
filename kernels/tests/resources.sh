#!/bin/sh
# Compiles the default kernels for every architecture and prints registers, shared memory and spills of each.
# Usage: resources.sh [arch ...]; nvcc from NVCC, CUDA_HOME or PATH.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/nvcc}}
nvcc=${nvcc:-nvcc}
[ $# -gt 0 ] || set -- 80 86 89 90a 100 120
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for arch in "$@"; do
    "$nvcc" -std=c++17 -O3 -gencode="arch=compute_$arch,code=sm_$arch" -Xptxas -v ${EXTRA:-} -cubin -o "$out/k.cubin" "$here/entry.cu" 2>"$out/log" || { cat "$out/log"; exit 1; }
    awk -v arch="$arch" '
        /Compiling entry function/ { split($0, q, "\x27"); name = q[2] }
        /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
        /Used [0-9]+ registers/ {
            for (i = 1; i <= NF; i++) { if ($i == "Used") regs = $(i + 1); if ($(i + 1) == "bytes" && $(i + 2) ~ /^smem/) smem = $i }
            printf "sm_%-5s %-32s registers %3d  static shared %6d  stack %3d  spill stores %3d  loads %3d\n", arch, name, regs, smem, stack, stores, loads
            smem = 0
        }' "$out/log" | sort
done
