// Queries into the coded space as fold.cuh has it, of many rows: for attention of many queries, as A fragments.
//
// Rows are rows of the mma, an m tile of sixteen to a warp; latents are its columns, channels are k. Latents come in pairs of n tiles,
// eight of a tier's lower half and the eight as far into its upper one. So what lane 4 g + q has of pair j are, of the rows g
// and g + 8, places 16 j + 4 q ... 16 j + 4 q + 3 of the A fragments that are to be written: levels, steps and bytes are made where the sums
// are. The means of the head's sets are columns too.
// A query is one f16 where it comes with sixteen bits, else the sum of two (22 bits), which add to the same sum.
//
// A block has one linear part of a KV head; its warps take m tiles of that, one after another. Grid: (kv head, block), about as many blocks
// as run at once. Those of a head share the m tiles of all linear parts that sets name; only the device knows how many parts these are.
//
// Shared memory: means f16 [set][channel] | matrix f16 [FOLD_STAGES][FOLD_CHUNK channels, as `k_of_channel`][latent, as `column_of_latents`].
// Rows have eight elements of nothing behind them, so that rows next to each other are in other banks.
#pragma once
#include "fold.cuh"

namespace dq {

constexpr int FOLD_ROWS_WARPS = 4, FOLD_ROWS_THREADS = 32 * FOLD_ROWS_WARPS;
// Blocks to a multiprocessor for which there are to be registers.
__host__ __device__ constexpr int fold_rows_blocks(int d) { return d <= 128 ? 3 : 2; }
template <class K>
constexpr uint32_t fold_rows_shared_bytes() {
    return (DQ_MAX_SETS + FOLD_STAGES<K> * FOLD_CHUNK<K>) * (K::D + 8) * 2;
}

// Where channel c is in the order of k. A lane has four channels next to each other of each sixteen, and pairs of every other one of
// these: two of sixteen bits that come in one word would stay where they were loaded and be copied for each product.
__device__ __forceinline__ uint32_t k_of_channel(uint32_t c) { return c / 16 * 16 + c % 2 * 8 + c % 16 / 4 * 2 + c % 4 / 2; }
// Pair j of four channels.
__device__ __forceinline__ uint32_t pair_of_four(uint32_t first, uint32_t second, int j) { return prmt(first, second, j == 0 ? 0x5410 : 0x7632); }
// Where eight latents from this one on begin.
template <class K>
__device__ __forceinline__ int column_of_latents(int latent) {
    const TierOf tier = tier_of<K>(latent);
    const int at = latent - tier.first, upper = at >= tier.channels / 2 ? 1 : 0;
    return tier.first + (at - upper * (tier.channels / 2)) * 2 + upper * 8;
}

// Ones of f16 with the signs of the rotation, of channel c and eight latents from this one on.
template <int D>
__device__ __forceinline__ uint4 signed_ones(const uint32_t* table, int latent, int c) {
    constexpr uint32_t ONES = 0x3C003C00u, SIGNS = 0x80008000u;
    if constexpr ((D & (D - 1)) == 0) {
        // Bit i of the channel turns those latents around that have it too.
        const uint32_t first = ONES ^ (rotation_sign<D>(table, latent, c) ? SIGNS : 0) ^ uint32_t(c) << 31;
        const uint32_t second = c & 2 ? SIGNS : 0, fourth = c & 4 ? SIGNS : 0;
        return make_uint4(first, first ^ second, first ^ fourth, first ^ second ^ fourth);
    } else {
        auto two = [&](int k) { return ONES ^ rotation_sign<D>(table, latent + 2 * k, c) << 15 ^ rotation_sign<D>(table, latent + 2 * k + 1, c) << 31; };
        return make_uint4(two(0), two(1), two(2), two(3));
    }
}

// What a block folds: m tiles first ... end - 1 of all streams, over one linear part.
struct FoldShare {
    uint32_t transform, first, end;
};
__device__ __forceinline__ FoldShare share_of_block(const DqAttend& p, const SetList& sets) {
    uint32_t named = named_transforms(sets);
    const uint32_t blocks = gridDim.y / __popc(named), nth = blockIdx.y / blocks, rank = blockIdx.y - nth * blocks;
    DQ_UNROLL_BY_1
    for (uint32_t i = 0; i < nth; i++) named &= named - 1;
    // As even as it goes.
    const uint32_t tiles = p.n_streams * (p.fold_tiles / 4), each = tiles / blocks, more = tiles - each * blocks;
    const uint32_t first = rank * each + (rank < more ? rank : more), end = first + each + (rank < more ? 1 : 0);
    return {uint32_t(__ffs(named) - 1), first, named != 0 ? end : 0};
}

__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 1));
    return fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 2));
}

