// Queries into the coded space. With x = mean_e + decode_e y and y_j = scale * unit_j * level_j, the score q . x is
//   scale * sum_j (decode_e^T q)_j unit_j level_j  +  q . mean_e.
// For every linear part (the rotation, dense matrices) and row of queries: q' = unit * decode^T q, rounded to 16 bits
// and cut into two signed bytes, q' = step (256 high + low), laid out as B fragments of the score mma; for every set the
// constant. All of it times the score's factor.
//
// A row is (query, query head of the group). An n tile holds four rows: column 2 r of the fragment is the high byte of
// row r, column 2 r + 1 the low one, so that both parts of a score land in one thread.
//
//   folded         [stream][kv head][transform][n tile][group of 32 channels][lane][2] u32
//   folded_scales  [stream][kv head][transform][4 * n tiles]
//   constants      [stream][kv head][set][4 * n tiles]
//
// A unit is one n tile of one stream. Grid: (kv head * DQ_MAX_TRANSFORMS, run of units), FOLD_THREADS threads. A block has
// `fold_units` units, a power of two. The matrix goes to shared memory once and from there into tensor cores, f16 as it is: a
// query is the sum of two f16 (22 bits), which are columns of the mma next to each other, as the two bytes are later. The
// means of the head's sets are one more tile of rows. Warps share the latents, then the rows.
//
// Of a call for few queries this kernel is a large part: what it loads is on its way before anything is waited for, and code
// is short, since fetching it is part of the time: nothing comes twice, and little is unrolled.
//
// Shared memory: means f16 [set][channel] | matrix f16 [FOLD_STAGES][FOLD_CHUNK channels][latent] | halves f16 [unit][column of the mma]
// [channel] | rows f32 [unit][row][channel, then latent] | fragments of the row that a warp is at. Rows of f16 have eight of
// nothing behind them.
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
    return (DQ_MAX_SETS + FOLD_STAGES<K> * FOLD_CHUNK<K> + 8 * units) * (K::D + 8) * 2 + 4 * units * K::D * 4 + FOLD_WARPS * K::groups * FOLDED_ROW;
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

// Puts a folded channel, rounded, to its place in its row's fragments.
template <class K>
__device__ __forceinline__ void place_folded(uint8_t* fragments, int channel, float v) {
    int first_channel = 0, channels = 0, groups = 0;
    for_each<K::tiers>([&](auto tier) {
        constexpr int T = decltype(tier)::value;
        if (channel >= K::first(T)) first_channel = K::first(T), channels = K::channels(T), groups = K::groups_before(T);
    });
    const KPosition k = k_position(channels, channel - first_channel);
    uint8_t* at = fragments + (groups + k.group) * FOLDED_ROW + k.q * 8 + k.reg * 4 + k.byte;
    const int whole = __float2int_rn(v), high = (whole + 128) >> 8, low = whole - 256 * high;
    at[0] = uint8_t(high);
    at[32] = uint8_t(low);
}

