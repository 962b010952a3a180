// Attention of many queries, what a warp does with a tile's levels: scores, softmax, weighted sums, of sixteen rows of queries and 32 or 64
// keys at a time.
//
// Where there are mma of warp groups, four warps (64 rows) take their steps together: all that these depend on is the same for
// the four. Fragments of rows are those of a warp's mma, and levels are read from shared memory by the tensor cores.
//
// Registers of lane 4 g + q:
//   scores   keys 2 q, 2 q + 1 of each n tile of eight keys, rows g and g + 8
//   output   acc[n]: rows g and g + 8, places 8 n + 2 q and 8 n + 2 q + 1
#pragma once
#include "attend_warp.cuh"
#include "prefill_levels.cuh"

namespace dq {

// Which keys of a step: a bit for each.
template <int KEYS> struct KeyMask {
    uint32_t words[KEYS / 32];
    __device__ __forceinline__ static KeyMask all() {
        KeyMask mask;
        DQ_UNROLL
        for (int w = 0; w < KEYS / 32; w++) mask.words[w] = ALL_LANES;
        return mask;
    }
    // Those whose byte is `sets`, of bytes in shared memory that the lanes have loaded.
    __device__ __forceinline__ static KeyMask of(const uint32_t (&bytes)[KEYS / 32], uint32_t sets) {
        KeyMask mask;
        DQ_UNROLL
        for (int w = 0; w < KEYS / 32; w++) mask.words[w] = __ballot_sync(ALL_LANES, bytes[w] == sets);
        return mask;
    }
    __device__ __forceinline__ KeyMask both(const KeyMask& other) const {
        KeyMask mask;
        DQ_UNROLL
        for (int w = 0; w < KEYS / 32; w++) mask.words[w] = words[w] & other.words[w];
        return mask;
    }
    __device__ __forceinline__ void remove(const KeyMask& other) {
        DQ_UNROLL
        for (int w = 0; w < KEYS / 32; w++) words[w] &= ~other.words[w];
    }
    __device__ __forceinline__ bool any() const { return KEYS == 32 ? words[0] != 0 : (words[0] | words[KEYS / 32 - 1]) != 0; }
    __device__ __forceinline__ bool is_all() const { return KEYS == 32 ? words[0] == ALL_LANES : (words[0] & words[KEYS / 32 - 1]) == ALL_LANES; }
    // The first one; there is one.
    __device__ __forceinline__ int first() const { return KEYS == 32 || words[0] != 0 ? __ffs(words[0]) - 1 : 31 + __ffs(words[KEYS / 32 - 1]); }
    // Of each 32 those from this one on, counted from it.
    __device__ __forceinline__ KeyMask from(uint32_t key) const {
        KeyMask mask;
        DQ_UNROLL
        for (int w = 0; w < KEYS / 32; w++) mask.words[w] = words[w] >> key;
        return mask;
    }
    // `key` is known when compiled.
    __device__ __forceinline__ bool has(int key) const { return words[key / 32] >> (key % 32) & 1; }
};

// What a row of queries sees, as far as lengths and window say, and its query's row of the mask, in bytes.
struct alignas(16) Sees {
    uint64_t mask;
    uint32_t from, to;
};

// A warp's queries, folded for one linear part after another: A fragments of rows g and g + 8, high bytes, low ones.
template <class K, bool GROUPS> struct PrefillQuery {
    static constexpr int STEPS = folded_steps<K>();
    uint32_t transform = DQ_MAX_TRANSFORMS;
    uint32_t fragments[STEPS][2][4];

    __device__ __forceinline__ PrefillQuery(uint8_t*, uint32_t, uint32_t, int) {}
    // Goes on with another part; `folded` are the lane's words of it.
    __device__ __forceinline__ void enter(uint32_t part, const uint4* folded) {
        if (part == transform) return;
        transform = part;
        DQ_UNROLL
        for (int j = 0; j < 2 * STEPS; j++) {
            const uint4 a = folded[32 * j];
            uint32_t (&to)[4] = fragments[j / 2][j % 2];
            to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
        }
    }
};
// Those of a warp group, in shared memory: where there is room of the last two linear parts, since most keys are in two.
template <class K> struct PrefillQuery<K, true> {
    using Rows = QueryRows<K>;
    static constexpr int STEPS = folded_steps<K>();
    uint8_t* slots;
    uint32_t more;  // slots but one
    uint32_t group, slot, held, other;  // which linear part is in `slot`, and which in the other one
    int lane, first_row;

    __device__ __forceinline__ PrefillQuery(uint8_t* of_groups, uint32_t n_slots, uint32_t warp, int lane)
        : slots(of_groups + warp / 4 * n_slots * Rows::slot), more(n_slots - 1), group(warp / 4), slot(0), held(DQ_MAX_TRANSFORMS), other(DQ_MAX_TRANSFORMS), lane(lane), first_row(warp % 4 * PREFILL_ROWS) {}
    __device__ __forceinline__ void enter(uint32_t part, const uint4* folded) {
        if (held == part) return;
        const bool there = more != 0 && other == part;
        other = held, held = part, slot ^= more;
        if (there) return;
        group_sync(group);  // nobody reads what was there any more
        const int row = first_row + (lane >> 2), q = lane & 3;
        DQ_UNROLL_BY_1
        for (int j = 0; j < 2 * STEPS; j++) {
            const uint4 a = folded[32 * j];
            uint8_t* to = slots + slot * Rows::slot + j % 2 * Rows::bytes;
            auto put = [&](int below, int further, uint32_t word) { *reinterpret_cast<uint32_t*>(to + Rows::at(row + below, j / 2 * 32 + further + 4 * q)) = word; };
            put(0, 0, a.x), put(8, 0, a.y), put(0, 16, a.z), put(8, 16, a.w);
        }
        shared_for_groups();
        group_sync(group);
    }
    // Where they begin.
    __device__ __forceinline__ GroupMatrix<Rows::LINE> matrix() const { return GroupMatrix<Rows::LINE>(slots + slot * Rows::slot); }
};

// A warp's rows, an m tile of sixteen, and what they have seen.
template <class K, class V>
struct PrefillWarp {
    using Tile = PrefillTile<K, V>;
    static constexpr int ROWS = Tile::ROWS, STEPS = folded_steps<K>(), TILES = V::D / 8, STEP = Tile::STEP, N = STEP / 8;
    static constexpr bool GROUPS = Tile::GROUPS;
    using Together = KeyMask<STEP>;
    // Rows that take each step together.
    static constexpr int TOGETHER = GROUPS ? 4 * ROWS : ROWS;
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
    int lane, g, q;
    float* sums;       // shared, [set][ROWS], this warp's own: weights of earlier runs of keys, for the means of value sets
    const Sees* sees;  // likewise, [ROWS]
    // Where in a tile's levels (of mma of warps) and scales the lane begins.
    uint32_t of_keys, of_values, of_scales;
    // Sets of keys and, four bits further up, of values; NOT_COUNTED where values in that set are not this block's.
    uint32_t sets;
    static constexpr uint32_t NOT_COUNTED = 0x100;
    PrefillQuery<K, GROUPS> query;
    // Of the rows g and g + 8. Weights count from exp2(m), where m follows the largest of score + log2(scale of the value). `from` is what
    // a score has besides its product: the set's constant, less m unless that is taken off late.
    float step[2], from[2], m[2], sum[2], acc[TILES][4];
    bool late, sums_used;
    // Of levels that others look up: barriers of the tile's buffer, which phase of them it is, and those of the tile before, whose values
    // may still be read by products under way.
    LevelBarriers levels, before;
    uint32_t parity;
    bool releases;
    // Keys that all rows that take their steps together see, but for a mask, and behind which none sees any.
    uint32_t seen_from, seen_to, seen_end;
    uint32_t mask_pairs;  // a mask of f16, two keys to an aligned word

