#!/usr/bin/env bash
# Lists the third-party crates that are linked into the library, with their licences, as THIRD-PARTY.md.
#   integration/licenses.sh > THIRD-PARTY.md      writes it
#   integration/licenses.sh --check               fails when the committed one is out of date, or a licence is new to us
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

list() {
    cat <<'END'
# Third-party software

Linked into libdecoquant, all of it under licences that allow use in closed and open programs with their notices kept.
The licence texts are in the crates; the Rust standard library is MIT OR Apache-2.0. Written by `integration/licenses.sh`.

| crate | version | licence |
|---|---|---|
END
    # The crates that reach the library: no build or test tools, this platform.
    cargo tree --locked --edges normal,no-proc-macro --target x86_64-unknown-linux-gnu --prefix none --format '{p}|{l}' |
        sed 's/ (\*)$//' | grep -v '^decoquant v' | sort -u |
        sed -E 's/^([^ ]+) v([^ |]+)[^|]*\|(.*)$/| \1 | \2 | \3 |/'
}

if [[ ${1:-} == --check ]]; then
    diff THIRD-PARTY.md <(list) || { echo "THIRD-PARTY.md is out of date: integration/licenses.sh > THIRD-PARTY.md" >&2; exit 1; }
    # Every crate offers at least one of these.
    if grep -E '^\| [a-z]' THIRD-PARTY.md | tail -n +2 | grep -vE 'MIT|Apache-2.0|BSL-1.0|BSD-[23]-Clause|ISC|Zlib|Unlicense|0BSD'; then
        echo "these licences are new: read them, then name them in integration/licenses.sh" >&2
        exit 1
    fi
else
    list
fi
