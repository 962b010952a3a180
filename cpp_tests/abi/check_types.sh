#!/usr/bin/env bash
# The types and functions of decoquant.h are those of the committed baseline, as libabigail sees them.
#   check_types.sh HEADER_DIR WORK_DIR            compares; 77 when abidw is not installed
#   check_types.sh HEADER_DIR WORK_DIR --write    writes the baseline anew
# Rust's debug information says nothing about C types, so the header is compiled with empty functions.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
include=$1 work=$2
baseline="$here/decoquant.abi"
command -v abidw >/dev/null || { echo "abidw (abigail-tools) is not installed"; exit 77; }
mkdir -p "$work"

# Every declaration of a function becomes a definition.
{
    echo '#include "decoquant.h"'
    awk '/^[a-z][a-z0-9_ ]*[ *]dq_[a-z_]*\(/ { taking = 1 } taking { print } taking && /\);$/ { taking = 0 }' \
        "$include/decoquant.h" | sed 's/);$/) { __builtin_trap(); }/'
} >"$work/stub.c"
grep -o 'dq_[a-z_]*(' "$work/stub.c" | tr -d '(' | sort | diff - <(sort "$here/../symbols.txt") ||
    { echo "functions of the header (<) are not the exported ones (>)"; exit 1; }
gcc -g -O0 -shared -fPIC -Wl,-soname,libdecoquant.so -I"$include" "$work/stub.c" -o "$work/stub.so"
abidw --no-show-locs --no-comp-dir-path --no-corpus-path "$work/stub.so" >"$work/new.abi"

if [[ ${3:-} == --write ]]; then
    cp "$work/new.abi" "$baseline"
    exit
fi
abidiff --harmless "$baseline" "$work/new.abi" || {
    echo "The interface changed. Something appended or added: write the baseline anew (check_types.sh ... --write) and say"
    echo "so in CHANGELOG.md. Anything that linked programs rely on: raise abi in Cargo.toml as well."
    exit 1
}