// Sixteen rows of queries, of which a lane has channels 16 k + 4 q ... 16 k + 4 q + 3 of rows g and g + 8 (h = 0, 1). HALVES: f16
// that a query is.
template <class K, int HALVES>
struct FoldTile {
    static constexpr int D = K::D, CHUNK = FOLD_CHUNK<K>, STEPS = CHUNK / 16, STRIDE = D + 8, PAIRS = D / 16;
    // The largest of a row is 2^14 at least and less than 2^15, so that f16 has bits for what is far smaller too.
    static constexpr uint32_t HEADROOM = 14;

    const DqRows& rows;
    const int g, q;
    const bool together;  // four channels are a load
    uint64_t at[2];
    uint32_t bits[2][STEPS][2 * HALVES];  // elements as they are in memory
    float largest[2], worth[2];           // of a row
    uint32_t a[HALVES][STEPS][4];
    float acc[2 * PAIRS][4], constants[DQ_MAX_SETS / 8][4];

    __device__ __forceinline__ FoldTile(const DqRows& rows, int lane)
        : rows(rows), g(lane >> 2), q(lane & 3),
          together(((reinterpret_cast<uintptr_t>(rows.data) | rows.token_stride | rows.head_stride) & (8 * HALVES - 1)) == 0) {}

    // Begins with rows from this one on.
    __device__ __forceinline__ void enter(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t first_row) {
        const Queries queries = queries_of(p, stream);
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            const uint32_t row = first_row + g + 8 * h, query = row / p.group;
            at[h] = row < queries.count * p.group ? (queries.first + query) * rows.token_stride + (head * p.group + row - query * p.group) * rows.head_stride : ABSENT_ROW;
            largest[h] = 0.0f;
        }
    }
    __device__ __forceinline__ void clear_sums() {
        DQ_UNROLL
        for (int n = 0; n < 2 * PAIRS; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
        DQ_UNROLL
        for (int n = 0; n < DQ_MAX_SETS / 8; n++) constants[n][0] = constants[n][1] = constants[n][2] = constants[n][3] = 0.0f;
    }
    // Channels from this one on. Rows that do not exist are zero.
    __device__ __forceinline__ void load(int from) {
        constexpr int SIZE = 2 * HALVES;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            DQ_UNROLL
            for (int k = 0; k < STEPS; k++) {
                DQ_UNROLL
                for (int i = 0; i < 2 * HALVES; i++) bits[h][k][i] = 0;
            }
            if (at[h] == ABSENT_ROW) continue;
            const uint8_t* first = static_cast<const uint8_t*>(rows.data) + at[h] + SIZE * (from + 4 * q);
            DQ_UNROLL
            for (int k = 0; k < STEPS; k++) {
                uint32_t (&to)[2 * HALVES] = bits[h][k];
                if constexpr (HALVES == 2) {
                    if (together) {
                        const uint4 four = at_bytes<uint4>(first, 64 * k);
                        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
                    } else {
                        DQ_UNROLL
                        for (int i = 0; i < 4; i++) to[i] = at_bytes<uint32_t>(first, 64 * k + 4 * i);
                    }
                } else {
                    if (together) {
                        const uint2 four = at_bytes<uint2>(first, 32 * k);
                        to[0] = four.x, to[1] = four.y;
                    } else {
                        DQ_UNROLL
                        for (int i = 0; i < 2; i++) to[i] = at_bytes<uint16_t>(first, 32 * k + 4 * i) | uint32_t(at_bytes<uint16_t>(first, 32 * k + 4 * i + 2)) << 16;
                    }
                }
            }
        }
    }
    // Pair j of four elements; not of f16, which stay as they are.
    __device__ __forceinline__ void pair(float (&x)[2], int h, int k, int j) const {
        if constexpr (HALVES == 2) {
            x[0] = __uint_as_float(bits[h][k][j]), x[1] = __uint_as_float(bits[h][k][j + 2]);
        } else {
            x[0] = bf16_to_float(uint16_t(bits[h][k][0] >> 16 * j)), x[1] = bf16_to_float(uint16_t(bits[h][k][1] >> 16 * j));
        }
    }
    __device__ __forceinline__ bool as_it_is() const { return HALVES == 1 && rows.type == DQ_TYPE_F16; }
    // Takes what was loaded into account for the rows' largest.
    __device__ __forceinline__ void look() {
        if (as_it_is()) return;
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            DQ_UNROLL
            for (int k = 0; k < STEPS; k++) {
                DQ_UNROLL
                for (int j = 0; j < 2; j++) {
                    float x[2];
                    pair(x, h, k, j);
                    largest[h] = fmaxf(largest[h], fmaxf(fabsf(x[0]), fabsf(x[1])));
                }
            }
        }
    }
    // A fragments of what was loaded.
    __device__ __forceinline__ void convert(float factor) {
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            if (as_it_is()) {
                DQ_UNROLL
                for (int k = 0; k < STEPS; k++) {
                    DQ_UNROLL
                    for (int j = 0; j < 2; j++) a[0][k][2 * j + h] = pair_of_four(bits[h][k][0], bits[h][k][1], j);
                }
                worth[h] = factor;
                continue;
            }
            const uint32_t exponent = __float_as_uint(quad_max(largest[h])) >> 23, kept = exponent > HEADROOM ? exponent : HEADROOM + 1;
            const float power = __uint_as_float((254 + HEADROOM - kept) << 23);
            worth[h] = __uint_as_float((kept - HEADROOM) << 23) * factor;
            DQ_UNROLL
            for (int k = 0; k < STEPS; k++) {
                DQ_UNROLL
                for (int j = 0; j < 2; j++) {
                    float x[2];
                    pair(x, h, k, j);
                    x[0] *= power, x[1] *= power;
                    const uint32_t upper = pack_halves(x[0], x[1]);
                    a[0][k][2 * j + h] = upper;
                    if constexpr (HALVES == 2) a[1][k][2 * j + h] = pack_halves(x[0] - half_to_float(uint16_t(upper)), x[1] - half_to_float(uint16_t(upper >> 16)));
                }
            }
        }
    }
    // Adds the products of a chunk with the means of eight sets: `means` are the channels of set g that are the lane's.
    __device__ __forceinline__ void add_constants(int eight, const uint16_t* means) {
        DQ_UNROLL
        for (int k = 0; k < STEPS; k++) {
            const uint2 four = *reinterpret_cast<const uint2*>(means + 16 * k);
            const uint32_t b[2] = {pair_of_four(four.x, four.y, 0), pair_of_four(four.x, four.y, 1)};
            DQ_UNROLL
            for (int half = 0; half < HALVES; half++) mma_f16(constants[eight], a[half][k], b);
        }
    }
    // And with its part of the matrix; `matrix` is the lane's row of the first 16 by 16.
    __device__ __forceinline__ void add(const uint16_t* matrix) {
        DQ_UNROLL
        for (int k = 0; k < STEPS; k++) {
            DQ_UNROLL
            for (int j = 0; j < PAIRS; j++) {
                uint32_t b[4];
                ldmatrix_trans(b, matrix + 16 * k * STRIDE + 16 * j);
                const uint32_t lower[2] = {b[0], b[1]}, upper[2] = {b[2], b[3]};
                DQ_UNROLL
                for (int half = 0; half < HALVES; half++) {
                    mma_f16(acc[2 * j], a[half][k], lower);
                    mma_f16(acc[2 * j + 1], a[half][k], upper);
                }
            }
        }
    }
    // Levels, steps and bytes; `scales` are those of the sixteen rows, `out` the lane's words.
    __device__ __forceinline__ void finish(uint32_t transform, float* scales, uint4* out) const {
        float inverse[2];
        DQ_UNROLL
        for (int h = 0; h < 2; h++) {
            float most = 0.0f;
            DQ_UNROLL
            for (int j = 0; j < PAIRS; j++) {
                const float(&lower)[4] = acc[2 * j], (&upper)[4] = acc[2 * j + 1];
                most = fmaxf(most, folded_worth<K>(16 * j, transform) * fmaxf(fmaxf(fabsf(lower[2 * h]), fabsf(lower[2 * h + 1])), fmaxf(fabsf(upper[2 * h]), fabsf(upper[2 * h + 1]))));
            }
            most = quad_max(most);
            inverse[h] = most > 0.0f ? FOLD_RANGE / most : 0.0f;
            // No step reaches infinity.
            if (q == 0) scales[g + 8 * h] = most < INFINITY ? most / FOLD_RANGE * worth[h] : NAN;
        }
        // A number of steps is a mantissa's low 16 bits, and 128 more: the byte above is the nearest multiple of 256, the one below what is
        // left, but for its sign bit.
        constexpr float WHOLE = 1.5f * (1 << 23) + 128.0f;
        DQ_UNROLL
        for (int step = 0; step < folded_steps<K>(); step++) {
            uint32_t high[4] = {}, low[4] = {};
            DQ_UNROLL
            for (int j = 0; j < 2 && 2 * step + j < PAIRS; j++) {
                const float(&lower)[4] = acc[4 * step + 2 * j], (&upper)[4] = acc[4 * step + 2 * j + 1];
                DQ_UNROLL
                for (int h = 0; h < 2; h++) {
                    const float steps = folded_worth<K>(32 * step + 16 * j, transform) * inverse[h];
                    auto bits_of = [&](float v) { return __float_as_uint(__fmaf_rn(v, steps, WHOLE)); };
                    const uint32_t first = prmt(bits_of(lower[2 * h]), bits_of(upper[2 * h]), 0x5410);
                    const uint32_t second = prmt(bits_of(lower[2 * h + 1]), bits_of(upper[2 * h + 1]), 0x5410);
                    high[2 * j + h] = prmt(first, second, 0x7531), low[2 * j + h] = prmt(first, second, 0x6420) ^ 0x80808080u;
                }
            }
            out[64 * step] = make_uint4(high[0], high[1], high[2], high[3]);
            out[64 * step + 32] = make_uint4(low[0], low[1], low[2], low[3]);
        }
    }
};

