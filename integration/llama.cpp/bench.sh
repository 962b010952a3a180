#!/usr/bin/env bash
# Speed of all kinds of KV cache in turn, in one run: decode and prefill over depth, as ratios to f16 and to q4_0,
# and a plot of decode speed against depth; all of it cold, fits included. Most of the time goes into filling caches:
# q4_0 at depth 16,384 alone takes half an hour on two cores.
#   bench.sh [MODEL.gguf]     SmolLM2-135M if none is given
# Environment: THREADS (all cores). DEPTHS (0 4096 16384). TYPES (all seven). RUNS (3): medians are of so many. OUT (build/llama.cpp/bench): tables and plot.
set -euo pipefail
source "$(dirname "$0")/paths.sh"
bash "$here/build.sh"
export CUDA_VISIBLE_DEVICES='' # the CPU is measured, also with a build that has CUDA

model=${1:-$small}
threads=${THREADS:-$(nproc)}
read -ra depths <<<"${DEPTHS:-0 4096 16384}"
runs=${RUNS:-3}
out=${OUT:-$work/bench}
read -ra types <<<"${TYPES:-f16 q8_0 q4_0 dq8 dq4 dq3 dq2}"
mkdir -p "$out"
: >"$out/results.jsonl"

bench() { # bench TYPE DEPTH ARGUMENTS...: appends llama-bench's own lines
    "$bin/llama-bench" -m "$model" -t "$threads" -ctk "$1" -ctv "$1" -fa on -d "$2" -r "$runs" -o jsonl "${@:3}" 2>/dev/null >>"$out/results.jsonl"
    python3 "$here/bench_report.py" last "$out/results.jsonl"
}

for depth in "${depths[@]}"; do
    say "depth $depth: decode of 32 tokens, prefill of 128"
    for type in "${types[@]}"; do
        bench "$type" "$depth" -p 0 -n 32
        bench "$type" "$depth" -p 128 -n 0
    done
done
say "a whole prompt of 512, cold: statistics and fits included"
for type in "${types[@]}"; do
    bench "$type" 0 -p 512 -n 0
done

say "${model##*/}, $threads threads, medians of $runs"
python3 "$here/bench_report.py" table "$out/results.jsonl" | tee "$out/table.md"
if [[ -x $work/plot/bin/python ]] || { python3 -m venv "$work/plot" && "$work/plot/bin/pip" install -q matplotlib==3.10.8; }; then
    "$work/plot/bin/python" "$here/bench_report.py" plot "$out/results.jsonl" "$out/decode.svg"
    echo "plot: $out/decode.svg"
else
    rm -rf "$work/plot"
    echo "no plot: matplotlib could not be installed from PyPI" >&2
fi
