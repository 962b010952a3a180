// Attention of many queries over coded slots: a whole prefill chunk, or decode with more rows to a KV head than one warp
// takes. Here arithmetic is what counts, not bytes. So the block's warps look the levels of a tile of keys up once, together, and
// put them into shared memory: those of keys as bytes, for scores that are as exact as elsewhere, from folded queries of two bytes;
// those of values as f16, which holds them exactly, so that the weighted sums stay in the f32 of the tensor cores. From there on
// it is flash attention, rows of queries as rows of the mma, 32 keys at a time.
//
// Block: one KV head, up to PrefillTile::WARPS warps, 4 NT rows each, 16 to an m tile.
// Grid: (split of the keys, KV head * blocks of rows, stream * v_transforms).
//
// Shared memory:
//   stages   [2][KEYS] rows of `stride` bytes: of a record what the head needs
//   levels   [2]: of keys s8 [KEYS][KEY_STRIDE], of values f16 [KEYS][VALUE_STRIDE]; word w of a tier (`plane_word`) is the eight
//            places from 8 w on, its first quad before its second one. Then scales f32 [K, V][KEYS], sets u8 [KEYS]: of K in the
//            lower half of a byte, of V in the upper one
//   rows     [warp][4 NT] what a row sees
//   sums     f32 [warp][set][4 NT]
//   chunks   u16 [chunks of a row]: where in a record they come from
//
// Registers of lane 4 g + q:
//   query    A fragments of each m tile, rows g and g + 8: of the high bytes, of the low ones
//   scores   keys 2 q, 2 q + 1 of each n tile of eight keys, rows g and g + 8 of each m tile
//   output   acc[i][n]: rows g and g + 8 of m tile i, places 8 n + 2 q and 8 n + 2 q + 1
#pragma once
#include "attend_warp.cuh"

namespace dq {

// n tiles of eight keys that a warp takes in at a time.
constexpr int STEP_TILES = KEYS_PER_WARP / 8;

// What a block has, whose size is that of the larger side.
template <class K, class V>
struct PrefillTile {
    static constexpr int D = K::D > V::D ? K::D : V::D;
    // What the registers of a multiprocessor have room for: a row's output is half of them. Tiles of four rows to a warp.
    static constexpr int WARPS = D <= 64 ? 16 : D <= 128 ? 12 : 8, ROW_TILES = 4;
    // Keys whose levels are looked up at once, and what is between two of them, in bytes and in halves: an odd number of chunks,
    // so that the rows of a matrix meet in no bank.
    static constexpr int KEYS = D <= 128 ? 64 : 32, KEY_STRIDE = (K::D / 16 | 1) * 16, VALUE_STRIDE = V::D + 8;
    // Bytes of a tile's levels, scales and sets, and where they begin.
    static constexpr int values = KEYS * KEY_STRIDE, scales = values + 2 * KEYS * VALUE_STRIDE, sets = scales + 2 * KEYS * 4, bytes = sets + KEYS;
    // Chunks of a row in a stage, at most: each part of it may begin and end within one.
    static constexpr int MOST_CHUNKS = 64;
    static constexpr int chunks = (K::row_bytes + V::row_bytes) / 16 + 2 * (K::planes() + V::planes() + 2);
    static_assert(chunks <= MOST_CHUNKS && chunks * chunks * KEYS < 65536, "or divisions by a product go wrong");
};

// Four levels, a byte each.
template <int BITS>
__device__ __forceinline__ uint32_t bytes_of(const Levels<BITS>& levels) {
    uint32_t whole = levels.part[0];
    DQ_UNROLL
    for (int part = 1; part < parts_of(BITS); part++) whole = add_bytes(whole, levels.part[part]);
    return whole;
}
// The same as f16.
__device__ __forceinline__ uint2 halves_of(uint32_t bytes) {
    // A byte below the exponent of 1024 counts ones; all are 128 too large then.
    const uint32_t biased = bytes ^ 0x80808080u, both = 0x64646464u, excess = 0x64806480u;
    return make_uint2(subtract_halves(prmt(biased, both, 0x4140), excess), subtract_halves(prmt(biased, both, 0x4342), excess));
}

// This thread's number, counted from thread `first` on.
__device__ __forceinline__ uint32_t thread_from(uint32_t first) {
    return threadIdx.x < first ? threadIdx.x + blockDim.x - first : threadIdx.x - first;
}

// Levels of a side's rows in a stage, by all threads, a word at a time: `put(key, place, first quad, second quad)`. `first` is the
// thread that begins; returns the one that is next, so that tiers of few words do not all go to the same threads.
template <class S, int KEYS, class Put>
__device__ __forceinline__ uint32_t look_up_rows(const uint8_t* stage, uint32_t stride, const uint32_t* planes, const Tables& tables, uint32_t first, Put&& put) {
    for_each<S::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value, N = S::channels(T), BITS = S::bits(T), P = S::plane_index(T, 0), WORDS = N / 8;
        DQ_UNROLL_BY_1
        for (uint32_t i = thread_from(first); i < KEYS * WORDS; i += blockDim.x) {
            const uint32_t key = i / WORDS, w = i % WORDS;
            const uint8_t* row = stage + key * stride;
            uint32_t low = 0;
            const uint32_t upper = plane_word<S::aligned, N, plane_bits(BITS, 0)>(row + planes[P], w);
            if constexpr (BITS == 8) low = plane_word<S::aligned, N, 8>(row + planes[P] + N / 2, w);
            if constexpr (planes_of(BITS) == 2) low = plane_word<S::aligned, N, plane_bits(BITS, 1)>(row + planes[P + 1], w);
            Levels<BITS> quads[2];
            word_levels<BITS>(tables, upper, low, quads[0], quads[1]);
            put(key, S::first(T) + 8 * w, bytes_of<BITS>(quads[0]), bytes_of<BITS>(quads[1]));
        }
        for (first += KEYS * WORDS; first >= blockDim.x; first -= blockDim.x) {}
    });
    return first;
}