template <class K>
__device__ __forceinline__ void fold_queries(const DqAttend& p) {
    constexpr int D = K::D, ROWS = 4, CHUNK = FOLD_CHUNK<K>, STAGES = FOLD_STAGES<K>, STRIDE = D + 8, PIECES = (D + 31) / 32, AT_ONCE = 8;
    constexpr bool BUTTERFLIES = (D & (D - 1)) == 0;
    constexpr uint64_t NO_ROW = ~0ull;
    DQ_DYNAMIC_SHARED(shared);
    __shared__ uint32_t most[FOLD_WARPS * ROWS][PIECES];  // bits of the largest magnitude in 32 channels of a row
    const uint32_t head = blockIdx.x / DQ_MAX_TRANSFORMS, transform = blockIdx.x % DQ_MAX_TRANSFORMS;
    const uint32_t n_tiles = p.fold_tiles, units = p.fold_units, first_unit = (blockIdx.z * gridDim.y + blockIdx.y) * units;
    uint16_t (*means)[STRIDE] = reinterpret_cast<uint16_t (*)[STRIDE]>(shared);
    uint16_t (*matrix)[STRIDE] = means + DQ_MAX_SETS;
    uint16_t (*halves)[STRIDE] = matrix + STAGES * CHUNK;
    float (*rows)[D] = reinterpret_cast<float (*)[D]>(halves + 2 * ROWS * units);
    const int t = threadIdx.x, warp = t >> 5, lane = t & 31, g = lane >> 2, q = lane & 3;
    uint8_t* fragments = reinterpret_cast<uint8_t*>(rows + ROWS * units) + warp * (K::groups * FOLDED_ROW);
    const SetList sets(p.k.heads[head]);

    // Phase 1: matrix and means start on their way before anything else is known, since memory is far away; the kernel ahead
    // may still be at work.
    const bool turns = BUTTERFLIES && transform == 0;
    auto copy_rows = [&](uint16_t (*to)[STRIDE], const uint16_t* from, int n) {
        DQ_UNROLL_BY_4
        for (int i = t; i < n * D / 8; i += FOLD_THREADS) cp_async_16(&to[i / (D / 8)][i % (D / 8) * 8], from + 8 * i);
    };
    auto copy_chunk = [&](int first) {
        if (turns || transform > p.k.max_dense) return;
        uint16_t (*to)[STRIDE] = matrix + first / CHUNK % STAGES * CHUNK;
        if (transform != 0) {
            copy_rows(to, p.k.decode + ((uint64_t(head) * p.k.max_dense + transform - 1) * D + first) * D, CHUNK);
        } else {
            // Ones of f16 with the signs of the rotation.
            for (int i = t; i < CHUNK * D; i += FOLD_THREADS) to[i / D][i % D] = uint16_t(0x3C00u | rotation_sign<D>(p.k.rotation, i % D, first + i / D) << 15);
        }
    };
    const bool named = names_transform(sets, transform);
    copy_chunk(0);
    copy_rows(means, p.k.means + uint64_t(head) * DQ_MAX_SETS * D, DQ_MAX_SETS);
    cp_async_commit();
    for (int stage = 1; stage < STAGES; stage++) {
        copy_chunk(stage * CHUNK);
        cp_async_commit();
    }
    wait_for_previous_kernel();
    // Nothing to do for a linear part that no set names.
    if (!named) {
        cp_async_wait<0>();
        return;
    }

    // Phase 2: the largest magnitude of each row, which its halves count from. A lane knows where a row is; the warp takes 32
    // channels of one at a time, and the second look finds them in registers where they fit, else near. Rows that do not exist are zero.
    uint64_t row_at = NO_ROW;
    {
        const uint32_t u = first_unit + lane / ROWS, stream = u / n_tiles, row = u % n_tiles * ROWS + q;
        if (lane < int(units) * ROWS && stream < p.n_streams) {
            const Queries queries = queries_of(p, stream);
            if (row < queries.count * p.group) {
                row_at = (queries.first + row / p.group) * p.q.token_stride + (head * p.group + row % p.group) * p.q.head_stride;
            }
        }
    }
    const float factor = fold_factor(p);
    uint32_t bits[AT_ONCE];
    auto each_piece = [&](bool first_look, auto&& use) {
        const int tasks = units * ROWS * PIECES;
        DQ_UNROLL_BY_1
        for (int from = warp; from < tasks; from += AT_ONCE * FOLD_WARPS) {
            DQ_UNROLL
            for (int a = 0; a < AT_ONCE; a++) {
                const int task = from + a * FOLD_WARPS, c = task % PIECES * 32 + lane;
                if (task >= tasks || !(first_look || tasks > AT_ONCE * FOLD_WARPS)) break;
                const uint64_t at = __shfl_sync(ALL_LANES, row_at, task / PIECES);
                bits[a] = c < D && at != NO_ROW ? element_bits(p.q, at, c) : 0;
            }
            DQ_UNROLL
            for (int a = 0; a < AT_ONCE; a++) {
                const int task = from + a * FOLD_WARPS;
                if (task >= tasks) break;
                use(task / PIECES, task % PIECES, element_value(p.q, bits[a]) * factor);
            }
        }
    };
    each_piece(true, [&](int row, int piece, float x) { most[row][piece] = __reduce_max_sync(ALL_LANES, __float_as_uint(fabsf(x))); });
    __syncthreads();
    // Attend floods the memory as soon as it has started; what is left here needs little of it.
    start_next_kernel();

    // Phase 3: the halves, and the rows themselves where butterflies take the matrix's place.
    auto exponent = [&](int row) {
        uint32_t of_row = 0;
        DQ_UNROLL
        for (int i = 0; i < PIECES; i++) of_row = of_row > most[row][i] ? of_row : most[row][i];
        return exponent_of(of_row);
    };
    each_piece(false, [&](int row, int piece, float x) {
        const int c = piece * 32 + lane;
        if (c >= D) return;
        const float small = x * __uint_as_float((254 - exponent(row)) << 23);
        const uint16_t upper = float_to_half(small);
        halves[2 * row][c] = upper;
        halves[2 * row + 1][c] = float_to_half((small - half_to_float(upper)) * LOWER_HALF);
        rows[row][c] = turns ? x : 0.0f;
    });
    if (turns) cp_async_wait<0>();
    else cp_async_wait<STAGES - 1>();
    __syncthreads();

    // Phase 4: products of sixteen means or latents (rows g and g + 8 of the mma) with a unit's queries: q', and the constants
    // q . mean. Columns 2 r and 2 r + 1 are the upper and the lower half of row r.
    auto products = [&](float (&sum)[2], int unit, int channels, int first, auto&& load_rows) {
        const uint16_t* column = halves[2 * ROWS * unit + g] + 2 * q + first;
        float acc[4] = {};
        DQ_UNROLL_BY_4
        for (int c = 0; c < channels; c += 16) {
            const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(column + c), *reinterpret_cast<const uint32_t*>(column + c + 8)};
            uint32_t a[4];
            load_rows(a, c);
            mma_f16(acc, a, b);
        }
        const float worth = __uint_as_float(exponent(unit * ROWS + q) << 23);
        DQ_UNROLL
        for (int i = 0; i < 2; i++) sum[i] = (acc[2 * i] + acc[2 * i + 1] * (1.0f / LOWER_HALF)) * worth;
    };
    auto stream_of = [&](int unit) { return (first_unit + unit) / n_tiles; };
    auto tile_of = [&](int unit) { return (first_unit + unit) % n_tiles; };
    for (int first = 0; first < D && !turns; first += CHUNK) {
        if (first > 0) {
            cp_async_wait<0>();
            __syncthreads();
            // Where the chunk before was, since all are done with that.
            if (first + CHUNK < D) {
                copy_chunk(first + CHUNK);
                cp_async_commit();
            }
        }
        DQ_UNROLL_BY_1
        for (int i = warp; i < int(units) * (D / 16); i += FOLD_WARPS) {
            const int unit = i / (D / 16), latent = i % (D / 16) * 16;
            const uint16_t* source = &matrix[first / CHUNK % STAGES * CHUNK + (lane >> 4) * 8 + (lane & 7)][(lane >> 3 & 1) * 8 + latent];
            float sum[2];
            products(sum, unit, CHUNK, first, [&](uint32_t (&a)[4], int c) { ldmatrix_trans(a, source + c * STRIDE); });
            rows[unit * ROWS + q][latent + g] += sum[0], rows[unit * ROWS + q][latent + g + 8] += sum[1];
        }
    }
    // Of all sets that share this linear part; absent ones count to the rotation.
    DQ_UNROLL_BY_1
    for (int unit = FOLD_WARPS - 1 - warp; unit < int(units) && stream_of(unit) < p.n_streams; unit += FOLD_WARPS) {
        const uint16_t* source = &means[(lane >> 3 & 1) * 8 + (lane & 7)][(lane >> 4) * 8];
        float sum[2];
        products(sum, unit, D, 0, [&](uint32_t (&a)[4], int c) { ldmatrix(a, source + c); });
        DQ_UNROLL
        for (int i = 0; i < 2; i++) {
            const uint32_t e = g + 8 * i;
            if (!sets.is_over(e, transform)) continue;
            const uint64_t at = ((uint64_t(stream_of(unit)) * p.n_kv_heads + head) * DQ_MAX_SETS + e) * n_tiles + tile_of(unit);
            p.constants[at * ROWS + q] = sets.present >> e & 1 ? sum[i] : 0.0f;
        }
    }
    __syncthreads();

    // Phase 5: a warp to a row: its levels, the step from the largest, the bytes.
    DQ_UNROLL_BY_1
    for (int row = warp; row < int(units) * ROWS && stream_of(row / ROWS) < p.n_streams; row += FOLD_WARPS) {
        float v[PIECES], largest = 0.0f;
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) v[k] = lane + 32 * k < D ? rows[row][lane + 32 * k] : 0.0f;
        if constexpr (BUTTERFLIES) {
            if (turns) {
                DQ_UNROLL
                for (int k = 0; k < PIECES; k++) v[k] = with_sign(v[k], rotation_sign<D>(p.k.rotation, 0, lane + 32 * k));
                butterflies<D>(v, lane);
            }
        }
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) v[k] *= folded_worth<K>(lane + 32 * k, transform), largest = fmaxf(largest, fabsf(v[k]));
        largest = warp_max(largest);
        const float inverse = largest > 0.0f ? FOLD_RANGE / largest : 0.0f;
        // Groups of a tier that are not full have channels that do not exist.
        for (int i = lane; K::groups * 32 != D && i < K::groups * FOLDED_ROW / 4; i += 32) reinterpret_cast<uint32_t*>(fragments)[i] = 0;
        __syncwarp();
        DQ_UNROLL
        for (int k = 0; k < PIECES; k++) if (lane + 32 * k < D) place_folded<K>(fragments, lane + 32 * k, v[k] * inverse);
        __syncwarp();
        const int unit = row / ROWS, r = row % ROWS;
        uint8_t* out = p.folded + folded_tile<K>(p, stream_of(unit), head, transform, tile_of(unit), n_tiles) + r * FOLDED_ROW;
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