template <class K>
__device__ __forceinline__ void fold_rows(const DqAttend& p) {
    constexpr int D = K::D, CHUNK = FOLD_CHUNK<K>, STAGES = FOLD_STAGES<K>, STRIDE = D + 8;
    DQ_DYNAMIC_SHARED(shared);
    uint16_t *means = reinterpret_cast<uint16_t*>(shared), *matrix = means + DQ_MAX_SETS * STRIDE;
    const uint32_t t = threadIdx.x;
    const int lane = t & 31, g = lane >> 2, q = lane & 3;
    const uint32_t warp = __shfl_sync(ALL_LANES, t >> 5, 0);  // in a uniform register
    const uint32_t head = blockIdx.x, n_tiles = p.fold_tiles, m_tiles = n_tiles / 4;
    const SetList sets(p.k.heads[head]);
    const FoldShare share = share_of_block(p, sets);
    if (share.first >= share.end) return leave_waiting_to_others();
    const uint32_t transform = share.transform;

    // Phase 1: matrix and means start on their way; the kernel ahead may still be at work.
    // A thread has eight elements of every so many rows.
    constexpr uint32_t EIGHTS = D / 8, AT_ONCE = FOLD_ROWS_THREADS / EIGHTS;
    const uint32_t own = t % EIGHTS * 8, column = column_of_latents<K>(own);
    auto by_all = [&](auto n, auto&& copy) {
        constexpr uint32_t N = decltype(n)::value;
        DQ_UNROLL_BY_4
        for (uint32_t from = 0; from < N; from += AT_ONCE) {
            const uint32_t row = from + t / EIGHTS;
            if ((FOLD_ROWS_THREADS % EIGHTS == 0 || t < AT_ONCE * EIGHTS) && (N % AT_ONCE == 0 || row < N)) copy(row);
        }
    };
    // The chunk from channel `first` on, to where the chunk of this number has its place.
    auto copy_chunk = [&](int first, uint32_t chunk) {
        if (transform > p.k.max_dense) return;
        uint16_t* to = matrix + chunk % STAGES * CHUNK * STRIDE + column;
        if (transform != 0) {
            const uint16_t* from = p.k.decode + ((uint64_t(head) * p.k.max_dense + transform - 1) * D + first) * D + own;
            by_all(Int<CHUNK>{}, [&](uint32_t c) { cp_async_16(to + k_of_channel(c) * STRIDE, from + c * D); });
        } else {
            by_all(Int<CHUNK>{}, [&](uint32_t c) { *reinterpret_cast<uint4*>(to + k_of_channel(c) * STRIDE) = signed_ones<D>(p.k.rotation, own, first + c); });
        }
    };
    copy_chunk(0, 0);
    const uint16_t* of_head = p.k.means + uint64_t(head) * DQ_MAX_SETS * D + own;
    by_all(Int<DQ_MAX_SETS>{}, [&](uint32_t set) { cp_async_16(means + set * STRIDE + own, of_head + set * D); });
    cp_async_commit();
    for (int stage = 1; stage < STAGES; stage++) {
        copy_chunk(stage * CHUNK, stage);
        cp_async_commit();
    }
    // Sets that share this linear part; absent ones count to the rotation.
    uint32_t over = 0;
    for (uint32_t e = 0; e < DQ_MAX_SETS; e++) over |= uint32_t(sets.is_over(e, transform)) << e;
    wait_for_previous_kernel();
    // Attend has a way to go before it floods the memory.
    start_next_kernel();

    auto fold = [&](auto halves) {
        FoldTile<K, decltype(halves)::value> tile(p.q, lane);
        const float factor = fold_factor(p);
        uint32_t chunk = 0;  // over all rounds
        for (uint32_t first = share.first; first < share.end; first += FOLD_ROWS_WARPS) {
            // Phase 2: the rows of a warp's m tile.
            const uint32_t unit = first + warp, stream = quotient(unit, m_tiles), m_tile = unit - stream * m_tiles;
            const bool exists = unit < share.end;
            if (exists) {
                tile.enter(p, stream, head, 16 * m_tile);
                for (int from = 0; STAGES > 1 && from < D; from += CHUNK) tile.load(from), tile.look();
            }
            for (int from = 0; from < D; from += CHUNK, chunk++) {
                if (exists) {
                    tile.load(from);
                    tile.look();
                    tile.convert(factor);
                }
                if (chunk == 0) {
                    cp_async_wait<STAGES - 1>();
                    __syncthreads();
                } else if (STAGES > 1) {
                    cp_async_wait<0>();
                    __syncthreads();
                    // Where the chunk before was, since all are done with that. The next round begins with the first one again.
                    const int next = from + CHUNK < D ? from + CHUNK : 0;
                    if (next > 0 || first + FOLD_ROWS_WARPS < share.end) {
                        copy_chunk(next, chunk + 1);
                        cp_async_commit();
                    }
                }
                if (!exists) continue;

                // Phase 3: products.
                if (from == 0) tile.clear_sums();
                DQ_UNROLL
                for (int eight = 0; eight < DQ_MAX_SETS / 8; eight++) {
                    if ((over & sets.present) >> 8 * eight & 0xFF) tile.add_constants(eight, means + (8 * eight + g) * STRIDE + from + 4 * q);
                }
                if (from + CHUNK == D) {
                    DQ_UNROLL
                    for (int i = 0; i < DQ_MAX_SETS / 4; i++) {
                        const uint32_t e = i / 2 * 8 + 2 * q + i % 2;
                        if (!(over >> e & 1)) continue;
                        float* to = p.constants + ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_SETS + e) * (4 * n_tiles) + 16 * m_tile + g;
                        DQ_UNROLL
                        for (int h = 0; h < 2; h++) to[8 * h] = sets.present >> e & 1 ? tile.constants[i / 2][2 * h + i % 2] * tile.worth[h] : 0.0f;
                    }
                }
                tile.add(matrix + (chunk % STAGES * CHUNK + (lane >> 3 & 1) * 8 + (lane & 7)) * STRIDE + (lane >> 4) * 8);
            }
            if (!exists) continue;

            // Phase 4: levels of the rows.
            float* scales = p.folded_scales + ((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * (4 * n_tiles) + 16 * m_tile;
            tile.finish(transform, scales, reinterpret_cast<uint4*>(p.folded + folded_tile<K>(p, stream, head, transform, 4 * m_tile, n_tiles)) + lane);
        }
    };
    if (p.q.type == DQ_TYPE_F32) fold(Int<2>{});
    else fold(Int<1>{});
}

}  // namespace dq