// What a row of queries sees, as far as lengths and window say, and its query's row of the mask, in bytes.
struct alignas(16) Sees {
    uint64_t mask;
    uint32_t from, to;
};

// A warp's rows and what they have seen.
template <class K, class V, int NT>
struct PrefillWarp {
    using Tile = PrefillTile<K, V>;
    static constexpr int MT = NT / 4, ROWS = 16 * MT, STEPS = folded_steps<K>(), TILES = V::D / 8, N = STEP_TILES;
    static_assert(NT % 4 == 0, "an m tile has 16 rows");
    // A weight times its value's scale is at most 2^14, as f16, and 2^7 where it is the largest; a lane's part of a step's weights is less
    // than MOST_WEIGHT. Scales of nothing count as 2 to LEAST_SCALE: so that weights of such values, whatever they are, stay what f32
    // holds, and those of others what f16 does.
    static constexpr uint32_t MOST_PRODUCT = 0x7400u;
    static constexpr float LARGEST = 7.0f, MOST_WEIGHT = 1e30f, LEAST_SCALE = -80.0f;
    // Where `m` moves up by more than this, what came before weighs nothing. Further from 0 than FAR (masks of -65504, say) it is taken
    // off after all else, or the scores of keys that are not masked would lose their bits.
    static constexpr float ANEW = 200.0f, FAR = 4096.0f;
    // Rounds in which `m` finds its place: seldom two, three behind a far one.
    static constexpr int MOST_ROUNDS = 8;

    const DqAttend& p;
    const uint32_t stream, head, row_tile, v_transform;
    const int lane, g, q;
    float* sums;       // shared, [set][ROWS], this warp's own: weights of earlier runs of keys, for the means of value sets
    const Sees* sees;  // likewise, [ROWS]
    // Where in a tile's levels and scales the lane begins.
    uint32_t of_keys, of_values, of_scales;
    uint32_t k_set, v_set;
    float v_scale;  // what scales of values are too small by; 0 where keys in this set are another block's
    uint32_t query[MT][STEPS][2][4];
    // Of the rows g and g + 8. Weights count from exp2(m), where m follows the largest of score + log2(scale of the value).
    float step[MT][2], constant[MT][2], m[MT][2], sum[MT][2], acc[MT][TILES][4];
    bool sums_used;
    // Keys that all of the warp's rows see, but for a mask, and behind which none sees any.
    uint32_t seen_from, seen_to, seen_end;
    bool mask_pairs;  // a mask of f16, two keys to an aligned word

