#!/bin/sh
# Does the suite see bugs? Plants one at a time in a copy of the kernels and runs the short emulator suite in all three
# schedule orders: a bug that passes is a failure of this script. With an argument, only those that have it in their name.
set -u
only=${1:-}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
missed=0

# plant NAME FILE SED-SCRIPT [SUITE [FLAGS]]
plant() {
    case $1 in *"$only"*) ;; *) return ;; esac
    rm -rf "$work/k"
    cp -r "$here" "$work/k"
    sed -i "$3" "$work/k/$2"
    if cmp -s "$here/$2" "$work/k/$2"; then echo "NOT PLANTED  $1"; missed=1; return; fi
    if ! g++ -std=c++17 -O1 -ffp-contract=off -DDQ_EMU -DDQ_FAST ${5:-} "$work/k/tests/${4:-attend_emu}.cpp" -o "$work/t" 2>"$work/log"; then
        echo "DOES NOT BUILD  $1"; cat "$work/log"; missed=1; return
    fi
    for order in 0 1 2; do
        if ! timeout 300 "$work/t" $order >"$work/out" 2>&1; then echo "seen (order $order)  $1"; return; fi
    done
    echo "MISSED  $1"
    missed=1
}

SM90=-DDQ_EMU_SM90
plant "missing barrier after a tile's copies" attend.cuh '/cp_async_wait<STAGES - 2>/{n;d}'
plant "a stage filled anew before all are done with it" attend.cuh 's/missing, 0) == 1/missing, 0) > 1/;/over already/d' attend_emu $SM90
plant "wait one group short" attend.cuh 's/cp_async_wait<STAGES - 2>/cp_async_wait<STAGES - 1>/'
plant "wait for the wrong phase" attend.cuh 's/index = 0, phase ^= 1/index = 0/' attend_emu $SM90
plant "fewer bytes announced than copied" attend.cuh 's|barrier_expect(barriers + index, (to - from)|barrier_expect(barriers + index, (to - from - 1)|' attend_emu $SM90
plant "maximum over the wrong lanes" attend_warp.cuh '0,/ALL_LANES, v, 8/s//ALL_LANES, v, 4/'
plant "tail not masked" attend_rows.cuh 's/if (key >= n_keys) return NEVER/if (key > n_keys) return NEVER/'
plant "merge: earlier parts not rescaled" merge.cuh 's/sum \*= shrink;/;/'
plant "merge: earlier sources not rescaled" merge.cuh 's/set_sum \*= shrink, //'
plant "warps of a head: results of another head" attend.cuh 's/step = p.heads_per_block \* ROWS/step = ROWS/'
plant "warps of a head: results over stages in use" attend.cuh '/ shares(p, shared);/{n;n;d}'
plant "warps of a head: joined before all are there" attend.cuh '/state.finish(results);/{n;n;d}'
plant "earlier sums not rescaled" attend_warp.cuh 's/if (sums_used) {/if (false) {/'
plant "constant of the wrong set" attend_warp.cuh 's/if (set != k_set) {/if (set > k_set) {/'
plant "low byte of the query dropped" fold.cuh 's/uint8_t(low)/uint8_t(0)/'
plant "nibbles of the wrong keys" codes.cuh 's/even = prmt(e, e, 0x3120)/even = prmt(e, e, 0x3210)/'
plant "prefill: levels read before they are all there" attend_prefill.cuh '/^            __syncthreads();$/d'
plant "prefill: stage overwritten while in use" prefill_tiles.cuh 's/(tile \& 1) \* stage_bytes/0 * stage_bytes/'
plant "prefill: levels overwritten while in use" attend_prefill.cuh 's/(tile \& 1) \* Tile::bytes/0 * Tile::bytes/'
plant "prefill: earlier sums not rescaled" prefill_warp.cuh 's/sums_used \&\& e < DQ_MAX_SETS/false/'
plant "prefill: scores count from nowhere" prefill_warp.cuh 's/ - (late ? 0.0f : base(h));/;/'
plant "prefill: far from 0 all the same" prefill_warp.cuh 's/ FAR = 4096.0f/ FAR = 1e30f/'
plant "prefill: the mask of the next pair" prefill_warp.cuh 's/(first_key + 2 \* q);/(first_key + 2 * q + 2);/'
plant "prefill: keys in other sets taken in with these" prefill_warp.cuh 's/if (mixed) hide_others(s, together);/;/'
plant "prefill: products beyond f16" prefill_warp.cuh 's/heavy || (most \& 0xFFFF) > MOST_PRODUCT || most >> 16 > MOST_PRODUCT/heavy/'
plant "prefill: sums beyond f32" prefill_warp.cuh 's/part\[h\] > MOST_WEIGHT/false/'
plant "prefill: scale of the key before" prefill_warp.cuh 's/(e % 2 == 0 ? scale.x : scale.y) \* step/scale.x * step/'
plant "prefill: rows see what the last one sees" prefill_warp.cuh 's/key >= row.to/key >= seen_end/'
plant "prefill: another chunk" prefill_tiles.cuh 's/16 \* chunks\[c\]/16 * chunks[c ^ 1]/'
plant "prefill: slots of the tile before" prefill_tiles.cuh 's/slots\[(tile \& 1) \* KEYS + t\]/slots[t]/'
plant "prefill: a row that sees low scores only" prefill_warp.cuh 's/sees_any(s, h)/part[h] > 0.0f/'
plant "prefill: a first half that is negative not made up for" prefill_levels.cuh 's/(Entries::at(k) < 0 ? -1 : 0)/0/'
plant "prefill: scores of before where the reference moves" prefill_warp.cuh 's/s\[n\]\[e\] += (was_late/s[n][e] += 0.0f * (was_late/'
plant "warp groups: products not waited for" prefill_warp.cuh '/group_wait<0>();/d' attend_emu $SM90
plant "warp groups: the last sums not waited for" attend_prefill.cuh '/^            state.settle();$/d' attend_emu $SM90
plant "warp groups: values of another panel" prefill_warp.cuh 's/matrix(8 \* k, 64 \* P)/matrix(8 * k, 0)/' attend_emu $SM90
plant "warp groups: low bytes of queries left out" prefill_warp.cuh 's/add(Int<1>{}, \[\] {});/;/' attend_emu $SM90
plant "warp groups: chunks as they come" prefill_levels.cuh 's/ ^ chunk_swizzle<LINE>(row)//' attend_emu $SM90
plant "warp groups: queries of the linear part before last" prefill_warp.cuh 's/if (there) return;/return;/' attend_emu $SM90
plant "warp groups: queries overwritten while others read them" prefill_warp.cuh '/nobody reads what was there any more/d' attend_emu $SM90
plant "warp groups: queries read before they are all there" prefill_warp.cuh '/^        shared_for_groups();$/{n;d}' attend_emu $SM90
plant "warp groups: a warp goes its own way" prefill_warp.cuh 's/see(first_together + TOGETHER - 1)/see(first_together + 16 * (threadIdx.x \/ 32 % 4))/' attend_emu $SM90
plant "warp groups: keys in the second half of a step in other sets taken in" prefill_warp.cuh 's/words\[key \/ 32\] >> (key % 32)/words[0] >> (key % 32)/' attend_emu $SM90
plant "warp groups: other sets in the second half of a step not looked for" prefill_warp.cuh 's/(words\[0\] & words\[KEYS \/ 32 - 1\]) == ALL_LANES/words[0] == ALL_LANES/' attend_emu $SM90
plant "warp groups: keys left in the second half of a step forgotten" prefill_warp.cuh 's/(words\[0\] | words\[KEYS \/ 32 - 1\]) != 0/words[0] != 0/' attend_emu $SM90
plant "warp groups: stage read before all copies are there" attend_prefill.cuh '/group_sync(Tile::WARPS \/ 4);/d' attend_emu $SM90
plant "warp groups: stage overwritten while in use" prefill_tiles.cuh 's/(tile \& 1) \* stage_bytes/0 * stage_bytes/' attend_emu $SM90
plant "warp groups: keys read before they are there" prefill_warp.cuh '/levels.wait(LevelBarriers::KEYS_THERE/d' attend_emu $SM90
plant "warp groups: values read before they are there" prefill_warp.cuh '/^            levels.wait(LevelBarriers::VALUES_THERE/d' attend_emu $SM90
plant "warp groups: keys overwritten while a group reads them" attend_prefill.cuh '/of_tile.wait(LevelBarriers::KEYS_DONE/d' attend_emu $SM90
plant "warp groups: values overwritten while a group reads them" attend_prefill.cuh '/of_tile.wait(LevelBarriers::VALUES_DONE/d' attend_emu $SM90
plant "warp groups: keys released before they are taken in" prefill_warp.cuh 's/^        take(tile, first_key);/levels.arrive(LevelBarriers::KEYS_DONE), take(tile, first_key);/;/^        levels.arrive(LevelBarriers::KEYS_DONE);/d' attend_emu $SM90
plant "warp groups: values released before their products are done" prefill_warp.cuh 's/^            group_wait<0>();/if (releases) before.arrive(LevelBarriers::VALUES_DONE); releases = false; group_wait<0>();/' attend_emu $SM90
plant "warp groups: values released a tile early" prefill_warp.cuh 's/before = levels, releases = true;/levels.arrive(LevelBarriers::VALUES_DONE);/' attend_emu $SM90
plant "warp groups: values that nobody sees never released" prefill_warp.cuh '/^        if (releases) settle();/d' attend_emu $SM90
plant "warp groups: a group without rows counted" attend_prefill.cuh 's/init(busy)/init(Tile::WARPS \/ 4)/' attend_emu $SM90
plant "warp groups: a group with rows not counted" attend_prefill.cuh 's/init(busy)/init(1)/' attend_emu $SM90
plant "warp groups: phases that do not change" prefill_levels.cuh 's/buffer = 0, parity ^= 1/buffer = 0/' attend_emu $SM90
plant "warp groups: buffers waited for before anybody had them" attend_prefill.cuh 's/turn(true)/turn(false)/' attend_emu $SM90
plant "warp groups: a buffer of another tile" attend_prefill.cuh 's/levels + turn.buffer \* Tile::bytes, tile/levels, tile/' attend_emu $SM90
plant "read past the last slot" attend.cuh 's/key < keys.end ? key : keys.end - 1/key/' attend_emu "-fsanitize=address"
plant "blocks that the window has left are read" attend.cuh 's/key = key < keys.first ? keys.first : /key = /' attend_emu "-fsanitize=address"
plant "blocks that the window has left are read, bulk copies" attend.cuh 's/const uint32_t from = keys.first > first_key.*/const uint32_t from = 0;/' attend_emu "-fsanitize=address $SM90"
plant "queries of the sequence before" fold.cuh 's|(queries.first + query)|(uint64_t(stream) * p.n_q + query)|'
plant "a stage waited for before its barrier is there" attend.cuh '/if constexpr (HAS_BULK_COPY) __syncthreads();/d' attend_emu $SM90
plant "the other stages never asked for" attend.cuh 's/if (HAS_BULK_COPY \&\& warp == 0)/if (false)/' attend_emu $SM90
plant "fold: a row's halves counted from another row's power of two" fold.cuh 's/exponents\[unit \* ROWS + q\]/exponents[unit * ROWS]/'
plant "fold of many rows: the next round's first piece never asked for" fold_rows.cuh 's/if (next > 0 || .*) {/if (next > 0) {/'
plant "fold of many rows: a piece of the matrix before all are done with the one there" fold_rows.cuh '/cp_async_wait<0>();/{n;d}'
plant "fold of many rows: products before the matrix is there" fold_rows.cuh '/cp_async_wait<STAGES - 1>();/{n;d}'
plant "fold of many rows: a tile that is left over goes to nobody" fold_rows.cuh 's/end = first + each + (rank < more ? 1 : 0)/end = first + each/'
plant "fold of many rows: another linear part" fold_rows.cuh 's/for (uint32_t i = 0; i < nth; i++) named/for (uint32_t i = 1; i < nth; i++) named/'
plant "fold of many rows: sums of the round before" fold_rows.cuh 's/if (from == 0) tile.clear_sums/if (chunk == 0) tile.clear_sums/'
plant "fold of many rows: the largest of one lane" fold_rows.cuh 's/most = quad_max(most);/;/'
plant "fold of many rows: counted from another power of two" fold_rows.cuh 's/worth\[h\] = __uint_as_float(/worth[h ^ 1] = __uint_as_float(/'
plant "fold of many rows: low byte of the query dropped" fold_rows.cuh 's/low\[2 \* j + h\] = /low[2 * j + h] = 0 \& /'
plant "fold of many rows: the lower half of the query dropped" fold_rows.cuh 's/half < HALVES; half++) mma_f16(constants/half < 1; half++) mma_f16(constants/'
plant "fold of many rows: constants of sets that are not there" fold_rows.cuh 's/(over \& sets.present) >> 8/(over \& ~sets.present) >> 8/'
plant "fold of many rows: channels in another order" fold_rows.cuh 's/c % 2 \* 8 + c % 16 \/ 4 \* 2 + c % 4 \/ 2/c % 4 \/ 2 * 8 + c % 16 \/ 4 * 2 + c % 2/'
plant "fold of many rows: bf16 taken for f16" fold_rows.cuh 's/HALVES == 1 \&\& rows.type == DQ_TYPE_F16/HALVES == 1/'
plant "fold of many rows: four elements at once wherever they are" fold_rows.cuh 's/token_stride | rows.head_stride) \& (8 \* HALVES - 1)) == 0/token_stride) \& 0) == 0/' attend_emu "-fsanitize=alignment -fno-sanitize-recover"
plant "queries of the sequence before, many rows" fold_rows.cuh 's|(queries.first + query)|(uint64_t(stream) * p.n_q + query)|'
plant "merge of many rows: a warp stops after its first" merge.cuh 's/if (!MANY) return;/return;/'
plant "merge of many rows: output of another warp" merge.cuh 's/(shared) + team/(shared)/'
plant "merge of many rows: stored before all lanes have written" merge.cuh '/store_runs(gathered\[warp\], x);/{n;d}'
plant "early launch: no wait" attend.cuh '/^    wait_for_previous_kernel();/d'
plant "early launch: all blocks leave the wait to others" fold.cuh 's/^    wait_for_previous_kernel();/    leave_waiting_to_others();/'
plant "early launch: all blocks leave the wait to others, many rows" fold_rows.cuh 's/^    wait_for_previous_kernel();/    leave_waiting_to_others();/'
plant "early launch: no wait where there is nothing to do" attend.cuh 's/return wait_for_previous_kernel();/return;/'
plant "tail: a key behind its end" tail.cuh 's/n_coded + tail.count) : NEVER/n_coded + tail.count + 1) : NEVER/'
plant "tail: no weight times NaN" tail.cuh 's/w\[r\] == 0.0f ? of_turn\[r\] : //'
plant "tail: earlier weights not rescaled" tail.cuh 's/sum\[r\] \* shrink + weight/sum[r] + weight/'
plant "tail: keys of two turns in shared memory" tail.cuh '/__syncwarp();  .. rows are there/d'
plant "tail: left out of the sum of weights" merge.cuh 's/if (tail) other_sum += /if (tail) /'
plant "tail: not counted among the keys" attend_rows.cuh 's/coded_keys(p, stream)) + tail_of(p, stream).count - n_q/coded_keys(p, stream)) - n_q/'
plant "encode: other lanes' codes too early" encode.cuh '/^    __syncwarp();$/{N;s/^    __syncwarp();\n    if (!stored)/    if (!stored)/}' encode_emu
plant "encode: the matrix before it is there" encode.cuh '/Also: the rows are there/{n;d}' encode_emu
plant "encode: an error that the next latent does not hear of" encode.cuh 's/for (int k = i + 1; k < 8; k++) target/for (int k = i + 2; k < 8; k++) target/' encode_emu
plant "encode: errors of other latents" encode.cuh 's/(errors + k))/(errors + (k ^ 4)))/' encode_emu
plant "encode: errors before the lane that has them wrote them" encode.cuh '/keeps) \*reinterpret_cast<uint2/{n;n;d}' encode_emu
plant "encode: chains before their rows are there" encode.cuh '/from += Layout::PASS_ROWS/{n;d}' encode_emu
plant "encode: ties the other way" encode.cuh 's/magnitude > found.edge/magnitude >= found.edge * 1.0001f/' encode_emu
plant "encode: beyond the last edge" encode.cuh 's/bins\[LAST\] = entry(-1.0f, 0/bins[LAST] = entry(2.0f * cap, 0/' encode_emu
plant "encode: a row alone: errors before they are known" encode.cuh '/handed\[rank\];/,/if (leads \&\& i == 0) sums/{/^            __syncthreads();$/d}' encode_emu
plant "encode: a row alone: errors of the step before last" encode.cuh 's/hand.errors\[(step - 1) % 2\]\[s\]/hand.errors[step % 2][s]/' encode_emu
plant "encode: a row alone: goes on before all latents are there" encode.cuh 's/== SLICES - 1/== SLICES - 2/' encode_emu
plant "encode: a row alone: counters that are not zero again" encode.cuh 's/atomicInc(arrived, SLICES - 1)/atomicInc(arrived, ~0u)/' encode_emu
exit $missed
