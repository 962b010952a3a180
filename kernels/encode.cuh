// New rows into records. The same bytes as src/cpu/encode.rs: every product is rounded before it is added, every sum has
// that file's order. Its sums over a row have sixteen lanes: lane l holds the channels l, l + 16, l + 32, ...
//
// Two kernels. For many tokens, grid (runs of ENCODE_ROWS tokens, KV head, side), 256 threads: rows are loaded and their sets
// chosen by half a warp each, latents made by the block, scales found by a warp to a row, codes with feedback by lanes of a
// (row, scale, tier). Shared memory of a block, see `EncodeLayout`: codes [16][FEEDBACK_SCALES][CODES]; latents f32 [16][LATENTS];
// stages of the matrix f32 [STAGES][ENCODE_CHUNK][D], later errors; what the feedback weighs with.
//
// For few, a row to a block or several, grid (token and block of it, KV head, side), 256 threads: see `encode_alone`.
#pragma once
#include "sinks.cuh"

namespace dq {

constexpr int ENCODE_ROWS = 16, ENCODE_THREADS = 16 * ENCODE_ROWS, ENCODE_WARPS = ENCODE_THREADS / 32;
constexpr int ENCODE_CHUNK = 16;
constexpr float SWITCH = 0.5f;
constexpr float HUGE_ROW = 1e15f;
constexpr int MAX_SINKS = 4;
constexpr int N_MULTIPLES = 8, FEEDBACK_SCALES = 4;
__host__ __device__ constexpr float scale_multiple(int i) {
    return i < 4 ? (i == 0 ? 0.76f : i == 1 ? 0.83f : i == 2 ? 0.9f : 0.97f) : (i == 4 ? 1.04f : i == 5 ? 1.11f : i == 6 ? 1.18f : 1.26f);
}
__host__ __device__ constexpr float feedback_multiple(int i) { return i == 0 ? 0.94f : i == 1 ? 1.0f : i == 2 ? 1.06f : 1.12f; }

// Bytes of shared memory; src/cuda/launch.rs says the same. Errors are of a pass over some of the rows.
template <class S> struct EncodeLayout {
    static constexpr int D = S::D, PASS_ROWS = D <= 192 ? ENCODE_ROWS : ENCODE_ROWS / 2;
    // From row to row, or from scale to scale, with room so that neighbours differ in their banks: floats, bytes, floats.
    static constexpr int LATENTS = D + 4, CODES = D + 8;
    static constexpr int ERRORS = D + 4 * DQ_MAX_TIERS;
    static constexpr int codes = ENCODE_ROWS * FEEDBACK_SCALES * CODES, latents = ENCODE_ROWS * LATENTS * 4;
    static constexpr int STAGES = D <= 192 ? 4 : 3;
    static constexpr int stages = STAGES * ENCODE_CHUNK * D * 4, errors = PASS_ROWS * FEEDBACK_SCALES * ERRORS * 4;
    static constexpr int work = stages > errors ? stages : errors;
    static constexpr int spare = D <= 128 ? 112 * D : 0;
    static constexpr bool weights_fit = (S::encode_floats - D * D) * 4 <= spare;
    static constexpr int bytes = codes + latents + work + spare;
};

// The mask of the sixteen lanes that work on one row: the two halves of a warp go their own ways.
__device__ __forceinline__ uint32_t half_mask(int lane) { return lane < 16 ? 0x0000FFFFu : 0xFFFF0000u; }

// Adds the lanes of a row; all get the sum. Halves fold in the order 8, 4, 2, 1.
__device__ __forceinline__ float fold_lanes(float v, uint32_t mask) {
    DQ_UNROLL
    for (int d = 8; d > 0; d /= 2) v = __fadd_rn(v, __shfl_xor_sync(mask, v, d));
    return v;
}
__device__ __forceinline__ float max_lanes(float v, uint32_t mask) {
    DQ_UNROLL
    for (int d = 8; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(mask, v, d));
    return v;
}
// The bits of channels l, l + 16, ... of the row at `at`.
template <int PER>
__device__ __forceinline__ void load_elements(uint32_t (&bits)[PER], const DqRows& rows, uint64_t at, int l) {
    if (rows.type == DQ_TYPE_F32) {
        DQ_UNROLL
        for (int k = 0; k < PER; k++) bits[k] = at_bytes<uint32_t>(rows.data, at + 4 * (l + 16 * k));
    } else {
        DQ_UNROLL
        for (int k = 0; k < PER; k++) bits[k] = at_bytes<uint16_t>(rows.data, at + 2 * (l + 16 * k));
    }
}
// sum over channels first .. first + n of term(k), k the index into the lane's channels.
template <int FIRST, int N, class Term>
__device__ __forceinline__ float sum_channels(uint32_t mask, Term&& term) {
    float sum = 0.0f;
    DQ_UNROLL
    for (int k = FIRST / 16; k < (FIRST + N) / 16; k++) sum = __fadd_rn(sum, term(k));
    return fold_lanes(sum, mask);
}

// ---- The rotation, y = H (signs x) / sqrt(D), in place ----

// Signs and the Paley factor come from the sign table: its first latent holds the signs, latents and channels at
// multiples of the run length hold Paley times signs.
template <int D> struct Rotation {
    static constexpr int M = D % 3 == 0 ? 12 : D % 5 == 0 ? 20 : 1, RUN = D / M, PER = D / 16, WORDS = (D + 31) / 32;

    __device__ static bool negative(const uint32_t* table, int latent, int channel) {
        return load_global(table + latent * WORDS + channel / 32) >> (channel % 32) & 1;
    }

    // `scratch` holds D floats of this row's own.
    __device__ __forceinline__ static void rotate(float (&x)[PER], const uint32_t* table, float* scratch, int l, uint32_t mask) {
        constexpr float INVERSE_ROOT = D == 64 ? 0.125f : D == 256 ? 0.0625f : D == 128 ? 0.088388347648318447f
            : D == 80 ? 0.1118033988749894848f : D == 96 ? 0.1020620726159657510f : 0.0721687836487032206f;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) x[k] = __fmul_rn(x[k], negative(table, 0, l + 16 * k) ? -INVERSE_ROOT : INVERSE_ROOT);
        // Butterflies at strides 1, 2, 4, 8 across lanes, from 16 on within a lane; only within runs.
        DQ_UNROLL
        for (int d = 1; d < 16 && d < RUN; d *= 2) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const float other = __shfl_xor_sync(mask, x[k], d);
                x[k] = l & d ? __fsub_rn(other, x[k]) : __fadd_rn(x[k], other);
            }
        }
        DQ_UNROLL
        for (int d = 16; d < RUN; d *= 2) {
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                if (k & (d / 16)) continue;
                const float a = x[k], b = x[k + d / 16];
                x[k] = __fadd_rn(a, b);
                x[k + d / 16] = __fsub_rn(a, b);
            }
        }
        if constexpr (M > 1) {
            // Paley's matrix across runs.
            DQ_UNROLL
            for (int k = 0; k < PER; k++) scratch[l + 16 * k] = x[k];
            __syncwarp(mask);
            DQ_UNROLL
            for (int k = 0; k < PER; k++) {
                const int c = l + 16 * k, row = c / RUN, at = c % RUN;
                float sum = 0.0f;
                for (int col = 0; col < M; col++) {
                    const bool minus = negative(table, row * RUN, col * RUN) != negative(table, 0, col * RUN);
                    const float v = scratch[col * RUN + at];
                    sum = __fadd_rn(sum, minus ? -v : v);
                }
                x[k] = sum;
            }
            __syncwarp(mask);
        }
    }
};

// ---- Codes of one row ----

struct Header {
    uint32_t bits;
    bool saturated;
};
// See src/code/header.rs. `scale` is not negative.
__device__ __forceinline__ Header pack_header(float scale, uint32_t set) {
    const uint32_t rounded = (uint32_t(float_to_half(scale)) << 1) + 8, largest = 0xF7F0;
    const uint32_t kept = rounded < largest ? rounded : largest;
    return {(kept & 0xFFF0) | set, rounded >= largest + 16};
}

// ---- Which level is nearest ----