    __device__ __forceinline__ PrefillWarp(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t row_tile, uint32_t v_transform, uint32_t n_keys, int lane, float* sums, Sees* rows)
        : p(p), stream(stream), head(head), row_tile(row_tile), v_transform(v_transform), lane(lane), g(lane >> 2), q(lane & 3), sums(sums), sees(rows), sums_used(false) {
        of_keys = (lane & 7) * Tile::KEY_STRIDE + (lane >> 3) * 16;
        of_values = Tile::values + 2 * (((lane >> 3 & 1) * 8 + (lane & 7)) * Tile::VALUE_STRIDE + (lane >> 4) * 8);
        of_scales = Tile::scales + 8 * q;
        work_out_here(of_keys), work_out_here(of_values), work_out_here(of_scales);
        for (int i = lane; i < DQ_MAX_SETS * ROWS; i += 32) sums[i] = 0.0f;
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) m[i][h] = NEVER, sum[i][h] = 0.0f;
            DQ_UNROLL
            for (int n = 0; n < TILES; n++) acc[i][n][0] = acc[i][n][1] = acc[i][n][2] = acc[i][n][3] = 0.0f;
        }
        // The last query sits at the last key. Rows that do not exist are the last one's.
        const uint32_t n_q = queries_of(p, stream).count;
        const int64_t behind = int64_t(n_keys) + tail_of(p, stream).count - n_q;
        auto see = [&](uint32_t row) {
            const uint32_t at = (row_tile * ROWS + row) / p.group, token = at < n_q ? at : n_q - 1;
            auto clamp = [&](int64_t key) { return key < 0 ? 0u : key < int64_t(n_keys) ? uint32_t(key) : n_keys; };
            Sees sees{stream * p.mask_stream_stride + token * p.mask_query_stride, 0, n_keys};
            if (p.lengths != nullptr && p.causal) sees.to = clamp(behind + token + 1);
            if (p.lengths != nullptr && p.window > 0) sees.from = clamp(behind + token + 1 - p.window);
            return sees;
        };
        for (int row = lane; row < ROWS; row += 32) rows[row] = see(row);
        const Sees first = see(0), last = see(ROWS - 1);
        seen_from = last.from, seen_to = first.to, seen_end = last.to;
        mask_pairs = p.mask != nullptr && p.mask_type == DQ_TYPE_F16 && ((reinterpret_cast<uintptr_t>(p.mask) | p.mask_stream_stride | p.mask_query_stride) & 3) == 0;
        __syncwarp();
        // Most rows are in the newest sets.
        k_set = header_set(p.k.heads[head].newest), v_set = header_set(p.v.heads[head].newest);
        v_scale = counts(v_set) ? SCALE_UP : 0.0f;
    }

    __device__ __forceinline__ bool counts(uint32_t set) const { return p.v_transforms == 1 || transform_of(p.v.heads[head], set) == v_transform; }

    // Queries folded for a linear part.
    __device__ __forceinline__ void load_query(uint32_t transform) {
        const uint32_t n_tiles = p.row_tiles * NT;
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            const uint4* from = reinterpret_cast<const uint4*>(p.folded + folded_tile<K>(p, stream, head, transform, row_tile * NT + 4 * i, n_tiles)) + lane;
            DQ_UNROLL
            for (int j = 0; j < 2 * STEPS; j++) {
                const uint4 a = from[32 * j];
                uint32_t (&to)[4] = query[i][j / 2][j % 2];
                to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
            }
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                const uint32_t row = row_tile * ROWS + 16 * i + 8 * h + g;
                const uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + row / 4;
                step[i][h] = p.folded_scales[at * 4 + row % 4] * SCALE_UP;
            }
        }
    }
    __device__ __forceinline__ void load_constants() {
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                const uint32_t row = row_tile * ROWS + 16 * i + 8 * h + g;
                const uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + k_set) * (p.row_tiles * NT) + row / 4;
                constant[i][h] = p.constants[at * 4 + row % 4];
            }
        }
    }
    __device__ __forceinline__ float base(int i, int h) const { return m[i][h] == NEVER ? 0.0f : m[i][h]; }
    __device__ __forceinline__ void start() {
        load_query(transform_of(p.k.heads[head], k_set));
        load_constants();
    }

    // Goes on with keys of other sets.
    __device__ __forceinline__ void enter_sets(uint32_t keys, uint32_t values) {
        if (keys != k_set) {
            const uint32_t before = transform_of(p.k.heads[head], k_set), now = transform_of(p.k.heads[head], keys);
            k_set = keys;
            if (now != before) load_query(now);
            load_constants();
        }
        if (values != v_set) {
            flush_sums();
            v_set = values, v_scale = counts(values) ? SCALE_UP : 0.0f;
        }
    }

    // Moves the running sums of weights to the set they belong to.
    __device__ __forceinline__ void flush_sums() {
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                float whole = sum[i][h] + __shfl_xor_sync(ALL_LANES, sum[i][h], 1);
                whole += __shfl_xor_sync(ALL_LANES, whole, 2);
                if (q == 0) sums[v_set * ROWS + 16 * i + 8 * h + g] += whole;
                sum[i][h] = 0.0f;
            }
        }
        sums_used = true;
        __syncwarp();
    }

    // Takes a tile in.
    __device__ __forceinline__ void take(const uint8_t* tile, uint32_t first_key) {
        DQ_UNROLL_BY_1
        for (int at = 0; at < Tile::KEYS; at += KEYS_PER_WARP) {
            if (first_key + at >= seen_end) return;
            const uint32_t mine = tile[Tile::sets + at + lane];
            const bool all_seen = p.mask == nullptr && first_key + at >= seen_from && first_key + at + KEYS_PER_WARP <= seen_to;
            // All at once where they are in the sets of those before, else the keys of one pair of sets after the other.
            const bool usual = __all_sync(ALL_LANES, mine == (k_set | v_set << 4));
            DQ_UNROLL_BY_1
            for (uint32_t left = ALL_LANES; left != 0;) {
                uint32_t together = left;
                if (!usual) {
                    const uint32_t sets = __shfl_sync(ALL_LANES, mine, __ffs(left) - 1);
                    together = __ballot_sync(ALL_LANES, mine == sets);
                    enter_sets(sets & 15, sets >> 4);
                }
                take_step(tile, at, first_key + at, all_seen, together);
                left &= ~together;
            }
        }
    }

    // Scores of the keys from `at` on, in units of log2; not `late`, less by `m` where that is a number.
    __device__ __forceinline__ void scores(float (&s)[MT][N][4], const uint8_t* tile, int at, bool late) const {
        float from[MT][2];
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) from[i][h] = late ? constant[i][h] : constant[i][h] - base(i, h);
        }
        // Two n tiles at a time, whose chains of sums do not wait for each other, and of these two steps of 32 channels.
        DQ_UNROLL
        for (int n = 0; n < N; n += 2) {
            int32_t high[2][MT][4] = {}, low[2][MT][4] = {};
            DQ_UNROLL
            for (int j = 0; j < STEPS; j += 2) {
                uint32_t b[2][4];
                DQ_UNROLL
                for (int t = 0; t < 2; t++) {
                    const uint8_t* of_lane = tile + of_keys + (at + 8 * (n + t)) * Tile::KEY_STRIDE;
                    ldmatrix(b[t], of_lane + 32 * (j + 1 < STEPS || lane < 16 ? j : j - 1));
                }
                DQ_UNROLL
                for (int k = j; k < j + 2 && k < STEPS; k++) {
                    DQ_UNROLL
                    for (int t = 0; t < 2; t++) {
                        const uint32_t of_step[2] = {b[t][2 * (k - j)], b[t][2 * (k - j) + 1]};
                        DQ_UNROLL
                        for (int i = 0; i < MT; i++) {
                            mma_s8_s8(high[t][i], query[i][k][0], of_step, high[t][i]);
                            mma_s8_s8(low[t][i], query[i][k][1], of_step, low[t][i]);
                        }
                    }
                }
            }
            DQ_UNROLL
            for (int t = 0; t < 2; t++) {
                const float2 scale = *reinterpret_cast<const float2*>(tile + of_scales + 4 * (at + 8 * (n + t)));
                DQ_UNROLL
                for (int i = 0; i < MT; i++) {
                    DQ_UNROLL
                    for (int e = 0; e < 4; e++) {
                        s[i][n + t][e] = __fmaf_rn(float(high[t][i][e] * 256 + low[t][i][e]), (e % 2 == 0 ? scale.x : scale.y) * step[i][e / 2], from[i][e / 2]);
                    }
                }
            }
        }
        if (p.softcap > 0.0f) {
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                DQ_UNROLL
                for (int n = 0; n < N; n++) {
                    DQ_UNROLL
                    for (int e = 0; e < 4; e++) s[i][n][e] = tanh_fast(s[i][n][e]) * (p.softcap * LOG2_E);
                }
            }
        }
    }

    // The mask's words for the lane's pairs of keys: on their way while scores are made.
    struct Mask {
        uint32_t pair[MT][2][N];
        bool there;
        // Nobody looks at them, and so waits for them, before.
        __device__ __forceinline__ void arrive() {
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                DQ_UNROLL
                for (int n = 0; n < N; n++) work_out_here(pair[i][0][n]), work_out_here(pair[i][1][n]);
            }
        }
        __device__ __forceinline__ uint32_t any() const {
            uint32_t any = 0;
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                DQ_UNROLL
                for (int n = 0; n < N; n++) any |= pair[i][0][n] | pair[i][1][n];
            }
            return any;
        }
    };
    __device__ __forceinline__ void load_mask(Mask& mask, uint32_t first_key) const {
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                const uint64_t row = sees[16 * i + 8 * h + g].mask + 2 * (first_key + 2 * q);
                DQ_UNROLL
                for (int n = 0; n < N; n++) mask.pair[i][h][n] = at_bytes<uint32_t>(p.mask, row + 16 * n);
            }
        }
    }

    // The mask's values for two keys that follow each other; keys that the row does not reach have none.
    __device__ __forceinline__ float2 mask_pair(const Sees& row, uint32_t key) const {
        return {key < row.to ? mask_at(p, row.mask, key) : 0.0f, key + 1 < row.to ? mask_at(p, row.mask, key + 1) : 0.0f};
    }

    // Minus infinity for the scores of keys that nobody sees, or that are not among `together`; the mask for others. False where there
    // are no others.
    __device__ __forceinline__ bool hide(float (&s)[MT][N][4], const Mask& mask, uint32_t first_key, uint32_t together) const {
        const bool inside = first_key >= seen_from && first_key + KEYS_PER_WARP <= seen_to && together == ALL_LANES;
        if (mask.there && inside && !__any_sync(ALL_LANES, mask.any() != 0)) return true;
        bool visible = false;
        work_out_here(first_key);  // or all that follows from it, of steps that hide nothing, too
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                const Sees row = sees[16 * i + 8 * h + g];
                DQ_UNROLL
                for (int n = 0; n < N; n++) {
                    float2 added{0.0f, 0.0f};
                    if (mask.there) added = {half_to_float(uint16_t(mask.pair[i][h][n])), half_to_float(uint16_t(mask.pair[i][h][n] >> 16))};
                    else if (p.mask != nullptr) added = mask_pair(row, first_key + 8 * n + 2 * q);
                    DQ_UNROLL
                    for (int e = 0; e < 2; e++) {
                        const uint32_t in_step = 8 * n + 2 * q + e, key = first_key + in_step;
                        const float of_key = e == 0 ? added.x : added.y;
                        const bool hidden = of_key == NEVER || key < row.from || key >= row.to || !(together >> in_step & 1);
                        // A hidden key's record may hold anything; its score must not come through as NaN.
                        float& score = s[i][n][2 * h + e];
                        score = hidden ? NEVER : __fmaf_rn(of_key, LOG2_E, score);
                        visible |= !hidden;
                    }
                }
            }
        }
        return __any_sync(ALL_LANES, visible);
    }

    __device__ __forceinline__ void take_step(const uint8_t* tile, int at, uint32_t first_key, bool all_seen, uint32_t together) {
        Mask mask;
        mask.there = !all_seen && mask_pairs && first_key + KEYS_PER_WARP <= seen_end;
        if (mask.there) load_mask(mask, first_key);

        // Weights, and as A fragments their products with the values' scales: of these and of the sums the largest says whether
        // `m` must follow. Where nothing has been seen yet it must. Scores are then made again: from far away they are not exact.
        uint32_t a[MT][N][2];
        float part[MT][2];
        DQ_UNROLL_BY_1
        for (int round = 1;; round++) {
            bool late = p.softcap > 0.0f;
            DQ_UNROLL
            for (int i = 0; i < MT; i++) late |= fabsf(base(i, 0)) > FAR || fabsf(base(i, 1)) > FAR;
            late = __any_sync(ALL_LANES, late);
            float s[MT][N][4];
            scores(s, tile, at, late);
            if (mask.there) mask.arrive();
            if ((!all_seen || together != ALL_LANES) && !hide(s, mask, first_key, together)) return;
            if (late) {
                DQ_UNROLL
                for (int i = 0; i < MT; i++) {
                    DQ_UNROLL
                    for (int n = 0; n < N; n++) {
                        DQ_UNROLL
                        for (int e = 0; e < 4; e++) s[i][n][e] -= base(i, e / 2);
                    }
                }
            }
            uint32_t most = 0;
            bool heavy = false;
            DQ_UNROLL
            for (int i = 0; i < MT; i++) part[i][0] = part[i][1] = 0.0f;
            DQ_UNROLL
            for (int n = 0; n < N; n++) {
                const float2 scale = scales_of(tile, at, n);
                DQ_UNROLL
                for (int i = 0; i < MT; i++) {
                    DQ_UNROLL
                    for (int h = 0; h < 2; h++) {
                        const float low = exp2_fast(s[i][n][2 * h]), high = exp2_fast(s[i][n][2 * h + 1]);
                        part[i][h] += low + high;
                        a[i][n][h] = pack_halves(low * scale.x, high * scale.y);
                        most = max_halves(most, a[i][n][h]);
                    }
                }
            }
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                DQ_UNROLL
                for (int h = 0; h < 2; h++) heavy |= part[i][h] >= MOST_WEIGHT || (m[i][h] == NEVER && part[i][h] > 0.0f);
            }
            if (round == MOST_ROUNDS || !__any_sync(ALL_LANES, heavy || (most & 0xFFFF) > MOST_PRODUCT || most >> 16 > MOST_PRODUCT)) break;
            raise(s, tile, at);
        }
        DQ_UNROLL
        for (int i = 0; i < MT; i++) sum[i][0] += part[i][0], sum[i][1] += part[i][1];

        // Weighted sums, sixteen keys after sixteen; values of two n tiles are loaded while those before are used.
        constexpr int LOADS = N / 2 * (TILES / 2);
        auto load = [&](uint32_t (&b)[4], int i) { ldmatrix_trans(b, tile + of_values + 2 * (at + 16 * (i / (TILES / 2))) * Tile::VALUE_STRIDE + 32 * (i % (TILES / 2))); };
        uint32_t b[2][4];
        load(b[0], 0);
        DQ_UNROLL
        for (int l = 0; l < LOADS; l++) {
            if (l + 1 < LOADS) load(b[(l + 1) % 2], l + 1);
            const int k = l / (TILES / 2) * 2, n = l % (TILES / 2) * 2;
            const uint32_t b0[2] = {b[l % 2][0], b[l % 2][1]}, b1[2] = {b[l % 2][2], b[l % 2][3]};
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                const uint32_t weights[4] = {a[i][k][0], a[i][k][1], a[i][k + 1][0], a[i][k + 1][1]};
                mma_f16(acc[i][n], weights, b0), mma_f16(acc[i][n + 1], weights, b1);
            }
        }
    }
    // Of the values of keys 2 q and 2 q + 1 of n tile n.
    __device__ __forceinline__ float2 scales_of(const uint8_t* tile, int at, int n) const {
        const float2 scale = *reinterpret_cast<const float2*>(tile + of_scales + 4 * (Tile::KEYS + at + 8 * n));
        return {scale.x * v_scale, scale.y * v_scale};
    }

    // `m` moves up, to 2^LARGEST below the largest of score + log2(scale).
    __device__ __forceinline__ void raise(const float (&s)[MT][N][4], const uint8_t* tile, int at) {
        float highest[MT][2];
        DQ_UNROLL
        for (int i = 0; i < MT; i++) highest[i][0] = highest[i][1] = NEVER;
        DQ_UNROLL
        for (int n = 0; n < N; n++) {
            const float2 scale = scales_of(tile, at, n);
            const float first = fmaxf(log2_fast(scale.x), LEAST_SCALE), second = fmaxf(log2_fast(scale.y), LEAST_SCALE);
            DQ_UNROLL
            for (int i = 0; i < MT; i++) {
                DQ_UNROLL
                for (int h = 0; h < 2; h++) highest[i][h] = fmaxf(highest[i][h], fmaxf(s[i][n][2 * h] + first, s[i][n][2 * h + 1] + second));
            }
        }
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                float most = fmaxf(highest[i][h], __shfl_xor_sync(ALL_LANES, highest[i][h], 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2)) - LARGEST;
                // Nothing to shrink where nothing has been seen.
                const bool first = m[i][h] == NEVER;
                const float up = fmaxf(most, 0.0f), shrink = first ? 1.0f : exp2_fast(-up);
                m[i][h] = first ? most : up > ANEW ? NEVER : m[i][h] + up;
                sum[i][h] *= shrink;
                DQ_UNROLL
                for (int n = 0; n < TILES; n++) acc[i][n][2 * h] *= shrink, acc[i][n][2 * h + 1] *= shrink;
                for (int e = q; sums_used && e < DQ_MAX_SETS; e += 4) sums[e * ROWS + 16 * i + 8 * h + g] *= shrink;
            }
        }
        __syncwarp();
    }

    // Writes the result, to rows of values and sums that lie so many floats apart; where no key was seen, zeros and the
    // maximum. Rows from `n_rows` on are left out.
    __device__ __forceinline__ void finish(const Results& to, uint32_t n_rows) {
        flush_sums();
        DQ_UNROLL
        for (int i = 0; i < MT; i++) {
            DQ_UNROLL
            for (int h = 0; h < 2; h++) {
                const uint32_t row = 16 * i + 8 * h + g;
                if (row_tile * ROWS + row >= n_rows) continue;
                float* of_sets = to.sums + row * to.sums_stride;
                for (int e = q; e < DQ_MAX_SETS; e += 4) of_sets[e] = counts(e) ? sums[e * ROWS + row] : 0.0f;
                if (q == 0) of_sets[DQ_MAX_SETS] = m[i][h];
                float* out = to.values + row * to.values_stride;
                for_each<V::tiers>([&](auto tier) {
                    constexpr int T = decltype(tier)::value, N = V::channels(T), FIRST = V::first(T);
                    DQ_UNROLL
                    for (int w = 0; w < N / 8; w++) {
                        // Places 2 q and 2 q + 1 of word w.
                        float* low = out + FIRST + 4 * w + q;
                        low[0] = acc[i][FIRST / 8 + w][2 * h], low[N / 2] = acc[i][FIRST / 8 + w][2 * h + 1];
                    }
                });
            }
        }
    }
};

