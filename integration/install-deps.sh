#!/usr/bin/env bash
# Installs what the build and the tests need on Debian or Ubuntu; does nothing when all of it is there.
# rustup's toolchain (cargo) is assumed.
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config catch2 python3 python3-venv python3-pip curl unzip
    clang libclang-rt-14-dev libxxhash-dev abigail-tools valgrind)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
done

if ((${#missing[@]})); then
    echo "installing: ${missing[*]}"
    sudo=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null || { echo "not root and no sudo: please install ${missing[*]}" >&2; exit 1; }
        sudo=(sudo)
    fi
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# cargo may sit in its default place without being on the PATH of a non-login shell.
export PATH="$PATH:$HOME/.cargo/bin"
command -v cargo >/dev/null || { echo "cargo not found: install Rust with rustup first" >&2; exit 1; }
