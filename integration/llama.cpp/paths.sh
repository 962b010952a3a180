# Where things lie; sourced by the other scripts. All of it is under build/ of the repository, which git ignores.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
work=$repo/build/llama.cpp
downloads=$work/downloads
models=$work/models
src=$work/src # the patched llama.cpp
bin=$work/out/bin

small=$models/SmolLM2-135M-Instruct.Q4_1.gguf
swa=$models/gemma-3-270m-q4_k_m.gguf # has sliding windows

export PATH="$PATH:$HOME/.cargo/bin"

say() { printf '\n== %s\n' "$*"; }
