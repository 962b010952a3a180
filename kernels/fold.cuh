// Queries into the coded space. With x = mean_e + decode_e y and y_j = scale * unit_j * level_j, the score q . x is
//   scale * sum_j (decode_e^T q)_j unit_j level_j  +  q . mean_e.
// For every linear part (the rotation, dense matrices) and row of queries: q' = unit * decode^T q, rounded to 16 bits
// and cut into two signed bytes, q' = step (256 high + low), laid out as B fragments of the score mma; for every set the
// constant. All of it times the score's factor.
//
// A row is (query, query head of the group). An n tile holds four rows: column 2 r of the fragment is the high byte of
// row r, column 2 r + 1 the low one, so that both parts of a score land in one thread.
//
// Of many rows the kernel behind has rows of its mma where that one has columns, and takes four n tiles together: A fragments,
// which fold_rows.cuh writes.
//
//   folded         [stream][kv head][transform][n tile][group of 32 channels][lane][2] u32; of many rows
//                  [stream][kv head][transform][four n tiles][step of 32 channels][high, low byte][lane][4] u32
//   folded_scales  [stream][kv head][transform][4 * n tiles]
//   constants      [stream][kv head][set][4 * n tiles]
//
// A unit is one n tile of one stream. A block has one linear part of a KV head and a run of `fold_units` units, a power of two;
// FOLD_THREADS threads. Grid: (kv head * DQ_MAX_TRANSFORMS, run), the second and third dimension one number. Blocks whose linear part
// no set names have nothing to do.
// The matrix goes to shared memory once and from there into tensor cores, f16 as it is: a query is the sum of two f16 (22 bits),
// which are columns of the mma next to each other, as the two bytes are later. The means of the head's sets are one more tile of
// rows. Warps share the latents, then the rows.
//
// Of a call for few queries this kernel is a large part: what it loads is on its way before anything is waited for, and code
// is short, since fetching it is part of the time: nothing comes twice, and little is unrolled.
//
// Shared memory: means f16 [set][channel] | matrix f16 [FOLD_STAGES][FOLD_CHUNK channels][latent] | halves f16 [unit][column of the mma]
// [channel] | rows f32 [unit][row][channel, then latent] | fragments of the row that a warp is at. Rows have eight elements of
// nothing behind them, so that rows next to each other are in other banks.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr float LOG2_E = 1.4426950408889634f;
// Largest magnitude of a folded query channel: 127 * 256 + 127 would do, this leaves the low byte its full range.
constexpr float FOLD_RANGE = 32512.0f;

// The lower half of a query counts in units of this less.
constexpr float LOWER_HALF = 2048.0f;

constexpr int FOLD_THREADS = 256, FOLD_WARPS = FOLD_THREADS / 32;

// Queries of a stream: the token of its first one, and how many. Workspace has room for n_q in every stream.
struct Queries {
    uint64_t first;
    uint32_t count;
};
__device__ __forceinline__ Queries queries_of(const DqAttend& p, uint32_t stream) {
    if (p.q_starts == nullptr) return {uint64_t(stream) * p.n_q, p.n_q};
    const int32_t first = p.q_starts[stream];
    return {uint64_t(first), uint32_t(p.q_starts[stream + 1] - first)};
}

