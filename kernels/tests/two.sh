#!/bin/sh
# Does the suite see bugs? Plants one at a time in a copy of the kernels and runs the short emulator suite in all three
# schedule orders: a bug that passes is a failure of this script.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
missed=0

# plant NAME FILE SED-SCRIPT [SUITE [FLAGS]]
plant() {
    rm -rf "$work/k"
    cp -r "$here" "$work/k"
    sed -i "$3" "$work/k/$2"
    if cmp -s "$here/$2" "$work/k/$2"; then echo "NOT PLANTED  $1"; missed=1; return; fi
    if ! g++ -std=c++17 -O1 -ffp-contract=off -DDQ_EMU -DDQ_FAST ${5:-} "$work/k/tests/${4:-attend_emu}.cpp" -o "$work/t" 2>"$work/log"; then
        echo "DOES NOT BUILD  $1"; cat "$work/log"; missed=1; return
    fi
    for order in 0 1 2; do
        if ! timeout 300 "$work/t" $order >"$work/out" 2>&1; then echo "seen (order $order)  $1"; return; fi
    done
    echo "MISSED  $1"
    missed=1
}

BULK=-DDQ_EMU_BULK
plant "missing barrier after a tile's copies" attend.cuh '/else cp_async_wait<STAGES - 2>/{n;d}'
plant "missing barrier, bulk copies" attend.cuh '/else cp_async_wait<STAGES - 2>/{n;d}' attend_emu $BULK
plant "fragments read before they are all there" attend_prefill.cuh '/look_up_tile(fragments + part/{n;n;d}'
plant "blocks that the window has left are read" attend.cuh 's/key = key < keys.first ? keys.first : /key = /' attend_emu "-fsanitize=address"
exit $missed
