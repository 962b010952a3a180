#!/usr/bin/env bash
# The main job: one small model through the patched llama.cpp with seven kinds of KV cache. Size, quality and speed, all
# measured now, then a few sentences from the dq4 cache. About 10 minutes on two cores once everything is built.
#   run.sh [MODEL.gguf]       SmolLM2-135M if none is given
# Environment: THREADS (all cores). DEPTH (4096): how full the cache is in the second half of the speed test. CHUNKS (8): texts of 512 tokens.
set -euo pipefail
source "$(dirname "$0")/paths.sh"
bash "$here/build.sh"
export CUDA_VISIBLE_DEVICES='' # the CPU is measured, also with a build that has CUDA

model=${1:-$small}
depth=${DEPTH:-4096}
chunks=${CHUNKS:-8}
threads=${THREADS:-$(nproc)}
types=(f16 q8_0 q4_0 dq8 dq4 dq3 dq2)

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# text that ships with llama.cpp
cat "$src"/docs/{build,autoparser,speculative,function-calling,multimodal,install,docker}.md >"$tmp/text.txt"

perplexity() {
    "$bin/llama-perplexity" -m "$model" -t "$threads" -f "$tmp/text.txt" -c 512 -b 512 --chunks "$chunks" -fa on "$@"
}

say "quality: KL divergence from the f16 cache over $chunks texts of 512 tokens of llama.cpp's documentation"
perplexity --save-all-logits "$tmp/base" >"$tmp/base.log" 2>&1 || { tail "$tmp/base.log"; exit 1; }
declare -A kld top size pp0 tg0 ppd tgd
for type in "${types[@]}"; do
    perplexity --kl-divergence --kl-divergence-base "$tmp/base" -ctk "$type" -ctv "$type" >"$tmp/kld.log" 2>&1 || { tail "$tmp/kld.log"; exit 1; }
    kld[$type]=$(sed -nE 's/^Mean +KLD: +([-0-9.]+).*/\1/p' "$tmp/kld.log")
    top[$type]=$(sed -nE 's/^Same top p: +([0-9.]+).*/\1/p' "$tmp/kld.log")
    echo "$type: mean KLD ${kld[$type]}, same first choice ${top[$type]}%"
done

say "size: what the cache of 8192 tokens takes, the factors of the coded ones included"
for type in "${types[@]}"; do
    "$bin/llama-completion" -m "$model" -t "$threads" -ctk "$type" -ctv "$type" -fa on -c 8192 -no-cnv -n 1 -p "The" -lv 4 >"$tmp/size.log" 2>&1 </dev/null ||
        { tail "$tmp/size.log"; exit 1; }
    size[$type]=$(awk '
        # one line per cache (a model with sliding windows has two)
        match($0, /KV buffer size = +[0-9.]+ MiB/)           { split(substr($0, RSTART, RLENGTH), a, "= *"); mib += a[2] }
        match($0, /with at most [0-9.]+ MiB of factors/)     { split(substr($0, RSTART, RLENGTH), a, " ");   mib += a[4] }
        END { printf "%.2f", mib }' "$tmp/size.log")
    echo "$type: ${size[$type]} MiB"
done

say "speed: tokens per second, empty cache and after $depth tokens, $threads threads"
bench() { # bench TYPE DEPTH: two numbers, prompt and generation
    "$bin/llama-bench" -m "$model" -t "$threads" -ctk "$1" -ctv "$1" -fa on -d "$2" -p 256 -n 16 -r 1 -o jsonl 2>/dev/null |
        python3 -c 'import json, sys; print(*("%.1f" % json.loads(line)["avg_ts"] for line in sys.stdin))'
}
for type in "${types[@]}"; do
    read -r pp0[$type] tg0[$type] < <(bench "$type" 0)
    read -r ppd[$type] tgd[$type] < <(bench "$type" "$depth")
    echo "$type: prompt ${pp0[$type]} and ${ppd[$type]}, generation ${tg0[$type]} and ${tgd[$type]}"
done

say "${model##*/}, measured just now"
printf '%-6s %10s %8s %10s %8s %12s %12s %12s %12s\n' cache 'MiB at 8K' 'of f16' 'mean KLD' 'same 1st' \
    'prompt t/s' "at $depth" 'gen t/s' "at $depth"
for type in "${types[@]}"; do
    printf '%-6s %10s %8s %10s %7s%% %12s %12s %12s %12s\n' "$type" "${size[$type]}" \
        "$(awk -v a="${size[$type]}" -v b="${size[f16]}" 'BEGIN { printf "%.3f", a/b }')" \
        "${kld[$type]}" "${top[$type]}" "${pp0[$type]}" "${ppd[$type]}" "${tg0[$type]}" "${tgd[$type]}"
done

say "the dq4 cache speaks"
"$bin/llama-completion" -m "$model" -t "$threads" -ctk dq4 -ctv dq4 -fa on -c 2048 -st -n 120 --temp 0 \
    -p "Explain in a few sentences what a key-value cache does in a language model." 2>/dev/null </dev/null
echo