template <class K, class V, int NT>
__device__ __forceinline__ void attend_prefill(const DqAttend& p) {
    DQ_DYNAMIC_SHARED(shared);
    using Warp = PrefillWarp<K, V, NT>;
    using Tile = PrefillTile<K, V>;
    constexpr int ROWS = Warp::ROWS, KEYS = Tile::KEYS;

    // Phase 1: what this block and warp work on.
    const uint32_t t = threadIdx.x, warps = blockDim.x >> 5;
    const uint32_t warp = __shfl_sync(ALL_LANES, t >> 5, 0);  // in a uniform register
    const int lane = t & 31;
    const uint32_t row_blocks = (p.row_tiles + warps - 1) / warps, head = blockIdx.y / row_blocks, row_block = blockIdx.y % row_blocks;
    const uint32_t row_tile = row_block * warps + warp;
    const uint32_t stream = blockIdx.z / p.v_transforms, v_transform = blockIdx.z % p.v_transforms;
    const uint32_t n_keys = coded_keys(p, stream), n_all = n_keys + tail_of(p, stream).count;
    // Rows of the block, of which the stream may have none; keys that they see.
    const uint32_t n_q = queries_of(p, stream).count, n_rows = n_q * p.group, first_row = row_block * warps * ROWS;
    if (first_row >= n_rows) return wait_for_previous_kernel();
    const uint32_t end_row = first_row + warps * ROWS < n_rows ? first_row + warps * ROWS : n_rows;
    const Keys keys = keys_of(p, n_keys, n_all, n_q, first_row / p.group, (end_row + p.group - 1) / p.group);
    const uint32_t before = keys.first / KEYS, tiles = (keys.end + KEYS - 1) / KEYS - before;
    const uint32_t share = (tiles + p.n_splits - 1) / p.n_splits, end_share = blockIdx.x * share + share;
    const uint32_t first_tile = before + blockIdx.x * share, end_tile = before + (end_share < tiles ? end_share : tiles);
    const bool idle = row_tile * ROWS >= n_rows || !names_transform(SetList(p.v.heads[head]), v_transform);

    RowImage<K, V> image;
    image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
    const uint32_t stride = padded_row(image.chunks), stage_bytes = KEYS * stride;
    uint8_t* levels = shared + 2 * stage_bytes;
    Sees* rows = reinterpret_cast<Sees*>(levels + 2 * Tile::bytes);
    float* sums = reinterpret_cast<float*>(rows + warps * ROWS);
    uint16_t* chunks = reinterpret_cast<uint16_t*>(sums + warps * DQ_MAX_SETS * ROWS);
    if (t == 0) {
        Run runs[MOST_RUNS];
        RowImage<K, V> again;
        again.lay_out(p.n_kv_heads, head, 1, head, runs);
        for (uint32_t r = 0; r < again.runs; r++) {
            for (uint32_t c = 0; c < runs[r].chunks; c++) chunks[runs[r].to + c] = uint16_t(runs[r].source + c);
        }
    }
    __syncthreads();

    // Phase 2: copies, a chunk to a thread at a time. Chunks are few, so that a product and a shift divide by their number (`Tile::chunks`).
    const uint32_t part_of_row = 65536 / image.chunks + 1;
    auto copy_tile = [&](uint32_t tile) {
        uint8_t* stage = shared + (tile & 1) * stage_bytes;
        for (uint32_t i = t; i < KEYS * image.chunks && tile < end_tile; i += blockDim.x) {
            const uint32_t row = i * part_of_row >> 16, c = i - row * image.chunks;
            uint32_t key = tile * KEYS + row;
            key = key < keys.first ? keys.first : key < keys.end ? key : keys.end - 1;
            cp_async_16(stage + row * stride + 16 * c, p.store.data + slot_of(p, stream, key) * p.store.stride + 16 * chunks[c]);
        }
        cp_async_commit();
    };
    copy_tile(first_tile);
    start_next_kernel();
    const Tables tables(false);
    Warp state(p, stream, head, row_tile < p.row_tiles ? row_tile : 0, v_transform, n_keys, lane, sums + warp * DQ_MAX_SETS * ROWS, rows + warp * ROWS);

    // Phase 3: levels, scales and sets of a tile, by the block.
    auto look_up_tile = [&](uint32_t tile) {
        if (tile >= end_tile) return;
        const uint8_t* stage = shared + (tile & 1) * stage_bytes;
        uint8_t* to = levels + (tile & 1) * Tile::bytes;
        const uint32_t next = look_up_rows<K, KEYS>(stage, stride, image.k_planes, tables, 0, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            *reinterpret_cast<uint2*>(to + key * Tile::KEY_STRIDE + place) = make_uint2(a, b);
        });
        const uint32_t last = look_up_rows<V, KEYS>(stage, stride, image.v_planes, tables, next, [&](uint32_t key, uint32_t place, uint32_t a, uint32_t b) {
            const uint2 first = halves_of(a), second = halves_of(b);
            *reinterpret_cast<uint4*>(to + Tile::values + 2 * (key * Tile::VALUE_STRIDE + place)) = make_uint4(first.x, first.y, second.x, second.y);
        });
        for (uint32_t key = thread_from(last); key < KEYS; key += blockDim.x) {
            const uint8_t* row = stage + key * stride;
            const uint32_t k_header = shared_half(row + image.k_headers), v_header = shared_half(row + image.v_headers);
            float* scales = reinterpret_cast<float*>(to + Tile::scales);
            scales[key] = small_scale(k_header & 0xFFF0), scales[KEYS + key] = small_scale(v_header & 0xFFF0);
            to[Tile::sets + key] = uint8_t(header_set(k_header) | header_set(v_header) << 4);
        }
    };
    cp_async_wait<0>();
    __syncthreads();
    copy_tile(first_tile + 1);
    look_up_tile(first_tile);
    wait_for_previous_kernel();
    state.start();
    for (uint32_t tile = first_tile; tile < end_tile; tile++) {
        // Phase 4: the next tile is in its stage and this one has its levels; nobody reads the other stage or the other levels any
        // more.
        cp_async_wait<0>();
        __syncthreads();
        copy_tile(tile + 2);

        // Phase 5: scores, softmax, weighted sums, and levels of the next tile. Some warps begin with the one, some with the other, so
        // that tensor cores and look-ups share the time.
        DQ_UNROLL_BY_1
        for (uint32_t turn = 0; turn < 2; turn++) {
            if ((warp >> 2 & 1) == turn) look_up_tile(tile + 1);
            else if (!idle) state.take(levels + (tile & 1) * Tile::bytes, tile * KEYS);
        }
    }
    cp_async_wait<0>();

    // Phase 6: the part's result.
    if (row_tile < p.row_tiles) state.finish(results_of<V>(p, stream, head, row_tile * ROWS, v_transform * p.n_splits + blockIdx.x), n_rows);
}

// Bytes of dynamic shared memory of a block, whichever its head: src/cuda/launch.rs says the same.
template <class K, class V, int NT>
uint32_t prefill_shared_bytes(const DqAttend& p, uint32_t warps) {
    using Tile = PrefillTile<K, V>;
    uint32_t most = 0;
    for (uint32_t head = 0; head < p.n_kv_heads; head++) {
        RowImage<K, V> image;
        image.lay_out(p.n_kv_heads, head, 1, head, nullptr);
        most = image.chunks > most ? image.chunks : most;
    }
    return 2 * (Tile::KEYS * padded_row(most) + Tile::bytes) + warps * PrefillWarp<K, V, NT>::ROWS * (sizeof(Sees) + DQ_MAX_SETS * 4) + 2 * Tile::MOST_CHUNKS;
}

}  // namespace dq
