#!/usr/bin/env bash
# What a user does with a release: install it, unpack it, build against it, run. CTest calls
#   test.sh STEP WORK_DIR TARGET_DIR      with the steps below; TARGET_DIR is where cargo has built already.
set -euo pipefail
step=$1 work=$2 target=$3
source_dir=$(cd "$(dirname "$0")/../.." && pwd)
consumer="$source_dir/cpp_tests/consumer"
package="$work/package"
prefix="$work/prefix with space"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$source_dir/Cargo.toml")
abi=$(sed -n 's/^abi = //p' "$source_dir/Cargo.toml")

compilers() { # those that are installed, as CC:CXX
    local pair
    for pair in gcc:g++ clang:clang++; do
        if command -v "${pair%%:*}" >/dev/null && command -v "${pair##*:}" >/dev/null; then echo "$pair"; fi
    done
}

expect() { # expect FILE...: regular files or links that lead to one
    local file
    for file in "$@"; do
        [[ -e $file ]] || { echo "missing: $file" >&2; exit 1; }
    done
}

run_all() { # run_all BUILD_DIR: every consumer, without LD_LIBRARY_PATH
    local kind
    for kind in shared static decoquant; do
        "$1/c_$kind"
        "$1/cpp_$kind"
    done
}

check_tree() { # check_tree PREFIX: everything is there, and nothing names the place where it was built
    local lib="$1/lib"
    expect "$1/include/decoquant.h" "$1/include/decoquant.hpp" "$lib/libdecoquant.a" \
        "$lib/libdecoquant.so.$version" "$lib/pkgconfig/decoquant.pc" "$lib/cmake/decoquant/decoquantConfig.cmake" \
        "$1/share/licenses/decoquant/LICENSE" "$1/share/licenses/decoquant/THIRD-PARTY.md"
    [[ $(readlink "$lib/libdecoquant.so") == "libdecoquant.so.$abi" ]]
    [[ $(readlink "$lib/libdecoquant.so.$abi") == "libdecoquant.so.$version" ]]
    readelf -d "$lib/libdecoquant.so" | grep -q "SONAME.*\[libdecoquant.so.$abi\]"
    if grep -rIl -e "$source_dir" -e "$work" "$1/include" "$lib/pkgconfig" "$lib/cmake"; then
        echo "these files name the place where they were built" >&2
        exit 1
    fi
}

with_cmake() { # with_cmake PREFIX NAME
    local pair
    for pair in $(compilers); do
        local build="$work/$2-${pair%%:*}"
        rm -rf "$build"
        CC=${pair%%:*} CXX=${pair##*:} cmake -S "$consumer" -B "$build" -G Ninja -DCMAKE_PREFIX_PATH="$1" >/dev/null
        cmake --build "$build"
        run_all "$build"
    done
}

with_pkg_config() { # with_pkg_config PREFIX
    export PKG_CONFIG_PATH="$1/lib/pkgconfig"
    [[ $(pkg-config --modversion decoquant) == "$version" ]]
    local pair dir="$1/lib" flags shared static
    # Through eval, because pkg-config quotes what has a space.
    flags=$(pkg-config --cflags decoquant)
    shared=$(pkg-config --libs decoquant)
    static=$(pkg-config --static --libs decoquant | sed 's/-ldecoquant//')
    for pair in $(compilers); do
        eval "${pair%%:*}" -std=c11 -Wall -Wextra -Wpedantic -Werror "$flags" "$source_dir/cpp_tests/life_cycle.c" \
            -o "'$work/pc_shared'" "$shared"
        LD_LIBRARY_PATH="$dir" "$work/pc_shared"
        readelf -d "$work/pc_shared" | grep -q "NEEDED.*libdecoquant.so.$abi"
        eval "${pair##*:}" -std=c++17 -Wall -Wextra -Wpedantic -Werror "$flags" "$consumer/consumer.cpp" \
            -o "'$work/pc_static'" "'$dir/libdecoquant.a'" "$static"
        "$work/pc_static"
        if readelf -d "$work/pc_static" | grep -q decoquant; then exit 1; fi
    done
}

case $step in
    build)
        rm -rf "$work"
        mkdir -p "$work"
        cmake -S "$source_dir" -B "$package" -G Ninja -DDECOQUANT_TARGET_DIR="$target" -DCMAKE_INSTALL_LIBDIR=lib
        cmake --build "$package"
        ;;
    prefix)
        cmake --install "$package" --prefix "$prefix"
        check_tree "$prefix"
        with_cmake "$prefix" find_package
        with_pkg_config "$prefix"
        ;;
    destdir)
        DESTDIR="$work/stage" cmake --install "$package" --prefix /opt/dq
        check_tree "$work/stage/opt/dq"
        ;;
    subproject)
        cmake -S "$consumer" -B "$work/subproject" -G Ninja \
            -DDECOQUANT_SOURCE="$source_dir" -DDECOQUANT_TARGET_DIR="$target" -DDECOQUANT_STATIC=ON
        cmake --build "$work/subproject"
        run_all "$work/subproject"
        if readelf -d "$work/subproject/cpp_decoquant" | grep -q 'NEEDED.*decoquant'; then exit 1; fi
        ;;
    tarball)
        (cd "$work" && cpack --config package/CPackConfig.cmake -B "$work/release")
        cd "$work/release"
        sha256sum -c ./*.sha256
        mkdir -p "$work/elsewhere"
        tar -xzf ./*.tar.gz -C "$work/elsewhere"
        mv "$work"/elsewhere/decoquant-* "$work/elsewhere/moved"
        check_tree "$work/elsewhere/moved"
        with_cmake "$work/elsewhere/moved" tarball
        ;;
    *)
        echo "no such step: $step" >&2
        exit 2
        ;;
esac
