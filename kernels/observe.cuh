// New rows into running statistics, and rows at position 0 into sinks. The same numbers as src/factor/moments.rs and
// head.rs: every product is rounded before it is added, every sum has that file's order, so that a fit made from these
// sums equals the CPU's, whatever the grid.
//
// Rows enter sixteen at a time: a turn. Two kernels, since only the choice of rows depends on the rows before:
//   observe    grid (KV head, kind: K, V, queries of the head's group): a block goes through its unit's rows in order,
//              makes sinks, decides who enters, adds to what grows with d, and leaves a list for the second.
//   products   grid (tile of the triangle, KV head, kind): a block adds its 32 x 32 second moments over all turns.
// At most OBSERVE_ROWS rows of a unit in a launch.
#pragma once
#include "sinks.cuh"

namespace dq {

constexpr int OBSERVE_THREADS = 256, OBSERVE_DIM = 256;
constexpr int OBSERVE_TURNS = DQ_OBSERVE_ROWS / OBSERVE_BLOCK + 1;
constexpr int16_t NO_ROW = -32768;
constexpr double OVER_MEDIAN = 100.0, OVER_MEAN = 64.0;

// What entered in a launch, from the first kernel to the second. A row of a turn: an index among the launch's rows of the
// unit, -1 - k for row k of those that waited from before, or NO_ROW.
// Behind it: rows that waited, f32 [OBSERVE_BLOCK][d].
struct Entered {
    uint32_t turns, reserved[3];
    int16_t rows[OBSERVE_TURNS][OBSERVE_BLOCK];
};
static_assert(sizeof(Entered) == DQ_ENTERED_BYTES, "");

// The rows of a unit in this launch: a stretch of [head of the group][token].
struct UnitRows {
    const DqRows& rows;
    uint32_t n, first_head, first, count, inverse;  // of n, rounded up, times 2^32
    __device__ __forceinline__ UnitRows(const DqObserve& p, const DqRows& rows, uint32_t head, uint32_t heads)
        : rows(rows), n(p.n), first_head(head * heads), first(p.first), inverse(p.n > 1 ? 0xFFFFFFFFu / p.n + 1 : 0) {
        const uint32_t all = p.flush ? 0 : p.n * heads, left = all > first ? all - first : 0;
        count = left < DQ_OBSERVE_ROWS ? left : DQ_OBSERVE_ROWS;
    }
    // The row's head in the group: a division by n, which may come out one too large before it is corrected.
    __device__ __forceinline__ uint32_t head_of(uint32_t index) const {
        if (n == 1) return first + index;
        const uint32_t q = uint32_t(uint64_t(first + index) * inverse >> 32);
        return q * n > first + index ? q - 1 : q;
    }
    __device__ __forceinline__ uint32_t token(uint32_t index) const { return first + index - head_of(index) * n; }
    __device__ __forceinline__ const uint8_t* at(uint32_t index) const {
        const uint32_t head = head_of(index);
        return static_cast<const uint8_t*>(rows.data) + uint64_t(first + index - head * n) * rows.token_stride + (first_head + head) * rows.head_stride;
    }
    __device__ __forceinline__ float load(uint32_t index, uint32_t c) const { return load_type(rows.type, at(index), c); }
    static __device__ __forceinline__ float load_type(uint32_t type, const uint8_t* row, uint32_t c) {
        if (type == DQ_TYPE_F32) return reinterpret_cast<const float*>(row)[c];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[c];
        return type == DQ_TYPE_F16 ? half_to_float(bits) : bf16_to_float(bits);
    }
};
__device__ __forceinline__ const DqRows& rows_of(const DqObserve& p, uint32_t kind) { return kind == 0 ? p.k_rows : kind == 1 ? p.v_rows : p.q_rows; }
__device__ __forceinline__ const DqUnits& units_of(const DqObserve& p, uint32_t kind) { return kind == 0 ? p.k : kind == 1 ? p.v : p.q; }
__device__ __forceinline__ Entered& entered_of(const DqObserve& p, uint32_t kind, uint32_t head) {
    return *reinterpret_cast<Entered*>(p.entered + (kind * p.n_kv_heads + head) * p.entered_stride);
}

// Where an entered row is, worked out once for all its channels: an address whose top bit says that it waited before,
// as f32. NO_PLACE: no row.
constexpr uint64_t WAITED = 1ull << 63, NO_PLACE = WAITED;
__device__ __forceinline__ uint64_t place_of(const UnitRows& rows, const float* waited, uint32_t d, int16_t row) {
    if (row == NO_ROW) return NO_PLACE;
    return row >= 0 ? uint64_t(rows.at(uint32_t(row))) : uint64_t(waited + uint32_t(-1 - row) * d) | WAITED;
}
__device__ __forceinline__ float load_place(uint32_t type, uint64_t place, uint32_t c) {
    if (place == NO_PLACE) return 0.0f;
    return UnitRows::load_type(place & WAITED ? DQ_TYPE_F32 : type, reinterpret_cast<const uint8_t*>(place & ~WAITED), c);
}
// Channel c of N rows. Rows of the caller's are loaded together, before any is waited for.
template <int N>
__device__ __forceinline__ void load_places(float (&x)[N], uint32_t type, const uint64_t (&places)[N], uint32_t c) {
    uint64_t any = 0;
    DQ_UNROLL
    for (int k = 0; k < N; k++) any |= places[k];
    if (any & WAITED) {
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = load_place(type, places[k], c);
    } else if (type == DQ_TYPE_F32) {
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = reinterpret_cast<const float*>(places[k])[c];
    } else {
        uint16_t bits[N];
        DQ_UNROLL
        for (int k = 0; k < N; k++) bits[k] = reinterpret_cast<const uint16_t*>(places[k])[c];
        DQ_UNROLL
        for (int k = 0; k < N; k++) x[k] = type == DQ_TYPE_F16 ? half_to_float(bits[k]) : bf16_to_float(bits[k]);
    }
}

// Channels of a tile of rows on its way to energies; rows whose places are known at a time.
constexpr int OBSERVE_STRIP = 8, OBSERVE_PLACES = 1024;
// Values of rows that are few enough to have all their squares in shared memory.
constexpr uint32_t OBSERVE_FEW = 1024;

struct ObserveShared {
    double energies[DQ_OBSERVE_ROWS];                  // of the launch's rows
    double waited_energies[OBSERVE_BLOCK];
    int16_t list[DQ_OBSERVE_ROWS + OBSERVE_BLOCK];     // rows to enter, in order; those of a turn that stay out go to its end
    uint16_t sink_row[DQ_OBSERVE_ROWS], sink_at[DQ_OBSERVE_ROWS];  // rows that may be sinks; length of the list before each
    uint8_t kind[DQ_OBSERVE_ROWS];                     // SKIP, ROW, SINK
    union {
        float strip[OBSERVE_THREADS][OBSERVE_STRIP + 1];
        uint64_t places[OBSERVE_PLACES];               // of rows that are added
        double squares[OBSERVE_FEW];
    };
    double limit[OBSERVE_TURNS];                       // of a turn's energies, by its median
    uint8_t all_enter[OBSERVE_TURNS];
    double sum[OBSERVE_DIM];
    float reference[OBSERVE_DIM];
    float row[OBSERVE_DIM];
    uint32_t n_list, n_sinks;
    DqMoments m;
    __device__ __forceinline__ double energy(int16_t row) const { return row >= 0 ? energies[row] : waited_energies[-1 - row]; }
};
static_assert(sizeof(ObserveShared) <= 48 * 1024, "");
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

// One thread: which rows of a turn of n enter, those first.
__device__ inline void keep_rows(ObserveShared& s, uint32_t turn, uint32_t n, uint32_t d) {
    int16_t* list = s.list + turn * OBSERVE_BLOCK;
    if (s.all_enter[turn]) {
        double energy = s.m.energy, slack = s.m.slack;
        DQ_UNROLL
        for (uint32_t i = 0; i < OBSERVE_BLOCK; i++) {
            if (i >= n) break;
            energy = __dadd_rn(energy, s.energy(list[i]));
            slack = __dmul_rn(slack, 0.25);
        }
        s.m.energy = energy, s.m.slack = slack, s.m.rows += n;
        return;
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        const double energy = s.energy(list[i]), mean = s.m.rows == 0 ? 0.0 : s.m.energy / double(s.m.rows);
        const double of_mean = __dmul_rn(OVER_MEAN, mean > s.m.slack ? mean : s.m.slack);
        if (energy <= (s.limit[turn] > of_mean ? s.limit[turn] : of_mean)) {
            list[kept++] = list[i];
            s.m.rows++;
            s.m.energy = __dadd_rn(s.m.energy, energy);
            s.m.slack = __dmul_rn(s.m.slack, 0.25);
        } else {
            double floor = 0.0;
            for (uint32_t c = 0; c < d; c++) floor = __dadd_rn(floor, __dmul_rn(double(s.reference[c]), double(s.reference[c])));
            floor = __dmul_rn(1e-6, __dadd_rn(floor, 1e-30));
            double slack = s.m.slack > mean ? s.m.slack : mean;
            slack = 2.0 * (slack > floor ? slack : floor);
            s.m.slack = slack < energy ? slack : energy;
        }
    }
    for (uint32_t i = kept; i < n; i++) list[i] = NO_ROW;
}

// The same as `measure` for the few rows of a token that is decoded: all values are loaded at once, and only the sums are one
// addition after the other.
__device__ inline void measure_few(ObserveShared& s, const UnitRows& rows, uint32_t d) {
    const uint32_t t = threadIdx.x;
    for (uint32_t i = t; i < rows.count; i += OBSERVE_THREADS) s.kind[i] = ROW;
    __syncthreads();
    for (uint32_t i = t; i < rows.count * d; i += OBSERVE_THREADS) {
        const float value = rows.load(i / d, i % d);
        if (!(fabsf(value) <= LARGEST_ROW)) s.kind[i / d] = SKIP;
        const double y = double(__fsub_rn(value, s.reference[i % d]));
        s.squares[i] = __dmul_rn(y, y);
    }
    __syncthreads();
    for (uint32_t i = t; i < rows.count; i += OBSERVE_THREADS) {
        double energy = 0.0;
        DQ_UNROLL_BY_8
        for (uint32_t c = 0; c < d; c++) energy = __dadd_rn(energy, s.squares[i * d + c]);
        s.energies[i] = energy;
    }
    __syncthreads();
}

// Whether each row is one to learn from, and its energy about the reference: a thread to a row, channels in order, since
// the order is the CPU's. Through strips of channels, so that loads of neighbours are next to each other.
__device__ inline void measure(ObserveShared& s, const UnitRows& rows, uint32_t d) {
    if (rows.count * d <= OBSERVE_FEW) return measure_few(s, rows, d);
    const uint32_t t = threadIdx.x;
    for (uint32_t from = 0; from < rows.count; from += OBSERVE_THREADS) {
        uint64_t at[OBSERVE_STRIP];
        DQ_UNROLL
        for (int k = 0; k < OBSERVE_STRIP; k++) {
            const uint32_t row = from + t / OBSERVE_STRIP + k * (OBSERVE_THREADS / OBSERVE_STRIP);
            at[k] = uint64_t(rows.at(row < rows.count ? row : rows.count - 1));
        }
        double energy = 0.0;
        bool fine = true;
        float x[OBSERVE_STRIP];
        auto fetch = [&](uint32_t strip) { load_places(x, rows.rows.type, at, strip + t % OBSERVE_STRIP); };
        fetch(0);
        for (uint32_t strip = 0; strip < d; strip += OBSERVE_STRIP) {
            __syncthreads();
            DQ_UNROLL
            for (int k = 0; k < OBSERVE_STRIP; k++) s.strip[t / OBSERVE_STRIP + k * (OBSERVE_THREADS / OBSERVE_STRIP)][t % OBSERVE_STRIP] = x[k];
            __syncthreads();
            // The next one is on its way while this one is added.
            if (strip + OBSERVE_STRIP < d) fetch(strip + OBSERVE_STRIP);
            DQ_UNROLL
            for (int k = 0; k < OBSERVE_STRIP; k++) {
                const float value = s.strip[t][k];
                fine &= fabsf(value) <= LARGEST_ROW;
                const double y = double(__fsub_rn(value, s.reference[strip + k]));
                energy = __dadd_rn(energy, __dmul_rn(y, y));
            }
        }
        if (from + t < rows.count) s.energies[from + t] = energy, s.kind[from + t] = fine ? ROW : SKIP;
    }
    __syncthreads();
}

// Turns [from, end) of the list go through the filter; the last has n_last rows. All threads.
__device__ inline void enter_turns(ObserveShared& s, const UnitRows& rows, const Unit& unit, uint32_t d, uint32_t from, uint32_t end, uint32_t n_last) {
    const uint32_t t = threadIdx.x;
    if (from == end) return;
    if (!s.m.has_reference) {
        const uint32_t n = end - from == 1 ? n_last : OBSERVE_BLOCK;
        for (uint32_t c = t; c < d; c += OBSERVE_THREADS) {
            float column[OBSERVE_BLOCK];
            for (uint32_t r = 0; r < n; r++) column[r] = load_place(rows.rows.type, place_of(rows, unit.staged, d, s.list[from * OBSERVE_BLOCK + r]), c);
            sort_16(column, n);
            s.reference[c] = column[n / 2];
        }
        __syncthreads();
        measure(s, rows, d);
    }
    if (t < s.m.n_staged && from == 0) {
        double energy = 0.0;
        for (uint32_t c = 0; c < d; c++) {
            const double y = double(__fsub_rn(unit.staged[t * d + c], s.reference[c]));
            energy = __dadd_rn(energy, __dmul_rn(y, y));
        }
        s.waited_energies[t] = energy;
    }
    __syncthreads();
    // Medians, a thread to a turn. In a short turn the median may itself be an outlier.
    for (uint32_t turn = from + t; turn < end; turn += OBSERVE_THREADS) {
        const uint32_t n = turn + 1 == end ? n_last : OBSERVE_BLOCK;
        double sorted[OBSERVE_BLOCK];
        for (uint32_t i = 0; i < n; i++) {
            const double energy = s.energy(s.list[turn * OBSERVE_BLOCK + i]);
            uint32_t j = i;
            for (; j > 0 && sorted[j - 1] > energy; j--) sorted[j] = sorted[j - 1];
            sorted[j] = energy;
        }
        s.limit[turn] = n >= OBSERVE_BLOCK / 2 ? __dmul_rn(OVER_MEDIAN, sorted[n / 2]) : 0.0;
        s.all_enter[turn] = sorted[n - 1] <= s.limit[turn];
    }
    __syncthreads();
    if (t == 0) {
        for (uint32_t turn = from; turn < end; turn++) keep_rows(s, turn, turn + 1 == end ? n_last : OBSERVE_BLOCK, d);
        s.m.has_reference = 1;
    }
    __syncthreads();
}

// Adds the rows of turns [from, end), those that entered, to the sums. A thread has a channel. All threads.
__device__ inline void add_turns(ObserveShared& s, const UnitRows& rows, const Unit& unit, uint32_t d, uint32_t from, uint32_t end) {
    for (uint32_t first = from * OBSERVE_BLOCK; first < end * OBSERVE_BLOCK; first += OBSERVE_PLACES) {
        const uint32_t left = end * OBSERVE_BLOCK - first, n = left < OBSERVE_PLACES ? left : OBSERVE_PLACES;
        for (uint32_t i = threadIdx.x; i < n; i += OBSERVE_THREADS) s.places[i] = place_of(rows, unit.staged, d, s.list[first + i]);
        __syncthreads();
        for (uint32_t c = threadIdx.x; c < d; c += OBSERVE_THREADS) {
            double sum = s.sum[c];
            const float reference = s.reference[c];
            float next[OBSERVE_BLOCK];
            auto fetch = [&](uint32_t i) {
                uint64_t places[OBSERVE_BLOCK];
                DQ_UNROLL
                for (int k = 0; k < OBSERVE_BLOCK; k++) places[k] = s.places[i + k];
                load_places(next, rows.rows.type, places, c);
            };
            fetch(0);
            for (uint32_t i = 0; i < n; i += OBSERVE_BLOCK) {
                float x[OBSERVE_BLOCK];
                DQ_UNROLL
                for (int k = 0; k < OBSERVE_BLOCK; k++) x[k] = next[k];
                if (i + OBSERVE_BLOCK < n) fetch(i + OBSERVE_BLOCK);
                DQ_UNROLL
                for (int k = 0; k < OBSERVE_BLOCK; k++) {
                    if (s.places[i + k] != NO_PLACE) sum = __dadd_rn(sum, double(__fsub_rn(x[k], reference)));
                }
            }
            s.sum[c] = sum;
        }
        __syncthreads();
    }
}

// What is to become of each row, and the lists of those that wait to enter and of those that may be sinks.
__device__ inline void sort_rows(ObserveShared& s, const DqObserve& p, const UnitRows& rows, bool sinks) {
    const uint32_t t = threadIdx.x, lane = t % 32, n_rows = rows.count;
    for (uint32_t i = t; i < n_rows; i += OBSERVE_THREADS) {
        const bool at_zero = p.positions != nullptr && p.positions[rows.token(i)] == 0;
        if (at_zero) s.kind[i] = sinks && s.m.takes_sinks ? SINK : SKIP;
        else if (!s.m.learns) s.kind[i] = SKIP;
    }
    for (uint32_t i = t; i < s.m.n_staged; i += OBSERVE_THREADS) s.list[i] = int16_t(-1 - int(i));
    __syncthreads();
    if (t >= 32) return;
    uint32_t n = s.m.n_staged, n_sinks = 0;
    for (uint32_t from = 0; from < n_rows; from += 32) {
        const uint32_t i = from + lane, kind = i < n_rows ? s.kind[i] : SKIP;
        const uint32_t enter = __ballot_sync(ALL_LANES, kind == ROW), sink = __ballot_sync(ALL_LANES, kind == SINK);
        const uint32_t before = (1u << lane) - 1, at = n + __popc(enter & before);
        if (kind == ROW) s.list[at] = int16_t(i);
        if (kind == SINK) s.sink_row[n_sinks + __popc(sink & before)] = uint16_t(i), s.sink_at[n_sinks + __popc(sink & before)] = uint16_t(at);
        n += __popc(enter), n_sinks += __popc(sink);
    }
    if (lane == 0) s.n_list = n, s.n_sinks = n_sinks;
}

// Whether the rows that wait are let in before a fit: where one is due. Queries follow the keys, which went first.
__device__ inline bool fit_is_due(const ObserveShared& s, const DqObserve& p, uint32_t kind, uint32_t head) {
    if (kind < 2) return s.m.rows + s.m.n_staged >= s.m.due;
    const DqMoments& keys = *Unit(p.k, head).head;
    return keys.learns && keys.rows >= keys.due;
}

__device__ __forceinline__ void observe(const DqObserve& p) {
    __shared__ ObserveShared s;
    const uint32_t head = blockIdx.x, kind = blockIdx.y + (p.flush == 2 ? 2 : 0), t = threadIdx.x;
    const DqUnits& units = units_of(p, kind);
    Entered& entered = entered_of(p, kind, head);
    wait_for_previous_kernel();
    if (t == 0) entered.turns = 0;
    if (units.data == nullptr || (!p.flush && rows_of(p, kind).data == nullptr)) return;
    const uint32_t d = units.dim;
    const UnitRows rows(p, rows_of(p, kind), head, kind == 2 ? p.group : 1);
    const Unit unit(units, head);
    if (t == 0) s.m = *unit.head;
    for (uint32_t c = t; c < d; c += OBSERVE_THREADS) s.sum[c] = unit.sum[c], s.reference[c] = unit.reference[c];
    __syncthreads();
    if (!s.m.learns) {
        // Only a row at position 0 matters still.
        bool sink = false;
        for (uint32_t i = t; s.m.takes_sinks && !p.flush && p.positions != nullptr && i < p.n; i += OBSERVE_THREADS) sink |= p.positions[i] == 0;
        if (!__syncthreads_or(sink)) return;
    }

    // Phase 1: rows by themselves, and the lists.
    if (s.m.learns) measure(s, rows, d);
    sort_rows(s, p, rows, kind < 2);
    __syncthreads();

    // Phase 2: whole turns up to each sink, since a sink looks at the rows before it; then those behind the last.
    uint32_t turns = 0;
    for (uint32_t i = 0; i <= s.n_sinks; i++) {
        const uint32_t end = (i < s.n_sinks ? s.sink_at[i] : s.n_list) / OBSERVE_BLOCK;
        enter_turns(s, rows, unit, d, turns, end, OBSERVE_BLOCK);
        add_turns(s, rows, unit, d, turns, end);
        turns = end;
        if (i == s.n_sinks) break;
        for (uint32_t c = t; c < d; c += OBSERVE_THREADS) s.row[c] = rows.load(s.sink_row[i], c);
        __syncthreads();
        DqHeadSets* sets = (kind == 0 ? p.k_heads : p.v_heads) + head;
        uint16_t* means = (kind == 0 ? p.k_means : p.v_means) + uint64_t(head) * DQ_MAX_SETS * d;
        if (t == 0) enter_sink(s.m, s.sum, s.row, *sets, means, d), __threadfence();
        __syncthreads();
    }
    uint32_t left = s.n_list - turns * OBSERVE_BLOCK;
    if (p.flush && left > 0 && fit_is_due(s, p, kind, head)) {
        for (uint32_t i = left + t; i < OBSERVE_BLOCK; i += OBSERVE_THREADS) s.list[i] = NO_ROW;
        enter_turns(s, rows, unit, d, 0, 1, left);
        add_turns(s, rows, unit, d, 0, 1);
        turns = 1, left = 0;
    }

    // Phase 3: the list, and the rows that waited so far, to the second kernel; rows that wait from now on.
    for (uint32_t i = t; i < turns * OBSERVE_BLOCK; i += OBSERVE_THREADS) (&entered.rows[0][0])[i] = s.list[i];
    for (uint32_t i = t; turns > 0 && i < s.m.n_staged * d; i += OBSERVE_THREADS) reinterpret_cast<float*>(&entered + 1)[i] = unit.staged[i];
    __syncthreads();
    for (uint32_t i = (turns == 0 ? s.m.n_staged * d : 0) + t; i < left * d; i += OBSERVE_THREADS) {
        // Rows that go on waiting are where they were.
        const int16_t row = s.list[turns * OBSERVE_BLOCK + i / d];
        if (row >= 0) unit.staged[i] = rows.load(uint32_t(row), i % d);
    }
    for (uint32_t c = t; turns > 0 && c < d; c += OBSERVE_THREADS) unit.sum[c] = s.sum[c], unit.reference[c] = s.reference[c];
    __syncthreads();
    if (t == 0) {
        s.m.n_staged = left;
        *unit.head = s.m;
        entered.turns = turns;
        if (kind < 2 && p.rows_seen != nullptr) p.rows_seen[kind * p.n_kv_heads + head] = uint32_t(s.m.rows) + left;
    }
}

// Tiles of 32 x 32 of a triangle of d rows.
__host__ __device__ constexpr uint32_t product_tiles(uint32_t d) { return ((d + 31) / 32) * ((d + 31) / 32 + 1) / 2; }

__device__ __forceinline__ void products(const DqObserve& p) {
    constexpr int TILE = 32;
    __shared__ __align__(8) float shared[2][OBSERVE_BLOCK][2][TILE];  // [buffer][row of the turn][rows, columns of the tile]
    const uint32_t head = blockIdx.y, kind = blockIdx.z, t = threadIdx.x;
    const DqUnits& units = units_of(p, kind);
    const Entered& entered = entered_of(p, kind, head);
    start_next_kernel();
    wait_for_previous_kernel();
    if (units.data == nullptr || !units.with_second || entered.turns == 0 || blockIdx.x >= product_tiles(units.dim)) return;
    const uint32_t d = units.dim, turns = entered.turns;
    const UnitRows rows(p, rows_of(p, kind), head, kind == 2 ? p.group : 1);
    const Unit unit(units, head);
    __shared__ uint64_t places[OBSERVE_TURNS * OBSERVE_BLOCK];
    for (uint32_t i = t; i < turns * OBSERVE_BLOCK; i += OBSERVE_THREADS) {
        places[i] = place_of(rows, reinterpret_cast<const float*>(&entered + 1), d, (&entered.rows[0][0])[i]);
    }
    __syncthreads();
    uint32_t tile_i = 0;
    while ((tile_i + 1) * (tile_i + 2) / 2 <= blockIdx.x) tile_i++;
    const uint32_t tile_j = blockIdx.x - tile_i * (tile_i + 1) / 2;

    // Phase 1: a thread has two rows and two columns of the tile.
    const uint32_t local_i = t / 16 * 2, local_j = t % 16 * 2;
    float total[2][2];
    auto place = [&](int a, int b) -> float* {
        const uint32_t i = tile_i * TILE + local_i + a, j = tile_j * TILE + local_j + b;
        return i < d && j <= i ? unit.second + i * (i + 1) / 2 + j : nullptr;
    };
    DQ_UNROLL
    for (int a = 0; a < 2; a++) {
        DQ_UNROLL
        for (int b = 0; b < 2; b++) total[a][b] = place(a, b) ? *place(a, b) : 0.0f;
    }

    // Phase 2: turns; the next one's values are on their way while this one is added.
    // A thread always fetches the same channel, of rows four apart.
    constexpr int EACH = OBSERVE_BLOCK * 2 * TILE / OBSERVE_THREADS, AHEAD = 2;
    static_assert(OBSERVE_THREADS % (2 * TILE) == 0, "");
    const uint32_t c = (t / TILE % 2 == 0 ? tile_i : tile_j) * TILE + t % TILE;
    const float reference = c < d ? unit.reference[c] : 0.0f;
    float next[AHEAD][EACH];
    auto fetch = [&](float (&to)[EACH], uint32_t turn) {
        uint64_t of_turn[EACH];
        float x[EACH] = {};
        DQ_UNROLL
        for (int k = 0; k < EACH; k++) of_turn[k] = places[turn * OBSERVE_BLOCK + t / (2 * TILE) + k * (OBSERVE_THREADS / (2 * TILE))];
        if (c < d) load_places(x, rows.rows.type, of_turn, c);
        DQ_UNROLL
        for (int k = 0; k < EACH; k++) to[k] = of_turn[k] == NO_PLACE ? 0.0f : __fsub_rn(x[k], reference);
    };
    fetch(next[0], 0);
    if (turns > 1) fetch(next[1], 1);
    for (uint32_t turn = 0; turn < turns; turn++) {
        float* buffer = &shared[turn & 1][0][0][0];
        DQ_UNROLL
        for (int k = 0; k < EACH; k++) buffer[t + k * OBSERVE_THREADS] = next[0][k], next[0][k] = next[1][k];
        __syncthreads();
        if (turn + AHEAD < turns) fetch(next[1], turn + AHEAD);
        // Zeros in place of rows that stayed out change no bit.
        DQ_UNROLL
        for (int from = 0; from < OBSERVE_BLOCK; from += 8) {
            float q[2][2][8];
            DQ_UNROLL
            for (int k = 0; k < 8; k++) {
                const float2 x = *reinterpret_cast<const float2*>(&shared[turn & 1][from + k][0][local_i]);
                const float2 y = *reinterpret_cast<const float2*>(&shared[turn & 1][from + k][1][local_j]);
                q[0][0][k] = __fmul_rn(x.x, y.x), q[0][1][k] = __fmul_rn(x.x, y.y);
                q[1][0][k] = __fmul_rn(x.y, y.x), q[1][1][k] = __fmul_rn(x.y, y.y);
            }
            DQ_UNROLL
            for (int e = 0; e < 4; e++) {
                const float* v = q[e / 2][e % 2];
                const float low = __fadd_rn(__fadd_rn(v[0], v[1]), __fadd_rn(v[2], v[3]));
                const float high = __fadd_rn(__fadd_rn(v[4], v[5]), __fadd_rn(v[6], v[7]));
                total[e / 2][e % 2] = __fadd_rn(total[e / 2][e % 2], __fadd_rn(low, high));
            }
        }
    }
    DQ_UNROLL
    for (int a = 0; a < 2; a++) {
        DQ_UNROLL
        for (int b = 0; b < 2; b++) if (place(a, b)) *place(a, b) = total[a][b];
    }
}

// A fit comes into force, in the order of the stream: its matrices are in their places already. The device gives it an
// id, since it gave ids to sinks meanwhile; `ids` tells the host. Grid: (KV head, side).
__device__ __forceinline__ void publish(const DqPublish& p) {
    const uint32_t head = blockIdx.x, side = blockIdx.y, unit = side * p.n_kv_heads + head, t = threadIdx.x;
    const DqFit& fit = p.fits[unit];
    if (!fit.wanted) return;
    const DqUnits& units = side == 0 ? p.k : p.v;
    DqHeadSets& sets = (side == 0 ? p.k_heads : p.v_heads)[head];
    uint16_t* means = (side == 0 ? p.k_means : p.v_means) + uint64_t(head) * DQ_MAX_SETS * units.dim;
    uint32_t id = fit.id == DQ_NO_PLACE ? 0 : fit.id;
    for (uint32_t e = DQ_MAX_SETS - 1; e > 0 && fit.id == 0; e--) if (!(sets.present >> e & 1)) id = e;
    const bool last = fit.last || id == 0;
    __syncthreads();
    if (id != 0 && fit.id == 0) {
        for (uint32_t c = t; c < units.dim; c += blockDim.x) means[id * units.dim + c] = p.means[uint64_t(unit) * OBSERVE_DIM + c];
        __threadfence();
    }
    if (t != 0) return;
    p.ids[unit] = id;
    if (id != 0) {
        if (fit.id == 0) sets.transform[id] = fit.transform;
        sets.present |= uint16_t(1u << id);
        sets.newest = uint8_t(id);
        sets.encode_dense = fit.encode_dense;
        for (int k = 0; k < DQ_MAX_TIERS; k++) sets.kappa[k] = fit.kappa[k];
        __threadfence();
    }
    DqMoments& m = *Unit(units, head).head;
    m.due = fit.due;
    if (!last) return;
    m.learns = 0;
    m.spread = fit.spread;
    if (side == 0 && p.q.data != nullptr) Unit(p.q, head).head->learns = 0;
}

}  // namespace dq
