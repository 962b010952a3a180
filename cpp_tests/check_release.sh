#!/usr/bin/env bash
# check_release.sh LIBRARY: manifest, header, SONAME, change log and licences speak of one release.
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
abi=$(sed -n 's/^abi = //p' Cargo.toml)
fail() { echo "$1" >&2; exit 1; }
number() { sed -n "s/^#define DQ_$1 //p" include/decoquant.h; }

[[ "$(number VERSION_MAJOR).$(number VERSION_MINOR).$(number VERSION_PATCH)" == "$version" ]] ||
    fail "the header's DQ_VERSION_* are not $version"
[[ $(number ABI_VERSION) == "$abi" ]] || fail "the header's DQ_ABI_VERSION is not $abi"
readelf --dynamic --wide "$1" | grep -q "SONAME.*\[libdecoquant\.so\.$abi\]" || fail "the SONAME is not libdecoquant.so.$abi"
grep -A1 '^name = "decoquant"' Cargo.lock | grep -q "version = \"$version\"" || fail "Cargo.lock has another version"
[[ $(sed -n 's/^## //p' CHANGELOG.md | head -n 1) == "$version" ]] || fail "CHANGELOG.md does not begin with $version"
integration/licenses.sh --check
