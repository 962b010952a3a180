// New rows into running statistics, and rows at position 0 into sinks. The same numbers as src/factor/moments.rs and
// head.rs: every product is rounded before it is added, every sum has that file's order, so that a fit made from these
// sums equals the CPU's.
//
// Grid: (KV head, kind: K, V, queries of the head's group), 256 threads; a block takes its unit's rows in order, so that
// the result does not depend on the grid. Rows wait until sixteen are there and enter together.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr int OBSERVE_BLOCK = 16, OBSERVE_THREADS = 256, OBSERVE_DIM = 256;
constexpr int OBSERVE_SINKS = 4;
constexpr float LARGEST_ROW = 65504.0f;
constexpr double OVER_MEDIAN = 100.0, OVER_MEAN = 64.0, SINK_DISTANCE = 0.25;

// The parts of a unit, see DqMoments.
struct Unit {
    DqMoments* head;
    double* sum;
    float* reference;
    float* staged;
    float* second;
    __device__ Unit(const DqUnits& u, uint32_t index) {
        uint8_t* at = u.data + index * u.stride;
        head = reinterpret_cast<DqMoments*>(at);
        sum = reinterpret_cast<double*>(at + sizeof(DqMoments));
        reference = reinterpret_cast<float*>(sum + u.dim);
        staged = reference + u.dim;
        second = staged + OBSERVE_BLOCK * u.dim;
    }
};

struct ObserveShared {
    float candidates[OBSERVE_BLOCK][OBSERVE_DIM];
    float staged[OBSERVE_BLOCK][OBSERVE_DIM];
    double sum[OBSERVE_DIM];
    float reference[OBSERVE_DIM];
    double energies[OBSERVE_BLOCK];
    uint32_t kind[OBSERVE_BLOCK];   // of a candidate: SKIP, ROW, SINK
    uint32_t order[OBSERVE_BLOCK];  // rows that are kept
    uint32_t kept;
    DqMoments m;
};
enum { SKIP = 0, ROW = 1, SINK = 2 };

// x is not NaN. Order of f32::total_cmp but for the sign of zero, which no sum can tell.
__device__ __forceinline__ void sort_16(float (&v)[OBSERVE_BLOCK], int n) {
    for (int i = 1; i < n; i++) {
        const float x = v[i];
        int j = i;
        for (; j > 0 && v[j - 1] > x; j--) v[j] = v[j - 1];
        v[j] = x;
    }
}

// Mean of |x - mean|^2.
__device__ inline double spread_of(const ObserveShared& s, uint32_t d) {
    if (s.m.rows == 0) return 0.0;
    const double n = double(s.m.rows);
    double mean = 0.0;
    for (uint32_t c = 0; c < d; c++) mean = __dadd_rn(mean, __dmul_rn(s.sum[c] / n, s.sum[c] / n));
    const double spread = __dadd_rn(s.m.energy / n, -mean);
    return spread > 0.0 ? spread : 0.0;
}

// One thread: which of the first n staged rows enter, with their energies.
__device__ inline void keep_rows(ObserveShared& s, uint32_t n, uint32_t d) {
    double limit = 0.0;
    if (n >= OBSERVE_BLOCK / 2) {
        double sorted[OBSERVE_BLOCK];
        for (uint32_t i = 0; i < n; i++) {
            uint32_t j = i;
            for (; j > 0 && sorted[j - 1] > s.energies[i]; j--) sorted[j] = sorted[j - 1];
            sorted[j] = s.energies[i];
        }
        limit = __dmul_rn(OVER_MEDIAN, sorted[n / 2]);
    }
    s.kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        const double energy = s.energies[i], mean = s.m.rows == 0 ? 0.0 : s.m.energy / double(s.m.rows);
        const double of_mean = __dmul_rn(OVER_MEAN, mean > s.m.slack ? mean : s.m.slack);
        if (energy <= (limit > of_mean ? limit : of_mean)) {
            s.order[s.kept++] = i;
            s.m.rows++;
            s.m.energy = __dadd_rn(s.m.energy, energy);
            s.m.slack = s.m.slack / 4.0;
        } else {
            double floor = 0.0;
            for (uint32_t c = 0; c < d; c++) floor = __dadd_rn(floor, __dmul_rn(double(s.reference[c]), double(s.reference[c])));
            floor = __dmul_rn(1e-6, __dadd_rn(floor, 1e-30));
            double slack = s.m.slack > mean ? s.m.slack : mean;
            slack = 2.0 * (slack > floor ? slack : floor);
            s.m.slack = slack < energy ? slack : energy;
        }
    }
}