    __device__ __forceinline__ PrefillWarp(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t row_tile, uint32_t first_together, uint32_t v_transform, uint32_t n_keys, uint32_t warp, int lane, uint8_t* queries, uint32_t query_slots, float* sums, Sees* rows)
        : p(p), stream(stream), head(head), row_tile(row_tile), v_transform(v_transform), lane(lane), g(lane >> 2), q(lane & 3), sums(sums), sees(rows), query(queries, query_slots, warp, lane), late(p.softcap > 0.0f), sums_used(false), releases(false) {
        if constexpr (GROUPS) work_out_here(this->lane);  // or it is read anew each time, which is far away
        of_keys = Tile::KeyLevels::at(lane & 7, (lane >> 3) * 16);
        of_values = Tile::values + Tile::ValueLevels::at((lane >> 3 & 1) * 8 + (lane & 7), (lane >> 4) * 8);
        of_scales = Tile::scales + 8 * q;
        work_out_here(of_keys), work_out_here(of_values), work_out_here(of_scales);
        for (int i = lane; i < DQ_MAX_SETS * ROWS; i += 32) sums[i] = 0.0f;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) m[h] = NEVER, sum[h] = 0.0f;
        DQ_UNROLL
        for (int n = 0; n < TILES; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
        // The last query sits at the last key. Rows that do not exist are the last one's.
        const uint32_t n_q = queries_of(p, stream).count;
        const int64_t behind = int64_t(n_keys) + tail_of(p, stream).count - n_q;
        auto see = [&](uint32_t row) {
            const uint32_t at = row / p.group, token = at < n_q ? at : n_q - 1;
            auto clamp = [&](int64_t key) { return key < 0 ? 0u : key < int64_t(n_keys) ? uint32_t(key) : n_keys; };
            Sees sees{stream * p.mask_stream_stride + token * p.mask_query_stride, 0, n_keys};
            if (p.lengths != nullptr && p.causal) sees.to = clamp(behind + token + 1);
            if (p.lengths != nullptr && p.window > 0) sees.from = clamp(behind + token + 1 - p.window);
            return sees;
        };
        for (int row = lane; row < ROWS; row += 32) rows[row] = see(row_tile * ROWS + row);
        const Sees first = see(first_together), last = see(first_together + TOGETHER - 1);
        seen_from = last.from, seen_to = first.to, seen_end = last.to;
        mask_pairs = p.mask != nullptr && p.mask_type == DQ_TYPE_F16 && ((reinterpret_cast<uintptr_t>(p.mask) | p.mask_stream_stride | p.mask_query_stride) & 3) == 0;
        __syncwarp();
        // Most rows are in the newest sets.
        sets = header_set(load_fresh(&p.k.heads[head].newest)) | header_set(load_fresh(&p.v.heads[head].newest)) << 4;
    }

