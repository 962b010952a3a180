#!/usr/bin/env bash
# check_symbols.sh LIBRARY LIST: the library exports exactly the symbols of the list, under its SONAME, and stays mapped.
set -euo pipefail

exported=$(nm --dynamic --defined-only "$1" | awk '{print $3}' | sort)
diff <(sort "$2") <(echo "$exported") || { echo "exported symbols (>) differ from $2 (<)"; exit 1; }

dynamic=$(readelf --dynamic --wide "$1")
grep -q 'SONAME.*\[libdecoquant\.so\.0\]' <<<"$dynamic" || { echo "SONAME is not libdecoquant.so.0"; exit 1; }
grep -q 'FLAGS_1.*NODELETE' <<<"$dynamic" || { echo "not linked with -z nodelete"; exit 1; }