// Sixteen waiting rows enter, outliers excepted. All threads.
__device__ inline void flush_rows(ObserveShared& s, const Unit& unit, uint32_t d, bool with_second) {
    const uint32_t t = threadIdx.x, n = OBSERVE_BLOCK;
    __syncthreads();
    if (!s.m.has_reference) {
        for (uint32_t c = t; c < d; c += OBSERVE_THREADS) {
            float column[OBSERVE_BLOCK];
            for (uint32_t r = 0; r < n; r++) column[r] = s.staged[r][c];
            sort_16(column, n);
            s.reference[c] = column[n / 2];
        }
        __syncthreads();
    }
    for (uint32_t i = t; i < n * d; i += OBSERVE_THREADS) s.staged[i / d][i % d] = __fsub_rn(s.staged[i / d][i % d], s.reference[i % d]);
    __syncthreads();
    if (t < n) {
        double energy = 0.0;
        for (uint32_t c = 0; c < d; c++) energy = __dadd_rn(energy, __dmul_rn(double(s.staged[t][c]), double(s.staged[t][c])));
        s.energies[t] = energy;
    }
    __syncthreads();
    if (t == 0) {
        keep_rows(s, n, d);
        s.m.has_reference = 1;
        s.m.n_staged = 0;
    }
    __syncthreads();
    // Kept rows to the front, zeros behind them up to a multiple of eight.
    const uint32_t kept = s.kept, padded = (kept + 7) / 8 * 8;
    for (uint32_t c = t; c < d; c += OBSERVE_THREADS) {
        double sum = s.sum[c];
        for (uint32_t r = 0; r < padded; r++) {
            const float x = r < kept ? s.staged[s.order[r]][c] : 0.0f;
            s.staged[r][c] = x;
            if (r < kept) sum = __dadd_rn(sum, double(x));
        }
        s.sum[c] = sum;
    }
    __syncthreads();
    if (with_second) {
        // Rows of the triangle are dealt to warps, columns to lanes.
        for (uint32_t i = t / 32; i < d; i += OBSERVE_THREADS / 32) {
            float* out = unit.second + i * (i + 1) / 2;
            for (uint32_t j = t % 32; j <= i; j += 32) {
                float total = out[j];
                for (uint32_t r = 0; r < padded; r += 8) {
                    float p[8];
                    DQ_UNROLL
                    for (int k = 0; k < 8; k++) p[k] = __fmul_rn(s.staged[r + k][i], s.staged[r + k][j]);
                    const float low = __fadd_rn(__fadd_rn(p[0], p[1]), __fadd_rn(p[2], p[3]));
                    const float high = __fadd_rn(__fadd_rn(p[4], p[5]), __fadd_rn(p[6], p[7]));
                    total = __fadd_rn(total, __fadd_rn(low, high));
                }
                out[j] = total;
            }
        }
    }
    __syncthreads();
}

// A row at position 0 becomes a sink unless one near it is there or no place is left. One thread: it is rare.
__device__ inline void enter_sink(const ObserveShared& s, const float* row, DqHeadSets& sets, uint16_t* means, uint32_t d) {
    double energy = 0.0;
    for (uint32_t c = 0; c < d; c++) energy = __dadd_rn(energy, __dmul_rn(double(row[c]), double(row[c])));
    if (!(energy <= 1.7976931348623157e308) || __popc(sets.sinks) >= OBSERVE_SINKS) return;
    const double spread = s.m.learns ? spread_of(s, d) : s.m.spread;
    const double scale = spread > 0.0 && spread < energy ? spread : energy;
    for (uint32_t e = 1; e < DQ_MAX_SETS; e++) {
        if (!(sets.sinks >> e & 1)) continue;
        double distance = 0.0;
        for (uint32_t c = 0; c < d; c++) {
            const double x = __dadd_rn(double(row[c]), -double(half_to_float(means[e * d + c])));
            distance = __dadd_rn(distance, __dmul_rn(x, x));
        }
        if (distance <= __dmul_rn(SINK_DISTANCE, scale) || distance <= __dmul_rn(1e-5, energy)) return;
    }
    auto mean = [&](uint32_t c) {
        const float x = row[c] < -LARGEST_ROW ? -LARGEST_ROW : row[c] > LARGEST_ROW ? LARGEST_ROW : row[c];
        return float_to_half(x);
    };
    bool zero = true;
    for (uint32_t c = 0; c < d; c++) zero &= (mean(c) & 0x7FFF) == 0;
    if (zero) return;
    // The same content keeps its id; otherwise the first free one.
    uint32_t id = DQ_MAX_SETS;
    for (uint32_t e = 1; e < DQ_MAX_SETS && id == DQ_MAX_SETS; e++) {
        if (!(sets.present >> e & 1) || sets.transform[e] != 0) continue;
        bool same = true;
        for (uint32_t c = 0; c < d; c++) same &= means[e * d + c] == mean(c);
        if (same) id = e;
    }
    for (uint32_t e = 1; e < DQ_MAX_SETS && id == DQ_MAX_SETS; e++) {
        if (sets.present >> e & 1) continue;
        id = e;
        for (uint32_t c = 0; c < d; c++) means[e * d + c] = mean(c);
        sets.transform[e] = 0;
    }
    if (id == DQ_MAX_SETS) return;
    sets.present |= uint16_t(1u << id);
    sets.sinks |= uint16_t(1u << id);
}