template <class K>
__device__ __forceinline__ uint64_t folded_tile(const DqAttend& p, uint32_t stream, uint32_t head, uint32_t transform, uint32_t tile, uint32_t n_tiles) {
    return (((uint64_t(stream) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile) * (K::groups * 256);
}

// The factor that turns q . x into the exponent's argument; with a softcap, into the argument of tanh.
__device__ __forceinline__ float fold_factor(const DqAttend& p) {
    return p.softcap > 0.0f ? p.scale / p.softcap : p.scale * LOG2_E;
}

// Channels of the matrix that are copied at a time, and copies that are in shared memory at once.
template <class K> constexpr int FOLD_CHUNK = K::D <= 128 ? K::D : 64;
template <class K> constexpr int FOLD_STAGES = K::D <= 128 ? 1 : 2;
// A row has 64 bytes of each group in a unit's fragments.
constexpr int FOLDED_ROW = 64;
template <class K>
constexpr uint32_t fold_shared_bytes(uint32_t units) {
    return (DQ_MAX_SETS + FOLD_STAGES<K> * FOLD_CHUNK<K> + 8 * units) * (K::D + 8) * 2 + 4 * units * (K::D + 8) * 4 + FOLD_WARPS * K::groups * FOLDED_ROW;
}

// The exponent of a magnitude's bits, kept within what has an inverse: a power of two that brings it below 2.
__device__ __forceinline__ uint32_t exponent_of(uint32_t bits) {
    const uint32_t exponent = bits >> 23;
    return exponent < 1 ? 1 : exponent < 253 ? exponent : 253;
}

// What a step of a folded channel counts: the book's unit of its tier; under the rotation also the norm of its rows.
template <class K>
__device__ __forceinline__ float folded_worth(int channel, uint32_t transform) {
    float worth = transform == 0 ? rsqrtf(float(K::D)) : 1.0f;
    for_each<K::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        if (channel >= K::first(T) && channel < K::first(T) + K::channels(T)) worth *= Book<K::bits(T)>::unit;
    });
    return worth;
}

// The tier of a channel.
struct TierOf {
    int first, channels, groups_before;
};
template <class K>
__device__ __forceinline__ TierOf tier_of(int channel) {
    TierOf of{};
    for_each<K::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        if (channel >= K::first(T)) of = {K::first(T), K::channels(T), K::groups_before(T)};
    });
    return of;
}

// Where in its row's fragments the high byte of a folded channel lies; the low one is half a group's bytes further on.
template <class K>
__device__ __forceinline__ uint32_t folded_place(int channel) {
    const TierOf tier = tier_of<K>(channel);
    const KPosition k = k_position(tier.channels, channel - tier.first);
    return (tier.groups_before + k.group) * FOLDED_ROW + k.q * 8 + k.reg * 4 + k.byte;
}
// Of A fragments: steps of 32 channels.
template <class K> __host__ __device__ constexpr int folded_steps() { return (K::D + 31) / 32; }

// A row's elements, channel lane + 32 k to each; zeros where there is no row.
constexpr uint64_t ABSENT_ROW = ~0ull;
template <int D>
__device__ __forceinline__ void load_pieces(uint32_t (&bits)[(D + 31) / 32], const DqRows& rows, uint64_t at, int lane) {
    const bool wide = rows.type == DQ_TYPE_F32;
    const uint8_t* first = static_cast<const uint8_t*>(rows.data) + at + (wide ? 4 : 2) * lane;
    DQ_UNROLL
    for (int k = 0; k < (D + 31) / 32; k++) bits[k] = 0;
    if (at == ABSENT_ROW) return;
    DQ_UNROLL
    for (int k = 0; k < (D + 31) / 32; k++) {
        if (lane + 32 * k >= D) break;
        bits[k] = wide ? at_bytes<uint32_t>(first, 128 * k) : at_bytes<uint16_t>(first, 64 * k);
    }
}

