#!/usr/bin/env bash
# Builds libdecoquant, the patched llama.cpp and its test programs. Run again after any change: only what changed is built.
#   build.sh                the six tools and the test programs
#   CUDA=1 build.sh         the same with llama.cpp's CUDA backend; needs the CUDA toolkit with cuBLAS
# Environment: CUDA_ARCHS (native): architectures of llama.cpp's kernels, as CMake names them.
set -euo pipefail
source "$(dirname "$0")/paths.sh"

bash "$here/fetch.sh"

say "libdecoquant"
[[ ${CUDA:-} ]] && export DECOQUANT_CUDA=on
(cd "$repo" && cargo build --release --locked)

say "llama.cpp with $(cd "$here/patches" && echo *.patch)"
# A changed patch set gives a fresh tree; files with the same contents keep their old times, so that little is rebuilt.
stamp=$(cat "$downloads"/xllamacpp-*.tar.gz "$here"/patches/*.patch | sha256sum)
if [[ ! -f $src/.stamp || $(<"$src/.stamp") != "$stamp" ]]; then
    rm -rf "$src.new"
    mkdir -p "$src.new" "$src"
    tar -xzf "$downloads"/xllamacpp-*.tar.gz -C "$src.new" --strip-components=3 --wildcards '*/thirdparty/llama.cpp/*'
    for patch in "$here"/patches/*.patch; do
        patch --directory="$src.new" --strip=1 --quiet --forward --fuzz=0 <"$patch"
    done
    (cd "$src" && find . -type f -print0) | while IFS= read -r -d '' file; do
        [[ -e $src.new/$file ]] || rm "$src/$file"
    done
    (cd "$src.new" && find . -type f -print0) | while IFS= read -r -d '' file; do
        if ! cmp --quiet "$src.new/$file" "$src/$file"; then
            mkdir -p "$(dirname "$src/$file")"
            cp -p "$src.new/$file" "$src/$file"
            touch "$src/$file"
        fi
    done
    rm -rf "$src.new"
    echo "$stamp" >"$src/.stamp"
fi

options=(-DGGML_CUDA=OFF)
[[ ${CUDA:-} ]] && options=(-DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHS:-native}")
# GCC's header says that loading a tile configuration reads 8 bytes of it (seen in GCC 12): the other stores may be
# dropped, and llama.cpp's AMX code ends in SIGILL.
if c++ --version | grep -q 'Free Software Foundation' && c++ -mno-amx-int8 -E -x c++ /dev/null >/dev/null 2>&1; then
    options+=(-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8)
fi

cmake -S "$src" -B "$work/out" -G Ninja -DCMAKE_BUILD_TYPE=Release "${options[@]}" \
    -DDECOQUANT_DIR="$repo" \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
    >"$work/cmake.log" || { cat "$work/cmake.log" >&2; exit 1; }

# The dynamic linker asks for the library by its SONAME.
mkdir -p "$bin"
ln -sf "$repo/target/release/libdecoquant.so" "$bin/libdecoquant.so.0"

cmake --build "$work/out" --target \
    llama-cli llama-completion llama-server llama-perplexity llama-bench llama-batched-bench

say "test programs"
build_test() { # build_test NAME SOURCE LIBRARIES...
    local name=$1 source=$2
    shift 2
    if [[ ! $bin/$name -nt $source || ! $bin/$name -nt $bin/libllama.so ]]; then
        c++ -std=c++17 -O2 -Wall -I"$src/include" -I"$src/ggml/include" -I"$src/common" -I"$src/src" -I"$src/vendor" \
            "$source" -o "$bin/$name" -L"$bin" "$@" -lllama -lggml -lggml-base -Wl,-rpath,"$bin" -Wl,-rpath-link,"$bin"
    fi
}
build_test test-kv "$here/tests/test-kv.cpp"
build_test test-llama-archs "$src/tests/test-llama-archs.cpp" -lllama-common # upstream's: writes small models of all architectures
ls "$bin" | grep -v '\.so'
