#!/usr/bin/env bash
# Runs every test: Rust, C++ (plain, under ASan and UBSan, the concurrent contracts under TSan), a short fuzzing of the C
# ABI, the CUDA backend (its kernels compiled by nvcc, driven through the library on a stand-in driver, and on a device
# where there is one), and the patched llama.cpp on a real small model.
#   integration/test.sh            everything
#   integration/test.sh rust cpp sanitizers tsan fuzz cuda llama    only the named parts
# Logs go to build/test-logs; the runners' own summary lines are repeated at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

parts=("$@")
((${#parts[@]})) || parts=(rust cpp sanitizers tsan fuzz cuda llama)
logs=build/test-logs
mkdir -p "$logs"
bash integration/install-deps.sh

run() { # run NAME COMMAND...: shows the output, keeps it, remembers a failure
    local name=$1
    shift
    echo "== $name"
    if ! "$@" 2>&1 | tee "$logs/$name.log"; then
        failed+=("$name")
    fi
}

rust_tests() {
    cargo test --release --locked
}

ctest_in() { # ctest_in BUILD_DIR CMAKE_OPTIONS...
    local dir=$1
    shift
    cargo build --release --locked &&
        cmake -S cpp_tests -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo "$@" &&
        cmake --build "$dir" &&
        ctest --test-dir "$dir" --output-on-failure -j "$(nproc)"
}

# A library of its own, so that the other parts see one without kernels; one architecture in it, all in the last step.
cuda_tests() {
    local home
    home=$(bash integration/install-nvcc.sh) || return
    export DECOQUANT_CUDA_ARCHS=${DECOQUANT_CUDA_ARCHS:-90a} CUDA_HOME=$home
    # Through CMake, so that its option is tested, too.
    cmake -S . -B build/package-cuda -G Ninja -DDECOQUANT_CUDA=ON -DDECOQUANT_TARGET_DIR="$PWD/target/cuda" &&
        cmake --build build/package-cuda &&
        cmake -S cpp_tests -B build/cpp_tests-cuda -G Ninja -DDECOQUANT_LIB="$PWD/target/cuda/release/libdecoquant.so" &&
        cmake --build build/cpp_tests-cuda --target cuda cuda_tail bench_cuda stand_in stand_in_sm90 &&
        ctest --test-dir build/cpp_tests-cuda --output-on-failure -R '^cuda_' &&
        EXTRA=-DDQ_INSTANCES_HOT sh kernels/tests/resources.sh
}

failed=()
for part in "${parts[@]}"; do
    case $part in
        rust) run rust rust_tests ;;
        cpp) run cpp ctest_in build/cpp_tests ;;
        sanitizers) run sanitizers ctest_in build/cpp_tests-sanitized -DDECOQUANT_SANITIZE=ON ;;
        tsan) run tsan bash cpp_tests/tsan/run.sh ;;
        fuzz) run fuzz bash cpp_tests/fuzz/run.sh 30 ;;
        cuda) run cuda cuda_tests ;;
        llama) run llama bash integration/llama.cpp/test.sh ;;
        *) echo "no such part: $part (rust, cpp, sanitizers, tsan, fuzz, cuda, llama)" >&2; exit 2 ;;
    esac
done

echo "== summary, in the runners' own words"
for part in "${parts[@]}"; do
    echo "$part:"
    grep -hE '^test result:|tests passed, [0-9]+ tests failed|^[0-9]+ passed, [0-9]+ failed' "$logs/$part.log" || echo "no summary"
done
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
