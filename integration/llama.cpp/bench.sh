#!/usr/bin/env bash
# Speed of all kinds of KV cache in turn, in one run: decode and prefill over depth and a whole prompt, as ratios to f16
# and to q4_0, and a plot of decode speed against depth. Cold, fits included; a whole prompt and decode from an empty
# cache also with loaded factors.
#   bench.sh [MODEL.gguf]     SmolLM2-135M if none is given
# Environment: THREADS (all cores). DEPTHS (0 4096): "0 4096 16384" for the whole table. TYPES (all seven). DEEP_TYPES
# (f16 dq4 dq3): those measured beyond 4096, where most of the time goes into filling caches: with 16,384 every one of them
# takes minutes on two cores, q4_0 half an hour.
# RUNS (3): medians are of so many. OUT (build/llama.cpp/bench): results, table and plot.
# BENCH_FLAGS: more arguments for llama-bench. BUILD (1): 0 takes what is built.
set -euo pipefail
source "$(dirname "$0")/paths.sh"
[[ ${BUILD:-1} == 0 ]] || bash "$here/build.sh"
export CUDA_VISIBLE_DEVICES='' # the CPU is measured, also with a build that has CUDA

model=${1:-$small}
threads=${THREADS:-$(nproc)}
read -ra depths <<<"${DEPTHS:-0 4096}"
runs=${RUNS:-3}
out=${OUT:-$work/bench}
read -ra types <<<"${TYPES:-f16 q8_0 q4_0 dq8 dq4 dq3 dq2}"
read -ra deep_types <<<"${DEEP_TYPES:-f16 dq4 dq3}"
read -ra flags <<<"${BENCH_FLAGS:-}"
mkdir -p "$out"
: >"$out/results.jsonl"

bench() { # bench LABEL TYPE DEPTH ARGUMENTS...: appends llama-bench's own lines, with the label
    "$bin/llama-bench" -m "$model" -t "$threads" -ctk "$2" -ctv "$2" -fa on -d "$3" -r "$runs" -o jsonl \
        ${flags[@]+"${flags[@]}"} "${@:4}" 2>"$out/llama-bench.log" | sed "s/^{/{\"label\": \"$1\", /" >"$out/last.jsonl" ||
        { tail -n 5 "$out/llama-bench.log" >&2; exit 1; }
    cat "$out/last.jsonl" >>"$out/results.jsonl"
    python3 "$here/bench_report.py" lines "$out/last.jsonl"
}

for depth in "${depths[@]}"; do
    say "depth $depth: prefill of 128, decode of 32 tokens"
    if ((depth > 4096)); then now=("${deep_types[@]}"); else now=("${types[@]}"); fi
    for type in "${now[@]}"; do
        # both tests in one process: the second takes the filled cache of the first
        bench cold "$type" "$depth" -p 128 -n 32
    done
done

say "a whole prompt of 512, cold: statistics and fits included"
for type in "${types[@]}"; do
    bench cold "$type" 0 -p 512 -n 0
done

say "a whole prompt of 512 and decode of 32 tokens, factors loaded"
# text that ships with llama.cpp
cat "$src"/docs/{build,autoparser,speculative,function-calling,multimodal,install,docker}.md >"$out/text.txt"
for type in "${types[@]}"; do
    if [[ $type != dq* ]]; then continue; fi
    "$bin/llama-perplexity" -m "$model" -t "$threads" -ctk "$type" -ctv "$type" -f "$out/text.txt" -c 1024 -b 512 --chunks 5 -fa on \
        --kv-factors-out "$out/$type.dqf" >"$out/factors.log" 2>&1 || { tail -n 5 "$out/factors.log" >&2; exit 1; }
    bench loaded "$type" 0 -p 512 -n 32 --kv-factors "$out/$type.dqf"
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