// Magnitudes are cut into bins of equal width with at most one edge of the book in each: a look at the bin's edge decides
// between two levels. The last bin takes all that lies beyond the last edge, and NaN, which no edge is below.
struct alignas(16) Bin {
    float edge, below, above;  // levels in units of a unit row
    uint32_t codes;            // bytes 0 and 1 of these levels, 2 and 3 of the negative ones
};
// The codes of positive levels, ascending, and of the negative ones of the same magnitudes.
template <int BITS> struct Ladder {
    static constexpr int HALF = 1 << (BITS - 1);
    int positive[HALF], negative[HALF];
    __host__ __device__ constexpr Ladder() : positive{}, negative{} {
        for (int code = 0; code < 2 * HALF; code++) {
            const int level = Book<BITS>::level(code), magnitude = level < 0 ? -level : level;
            int place = 0;
            for (int other = 0; other < 2 * HALF; other++) {
                if (Book<BITS>::level(other) > 0 && Book<BITS>::level(other) < magnitude) place++;
            }
            (level < 0 ? negative : positive)[place] = code;
        }
    }
};
template <int BITS> struct Bins {
    using B = Book<BITS>;
    static constexpr int HALF = 1 << (BITS - 1);
    static constexpr Ladder<BITS> LADDER{};
    __host__ __device__ static constexpr int magnitude(int i) { return B::level(LADDER.positive[i]); }
    // In steps of the book.
    __host__ __device__ static constexpr double edge(int i) { return (double(magnitude(i)) + double(magnitude(i + 1))) / 2.0; }
    __host__ __device__ static constexpr int bin_of(double steps, double width) { return int(steps / width + 0.5); }
    __host__ __device__ static constexpr bool apart(double width) {
        for (int i = 0; i + 1 < HALF; i++) {
            // Not near the border of its bin: an index is rounded from a product.
            const double at = edge(i) / width + 0.5, within = at - int(at);
            if (within < 0.01 || within > 0.99 || (i > 0 && bin_of(edge(i), width) == bin_of(edge(i - 1), width))) return false;
        }
        return true;
    }
    __host__ __device__ static constexpr double find_width() {
        double width = 128.0;
        while (!apart(width)) width *= 0.99;
        return width;
    }
    static constexpr double WIDTH = find_width();
    static constexpr int LAST = bin_of(edge(HALF - 2), WIDTH) + 1, COUNT = LAST + 1;
    static constexpr float cap = float(LAST * WIDTH * B::exact_unit), per_unit = float(0.25 / (WIDTH * B::exact_unit));

    Bin bins[COUNT];
    __host__ __device__ constexpr Bins() : bins{} {
        for (int b = 0; b < LAST; b++) {
            int below = 0;
            while (below + 1 < HALF && bin_of(edge(below), WIDTH) < b) below++;
            const bool has = below + 1 < HALF && bin_of(edge(below), WIDTH) == b;
            bins[b] = entry(has ? float(edge(below) * B::exact_unit) : __builtin_huge_valf(), below, below + (has ? 1 : 0));
        }
        bins[LAST] = entry(-1.0f, 0, HALF - 1);
    }
    __host__ __device__ static constexpr Bin entry(float edge, int below, int above) {
        return {edge, float(magnitude(below)) * B::unit, float(magnitude(above)) * B::unit,
                four_bytes(LADDER.positive[below], LADDER.positive[above], LADDER.negative[below], LADDER.negative[above])};
    }
};
template <> struct Bins<8> { static constexpr int COUNT = 0; };
template <int BITS> __device__ constexpr Bins<BITS> BINS{};

// A book's bins in shared memory, eight copies of each next to each other: lanes meet in no bank.
constexpr int BIN_COPIES = 8, BIN_BYTES = BIN_COPIES * int(sizeof(Bin));
struct LevelBook {
    const uint8_t* bins;  // this lane's copy of the first
    float cap, per_unit;

    // The level nearest to a value of this magnitude and sign, in units of a unit row; bytes 0 and 2 are the codes of its
    // magnitude, positive and negative.
    struct Found {
        float level;
        uint32_t codes;
    };
    // The bin of a magnitude in units of which `most` are the cap and `per` counts bins.
    __device__ __forceinline__ Bin bin(float magnitude, float most, float per) const {
        // The sum's last bits are the bin, and what is above them leaves with the shift.
        const float at = __fmaf_rn(fminf(magnitude, most), per, 2097152.0f);
        return *reinterpret_cast<const Bin*>(bins + (__float_as_uint(at) << 7));
    }
    __device__ __forceinline__ Found look_up(float magnitude, float sign) const {
        const Bin found = bin(magnitude, cap, per_unit);
        const bool above = magnitude > found.edge;
        return {copysignf(above ? found.above : found.below, sign), above ? found.codes >> 8 : found.codes};
    }
    __device__ __forceinline__ static uint32_t code(uint32_t codes, float y) { return (__float_as_int(y) < 0 ? codes >> 16 : codes) & 0xFF; }
};
static_assert(BIN_BYTES == 1 << 7, "");

// A book for values that `inverse` brings to units, and `scale` back. Where each value waits for the one before, what it
// takes from value to value is what counts: the bin is found without the product that the edge is compared with, and both
// levels are scaled while that comparison is made.
struct ScaledBook {
    LevelBook book;
    float scale, inverse, most, per;
    __device__ __forceinline__ ScaledBook(const LevelBook& book, float scale, float inverse)
        : book(book), scale(scale), inverse(inverse) {
        // Not above: a host's compiler sees that, and has no such products.
        most = inverse > 0.0f ? __fdiv_rn(book.cap, inverse) : 0.0f, per = __fmul_rn(book.per_unit, inverse);
    }
    // What the nearest level stands for, and its code.
    struct Found {
        float value;
        uint32_t code;
    };
    __device__ __forceinline__ Found look_up(float y) const {
        const Bin found = book.bin(fabsf(y), most, per);
        const float with_sign = copysignf(scale, y), below = __fmul_rn(with_sign, found.below), above = __fmul_rn(with_sign, found.above);
        const bool is_above = fabsf(__fmul_rn(y, inverse)) > found.edge;
        return {is_above ? above : below, LevelBook::code(is_above ? found.codes >> 8 : found.codes, y)};
    }
};

template <class S> struct SideBooks {
    __host__ __device__ static constexpr int bins_before(int t) {
        int n = 0;
        for (int i = 0; i < t; i++) n += bins_of(S::bits(i));
        return n;
    }
    __host__ __device__ static constexpr int bins_of(int bits) {
        return bits == 2 ? Bins<2>::COUNT : bits == 3 ? Bins<3>::COUNT : bits == 4 ? Bins<4>::COUNT : bits == 5 ? Bins<5>::COUNT : bits == 6 ? Bins<6>::COUNT : 0;
    }
    static constexpr int COUNT = bins_before(S::tiers), BYTES = COUNT > 0 ? COUNT * BIN_BYTES : 16;

    __device__ __forceinline__ static void fill(uint8_t* shared, int t) {
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value, N = bins_of(S::bits(T));
            if constexpr (N > 0) {
                Bin* to = reinterpret_cast<Bin*>(shared + bins_before(T) * BIN_BYTES);
                DQ_UNROLL_BY_1
                for (int i = t; i < N * BIN_COPIES; i += ENCODE_THREADS) to[i] = BINS<S::bits(T)>.bins[i / BIN_COPIES];
            }
        });
    }
    template <int T> __device__ __forceinline__ static LevelBook of(const uint8_t* shared, int lane) {
        using B = Bins<S::bits(T)>;
        return {shared + bins_before(T) * BIN_BYTES + lane % BIN_COPIES * int(sizeof(Bin)), B::cap, B::per_unit};
    }
};

