#!/usr/bin/env bash
# The concurrent contracts under ThreadSanitizer: library and tests instrumented, any report is a failure.
# Needs what integration/install-deps.sh installs, and rustc's own sanitizer runtime, which rustup brings along.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=x86_64-unknown-linux-gnu
dir=build/tsan
# Our own crate is instrumented; the linear algebra below it knows no threads. The switches are not stable yet; the runtime
# is that of the compiler in use.
export RUSTC_BOOTSTRAP=1 CARGO_PROFILE_RELEASE_OPT_LEVEL=1
cargo rustc --release --locked --lib --crate-type cdylib --target-dir build/sanitized -- \
    -Zsanitizer=thread --cfg dq_tsan -Cunsafe-allow-abi-mismatch=sanitizer
mkdir -p $dir
runtime=$(ls "$(rustc --print sysroot)/lib/rustlib/$target/lib"/librustc-*_rt.tsan.a)
lib=$dir/lib
mkdir -p "$lib"
cp build/sanitized/release/libdecoquant.so "$lib/libdecoquant.so.0"
ln -sf libdecoquant.so.0 "$lib/libdecoquant.so"

flags=(-std=c++17 -O1 -g -w -Iinclude -DCATCH_CONFIG_FAST_COMPILE)
g++ "${flags[@]}" -c cpp_tests/main.cpp -o $dir/main.o
passed=0 failed=0
for test in threads paged; do
    g++ "${flags[@]}" -fsanitize=thread -c cpp_tests/$test.cpp -o $dir/$test.o
    # rustc's runtime in place of g++'s, which is older than the code that rustc makes.
    g++ $dir/$test.o $dir/main.o -L"$lib" -ldecoquant -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive \
        -Wl,--export-dynamic -lpthread -ldl -lm -lrt -o $dir/$test
    # Of the paged tests those on threads. TSan cannot place its shadow under some randomised layouts.
    only=()
    [[ $test == paged ]] && only=("any number of shards*")
    if LD_LIBRARY_PATH=$lib TSAN_OPTIONS="suppressions=cpp_tests/tsan/suppressions.txt halt_on_error=0" \
        setarch -R "$dir/$test" "${only[@]}"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
((failed == 0))
