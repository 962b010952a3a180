#!/usr/bin/env bash
# Fuzzes the C ABI with libFuzzer under ASan, the library instrumented for both.
#   run.sh [SECONDS]     30 by default, as in CI; give hours by hand. Inputs are kept in build/fuzz/corpus.
# A finding is written to build/fuzz/ and played again by: build/fuzz/fuzz FILE
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-30}
dir=build/fuzz
# Our own crate is instrumented, not the linear algebra below it: that would cost five minutes. The switches are not
# stable yet.
export RUSTC_BOOTSTRAP=1 CARGO_PROFILE_RELEASE_OPT_LEVEL=1
cargo rustc --release --locked --lib --crate-type staticlib --target-dir build/sanitized -- \
    -Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer -Coverflow-checks=on \
    -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
mkdir -p $dir/corpus
clang++ -std=c++17 -O1 -g -Wall -Wextra -Wpedantic -Werror -fsanitize=address,fuzzer -Iinclude cpp_tests/fuzz/fuzz.cpp \
    build/sanitized/release/libdecoquant.a -lpthread -ldl -lm -lrt -lgcc_s -o $dir/fuzz

# A start for each target.
for t in 0 1 2 3; do
    for length in 1 40 400; do
        { printf "\\x0$t"; head -c $length /dev/zero | tr '\0' '\125'; } >"$dir/corpus/start-$t-$length"
    done
done
if $dir/fuzz -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -max_len=700 -print_final_stats=1 \
    -artifact_prefix=$dir/ -verbosity=1 $dir/corpus 2>&1 | tail -40; then
    echo "1 passed, 0 failed"
else
    echo "0 passed, 1 failed"
    exit 1
fi