    // The linear part of a set, past the L1: all warps of a group must read the same.
    __device__ __forceinline__ static uint32_t fresh_transform(const DqHeadSets& sets, uint32_t set) { return load_fresh(&sets.transform[set]) & (DQ_MAX_TRANSFORMS - 1); }
    __device__ __forceinline__ uint32_t k_set() const { return sets & 15; }
    __device__ __forceinline__ uint32_t v_set() const { return sets >> 4 & 15; }
    __device__ __forceinline__ void look_at_values() {
        if (p.v_transforms > 1 && fresh_transform(p.v.heads[head], v_set()) != v_transform) sets |= NOT_COUNTED;
    }

    // Queries, their scales and constants for the set of keys.
    __device__ __forceinline__ void look_at_keys() {
        const uint32_t n_tiles = p.row_tiles * (ROWS / 4), transform = fresh_transform(p.k.heads[head], k_set()), row = row_tile * ROWS + g;
        query.enter(transform, reinterpret_cast<const uint4*>(p.folded + folded_tile<K>(p, stream, head, transform, row_tile * (ROWS / 4), n_tiles)) + lane);
        const uint64_t of_head = uint64_t(stream) * p.n_kv_heads + head;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            step[h] = p.folded_scales[(of_head * DQ_MAX_TRANSFORMS + transform) * (4 * n_tiles) + row + 8 * h];
        }
        count_from_here();
    }
    // From what scores count, after `m`, `late` or the constants have changed.
    __device__ __forceinline__ void count_from_here() {
        uint32_t set = k_set();
        work_out_here(set);  // or where constants are is worked out where nobody asks for it
        const uint64_t at = ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + set) * (p.row_tiles * ROWS) + row_tile * ROWS + g;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) from[h] = p.constants[at + 8 * h] - (late ? 0.0f : base(h));
    }
    __device__ __forceinline__ float base(int h) const { return m[h] == NEVER ? 0.0f : m[h]; }
    __device__ __forceinline__ void start() {
        look_at_keys();
        look_at_values();
    }

    // Goes on with keys of other sets.
    __device__ __forceinline__ void enter_sets(uint32_t now) {
        const uint32_t changed = sets ^ now;
        if (changed & 0xF0) flush_sums();
        sets = changed & 0xF0 ? now : now | (sets & NOT_COUNTED);
        if (changed & 0x0F) look_at_keys();
        if (changed & 0xF0) look_at_values();
    }

    // Moves the running sums of weights to the set they belong to.
    __device__ __forceinline__ void flush_sums() {
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            float whole = sum[h] + __shfl_xor_sync(ALL_LANES, sum[h], 1);
            whole += __shfl_xor_sync(ALL_LANES, whole, 2);
            if (q == 0) sums[v_set() * ROWS + 8 * h + g] += whole;
            sum[h] = 0.0f;
        }
        sums_used = true;
        __syncwarp();
    }

    // Takes a tile in.
    __device__ __forceinline__ void take(const uint8_t* tile, uint32_t first_key) {
        DQ_UNROLL_BY_1
        for (int at = 0; at < Tile::KEYS && first_key + at < seen_end; at += STEP) {
            // Mostly all at once; else the keys in the sets of those before, then those of one pair of sets after the other.
            DQ_UNROLL_BY_1
            for (Together left = Together::all(); left.any();) {
                uint32_t mine[STEP / 32];
                DQ_UNROLL
                for (int w = 0; w < STEP / 32; w++) mine[w] = tile[Tile::sets + at + 32 * w + lane];
                Together together = Together::of(mine, sets & 0xFF).both(left);
                if (!together.any()) {
                    const uint32_t other = __shfl_sync(ALL_LANES, uint32_t(tile[Tile::sets + at + left.first()]), 0);
                    together = Together::of(mine, other).both(left);
                    enter_sets(other);
                }
                left.remove(together);
                if (sets < NOT_COUNTED) take_step(tile, at, first_key + at, together);
            }
        }
    }

    // Takes a tile in that others look up, once it is there.
    __device__ __forceinline__ void take_from_others(const uint8_t* tile, uint32_t first_key, const LevelBarriers& of_tile, uint32_t of_phase) {
        levels = of_tile, parity = of_phase;
        levels.wait(LevelBarriers::KEYS_THERE, parity);
        take(tile, first_key);
        levels.arrive(LevelBarriers::KEYS_DONE);
        if (releases) settle();
        levels.wait(LevelBarriers::VALUES_THERE, parity);
        before = levels, releases = true;
    }

    // Products of the queries with the keys from `at` on, in units of the row's step and the key's scale; meanwhile something else.
    template <class Meanwhile>
    __device__ __forceinline__ void products(int32_t (&dots)[N][4], const uint8_t* tile, int at, Meanwhile&& meanwhile) {
        if constexpr (GROUPS) {
            // The low bytes' sums on top of the high ones': one behind the other takes half the registers.
            const GroupMatrix<Tile::KeyLevels::LINE> keys(tile + Tile::KeyLevels::matrix(at, 0)), rows = query.matrix();
            auto add = [&](auto byte, auto&& meanwhile) {
                constexpr int BYTE = decltype(byte)::value;
                group_fence();
                DQ_UNROLL
                for (int j = 0; j < STEPS; j++) {
                    const auto a = rows.moved(BYTE * QueryRows<K>::bytes + QueryRows<K>::matrix(0, 32 * j)), b = keys.moved(Tile::KeyLevels::matrix(0, 32 * j));
                    if (BYTE == 0 && j == 0) group_mma_s8<false>(dots, a, b);
                    else group_mma_s8<true>(dots, a, b);
                }
                group_commit();
                meanwhile();
                settle();
                DQ_UNROLL
                for (int n = 0; n < N; n++) group_arrive(dots[n]);
            };
            add(Int<0>{}, meanwhile);
            DQ_UNROLL
            for (int n = 0; n < N; n++) {
                DQ_UNROLL
                for (int e = 0; e < 4; e++) dots[n][e] *= 256;
                group_arrive(dots[n]);
            }
            add(Int<1>{}, [] {});
        } else {
            meanwhile();
            // Two n tiles at a time, whose chains of sums do not wait for each other, and of these two steps of 32 channels.
            DQ_UNROLL
            for (int n = 0; n < N; n += 2) {
                int32_t high[2][4] = {}, low[2][4] = {};
                DQ_UNROLL
                for (int j = 0; j < STEPS; j += 2) {
                    uint32_t b[2][4];
                    DQ_UNROLL
                    for (int t = 0; t < 2; t++) {
                        const uint8_t* of_lane = tile + of_keys + (at + 8 * (n + t)) * Tile::KeyLevels::STRIDE;
                        ldmatrix(b[t], of_lane + 32 * (j + 1 < STEPS || lane < 16 ? j : j - 1));
                    }
                    DQ_UNROLL
                    for (int k = j; k < j + 2 && k < STEPS; k++) {
                        DQ_UNROLL
                        for (int t = 0; t < 2; t++) {
                            const uint32_t of_step[2] = {b[t][2 * (k - j)], b[t][2 * (k - j) + 1]};
                            mma_s8_s8(high[t], query.fragments[k][0], of_step, high[t]);
                            mma_s8_s8(low[t], query.fragments[k][1], of_step, low[t]);
                        }
                    }
                }
                DQ_UNROLL
                for (int t = 0; t < 2; t++) {
                    DQ_UNROLL
                    for (int e = 0; e < 4; e++) dots[n + t][e] = high[t][e] * 256 + low[t][e];
                }
            }
        }
    }

    // Scores in units of log2, counted from `m` or, `late`, from 0.
    __device__ __forceinline__ void scores(float (&s)[N][4], const int32_t (&dots)[N][4], const uint8_t* tile, int at) const {
        DQ_UNROLL
        for (int n = 0; n < N; n++) {
            const float2 scale = *reinterpret_cast<const float2*>(tile + of_scales + 4 * (at + 8 * n));
            DQ_UNROLL
            for (int e = 0; e < 4; e++) s[n][e] = __fmaf_rn(float(dots[n][e]), (e % 2 == 0 ? scale.x : scale.y) * step[e / 2], from[e / 2]);
        }
        if (p.softcap > 0.0f) {
            DQ_UNROLL
            for (int n = 0; n < N; n++) {
                DQ_UNROLL
                for (int e = 0; e < 4; e++) s[n][e] = tanh_fast(s[n][e]) * (p.softcap * LOG2_E);
            }
        }
    }

    // The mask's words for the lane's pairs of keys: on their way while scores are made.
    struct Mask {
        uint32_t pair[2][N];
        uint32_t there;
        // Nobody looks at them, and so waits for them, before.
        __device__ __forceinline__ void arrive() {
            DQ_UNROLL
            for (int n = 0; n < N; n++) work_out_here(pair[0][n]), work_out_here(pair[1][n]);
        }
        __device__ __forceinline__ uint32_t any() const {
            uint32_t any = 0;
            DQ_UNROLL
            for (int n = 0; n < N; n++) any |= pair[0][n] | pair[1][n];
            return any;
        }
    };
    __device__ __forceinline__ void load_mask(Mask& mask, uint32_t first_key) const {
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            const uint64_t row = sees[8 * h + g].mask + 2 * (first_key + 2 * q);
            DQ_UNROLL
            for (int n = 0; n < N; n++) mask.pair[h][n] = at_bytes<uint32_t>(p.mask, row + 16 * n);
        }
    }

    // The mask's values for two keys that follow each other; keys that the row does not reach have none.
    __device__ __forceinline__ float2 mask_pair(const Sees& row, uint32_t key) const {
        return {key < row.to ? mask_at(p, row.mask, key) : 0.0f, key + 1 < row.to ? mask_at(p, row.mask, key + 1) : 0.0f};
    }

    // Minus infinity for the scores of keys that are not among `together`: where sets are mixed, in many steps.
    __device__ __forceinline__ void hide_others(float (&s)[N][4], const Together& together) const {
        const Together of_lane = together.from(2 * q);
        DQ_UNROLL
        for (int n = 0; n < N; n++) {
            DQ_UNROLL
            for (int e = 0; e < 4; e++) s[n][e] = of_lane.has(8 * n + e % 2) ? s[n][e] : NEVER;
        }
    }

    // The same for keys that nobody sees, the mask for others. False where there are no others.
    __device__ __forceinline__ bool hide(float (&s)[N][4], const Mask& mask, uint32_t first_key) const {
        bool visible = false;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            const Sees row = sees[8 * h + g];
            DQ_UNROLL
            for (int n = 0; n < N; n++) {
                float2 added{0.0f, 0.0f};
                if (mask.there) added = {half_to_float(uint16_t(mask.pair[h][n])), half_to_float(uint16_t(mask.pair[h][n] >> 16))};
                else if (p.mask != nullptr) added = mask_pair(row, first_key + 8 * n + 2 * q);
                DQ_UNROLL
                for (int e = 0; e < 2; e++) {
                    const uint32_t key = first_key + 8 * n + 2 * q + e;
                    const float of_key = e == 0 ? added.x : added.y;
                    const bool hidden = of_key == NEVER || key < row.from || key >= row.to;
                    // A hidden key's record may hold anything; its score must not come through as NaN.
                    float& score = s[n][2 * h + e];
                    score = hidden ? NEVER : __fmaf_rn(of_key, LOG2_E, score);
                    visible |= !hidden;
                }
            }
        }
        return __any_sync(ALL_LANES, visible);
    }

    __device__ __forceinline__ void take_step(const uint8_t* tile, int at, uint32_t first_key, const Together& together) {
        Mask mask;
        mask.there = mask_pairs && first_key + STEP <= seen_end;
        work_out_here(mask.there);
        int32_t dots[N][4];
        products(dots, tile, at, [&] {
            if (mask.there) load_mask(mask, first_key);
        });
        float s[N][4];
        scores(s, dots, tile, at);
        bool visible = true, plain = first_key >= seen_from && first_key + STEP <= seen_to;
        if (p.mask != nullptr) {
            if (mask.there) mask.arrive();
            plain &= mask.there && !__any_sync(ALL_LANES, mask.any() != 0);
        }
        const bool mixed = !together.is_all();
        if (!plain || mixed) {
            if (mixed) hide_others(s, together);
            work_out_here(first_key);  // or all that follows from it, of steps that hide nothing, too
            if (!plain) visible = hide(s, mask, first_key);
        }

        // Weights, and as A fragments their products with the values' scales: of these and of the sums the largest says whether
        // `m` must follow. Where nothing has been seen yet it must.
        uint32_t a[N][2];
        float part[2];
        if (!visible) {
            DQ_UNROLL
            for (int n = 0; n < N; n++) a[n][0] = a[n][1] = 0;
            part[0] = part[1] = 0.0f;
        }
        DQ_UNROLL_BY_1
        for (int round = 1; visible; round++) {
            uint32_t most = 0;
            bool heavy = false;
            weigh(a, part, most, s, tile, at);
            DQ_UNROLL
            for (int h = 0; h < 2; h++) heavy |= m[h] == NEVER ? sees_any(s, h) : part[h] > MOST_WEIGHT;
            if (round == MOST_ROUNDS || !__any_sync(ALL_LANES, heavy || (most & 0xFFFF) > MOST_PRODUCT || most >> 16 > MOST_PRODUCT)) break;
            raise(s, tile, at);
        }
        sum[0] += part[0], sum[1] += part[1];
        add_values(tile, at, a);
    }

    __device__ __forceinline__ void weigh(uint32_t (&a)[N][2], float (&part)[2], uint32_t& most, const float (&s)[N][4], const uint8_t* tile, int at) const {
        auto of = [&](auto&& weight) {
            part[0] = part[1] = 0.0f;
            DQ_UNROLL
            for (int n = 0; n < N; n++) {
                const float2 scale = scales_of(tile, at, n);
                DQ_UNROLL
                for (int h = 0; h < 2; h++) {
                    const float low = weight(s[n][2 * h], h), high = weight(s[n][2 * h + 1], h);
                    part[h] += low + high;
                    a[n][h] = pack_halves(low * scale.x, high * scale.y);
                    most = max_halves(most, a[n][h]);
                }
            }
        };
        if (late) of([&](float score, int h) { return exp2_fast(score - base(h)); });
        else of([&](float score, int) { return exp2_fast(score); });
    }

    // Whether a row that has seen nothing sees one of these keys: however small its score, whose weight from 0 on may be none.
    __device__ __forceinline__ bool sees_any(const float (&s)[N][4], int h) const {
        float highest = NEVER;
        DQ_UNROLL
        for (int n = 0; n < N; n++) highest = fmaxf(highest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        return highest > NEVER;
    }

    // Waits for a warp group's products.
    __device__ __forceinline__ void settle() {
        if constexpr (GROUPS) {
            group_wait<0>();
            DQ_UNROLL
            for (int n = 0; n < TILES; n++) group_arrive(acc[n]);
            if (releases) before.arrive(LevelBarriers::VALUES_DONE);
            releases = false;
        }
    }

    // Weighted sums, sixteen keys after sixteen.
    __device__ __forceinline__ void add_values(const uint8_t* tile, int at, const uint32_t (&a)[N][2]) {
        if constexpr (GROUPS) {
            DQ_UNROLL
            for (int n = 0; n < TILES; n++) group_arrive(acc[n]);
            levels.wait(LevelBarriers::VALUES_THERE, parity);
            group_fence();
            const GroupMatrix<128> values(tile + Tile::values + Tile::ValueLevels::matrix(at, 0));
            DQ_UNROLL
            for (int k = 0; k < N; k += 2) {
                const uint32_t weights[4] = {a[k][0], a[k][1], a[k + 1][0], a[k + 1][1]};
                for_each<TILES / 8>([&](auto panel) {
                    constexpr int P = decltype(panel)::value;
                    group_mma_f16<8 * P>(acc, weights, values.moved(Tile::ValueLevels::matrix(8 * k, 64 * P)));
                });
            }
            group_commit();  // and nobody looks at the sums before the next products are there
        } else {
            // Values of two n tiles are loaded while those before are used.
            constexpr int LOADS = N / 2 * (TILES / 2);
            auto load = [&](uint32_t (&b)[4], int i) { ldmatrix_trans(b, tile + of_values + (at + 16 * (i / (TILES / 2))) * Tile::ValueLevels::STRIDE + 32 * (i % (TILES / 2))); };
            uint32_t b[2][4];
            load(b[0], 0);
            DQ_UNROLL
            for (int l = 0; l < LOADS; l++) {
                if (l + 1 < LOADS) load(b[(l + 1) % 2], l + 1);
                const int k = l / (TILES / 2) * 2, n = l % (TILES / 2) * 2;
                const uint32_t b0[2] = {b[l % 2][0], b[l % 2][1]}, b1[2] = {b[l % 2][2], b[l % 2][3]};
                const uint32_t weights[4] = {a[k][0], a[k][1], a[k + 1][0], a[k + 1][1]};
                mma_f16(acc[n], weights, b0), mma_f16(acc[n + 1], weights, b1);
            }
        }
    }
    // Of the values of keys 2 q and 2 q + 1 of n tile n.
    __device__ __forceinline__ float2 scales_of(const uint8_t* tile, int at, int n) const {
        return *reinterpret_cast<const float2*>(tile + of_scales + 4 * (Tile::KEYS + at + 8 * n));
    }

    // `m` moves up, to 2^LARGEST below the largest of score + log2(scale), and these scores with it.
    __device__ __forceinline__ void raise(float (&s)[N][4], const uint8_t* tile, int at) {
        float highest[2] = {NEVER, NEVER};
        const bool was_late = late;
        DQ_UNROLL
        for (int n = 0; n < N; n++) {
            const float2 scale = scales_of(tile, at, n);
            const float first = fmaxf(log2_fast(scale.x), LEAST_SCALE), second = fmaxf(log2_fast(scale.y), LEAST_SCALE);
            DQ_UNROLL
            for (int h = 0; h < 2; h++) highest[h] = fmaxf(highest[h], fmaxf(s[n][2 * h] + first, s[n][2 * h + 1] + second));
        }
        float before[2];
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            before[h] = base(h);
            float most = fmaxf(highest[h], __shfl_xor_sync(ALL_LANES, highest[h], 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2)) - (was_late ? before[h] : 0.0f) - LARGEST;
            // Nothing to shrink where nothing has been seen.
            const bool first = m[h] == NEVER;
            const float up = fmaxf(most, 0.0f), shrink = first ? 1.0f : exp2_fast(-up);
            m[h] = first ? most : up > ANEW ? NEVER : m[h] + up;
            sum[h] *= shrink;
            DQ_UNROLL
            for (int n = 0; n < TILES; n++) acc[n][2 * h] *= shrink, acc[n][2 * h + 1] *= shrink;
            for (int e = q; sums_used && e < DQ_MAX_SETS; e += 4) sums[e * ROWS + 8 * h + g] *= shrink;
        }
        late = p.softcap > 0.0f || __any_sync(ALL_LANES, fabsf(base(0)) > FAR || fabsf(base(1)) > FAR);
        count_from_here();
        DQ_UNROLL
        for (int n = 0; n < N; n++) {
            DQ_UNROLL
            for (int e = 0; e < 4; e++) s[n][e] += (was_late ? 0.0f : before[e / 2]) - (late ? 0.0f : base(e / 2));
        }
        __syncwarp();
    }

    // Writes the result, to rows of values and sums that lie so many floats apart; where no key was seen, zeros and the
    // maximum. Rows from `n_rows` on are left out.
    __device__ __forceinline__ void finish(const Results& to, uint32_t n_rows) {
        flush_sums();
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            const uint32_t row = 8 * h + g;
            if (row_tile * ROWS + row >= n_rows) continue;
            float* of_sets = to.sums + row * to.sums_stride;
            for (int e = q; e < DQ_MAX_SETS; e += 4) of_sets[e] = sums[e * ROWS + row];
            if (q == 0) of_sets[DQ_MAX_SETS] = m[h];
            float* out = to.values + row * to.values_stride;
            for_each<V::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value, N = V::channels(T), FIRST = V::first(T);
                DQ_UNROLL
                for (int w = 0; w < N / 8; w++) {
                    // Places 2 q and 2 q + 1 of word w.
                    float* low = out + FIRST + 4 * w + q;
                    low[0] = acc[FIRST / 8 + w][2 * h], low[N / 2] = acc[FIRST / 8 + w][2 * h + 1];
                }
            });
        }
    }
};

}  // namespace dq
