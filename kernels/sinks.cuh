// A unit's running statistics, and rows at position 0 that become sinks: the same decisions as src/factor/head.rs.
#pragma once
#include "rows.cuh"

namespace dq {

constexpr int OBSERVE_BLOCK = 16, OBSERVE_SINKS = 4;
constexpr float LARGEST_ROW = 65504.0f;
constexpr double SINK_DISTANCE = 0.25;

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

// Mean of |x - mean|^2.
__device__ inline double spread_of(const DqMoments& m, const double* sum, uint32_t d) {
    if (m.rows == 0) return 0.0;
    const double n = double(m.rows);
    double mean = 0.0;
    for (uint32_t c = 0; c < d; c++) mean = __dadd_rn(mean, __dmul_rn(sum[c] / n, sum[c] / n));
    const double spread = __dadd_rn(m.energy / n, -mean);
    return spread > 0.0 ? spread : 0.0;
}

// A row at position 0 becomes a sink unless one near it is there or no place is left. One thread: it is rare.
__device__ DQ_COLD inline void enter_sink(const DqMoments& m, const double* sum, const float* row, DqHeadSets& sets, uint16_t* means, uint32_t d) {
    double energy = 0.0;
    for (uint32_t c = 0; c < d; c++) energy = __dadd_rn(energy, __dmul_rn(double(row[c]), double(row[c])));
    if (!(energy <= 1.7976931348623157e308) || __popc(sets.sinks) >= OBSERVE_SINKS) return;
    const double spread = m.learns ? spread_of(m, sum, d) : m.spread;
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

}  // namespace dq