template <class S> struct RowCoder {
    static constexpr int D = S::D, PER = D / 16;
    using Layout = EncodeLayout<S>;
    using Books = SideBooks<S>;

    // sum over tiers of weight[t] * (sum over the tier's channels of term<tier>(k)), by half a warp
    template <class Term>
    __device__ __forceinline__ static float over_tiers(const float (&weights)[S::tiers], uint32_t mask, Term&& term) {
        float sum = 0.0f;
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            const float part = sum_channels<S::first(T), S::channels(T)>(mask, [&](int k) { return term(tier, k); });
            sum = __fadd_rn(sum, __fmul_rn(weights[T], part));
        });
        return sum;
    }

    // A row, made safe to compute with, by half a warp: the lane's channels. NaN or infinity anywhere makes the row zero.
    struct Row {
        float raw[PER];
        bool bad;
    };
    __device__ __forceinline__ static Row load_row(const DqRows& rows, uint64_t at, bool is_there, int l, uint32_t mask) {
        Row row;
        uint32_t bits[PER] = {};
        // All loads before the first value is looked at.
        if (is_there) load_elements(bits, rows, at, l);
        float largest = 0.0f;
        row.bad = false;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            row.raw[k] = element_value(rows, bits[k]);
            row.bad |= !(fabsf(row.raw[k]) <= 3.402823466e38f);
            largest = fmaxf(largest, fabsf(row.raw[k]));
        }
        row.bad = __any_sync(mask, row.bad);
        largest = max_lanes(largest, mask);
        const float shrink = largest > HUGE_ROW ? __fdiv_rn(HUGE_ROW, largest) : 1.0f;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            if (largest > HUGE_ROW) row.raw[k] = __fmul_rn(row.raw[k], shrink);
            if (row.bad) row.raw[k] = 0.0f;
        }
        return row;
    }

    // What the newest set's kappa says of the tiers' errors.
    struct Expected {
        float kappa[S::tiers], of_tier[S::tiers], distortion;
        __device__ __forceinline__ explicit Expected(const float* kappas) : distortion(0.0f) {
            for_each<S::tiers>([&](auto tier) {
                constexpr int T = decltype(tier)::value;
                kappa[T] = kappas[T];
                of_tier[T] = __fmul_rn(kappa[T], Book<S::bits(T)>::distortion);
                distortion = __fadd_rn(distortion, __fmul_rn(float(S::channels(T)), Book<S::bits(T)>::distortion));
            });
            distortion = __fdiv_rn(distortion, float(D));
        }
    };

    // The rotation about zero or a sink, whichever is nearest to the row, by half a warp. `mean` gives a set's at a channel.
    struct Other {
        uint32_t set;
        float distance;
    };
    template <class Mean>
    __device__ __forceinline__ static Other nearest_other(const Row& row, uint32_t sinks, int l, uint32_t mask, Mean&& mean) {
        Other other{0, 0.0f};
        // Set 0 comes first: its mean is zero, and it needs no sink.
        uint32_t left = sinks | 1;
        DQ_UNROLL_BY_1
        for (int n = 0; n <= MAX_SINKS && left != 0; n++, left &= left - 1) {
            const uint32_t set = __ffs(left) - 1;
            const float d = sum_channels<0, D>(mask, [&](int k) {
                const float e = set == 0 ? row.raw[k] : __fsub_rn(row.raw[k], mean(set, l + 16 * k));
                return __fmul_rn(e, e);
            });
            if (set == 0 || (!row.bad && d < other.distance)) other = {set, d};
        }
        return other;
    }
    // Its latents, in place of those of the newest set.
    template <class Mean>
    __device__ __forceinline__ static void take_other(float* latents, const Row& row, uint32_t other, const uint32_t* rotation, int l, uint32_t mask, Mean&& mean) {
        float y[PER];
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            y[k] = row.raw[k];
            if (other != 0) y[k] = __fsub_rn(y[k], mean(other, l + 16 * k));
        }
        // Not the rotation's zeros: they are of either sign.
        if (!row.bad) Rotation<D>::rotate(y, rotation, latents, l, mask);
        DQ_UNROLL
        for (int k = 0; k < PER; k++) latents[l + 16 * k] = row.bad ? 0.0f : y[k];
    }
    // Which set, by half a warp: the newest, unless the other promises less than half its error; that one is also the way out
    // for a row that does not fit the newest. `latents` hold those of the newest set, its centred row where it is a rotation;
    // true: they are the other's now.
    template <class Mean>
    __device__ __forceinline__ static bool choose_set(float* latents, const Row& row, const Other& other, const Expected& expected, bool dense, const uint32_t* rotation,
                                                      int l, uint32_t mask, Mean&& mean) {
        float y[PER];
        DQ_UNROLL
        for (int k = 0; k < PER; k++) y[k] = latents[l + 16 * k];
        if (!dense) {
            Rotation<D>::rotate(y, rotation, latents, l, mask);
            DQ_UNROLL
            for (int k = 0; k < PER; k++) latents[l + 16 * k] = y[k];
        }
        const float cost = over_tiers(expected.of_tier, mask, [&](auto, int k) { return __fmul_rn(y[k], y[k]); });
        const bool use_other = row.bad || __fmul_rn(other.distance, expected.distortion) < __fmul_rn(SWITCH, cost);
        if (use_other) take_other(latents, row, other.set, rotation, l, mask, mean);
        return use_other;
    }

    // Eight bits, by half a warp: the first scale of the header's that reaches the largest latent; codes against that very
    // scale. `codes` gets a byte to a channel.
    __device__ __forceinline__ static Header code_uniform(const float* latents, uint32_t set, uint8_t* codes, int l, uint32_t mask) {
        using B = Book<8>;
        float y[PER], largest = 0.0f;
        bool nan = false;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) y[k] = latents[l + 16 * k], largest = fmaxf(largest, fabsf(y[k])), nan |= y[k] != y[k];
        largest = max_lanes(largest, mask);
        if (__any_sync(mask, nan)) largest = __int_as_float(0x7FC00000);
        const float scale = __fdiv_rn(largest, __fmul_rn(127.0f, B::unit));
        Header h = pack_header(scale > 3.402823466e38f ? 3.402823466e38f : scale, set);
        if (header_scale(h.bits) < scale && (h.bits & 0xFFF0) < 0xF7F0) h.bits += 16;
        const float step = __fmul_rn(header_scale(h.bits), B::unit), inverse = step > 0.0f ? __fdiv_rn(1.0f, step) : 0.0f;
        DQ_UNROLL
        for (int k = 0; k < PER; k++) {
            float level = rintf(__fmul_rn(y[k], inverse));
            level = level < -127.0f ? -127.0f : level > 127.0f ? 127.0f : level;
            codes[l + 16 * k] = level == level ? uint8_t(int(level) + 128) : 0;
        }
        return h;
    }

    // A few scales around the rms, each then such that the coded row is as long along the row; the least error after
    // rounding wins. One of them, by LANES lanes next to each other: lane p has the channels p, p + LANES, ... of each sixteen,
    // which are 16 / LANES of a sum's lanes. `reach` is what latents are multiplied with to find their levels.
    struct Trial {
        Header header;
        float reach, error;
    };
    template <int LANES>
    __device__ __forceinline__ static Trial try_scale(const float* latents, uint32_t set, const float (&kappa)[S::tiers], const uint8_t* books, int m, int p, int lane) {
        constexpr int PARTS = 16 / LANES;
        auto fold = [](float (&v)[PARTS]) {
            DQ_UNROLL
            for (int w = PARTS / 2; w > 0; w /= 2) {
                DQ_UNROLL
                for (int i = 0; i < w; i++) v[i] = __fadd_rn(v[i], v[i + w]);
            }
            float sum = v[0];
            DQ_UNROLL
            for (int d = LANES / 2; d > 0; d /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, d));
            return sum;
        };
        float y[D / LANES], level[D / LANES], squares[PARTS] = {};
        DQ_UNROLL
        for (int k = 0; k < D / LANES; k++) {
            y[k] = latents[k / PARTS * 16 + p + LANES * (k % PARTS)];
            squares[k % PARTS] = __fadd_rn(squares[k % PARTS], __fmul_rn(y[k], y[k]));
        }
        const float rms = __fsqrt_rn(__fdiv_rn(fold(squares), float(D)));
        if (!(rms > 0.0f)) return {{set, false}, 0.0f, 0.0f};
        float multiple = 0.0f;
        for_each<N_MULTIPLES>([&](auto i) { if (m == decltype(i)::value) multiple = scale_multiple(decltype(i)::value); });
        const float reach = __fdiv_rn(1.0f, __fmul_rn(rms, multiple));

        float projection = 0.0f, energy = 0.0f, error = 0.0f;
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value, FROM = S::first(T) / LANES, TO = FROM + S::channels(T) / LANES;
            const LevelBook book = Books::template of<T>(books, lane);
            float along[PARTS] = {}, own[PARTS] = {};
            DQ_UNROLL
            for (int k = FROM; k < TO; k++) {
                level[k] = book.look_up(fabsf(__fmul_rn(y[k], reach)), y[k]).level;
                along[k % PARTS] = __fadd_rn(along[k % PARTS], __fmul_rn(y[k], level[k]));
                own[k % PARTS] = __fadd_rn(own[k % PARTS], __fmul_rn(y[k], y[k]));
            }
            projection = __fadd_rn(projection, __fmul_rn(kappa[T], fold(along)));
            energy = __fadd_rn(energy, __fmul_rn(kappa[T], fold(own)));
        });
        float scale = __fdiv_rn(energy, projection);
        scale = scale < 0.0f ? 0.0f : scale > 3.402823466e38f ? 3.402823466e38f : scale;
        const Header header = pack_header(scale, set);
        const float kept = header_scale(header.bits);
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value, FROM = S::first(T) / LANES, TO = FROM + S::channels(T) / LANES;
            float lost[PARTS] = {};
            DQ_UNROLL
            for (int k = FROM; k < TO; k++) {
                const float e = __fsub_rn(y[k], __fmul_rn(kept, level[k]));
                lost[k % PARTS] = __fadd_rn(lost[k % PARTS], __fmul_rn(e, e));
            }
            error = __fadd_rn(error, __fmul_rn(kappa[T], fold(lost)));
        });
        // The first of the least. NaN loses against all but stays when it comes first.
        if (error != error) error = m == 0 ? -__builtin_huge_valf() : __builtin_huge_valf();
        return {header, reach, error};
    }

    // All of them by a warp, four lanes to each.
    __device__ __forceinline__ static Header find_scale(const float* latents, uint32_t set, const float (&kappa)[S::tiers], const uint8_t* books, float& reach, int lane) {
        const int m = lane >> 2;
        const Trial mine = try_scale<4>(latents, set, kappa, books, m, lane & 3, lane);
        float error = mine.error;
        int best = m;
        DQ_UNROLL
        for (int d = 4; d < 32; d *= 2) {
            const float that = __shfl_xor_sync(ALL_LANES, error, d);
            const int there = __shfl_xor_sync(ALL_LANES, best, d);
            if (that < error || (that == error && there < best)) error = that, best = there;
        }
        reach = __shfl_sync(ALL_LANES, mine.reach, 4 * best);
        const uint32_t found = __shfl_sync(ALL_LANES, mine.header.bits | uint32_t(mine.header.saturated) << 16, 4 * best);
        return {found & 0xFFFF, found >> 16 != 0};
    }

    // Codes of the levels that `reach` finds, by THREADS threads from a whole warp on.
    template <int THREADS>
    __device__ __forceinline__ static void code(const float* latents, float reach, const uint8_t* books, uint8_t* codes, int t) {
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            const LevelBook book = Books::template of<T>(books, t);
            for (int c = S::first(T) + t; c < S::first(T) + S::channels(T); c += THREADS) {
                const float y = latents[c];
                codes[c] = uint8_t(LevelBook::code(book.look_up(fabsf(__fmul_rn(y, reach)), y).codes, y));
            }
        });
    }

    // ---- Feedback ----

    // What a tier's chains need to know. `weights`: of each eight latents behind each other, and each k up to the last of
    // them, what the error of latent k adds to the eight; of a latent itself, what its loss counts (src/cuda/tables.rs).
    struct Tier {
        int first, n;
        const float* weights;
        LevelBook book;
        float widening;  // Codebook::widening
    };
    __device__ __forceinline__ static ScaledBook scaled(const Tier& tier, float scale) {
        return {tier.book, scale, __fmul_rn(scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f, tier.widening)};
    }
    // Of a chain: its loss, its targets' squares, and their products with what their codes stand for.
    struct Sums {
        float lost, size, along;
    };
    __device__ __forceinline__ static float4 weights_at(const float* at) {
        if constexpr (Layout::weights_fit) return *reinterpret_cast<const float4*>(at);
        else return load_global(reinterpret_cast<const float4*>(at));
    }

    __device__ __forceinline__ static void put(float* to, const float4& v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

    // Eight latents behind each other, each against what the errors before it leave of its target. `triangle`: what the error
    // of each adds to all eight.
    template <class Weights>
    __device__ __forceinline__ static void round_eight(const ScaledBook& book, const float* triangle, const float (&latent)[8], float (&target)[8],
                                                       float (&error)[8], uint2& codes, Sums& sums, Weights&& four_weights) {
        uint32_t words[2] = {0, 0};
        DQ_UNROLL
        for (int i = 0; i < 8; i++, triangle += 8) {
            float weight[8];
            if (i < 4) put(weight, four_weights(triangle));
            put(weight + 4, four_weights(triangle + 4));
            const ScaledBook::Found found = book.look_up(target[i]);
            const float left = __fsub_rn(found.value, target[i]);
            error[i] = __fsub_rn(found.value, latent[i]);
            sums.lost = __fadd_rn(sums.lost, __fmul_rn(weight[i], __fmul_rn(left, left)));
            sums.size = __fadd_rn(sums.size, __fmul_rn(weight[i], __fmul_rn(target[i], target[i])));
            sums.along = __fadd_rn(sums.along, __fmul_rn(weight[i], __fmul_rn(target[i], found.value)));
            DQ_UNROLL
            for (int k = i + 1; k < 8; k++) target[k] = __fsub_rn(target[k], __fmul_rn(weight[k], error[i]));
            words[i / 4] |= found.code << (8 * (i % 4));
        }
        codes = make_uint2(words[0], words[1]);
    }

    // Codes a tier of a row anew with one scale, latent after latent, each against what the errors before it leave to be
    // said (src/factor/fit.rs). LANES lanes next to each other share the work: each takes the errors of earlier eights off
    // 8 / LANES of the next eight, which all then code. `errors` [n], `codes` [n]; returns what it lost.
    template <int LANES>
    __device__ __forceinline__ static Sums chain(const Tier& tier, const float* latents, float scale, float* errors, uint8_t* codes, bool keeps, int lane) {
        constexpr int OWN = 8 / LANES;
        const int share = lane % LANES * OWN;
        const ScaledBook book = scaled(tier, scale);
        const float* weights = tier.weights;
        Sums sums{};
        DQ_UNROLL_BY_1
        for (int block = 0; block < tier.n; block += 8) {
            float own[OWN], target[8], latent[8], error[8];
            DQ_UNROLL
            for (int i = 0; i < 8; i += 4) put(latent + i, *reinterpret_cast<const float4*>(latents + block + i));
            DQ_UNROLL
            for (int i = 0; i < OWN; i++) own[i] = LANES == 1 ? latent[i] : latents[block + share + i];
            DQ_UNROLL_BY_1
            for (int k = 0; k < block; k += 4, weights += 32) {
                float before[4], weight[OWN];
                put(before, *reinterpret_cast<const float4*>(errors + k));
                DQ_UNROLL
                for (int e = 0; e < 4; e++) {
                    if constexpr (LANES == 1) put(weight, weights_at(weights + 8 * e)), put(weight + 4, weights_at(weights + 8 * e + 4));
                    else {
                        DQ_UNROLL
                        for (int i = 0; i < OWN; i++) weight[i] = Layout::weights_fit ? weights[8 * e + share + i] : load_global(weights + 8 * e + share + i);
                    }
                    DQ_UNROLL
                    for (int i = 0; i < OWN; i++) own[i] = __fsub_rn(own[i], __fmul_rn(weight[i], before[e]));
                }
            }
            DQ_UNROLL
            for (int i = 0; i < 8; i++) target[i] = LANES == 1 ? own[i % OWN] : __shfl_sync(ALL_LANES, own[i % OWN], i / OWN, LANES);
            uint2 words;
            round_eight(book, weights, latent, target, error, words, sums, [](const float* at) { return weights_at(at); });
            weights += 64;
            if (lane % LANES == 0) {
                DQ_UNROLL
                for (int i = 0; i < 8; i += 4) *reinterpret_cast<float4*>(errors + block + i) = make_float4(error[i], error[i + 1], error[i + 2], error[i + 3]);
                if (keeps) *reinterpret_cast<uint2*>(codes + block) = words;
            }
            __syncwarp();
        }
        return sums;
    }

    // The tier's number by size, the largest first: its chains are the longest.
    __host__ __device__ static constexpr int by_size(int i) {
        for (int t = 0; t < S::tiers; t++) {
            int larger = 0;
            for (int u = 0; u < S::tiers; u++) larger += S::channels(u) > S::channels(t) || (S::channels(u) == S::channels(t) && u < t);
            if (larger == i) return t;
        }
        return 0;
    }

    __device__ __forceinline__ static Tier tier_by_size(int rank, const float* weights, const uint8_t* books, int copy, int& t) {
        Tier tier{};
        for_each<S::tiers>([&](auto i) {
            constexpr int T = by_size(decltype(i)::value);
            if (rank == decltype(i)::value) t = T, tier = {S::first(T), S::channels(T), weights + S::feedback_before(T), Books::template of<T>(books, copy), __fadd_rn(1.0f, Book<S::bits(T)>::distortion)};
        });
        return tier;
    }
    // Scale number s of those that are tried with feedback.
    __device__ __forceinline__ static float feedback_scale(uint32_t without, int s) {
        float multiple = 0.0f;
        for_each<FEEDBACK_SCALES>([&](auto i) { if (s == decltype(i)::value) multiple = feedback_multiple(decltype(i)::value); });
        return header_scale(pack_header(__fmul_rn(header_scale(without & 0xFFFF), multiple), 0).bits);
    }

    // All chains of `n_rows` rows, by the block. `headers` of rows without feedback, FEED where it is wanted; `sums`
    // [tier][row][scale].
    static constexpr uint32_t FEED = 1u << 16, REPLACED = 1u << 17;
    template <int LANES>
    __device__ __forceinline__ static void feed_back(const float* latents, const uint32_t* headers, int n_rows, const float* weights, const uint8_t* books, float* errors, uint8_t* codes, Sums* sums) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = n_rows * FEEDBACK_SCALES, groups = (pairs * LANES + 31) / 32;
        DQ_UNROLL_BY_1
        for (int task = warp; task < S::tiers * groups; task += ENCODE_WARPS) {
            const int group = task % groups, at = (group * 32 + lane) / LANES, pair = at < pairs ? at : pairs - 1;
            const int row = pair / FEEDBACK_SCALES, s = pair % FEEDBACK_SCALES;
            const bool keeps = at < pairs && (headers[row] & FEED);
            if (!__any_sync(ALL_LANES, keeps)) continue;
            int t = 0;
            const Tier tier = tier_by_size(task / groups, weights, books, lane, t);
            const float scale = feedback_scale(headers[row], s);
            // Lanes without a pair of their own do the last pair's work again, and write the same.
            const Sums mine = chain<LANES>(tier, latents + row * Layout::LATENTS + tier.first, scale, errors + pair * Layout::ERRORS + tier.first + 4 * t, codes + pair * Layout::CODES + tier.first, keeps, lane);
            if (keeps && lane % LANES == 0) sums[t * ENCODE_ROWS * FEEDBACK_SCALES + pair] = mine;
        }
    }

    // The chains of one row, by the block, in steps of eight latents. For each tier a warp leads: eight lanes to a scale all
    // round the step's eight latents. The others help, each with every so many eights of a tier: once the errors of a step are
    // known they are taken off all eights behind it, a lane to a latent and scale, while the next step is rounded. So a chain
    // waits for nothing but its own roundings, and each latent hears of the errors before it in their order.
    __host__ __device__ static constexpr int helpers(int rank) { return (ENCODE_WARPS - S::tiers - rank + S::tiers - 1) / S::tiers; }
    __host__ __device__ static constexpr int most_eights() {
        int most = 0;
        for (int i = 0; i < S::tiers; i++) {
            const int eights = (S::channels(by_size(i)) / 8 + helpers(i) - 1) / helpers(i);
            if (eights > most) most = eights;
        }
        return most;
    }
    struct alignas(16) Handed {
        float targets[2][32];                     // [of even and odd steps][lane]: of the next eight, from whoever helps
        float errors[2][FEEDBACK_SCALES][8];      // of the last eight, from whoever leads
    };
    __device__ __forceinline__ static void feed_back_alone(const float* latents, uint32_t without, const float* weights, const uint8_t* books,
                                                           uint8_t (&codes)[FEEDBACK_SCALES][Layout::CODES], Sums* sums, Handed (&handed)[S::tiers]) {
        constexpr int EIGHTS = most_eights();
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, s = lane / 8, i = lane % 8;
        const bool leads = warp < S::tiers;
        const int rank = warp % S::tiers, helper = leads ? 0 : warp / S::tiers - 1, stride = helpers(rank);
        int t = 0;
        // Lanes of a scale look at one copy of a bin, those of others next to it.
        const Tier tier = tier_by_size(rank, weights, books, s, t);
        const int eights = tier.n / 8;
        // Weights of the eight latents number `eight`, those of the error of latent `before`.
        auto of = [&](int eight, int before) { return tier.weights + 32 * eight * (eight + 1) + 8 * before; };
        const ScaledBook book = scaled(tier, feedback_scale(without, s));
        Handed& hand = handed[rank];
        float own[EIGHTS], error[8] = {};
        Sums mine{};
        DQ_UNROLL
        for (int k = 0; k < EIGHTS; k++) {
            const int eight = helper + k * stride;
            own[k] = eight < eights ? latents[tier.first + 8 * eight + i] : 0.0f;
        }
        DQ_UNROLL_BY_1
        for (int step = 0; step < S::channels(by_size(0)) / 8; step++) {
            if (leads && step < eights) {
                float latent[8], target[8];
                put(latent, *reinterpret_cast<const float4*>(latents + tier.first + 8 * step));
                put(latent + 4, *reinterpret_cast<const float4*>(latents + tier.first + 8 * step + 4));
                float first = step == 0 ? own[0] : hand.targets[step % 2][lane];
                if (step > 0) {
                    DQ_UNROLL
                    for (int k = 0; k < 8; k++) first = __fsub_rn(first, __fmul_rn(of(step, 8 * (step - 1) + k)[i], error[k]));
                }
                DQ_UNROLL
                for (int k = 0; k < 8; k++) target[k] = __shfl_sync(ALL_LANES, first, k, 8);
                uint2 words;
                round_eight(book, of(step, 8 * step), latent, target, error, words, mine, [](const float* at) { return *reinterpret_cast<const float4*>(at); });
                if (i == 0) {
                    float4* to = reinterpret_cast<float4*>(hand.errors[step % 2][s]);
                    to[0] = make_float4(error[0], error[1], error[2], error[3]), to[1] = make_float4(error[4], error[5], error[6], error[7]);
                    *reinterpret_cast<uint2*>(codes[s] + tier.first + 8 * step) = words;
                }
            } else if (!leads && step + 1 < eights) {
                float before[8] = {};
                if (step > 0) {
                    const float4* from = reinterpret_cast<const float4*>(hand.errors[(step - 1) % 2][s]);
                    put(before, from[0]), put(before + 4, from[1]);
                }
                // Those that are rounded already go on with what is nobody's, rather than part the warp's ways.
                if (step > 0) {
                    DQ_UNROLL
                    for (int k = 0; k < EIGHTS; k++) {
                        const int eight = helper + k * stride;
                        const float* weight = eight > step && eight < eights ? of(eight, 8 * (step - 1)) + i : tier.weights + i;
                        DQ_UNROLL
                        for (int e = 0; e < 8; e++) own[k] = __fsub_rn(own[k], __fmul_rn(weight[8 * e], before[e]));
                    }
                }
                DQ_UNROLL
                for (int k = 0; k < EIGHTS; k++) if (helper + k * stride == step + 1) hand.targets[(step + 1) % 2][lane] = own[k];
            }
            __syncthreads();
        }
        if (leads && i == 0) sums[t * FEEDBACK_SCALES + s] = mine;
    }

    // The scale of least loss, the first of equals; then as long as the targets' codes must be. By sixteen lanes at least, of which
    // each looks at one scale. Sums of a row's tiers are `stride` apart.
    __device__ __forceinline__ static Header least_loss(uint32_t without, uint32_t set, const float (&kappa)[S::tiers], const Sums* sums, int stride, int& slot, int lane, uint32_t mask) {
        const int mine = lane % FEEDBACK_SCALES;
        float multiple = 0.0f, cost = 0.0f, size = 0.0f, along = 0.0f;
        for_each<FEEDBACK_SCALES>([&](auto i) { if (mine == decltype(i)::value) multiple = feedback_multiple(decltype(i)::value); });
        const Header header = pack_header(__fmul_rn(header_scale(without & 0xFFFF), multiple), set);
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            const Sums& of = sums[T * stride + mine];
            cost = __fadd_rn(cost, __fmul_rn(kappa[T], of.lost));
            size = __fadd_rn(size, __fmul_rn(kappa[T], of.size)), along = __fadd_rn(along, __fmul_rn(kappa[T], of.along));
        });
        // The first never saturates where the scale without feedback does not.
        float least = 0.0f;
        slot = 0;
        DQ_UNROLL
        for (int i = 0; i < FEEDBACK_SCALES; i++) {
            const float that = __shfl_sync(mask, cost, i, 16);
            const bool saturated = __shfl_sync(mask, uint32_t(header.saturated), i, 16) != 0;
            if (i == 0 || (!saturated && that < least)) least = that, slot = i;
        }
        Header best{__shfl_sync(mask, header.bits, slot, 16), false};
        const float ratio = __shfl_sync(mask, __fdiv_rn(size, along), slot, 16);
        const float scale = header_scale(best.bits), unbiased = ratio > 0.0f && ratio <= 3.402823466e38f ? __fmul_rn(scale, ratio) : scale;
        const Header longer = pack_header(unbiased > 3.402823466e38f ? 3.402823466e38f : unbiased, set);
        if (!longer.saturated) best.bits = longer.bits;
        return best;
    }

    // Codes into the planes of a record, by THREADS threads; plane by plane, or each by a group of its own: planes number `group`,
    // group + GROUPS, ...
    template <int THREADS, int GROUPS = 1>
    __device__ __forceinline__ static void write(const uint8_t* codes, uint8_t* record, uint32_t side, uint32_t n_kv, uint32_t head, int t, int group = 0) {
        for_each<S::tiers>([&](auto tier) {
            constexpr int T = decltype(tier)::value;
            for_each<planes_of(S::bits(T))>([&](auto plane) {
                constexpr int P = decltype(plane)::value, BITS = plane_bits(S::bits(T), P), BYTES = S::head_bytes(T, P);
                // Bits of the code below this plane.
                constexpr int SHIFT = planes_of(S::bits(T)) == 2 && P == 0 ? plane_bits(S::bits(T), 1) : 0;
                if (GROUPS > 1 && S::plane_index(T, P) % GROUPS != group) return;
                uint8_t* out = record + side + n_kv * S::bytes_before(T, P) + head * BYTES;
                auto byte_at = [&](int j) {
                    uint32_t byte = 0;
                    DQ_UNROLL
                    for (int k = 0; k < 8 / BITS; k++) byte |= (codes[S::first(T) + j + k * BYTES] >> SHIFT & ((1u << BITS) - 1)) << (k * BITS);
                    return byte;
                };
                for (int j = 2 * t; j < BYTES; j += 2 * THREADS) {
                    *reinterpret_cast<uint16_t*>(out + j) = uint16_t(byte_at(j) | byte_at(j + 1) << 8);
                }
            });
        });
    }
};

