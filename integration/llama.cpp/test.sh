#!/usr/bin/env bash
# Builds libdecoquant and the patched llama.cpp, then runs the tests of the integration on two small models.
# Ends with "N passed, M failed".
#   test.sh            everything
#   test.sh kv|archs|tools|server|kld|cuda|gpu ...    only the named parts
# cuda compiles the changed file of the CUDA backend and needs no device; gpu needs one, and a build with CUDA=1, with
# which it is among everything.
set -euo pipefail
source "$(dirname "$0")/paths.sh"

parts=("$@")
((${#parts[@]})) || parts=(kv archs tools server kld cuda ${CUDA:+gpu})

bash "$here/build.sh"

threads=${THREADS:-$(nproc)} # fewer on a machine that is busy with other things: the pool spins at its barriers
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

passed=0
failed=0

count() { # count LOG: adds the numbers of a test program's last line, or one failure if it has none
    local line
    if line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$1" | tail -n 1) && [[ $line ]]; then
        passed=$((passed + ${line%% *}))
        line=${line#*, }
        failed=$((failed + ${line%% *}))
    else
        echo "FAILED: no summary line"
        failed=$((failed + 1))
    fi
}

case_() { # case_ NAME COMMAND...: the command prints what it found and fails if that is wrong
    local name=$1 out
    shift
    if out=$("$@" 2>"$tmp/err"); then
        echo "ok $name: $out"
        passed=$((passed + 1))
    else
        echo "FAILED $name: $out $(tail -n 15 "$tmp/err")"
        failed=$((failed + 1))
    fi
}

# text that ships with llama.cpp
text=$tmp/text.txt
cat "$src"/docs/{build,autoparser,speculative,function-calling,multimodal,install,docker}.md >"$text"

run_kv() {
    "$bin/test-kv" -m "$small" -g "$swa" -f "$text" -t "$threads" | tee "$tmp/kv.log" || true
    count "$tmp/kv.log"
}

# small random models of all architectures that upstream's own test can write
run_archs() {
    mkdir -p "$tmp/archs"
    "$bin/test-llama-archs" -v 0 -o "$tmp/archs" >/dev/null 2>&1 || true
    "$bin/test-kv" archs "$tmp/archs" | tee "$tmp/archs.log" || true
    count "$tmp/archs.log"
    rm -rf "$tmp/archs"
}

# every tool takes the types, K and V apart, and says what the cache costs
tool_says() { # tool_says PATTERN COMMAND...
    local pattern=$1
    shift
    "$@" >"$tmp/tool.log" 2>&1 </dev/null || { tail -n 5 "$tmp/tool.log"; return 1; }
    grep -oE -m 1 -- "$pattern" "$tmp/tool.log" || { echo "no '$pattern'"; return 1; }
}

refused_by() { # refused_by SENTENCE COMMAND...
    local sentence=$1
    shift
    if "$@" >"$tmp/tool.log" 2>&1 </dev/null; then
        echo "not refused"
        return 1
    fi
    grep -oF -m 1 -- "$sentence" "$tmp/tool.log" || { tail -n 5 "$tmp/tool.log"; return 1; }
}

run_tools() {
    local sizes='K \(dq[0-9]\), V \(dq[0-9]\).* bytes per token .*bits per value, [0-9.]+ with'
    local sets='K \(dq[0-9]\), V \(dq[0-9]\).*sets of K and .* of V in use'
    case_ llama-completion tool_says "$sizes" "$bin/llama-completion" -m "$small" -t "$threads" -ctk dq4 -ctv dq3 -no-cnv -n 8 -p "Once upon a time" -lv 4
    case_ llama-cli tool_says "$sets" "$bin/llama-cli" -m "$small" -t "$threads" -ctk dq8 -ctv dq8 -st -n 8 -p "Hello" -lv 4
    case_ llama-perplexity tool_says "Final estimate: PPL = [0-9.]+" "$bin/llama-perplexity" -m "$small" -t "$threads" -ctk dq2 -ctv dq2 -f "$text" -c 256 --chunks 2
    case_ llama-bench tool_says "\| +dq3 \| +dq4 \|.*pp32.*" "$bin/llama-bench" -m "$small" -t "$threads" -ctk dq3 -ctv dq4 -p 32 -n 4 -r 1 -d 64 -fa on
    case_ llama-batched-bench tool_says "\| +64 \| +8 \| +2 \|.*" "$bin/llama-batched-bench" -m "$small" -t "$threads" -ctk dq4 -ctv dq4 -c 1024 -npp 64 -ntg 8 -npl 2
    case_ factors-out tool_says "wrote the factors" "$bin/llama-perplexity" -m "$small" -t "$threads" -ctk dq4 -ctv dq4 -f "$text" -c 512 --chunks 2 --kv-factors-out "$tmp/small.dqf" -lv 4
    case_ factors-in tool_says "loaded the factors" "$bin/llama-completion" -m "$small" -t "$threads" -ctk dq4 -ctv dq4 -no-cnv -n 4 -p "Once" --kv-factors "$tmp/small.dqf" -lv 4
    case_ factors-of-another-model refused_by "cannot load the factors" "$bin/llama-completion" -m "$swa" -t "$threads" -ctk dq4 -ctv dq4 -no-cnv -n 4 -p "Once" --kv-factors "$tmp/small.dqf"
    case_ factors-for-f16 refused_by "only a dq cache" "$bin/llama-completion" -m "$small" -t "$threads" -no-cnv -n 4 -p "Once" --kv-factors "$tmp/small.dqf"
    case_ fa-off refused_by "a dq4 cache needs flash attention: use -fa on or -fa auto" "$bin/llama-completion" -m "$small" -t "$threads" -ctk dq4 -ctv dq4 -fa off -no-cnv -n 4 -p "Once"
    case_ one-side refused_by "must both be of a dq type" "$bin/llama-completion" -m "$small" -t "$threads" -ctk dq4 -no-cnv -n 4 -p "Once"
}

run_server() {
    [[ -f $tmp/small.dqf ]] || "$bin/llama-perplexity" -m "$small" -t "$threads" -ctk dq4 -ctv dq4 -f "$text" -c 512 --chunks 2 --kv-factors-out "$tmp/small.dqf" >/dev/null 2>&1
    case_ llama-server python3 "$here/tests/server.py" "$bin/llama-server" "$small" "$tmp/small.dqf" "$threads"
}

# mean KL divergence to f16 with flash attention, from a cold start
kld_of() { # kld_of MODEL BASE TYPE...
    "$bin/llama-perplexity" -m "$1" -t "$threads" -f "$text" -c 512 -b 512 --chunks 6 -fa on --kl-divergence --kl-divergence-base "$2" "${@:3}" 2>/dev/null |
        sed -nE 's/^Mean +KLD: +([-0-9.]+).*/\1/p'
}

kld_below() { # kld_below LIMIT MODEL BASE TYPE
    local kld
    kld=$(kld_of "$2" "$3" -ctk "$4" -ctv "$4")
    echo "mean KLD $kld, limit $1"
    awk -v kld="$kld" -v limit="$1" 'BEGIN { exit !(kld != "" && kld + 0 <= limit + 0) }'
}

run_kld() {
    local model base limit
    for model in "$small" "$swa"; do
        base=$tmp/base.kld
        "$bin/llama-perplexity" -m "$model" -t "$threads" -f "$text" -c 512 -b 512 --chunks 6 -fa on --save-all-logits "$base" >/dev/null 2>&1
        q8=$(kld_of "$model" "$base" -ctk q8_0 -ctv q8_0)
        echo "${model##*/}: q8_0 has mean KLD $q8"
        # these short texts from a cold start cost about a fifth more than eight of 1,024 tokens; dq4 was 0.0120 and dq3 0.0352 on the first model, 0.0190 and 0.0465 on the second
        if [[ $model == "$small" ]]; then limits=(0.0135 0.040); else limits=(0.021 0.053); fi
        case_ "kld-dq8 ${model##*/}" kld_below "$(awk -v q8="$q8" 'BEGIN { print 1.15*q8 }')" "$model" "$base" dq8
        case_ "kld-dq4 ${model##*/}" kld_below "${limits[0]}" "$model" "$base" dq4
        case_ "kld-dq3 ${model##*/}" kld_below "${limits[1]}" "$model" "$base" dq3
    done
}

compile_ggml_cuda() {
    local home
    home=$(bash "$repo/integration/install-nvcc.sh") &&
        "$home/bin/nvcc" -std=c++17 -arch=sm_90 -extended-lambda -DGGML_CUDA_USE_GRAPHS -DGGML_SCHED_MAX_COPIES=4 \
            -I"$here/tests/cublas" -I"$src/ggml/include" -I"$src/ggml/src" \
            -c "$src/ggml/src/ggml-cuda/ggml-cuda.cu" -o "$tmp/ggml-cuda.o" &&
        echo "$(nm "$tmp/ggml-cuda.o" | grep -c ' [tT] ') functions"
}

run_cuda() {
    case_ ggml-cuda compile_ggml_cuda
}

# the cache in device memory: all layers, then half of them
run_gpu() {
    local half=(-ngl 15 chat state nan)
    local all=(-ngl 99 greedy sequences learned-sequences swa holes streams state state-mismatch loaded factor-files
        refusals nan warmup chat)
    "$bin/test-kv" -m "$small" -g "$swa" -f "$text" -t "$threads" "${all[@]}" | tee "$tmp/gpu.log" || true
    count "$tmp/gpu.log"
    "$bin/test-kv" -m "$small" -g "$swa" -f "$text" -t "$threads" "${half[@]}" | tee "$tmp/gpu.log" || true
    count "$tmp/gpu.log"
}

for part in "${parts[@]}"; do
    say "$part"
    if [[ $part == gpu ]]; then
        run_gpu
    else
        CUDA_VISIBLE_DEVICES='' "run_$part" # on the CPU, also with a build that has CUDA
    fi
done

echo
echo "$passed passed, $failed failed"
((failed == 0))