template <class K>
__device__ __forceinline__ void fold_queries(const DqAttend& p) {
    constexpr int D = K::D, ROWS = 4, CHUNK = FOLD_CHUNK<K>, STAGES = FOLD_STAGES<K>, STRIDE = D + 8, PIECES = (D + 31) / 32, AT_ONCE = 2;
    constexpr bool BUTTERFLIES = (D & (D - 1)) == 0;
    DQ_DYNAMIC_SHARED(shared);
    __shared__ uint32_t exponents[FOLD_WARPS * ROWS];  // of the power of two that a row's halves count from
    const uint32_t n_tiles = p.fold_tiles;
    const int units = p.fold_units, n_rows = units * ROWS;
    uint16_t (*means)[STRIDE] = reinterpret_cast<uint16_t (*)[STRIDE]>(shared);
    uint16_t (*matrix)[STRIDE] = means + DQ_MAX_SETS;
    uint16_t (*halves)[STRIDE] = matrix + STAGES * CHUNK;
    float (*rows)[STRIDE] = reinterpret_cast<float (*)[STRIDE]>(halves + 2 * ROWS * units);
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, g = lane >> 2, q = lane & 3;
    uint8_t* fragments = reinterpret_cast<uint8_t*>(rows + ROWS * units) + warp * (K::groups * FOLDED_ROW);
    // Nothing to do for a linear part that no set names; the rotation has one always. A place for others.
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const SetList sets(p.k.heads[head]);
    const uint32_t first_unit = (blockIdx.z * gridDim.y + blockIdx.y) * units;
    const uint32_t end = names_transform(sets, transform) ? p.n_streams * n_tiles : 0;
    if (first_unit >= end) return leave_waiting_to_others();

    // Phase 1: matrix and means start on their way before more is known, since memory is far away; the kernel ahead may still be
    // at work.
    const bool turns = BUTTERFLIES && transform == 0;
    auto copy_rows = [&](uint16_t (*to)[STRIDE], const uint16_t* from, int n) {
        DQ_UNROLL_BY_4
        for (int i = t; i < n * D / 8; i += FOLD_THREADS) cp_async_16(&to[i / (D / 8)][i % (D / 8) * 8], from + 8 * i);
    };
    // The chunk from channel `first` on, to where the chunk of this number has its place.
    auto copy_chunk = [&](int first, uint32_t chunk) {
        if (turns || transform > p.k.max_dense) return;
        uint16_t (*to)[STRIDE] = matrix + chunk % STAGES * CHUNK;
        if (transform != 0) {
            copy_rows(to, p.k.decode + ((uint64_t(head) * p.k.max_dense + transform - 1) * D + first) * D, CHUNK);
        } else {
            // Ones of f16 with the signs of the rotation.
            for (int i = t; i < CHUNK * D; i += FOLD_THREADS) to[i / D][i % D] = uint16_t(0x3C00u | rotation_sign<D>(p.k.rotation, i % D, first + i / D) << 15);
        }
    };
    copy_chunk(0, 0);
    copy_rows(means, p.k.means + uint64_t(head) * DQ_MAX_SETS * D, DQ_MAX_SETS);
    cp_async_commit();
    for (int stage = 1; stage < STAGES; stage++) {
        copy_chunk(stage * CHUNK, stage);
        cp_async_commit();
    }
    // What the lane's channels come to in the end: their places, what a step of theirs is worth, the rotation's signs.
    uint32_t place[PIECES], negative[PIECES];
    float worth[PIECES];
    DQ_UNROLL
    for (int k = 0; k < PIECES; k++) {
        const int c = lane + 32 * k < D ? lane + 32 * k : D - 1;
        place[k] = folded_place<K>(c), worth[k] = folded_worth<K>(c, transform);
        negative[k] = 0;
        if constexpr (BUTTERFLIES) negative[k] = turns ? rotation_sign<D>(p.k.rotation, 0, c) : 0;
        work_out_here(place[k]), work_out_here(worth[k]), work_out_here(negative[k]);
    }
    // A lane knows where one of the rows is.
    const uint32_t lane_unit = first_unit + lane / ROWS, stream = quotient(lane_unit, n_tiles);
    uint32_t row = (lane_unit - stream * n_tiles) * ROWS + q, query = row / p.group;
    uint64_t of_head = (head * p.group + row - query * p.group) * p.q.head_stride;
    work_out_here(row), work_out_here(query), work_out_here(of_head);
    wait_for_previous_kernel();
    // Attend has a way to go before it floods the memory.
    start_next_kernel();
    const float factor = fold_factor(p);
    uint32_t chunk = 0;
    auto stream_of = [&](int unit) { return quotient(first_unit + unit, n_tiles); };
    auto tile_of = [&](int unit) { return first_unit + unit - stream_of(unit) * n_tiles; };
    auto exists = [&](int unit) { return stream_of(unit) < p.n_streams; };

    // Phase 2: the rows' halves, and the rows themselves where butterflies take the matrix's place. A warp takes a whole row, the
    // loads of several at a time. Rows that do not exist are zero.
    uint64_t row_at = ABSENT_ROW;
    if (lane < n_rows && stream < p.n_streams) {
        const Queries queries = queries_of(p, stream);
        if (row < queries.count * p.group) row_at = (queries.first + query) * p.q.token_stride + of_head;
    }
    DQ_UNROLL_BY_1
    for (int from = warp; from < n_rows; from += AT_ONCE * FOLD_WARPS) {
        uint32_t bits[AT_ONCE][PIECES];
        DQ_UNROLL
        for (int a = 0; a < AT_ONCE; a++) {
            const int row = from + a * FOLD_WARPS;
            if (row >= n_rows) break;
            load_pieces<D>(bits[a], p.q, __shfl_sync(ALL_LANES, row_at, row), lane);
        }
        DQ_UNROLL
        for (int a = 0; a < AT_ONCE; a++) {
            const int row = from + a * FOLD_WARPS;
            if (row >= n_rows) break;
            float x[PIECES], largest = 0.0f;
            element_values(x, p.q, bits[a]);
            DQ_UNROLL
            for (int k = 0; k < PIECES; k++) x[k] *= factor, largest = fmaxf(largest, fabsf(x[k]));
            const uint32_t exponent = exponent_of(__reduce_max_sync(ALL_LANES, __float_as_uint(largest)));
            if (lane == 0) exponents[row] = exponent;
            DQ_UNROLL
            for (int k = 0; k < PIECES; k++) {
                const int c = lane + 32 * k;
                if (D % 32 != 0 && c >= D) break;
                const float small = x[k] * __uint_as_float((254 - exponent) << 23);
                const uint16_t upper = float_to_half(small);
                halves[2 * row][c] = upper;
                halves[2 * row + 1][c] = float_to_half((small - half_to_float(upper)) * LOWER_HALF);
                if (turns) rows[row][c] = x[k];
            }
        }
    }
    if (turns) cp_async_wait<0>();
    else cp_async_wait<STAGES - 1>();
    __syncthreads();

    // Phase 3: products of sixteen latents or means (rows g and g + 8 of the mma) with a unit's queries: q', and the constants
    // q . mean. Columns 2 r and 2 r + 1 are the upper and the lower half of row r.
    auto products = [&](float (&sum)[2], int unit, int first, auto&& a, auto steps) {
        // B of two steps at a time; of an odd number the last has something of nobody's behind it.
        const uint16_t* column = &halves[2 * ROWS * unit + (lane & 7)][(lane >> 3) * 8 + first];
        float acc[4] = {};
        DQ_UNROLL
        for (int i = 0; i < decltype(steps)::value; i += 2) {
            uint32_t two[4];
            ldmatrix(two, column + 16 * i);
            DQ_UNROLL
            for (int j = 0; j < 2 && i + j < decltype(steps)::value; j++) {
                const uint32_t b[2] = {two[2 * j], two[2 * j + 1]};
                mma_f16(acc, a[i + j], b);
            }
        }
        const float worth_of_row = __uint_as_float(exponents[unit * ROWS + q] << 23);
        DQ_UNROLL
        for (int i = 0; i < 2; i++) sum[i] = (acc[2 * i] + acc[2 * i + 1] * (1.0f / LOWER_HALF)) * worth_of_row;
    };
    // A warp has the same latents of all units, its part of the matrix in registers; warps that are left over share the units.
    constexpr int TILES = D / 16, SHARERS = TILES < FOLD_WARPS ? FOLD_WARPS / TILES : 1;
    for (int first = 0; first < D && !turns; first += CHUNK, chunk++) {
        if (STAGES > 1 && chunk > 0) {
            cp_async_wait<0>();
            __syncthreads();
            // Where the chunk before was, since all are done with that.
            if (first + CHUNK < D) {
                copy_chunk(first + CHUNK, chunk + 1);
                cp_async_commit();
            }
        }
        for (int latent = warp % TILES * 16; latent < D && warp / TILES < SHARERS; latent += FOLD_WARPS * 16) {
            const uint16_t* source = &matrix[chunk % STAGES * CHUNK + (lane >> 4) * 8 + (lane & 7)][(lane >> 3 & 1) * 8 + latent];
            uint32_t a[CHUNK / 16][4];
            DQ_UNROLL
            for (int i = 0; i < CHUNK / 16; i++) ldmatrix_trans(a[i], source + 16 * i * STRIDE);
            DQ_UNROLL_BY_1
            for (int unit = warp / TILES; unit < units; unit += SHARERS) {
                float sum[2];
                products(sum, unit, first, a, Int<CHUNK / 16>{});
                float* to = &rows[unit * ROWS + q][latent + g];
                to[0] = first > 0 ? to[0] + sum[0] : sum[0], to[8] = first > 0 ? to[8] + sum[1] : sum[1];
            }
        }
    }
    // Of all sets that share this linear part; absent ones count to the rotation.
    DQ_UNROLL_BY_1
    for (int unit = FOLD_WARPS - 1 - warp; unit < units && exists(unit); unit += FOLD_WARPS) {
        const uint16_t* source = &means[(lane >> 3 & 1) * 8 + (lane & 7)][(lane >> 4) * 8];
        uint32_t a[D / 16][4];
        DQ_UNROLL
        for (int i = 0; i < D / 16; i++) ldmatrix(a[i], source + 16 * i);
        float sum[2];
        products(sum, unit, 0, a, Int<D / 16>{});
        DQ_UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t e = g + 8 * i;
            if (!sets.is_over(e, transform)) continue;
            const uint64_t at = ((uint64_t(stream_of(unit)) * p.n_kv_heads + head) * DQ_MAX_SETS + e) * n_tiles + tile_of(unit);
            p.constants[at * ROWS + q] = sets.present >> e & 1 ? sum[i] : 0.0f;
        }
    }
    __syncthreads();

    // Phase 4: a warp to a row: its levels, the step from the largest, the bytes.
    DQ_UNROLL_BY_1
    for (int row = warp; row < n_rows && exists(row / ROWS); row += FOLD_WARPS) {
        float v[PIECES], largest = 0.0f;
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) v[k] = lane + 32 * k < D ? rows[row][lane + 32 * k] : 0.0f;
        if constexpr (BUTTERFLIES) {
            if (turns) {
                DQ_UNROLL
                for (int k = 0; k < PIECES; k++) v[k] = with_sign(v[k], negative[k]);
                butterflies<D>(v, lane);
            }
        }
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) v[k] *= worth[k], largest = fmaxf(largest, fabsf(v[k]));
        largest = warp_max(largest);
        const float inverse = largest > 0.0f ? FOLD_RANGE / largest : 0.0f;
        // Groups of a tier that are not full have channels that do not exist.
        for (int i = lane; K::groups * 32 != D && i < K::groups * FOLDED_ROW / 4; i += 32) reinterpret_cast<uint32_t*>(fragments)[i] = 0;
        __syncwarp();
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) {
            if (lane + 32 * k >= D) break;
            const int whole = __float2int_rn(v[k] * inverse), high = (whole + 128) >> 8, low = whole - 256 * high;
            fragments[place[k]] = uint8_t(high);
            fragments[place[k] + FOLDED_ROW / 2] = uint8_t(low);
        }
        __syncwarp();
        const int unit = row / ROWS, r = row % ROWS;
        const uint32_t tile = tile_of(unit);
        uint8_t* out = p.folded + folded_tile<K>(p, stream_of(unit), head, transform, tile, n_tiles) + r * FOLDED_ROW;
        for (int i = lane; i < K::groups * FOLDED_ROW / 16; i += 32) {
            const int group = i / (FOLDED_ROW / 16);
            *reinterpret_cast<uint4*>(out + group * 256 + i % (FOLDED_ROW / 16) * 16) = reinterpret_cast<const uint4*>(fragments)[i];
        }
        const uint64_t at = ((uint64_t(stream_of(unit)) * p.n_kv_heads + head) * DQ_MAX_TRANSFORMS + transform) * n_tiles + tile_of(unit);
        if (lane == 0) p.folded_scales[at * ROWS + r] = largest / FOLD_RANGE;
        __syncwarp();
    }
}

}  // namespace dq