// ---- Latents of the block's rows under a dense matrix ----

// In place: `rows` [ENCODE_ROWS][LATENTS] are centred rows, then latents. The whole block takes part; a thread has four
// channels of latents and MINE rows. Products are rounded, and added in the order of the channels. Rows from `n` on are
// nobody's.
template <class S, int MINE>
__device__ __forceinline__ void dense_latents(float* rows, const float* matrix, float* stages, uint32_t n) {
    constexpr int D = S::D, LATENTS = EncodeLayout<S>::LATENTS, GROUPS = D / 4, CHUNKS = D / ENCODE_CHUNK, STAGES = EncodeLayout<S>::STAGES;
    const int t = threadIdx.x, channel = t % GROUPS * 4, first = t / GROUPS * MINE;
    const bool works = first + MINE <= ENCODE_ROWS && uint32_t(first) < n;
    auto fetch = [&](int chunk) {
        float* stage = stages + chunk % STAGES * (ENCODE_CHUNK * D);
        for (int i = 4 * t; i < ENCODE_CHUNK * D && chunk < CHUNKS; i += 4 * ENCODE_THREADS) cp_async_16(stage + i, matrix + chunk * (ENCODE_CHUNK * D) + i);
        cp_async_commit();
    };
    DQ_UNROLL
    for (int s = 0; s < STAGES - 1; s++) fetch(s);
    float4 acc[MINE] = {};
    DQ_UNROLL_BY_1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        cp_async_wait<STAGES - 2>();
        // Also: the rows are there, and nobody reads the stage that is filled next.
        __syncthreads();
        fetch(chunk + STAGES - 1);
        if (!works) continue;
        const float* stage = stages + chunk % STAGES * (ENCODE_CHUNK * D) + channel;
        DQ_UNROLL_BY_4
        for (int i = 0; i < ENCODE_CHUNK; i += 4) {
            float4 weight[4];
            DQ_UNROLL
            for (int k = 0; k < 4; k++) weight[k] = *reinterpret_cast<const float4*>(stage + (i + k) * D);
            DQ_UNROLL
            for (int r = 0; r < MINE; r++) {
                const float4 x = *reinterpret_cast<const float4*>(rows + (first + r) * LATENTS + chunk * ENCODE_CHUNK + i);
                auto add = [&](float v, const float4& w) {
                    acc[r].x = __fadd_rn(acc[r].x, __fmul_rn(v, w.x)), acc[r].y = __fadd_rn(acc[r].y, __fmul_rn(v, w.y));
                    acc[r].z = __fadd_rn(acc[r].z, __fmul_rn(v, w.z)), acc[r].w = __fadd_rn(acc[r].w, __fmul_rn(v, w.w));
                };
                add(x.x, weight[0]), add(x.y, weight[1]), add(x.z, weight[2]), add(x.w, weight[3]);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    DQ_UNROLL
    for (int r = 0; r < MINE; r++) {
        if (works) *reinterpret_cast<float4*>(rows + (first + r) * LATENTS + channel) = acc[r];
    }
    __syncthreads();
}

// ---- The kernel's body for one side ----

template <class S>
__device__ __forceinline__ void encode_side(const DqEncode& p, const DqFactors& f, const DqRows& rows, uint32_t side, uint32_t headers_at, uint32_t slot_bytes, bool pad, uint8_t* shared) {
    constexpr int D = S::D, PER = D / 16;
    using Coder = RowCoder<S>;
    using Layout = EncodeLayout<S>;
    constexpr bool FEEDBACK = S::tiers > 1, UNIFORM = S::bits(0) == 8;
    const int t = threadIdx.x, half = t >> 4, l = t & 15, lane = t & 31, warp = t >> 5;
    const uint32_t mask = half_mask(lane), head = blockIdx.y, block_first = blockIdx.x * ENCODE_ROWS, token = block_first + half;
    const int n_rows = p.n - block_first < ENCODE_ROWS ? p.n - block_first : ENCODE_ROWS;
    uint8_t* all_codes = shared;
    float* all_latents = reinterpret_cast<float*>(shared + Layout::codes);
    float* work = reinterpret_cast<float*>(shared + Layout::codes + Layout::latents);
    float* in_shared = reinterpret_cast<float*>(shared + Layout::codes + Layout::latents + Layout::work);
    float* latents = all_latents + half * Layout::LATENTS;
    __shared__ __align__(16) uint8_t books[SideBooks<S>::BYTES];
    __shared__ uint32_t headers[ENCODE_ROWS];  // and Coder::FEED, Coder::REPLACED
    __shared__ typename Coder::Sums sums[FEEDBACK ? S::tiers * ENCODE_ROWS * FEEDBACK_SCALES : 1];

    const DqHeadSets& sets = f.heads[head];
    const uint32_t newest = header_set(load_fresh(&sets.newest));
    const bool dense = load_fresh(&sets.encode_dense);
    const uint16_t* means = f.means + uint64_t(head) * DQ_MAX_SETS * D;
    const float* matrix = f.encode + uint64_t(head) * S::encode_floats;
    if constexpr (FEEDBACK && Layout::weights_fit) {
        for (int i = 4 * t; dense && i < S::encode_floats - D * D; i += 4 * ENCODE_THREADS) cp_async_16(in_shared + i, matrix + D * D + i);
        if (dense) cp_async_commit();
    }
    SideBooks<S>::fill(books, t);
    wait_for_previous_kernel();
    start_next_kernel();
    const bool stored = token < p.n && in_store(p.store, p.slots[token]);

    // Phase 1: the rows.
    auto mean = [&](uint32_t set, int c) { return half_to_float(load_global(means + set * D + c)); };
    const auto row = Coder::load_row(rows, token * rows.token_stride + head * rows.head_stride, token < p.n, l, mask);
    DQ_UNROLL
    for (int k = 0; k < PER; k++) latents[l + 16 * k] = __fsub_rn(row.raw[k], mean(newest, l + 16 * k));

    // Phase 2: latents under the newest set.
    if (dense) {
        constexpr int SHARERS = ENCODE_THREADS / (D / 4);
        if (n_rows <= SHARERS) dense_latents<S, 1>(all_latents, matrix, work, n_rows);
        else dense_latents<S, (D <= 64 ? 2 : 4)>(all_latents, matrix, work, n_rows);
    } else {
        __syncthreads();  // books
    }

    // Phase 3: which set.
    const typename Coder::Expected expected(sets.kappa);
    const float (&kappa)[S::tiers] = expected.kappa;
    bool use_other = row.bad;
    uint32_t other = 0;
    auto take_other = [&] { Coder::take_other(latents, row, other, f.rotation, l, mask, mean); };
    if (stored) {
        const auto nearest = Coder::nearest_other(row, sets.sinks & sets.present, l, mask, mean);
        other = nearest.set;
        use_other = Coder::choose_set(latents, row, nearest, expected, dense, f.rotation, l, mask, mean);
    }
    __syncwarp();

    // Phase 4: scales and codes without feedback.
    if constexpr (UNIFORM) {
        uint8_t* codes = all_codes + half * FEEDBACK_SCALES * Layout::CODES;
        Header header{};
        if (stored) {
            header = Coder::code_uniform(latents, use_other ? other : newest, codes, l, mask);
            if (header.saturated && !use_other) {
                take_other();
                use_other = true;
                header = Coder::code_uniform(latents, other, codes, l, mask);
            }
        }
        if (l == 0) headers[half] = header.bits | (row.bad || (use_other && header.saturated) ? Coder::REPLACED : 0);
    } else {
        DQ_UNROLL_BY_1
        for (int r = 0; r < 2; r++) {
            const uint32_t state = __shfl_sync(ALL_LANES, uint32_t(stored) | uint32_t(use_other) << 1 | uint32_t(row.bad) << 2 | other << 3, 16 * r);
            if (!(state & 1)) continue;
            const int at = 2 * warp + r;
            const float* row_latents = all_latents + at * Layout::LATENTS;
            bool fits = !(state & 2);
            Header header;
            float reach, weights[S::tiers];
            while (true) {
                DQ_UNROLL
                for (int i = 0; i < S::tiers; i++) weights[i] = fits ? kappa[i] : 1.0f;
                header = Coder::find_scale(row_latents, fits ? newest : state >> 3, weights, books, reach, lane);
                if (!fits || !header.saturated) break;
                fits = false;
                if (half == at) take_other();
                __syncwarp();
            }
            const bool feed = FEEDBACK && dense && fits;
            if (!feed) Coder::template code<32>(row_latents, reach, books, all_codes + at * FEEDBACK_SCALES * Layout::CODES, lane);
            if (lane == 0) headers[at] = header.bits | (feed ? Coder::FEED : 0) | ((state & 4) || (!fits && header.saturated) ? Coder::REPLACED : 0);
        }
    }

    // Phase 5: the newest set's codes anew, with feedback.
    if constexpr (FEEDBACK) {
        if (dense) {
            if (!stored && l == 0) headers[half] = 0;
            cp_async_wait<0>();
            const float* weights = Layout::weights_fit ? in_shared : matrix + D * D;
            DQ_UNROLL_BY_1
            for (int from = 0; from < n_rows; from += Layout::PASS_ROWS) {
                __syncthreads();
                const int n = n_rows - from < Layout::PASS_ROWS ? n_rows - from : Layout::PASS_ROWS;
                const float* of_rows = all_latents + from * Layout::LATENTS;
                uint8_t* codes = all_codes + from * FEEDBACK_SCALES * Layout::CODES;
                if (n <= 2) Coder::template feed_back<8>(of_rows, headers + from, n, weights, books, work, codes, sums + from * FEEDBACK_SCALES);
                else Coder::template feed_back<1>(of_rows, headers + from, n, weights, books, work, codes, sums + from * FEEDBACK_SCALES);
            }
            __syncthreads();
        }
    }
    __syncwarp();
    if (!stored) return;

    // Phase 6: codes, header, and the pad behind the headers.
    uint8_t* record = p.store.data + uint64_t(p.slots[token]) * p.store.stride;
    uint32_t header = headers[half];
    int slot = 0;
    if constexpr (FEEDBACK) {
        if (header & Coder::FEED) header = Coder::least_loss(header, newest, kappa, sums + half * FEEDBACK_SCALES, ENCODE_ROWS * FEEDBACK_SCALES, slot, l, mask).bits;
    }
    Coder::template write<16>(all_codes + (half * FEEDBACK_SCALES + slot) * Layout::CODES, record, side, p.n_kv_heads, head, l);
    if (l == 0) *reinterpret_cast<uint16_t*>(record + headers_at + 2 * head) = uint16_t(header);
    if (pad && head == 0) {
        for (uint32_t b = headers_at + 2 * p.n_kv_heads + l; b < slot_bytes; b += 16) record[b] = 0;
    }
    if ((header & Coder::REPLACED) && l == 0 && p.status != nullptr) atomicAdd(p.status, 1u);
}

// ---- A row to a block ----

// Bytes of shared memory; src/cuda/launch.rs says the same: a slice of the matrix, what the feedback weighs with (where the matrix
// is large: in place of the slice, later), the means of all sets.
template <class S> struct AloneLayout {
    static constexpr int D = S::D, SLICE = D <= 128 ? D : 32, SLICES = D / SLICE;
    static constexpr bool beside = D <= 128;
    static constexpr int slice = D * SLICE * 4, weights = (S::encode_floats - D * D) * 4;
    static constexpr int work = beside ? slice + weights : slice > weights ? slice : weights;
    static constexpr int bytes = work + DQ_MAX_SETS * D * 2;
};

// The same for one row, where what counts is how long it takes: of few tokens each row has blocks of its own. Tables are on their
// way before the kernel ahead has ended. A large matrix would take a multiprocessor long to read: blocks next to each other share
// its latents, and the one that is the last to be done goes on. `units`: the side's statistics, for a row at position 0.
template <class S>
__device__ __forceinline__ void encode_alone(const DqEncode& p, const DqFactors& f, const DqUnits& units, const DqRows& rows, uint32_t side, uint32_t headers_at, uint32_t slot_bytes,
                                             bool values, uint32_t blocks, uint8_t* shared) {
    constexpr int D = S::D, PER = D / 16;
    using Coder = RowCoder<S>;
    using Layout = EncodeLayout<S>;
    using Alone = AloneLayout<S>;
    constexpr bool FEEDBACK = S::tiers > 1, UNIFORM = S::bits(0) == 8;
    constexpr uint32_t SLICES = Alone::SLICES, SLICE = Alone::SLICE;
    // The first warp does what sixteen lanes do of a row elsewhere, both its halves the same.
    const int t = threadIdx.x, l = t & 15, lane = t & 31, warp = t >> 5;
    const bool first = t < 32;
    const uint32_t head = blockIdx.y, token = blockIdx.x / blocks, part = blockIdx.x % blocks;
    float* slice = reinterpret_cast<float*>(shared);
    float* weights = reinterpret_cast<float*>(shared + (Alone::beside ? Alone::slice : 0));
    uint16_t* means = reinterpret_cast<uint16_t*>(shared + Alone::work);
    __shared__ __align__(16) uint8_t books[SideBooks<S>::BYTES];
    __shared__ __align__(16) float latents[D];
    __shared__ __align__(16) uint8_t codes[FEEDBACK ? FEEDBACK_SCALES : 1][Layout::CODES];
    __shared__ typename Coder::Trial trials[N_MULTIPLES];
    __shared__ uint32_t choice, uniform, is_last;

    // Phase 1: tables start on their way; in little code, since fetching that is a part of the time. Nothing of a side is ever dense that has no room for it.
    const bool may_be_dense = f.max_dense > 0;
    if (part >= (may_be_dense ? SLICES : 1)) return wait_for_previous_kernel();
    const DqHeadSets& sets = f.heads[head];
    const float* matrix = f.encode + uint64_t(head) * S::encode_floats;
    auto fetch_means = [&] {
        DQ_UNROLL_BY_1
        for (int i = 8 * t; i < DQ_MAX_SETS * D; i += 8 * ENCODE_THREADS) cp_async_16(means + i, f.means + uint64_t(head) * DQ_MAX_SETS * D + i);
    };
    auto fetch_weights = [&] {
        DQ_UNROLL_BY_1
        for (int i = 4 * t; i < S::encode_floats - D * D; i += 4 * ENCODE_THREADS) cp_async_16(weights + i, matrix + D * D + i);
    };
    if (may_be_dense) {
        DQ_UNROLL_BY_1
        for (uint32_t i = 4 * t; i < D * SLICE; i += 4 * ENCODE_THREADS) cp_async_16(slice + i, matrix + i / SLICE * D + part * SLICE + i % SLICE);
        if (Alone::beside) fetch_weights();
    }
    fetch_means();
    cp_async_commit();
    SideBooks<S>::fill(books, t);
    const uint32_t newest = header_set(load_fresh(&sets.newest));
    const bool dense = load_fresh(&sets.encode_dense);
    float kappas[S::tiers];
    DQ_UNROLL
    for (int i = 0; i < S::tiers; i++) kappas[i] = load_fresh(sets.kappa + i);
    auto mean = [&](uint32_t set, int c) { return half_to_float(means[set * D + c]); };
    wait_for_previous_kernel();

    // Phase 2: the row, centred. One at position 0 may become a sink first.
    const int64_t slot = p.slots[token];
    const bool stored = in_store(p.store, slot);
    const bool at_zero = p.sinks.positions != nullptr && units.data != nullptr && p.sinks.positions[token] == 0;
    if (at_zero && part == 0) {
        const Unit unit(units, head);
        if (unit.head->takes_sinks) {
            if (t < D) latents[t] = load_row(rows, token, head, t);
            __syncthreads();
            if (t == 0) {
                enter_sink(*unit.head, unit.sum, latents, const_cast<DqHeadSets&>(sets), const_cast<uint16_t*>(f.means) + uint64_t(head) * DQ_MAX_SETS * D, D);
                __threadfence();
            }
            __syncthreads();
        }
    }
    start_next_kernel();
    const auto row = Coder::load_row(rows, token * rows.token_stride + head * rows.head_stride, stored && first, l, ALL_LANES);
    cp_async_wait<0>();
    __syncthreads();
    if (!stored || (part > 0 && !dense)) return;
    if (first) {
        DQ_UNROLL
        for (int k = 0; k < PER; k++) latents[l + 16 * k] = __fsub_rn(row.raw[k], mean(newest, l + 16 * k));
    }
    __syncthreads();

    // Phase 3: latents under the newest set; then which set.
    if (dense) {
        float sum = 0.0f;
        if (t < SLICE) {
            DQ_UNROLL_BY_4
            for (int c = 0; c < D; c += 4) {
                const float4 x = *reinterpret_cast<const float4*>(latents + c);
                const float* column = slice + c * SLICE + t;
                sum = __fadd_rn(sum, __fmul_rn(x.x, column[0])), sum = __fadd_rn(sum, __fmul_rn(x.y, column[SLICE]));
                sum = __fadd_rn(sum, __fmul_rn(x.z, column[2 * SLICE])), sum = __fadd_rn(sum, __fmul_rn(x.w, column[3 * SLICE]));
            }
        }
        float* joined = p.joined + uint64_t((token * 2 + values) * p.n_kv_heads + head) * DQ_JOINED_DIM;
        if constexpr (SLICES > 1) {
            if (t < SLICE) joined[part * SLICE + t] = sum, __threadfence();
        }
        __syncthreads();
        if constexpr (SLICES > 1) {
            if (t == 0) {
                uint32_t* arrived = p.arrived + (token * 2 + values) * p.n_kv_heads + head;
                is_last = atomicInc(arrived, SLICES - 1) == SLICES - 1;  // 0 again behind the last one
                __threadfence();
            }
            __syncthreads();
            if (!is_last) return;
            if (!Alone::beside) fetch_weights();
            if (t < D) latents[t] = load_fresh(joined + t);
        } else if (t < D) {
            latents[t] = sum;
        }
    }
    // Another block may have made the sink.
    if (at_zero) fetch_means();
    cp_async_commit();
    if (at_zero) cp_async_wait<0>();
    __syncthreads();
    const typename Coder::Expected expected(kappas);
    typename Coder::Other other{};
    if (first) {
        other = Coder::nearest_other(row, load_fresh(&sets.sinks) & load_fresh(&sets.present), l, ALL_LANES, mean);
        const bool use_other = Coder::choose_set(latents, row, other, expected, dense, f.rotation, l, ALL_LANES, mean);
        if (t == 0) choice = uint32_t(use_other) | uint32_t(row.bad) << 1;
    }
    __syncthreads();
    const bool bad = choice >> 1 & 1;
    bool fits = !(choice & 1);
    auto leave = [&] {
        fits = false;
        if (first) Coder::take_other(latents, row, other.set, f.rotation, l, ALL_LANES, mean);
        __syncthreads();
    };

    // Phase 4: scale and codes without feedback.
    Header header{};
    int taken = 0;
    if constexpr (UNIFORM) {
        DQ_UNROLL_BY_1
        while (true) {
            if (first) {
                header = Coder::code_uniform(latents, 0, codes[0], l, ALL_LANES);
                if (t == 0) uniform = header.bits | uint32_t(header.saturated) << 16;
            }
            __syncthreads();
            header = {uniform & 0xFFFF, uniform >> 16 != 0};
            if (!fits || !header.saturated) break;
            leave();
        }
    } else {
        float reach;
        DQ_UNROLL_BY_1
        while (true) {
            if (t < 16 * N_MULTIPLES) {
                float of_tiers[S::tiers];
                DQ_UNROLL
                for (int i = 0; i < S::tiers; i++) of_tiers[i] = fits ? expected.kappa[i] : 1.0f;
                const auto trial = Coder::template try_scale<16>(latents, 0, of_tiers, books, t / 16, l, lane);
                if (l == 0) trials[t / 16] = trial;
            }
            __syncthreads();
            int best = 0;
            DQ_UNROLL
            for (int m = 1; m < N_MULTIPLES; m++) if (trials[m].error < trials[best].error) best = m;
            header = trials[best].header, reach = trials[best].reach;
            if (!fits || !header.saturated) break;
            leave();
        }
        if (!(FEEDBACK && dense && fits)) Coder::template code<ENCODE_THREADS>(latents, reach, books, codes[0], t);
    }

    // Phase 5: the newest set's codes anew, with feedback.
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (FEEDBACK) {
        __shared__ typename Coder::Sums sums[S::tiers * FEEDBACK_SCALES];
        __shared__ typename Coder::Handed handed[S::tiers];
        if (dense && fits) {
            Coder::feed_back_alone(latents, header.bits, weights, books, codes, sums, handed);
            __syncthreads();
            header.bits = Coder::least_loss(header.bits, 0, expected.kappa, sums, FEEDBACK_SCALES, taken, lane, ALL_LANES).bits;
        }
    }

    // Phase 6: codes, header, and the pad behind the headers.
    uint8_t* record = p.store.data + uint64_t(slot) * p.store.stride;
    Coder::template write<32, ENCODE_WARPS>(codes[taken], record, side, p.n_kv_heads, head, lane, warp);
    if (t == 0) {
        *reinterpret_cast<uint16_t*>(record + headers_at + 2 * head) = uint16_t(header.bits | (fits ? newest : other.set));
        if ((bad || (!fits && header.saturated)) && p.status != nullptr) atomicAdd(p.status, 1u);
    }
    // Behind the values' headers.
    if (values && head == 0) {
        for (uint32_t b = headers_at + 2 * p.n_kv_heads + t; b < slot_bytes; b += ENCODE_THREADS) record[b] = 0;
    }
}

// Bytes of dynamic shared memory of a block.
template <class K, class V>
constexpr uint32_t encode_alone_shared_bytes() {
    return AloneLayout<K>::bytes > AloneLayout<V>::bytes ? AloneLayout<K>::bytes : AloneLayout<V>::bytes;
}
template <class K, class V>
constexpr uint32_t encode_shared_bytes() {
    return EncodeLayout<K>::bytes > EncodeLayout<V>::bytes ? EncodeLayout<K>::bytes : EncodeLayout<V>::bytes;
}

template <class K, class V>
__device__ __forceinline__ void encode(const DqEncode& p) {
    DQ_DYNAMIC_SHARED(shared);
    using R = Record<K, V>;
    const uint32_t n = p.n_kv_heads;
    if (blockIdx.z == 0) encode_side<K>(p, p.k, p.k_rows, 0, R::k_headers(n), 0, false, shared);
    else encode_side<V>(p, p.v, p.v_rows, n * K::row_bytes, R::v_headers(n), R::bytes(n), true, shared);
}
// Blocks to a row.
template <class K, class V>
__host__ __device__ constexpr uint32_t encode_few_blocks() {
    return AloneLayout<K>::SLICES > AloneLayout<V>::SLICES ? AloneLayout<K>::SLICES : AloneLayout<V>::SLICES;
}
template <class K, class V>
__device__ __forceinline__ void encode_few(const DqEncode& p) {
    DQ_DYNAMIC_SHARED(shared);
    using R = Record<K, V>;
    constexpr uint32_t BLOCKS = encode_few_blocks<K, V>();
    const uint32_t n = p.n_kv_heads;
    if (blockIdx.z == 0) encode_alone<K>(p, p.k, p.sinks.k, p.k_rows, 0, R::k_headers(n), 0, false, BLOCKS, shared);
    else encode_alone<V>(p, p.v, p.sinks.v, p.v_rows, n * K::row_bytes, R::v_headers(n), R::bytes(n), true, BLOCKS, shared);
}

}  // namespace dq