// Takes n rows of one head of a tensor.
__device__ inline void observe_rows(ObserveShared& s, const Unit& unit, const DqObserve& p, const DqRows& rows, uint32_t head, uint32_t d, bool with_second, DqHeadSets* sets, uint16_t* means) {
    const uint32_t t = threadIdx.x, warp = t / 32, lane = t % 32;
    for (uint32_t first = 0; first < p.n; first += OBSERVE_BLOCK) {
        const uint32_t n = p.n - first < OBSERVE_BLOCK ? p.n - first : OBSERVE_BLOCK;
        // Phase 1: candidates, and what is to become of each.
        for (uint32_t r = warp; r < n; r += OBSERVE_THREADS / 32) {
            bool fine = true;
            for (uint32_t c = lane; c < d; c += 32) {
                const float x = load_row(rows, first + r, head, c);
                s.candidates[r][c] = x;
                fine &= fabsf(x) <= LARGEST_ROW;
            }
            fine = __all_sync(ALL_LANES, fine);
            if (lane == 0) {
                const bool at_zero = p.positions != nullptr && p.positions[first + r] == 0;
                s.kind[r] = at_zero ? (sets != nullptr && s.m.takes_sinks ? SINK : SKIP) : fine && s.m.learns ? ROW : SKIP;
            }
        }
        __syncthreads();
        // Phase 2: in order, since a sink looks at the rows before it.
        for (uint32_t r = 0; r < n; r++) {
            if (s.kind[r] == SKIP) continue;
            if (s.kind[r] == SINK) {
                if (t == 0) enter_sink(s, s.candidates[r], *sets, means, d);
                continue;
            }
            const uint32_t at = s.m.n_staged;
            for (uint32_t c = t; c < d; c += OBSERVE_THREADS) s.staged[at][c] = s.candidates[r][c];
            __syncthreads();
            if (t == 0) s.m.n_staged = at + 1;
            __syncthreads();
            if (at + 1 == OBSERVE_BLOCK) flush_rows(s, unit, d, with_second);
        }
        __syncthreads();
    }
}

__device__ __forceinline__ void observe(const DqObserve& p) {
    __shared__ ObserveShared s;
    const uint32_t head = blockIdx.x, kind = blockIdx.y, t = threadIdx.x;
    const DqUnits& units = kind == 0 ? p.k : kind == 1 ? p.v : p.q;
    const DqRows& rows = kind == 0 ? p.k_rows : kind == 1 ? p.v_rows : p.q_rows;
    if (units.data == nullptr || rows.data == nullptr) return;
    const uint32_t d = units.dim;
    const bool with_second = units.with_second != 0;
    const Unit unit(units, head);
    if (t == 0) s.m = *unit.head;
    __syncthreads();
    if (!s.m.learns && !s.m.takes_sinks) return;
    for (uint32_t c = t; c < d; c += OBSERVE_THREADS) {
        s.sum[c] = unit.sum[c], s.reference[c] = unit.reference[c];
        for (uint32_t r = 0; r < s.m.n_staged; r++) s.staged[r][c] = unit.staged[r * d + c];
    }
    __syncthreads();

    if (kind == 2) {
        for (uint32_t q = 0; q < p.group; q++) observe_rows(s, unit, p, rows, head * p.group + q, d, with_second, nullptr, nullptr);
    } else {
        DqHeadSets* sets = (kind == 0 ? p.k_heads : p.v_heads) + head;
        uint16_t* means = (kind == 0 ? p.k_means : p.v_means) + uint64_t(head) * DQ_MAX_SETS * d;
        observe_rows(s, unit, p, rows, head, d, with_second, sets, means);
    }

    __syncthreads();
    for (uint32_t c = t; c < d; c += OBSERVE_THREADS) {
        unit.sum[c] = s.sum[c], unit.reference[c] = s.reference[c];
        for (uint32_t r = 0; r < s.m.n_staged; r++) unit.staged[r * d + c] = s.staged[r][c];
    }
    if (t == 0) {
        *unit.head = s.m;
        if (kind < 2 && p.rows_seen != nullptr) p.rows_seen[kind * p.n_kv_heads + head] = uint32_t(s.m.rows) + s.m.n_staged;
    }
}

}  // namespace dq
