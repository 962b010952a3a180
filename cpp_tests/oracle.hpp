// Attention in double over rows: the truth that batches, windows and tails are compared with.
#pragma once

#include "support.hpp"

#include <algorithm>

namespace test {

// All rows of a store, decoded by the library: [slot][head][dim].
struct Decoded {
    Rows k, v;

    Decoded(const dq_codec *codec, uint32_t layer, const dq_store &store, const dq_layer_desc &shape)
        : k(static_cast<uint32_t>(store.n_slots), shape.n_kv_heads, shape.head_dim_k),
          v(static_cast<uint32_t>(store.n_slots), shape.n_kv_heads, shape.head_dim_v) {
        std::vector<int64_t> slots(store.n_slots);
        for (size_t i = 0; i < slots.size(); i++) slots[i] = static_cast<int64_t>(i);
        const auto to_k = k.tensor(), to_v = v.tensor();
        ok(dq_dequantize(codec, layer, &store, slots.data(), static_cast<uint32_t>(slots.size()), &to_k, &to_v, nullptr));
    }
};

// A key that a query sees: a row of `k` and the same of `v`.
struct Seen {
    const Rows *k, *v;
    uint32_t row;
};

// Error of out[token][q_head] against softmax(q k^T / sqrt(d)) v over `keys`, as a share of the mean over the channels
// of the sum of p |v|: rows are rotated before they are coded, so that an error is spread over all channels.
inline double attend_error(const Rows &q, const Rows &out, uint32_t token, uint32_t q_head, uint32_t group,
                           const std::vector<Seen> &keys) {
    const uint32_t head = q_head / group;
    const double scale = 1 / std::sqrt(double{1} * q.dim());
    std::vector<double> p;
    double largest = -INFINITY, total = 0;
    for (const auto &key : keys) {
        double sum = 0;
        for (uint32_t i = 0; i < q.dim(); i++) sum += double{q.get(token, q_head, i)} * double{key.k->get(key.row, head, i)};
        p.push_back(sum * scale);
        largest = std::max(largest, p.back());
    }
    for (double &x : p) total += x = std::exp(x - largest);
    double worst = 0, sizes = 0;
    for (uint32_t i = 0; i < out.dim(); i++) {
        double want = 0, size = 0;
        for (size_t j = 0; j < keys.size(); j++) {
            const double x = double{keys[j].v->get(keys[j].row, head, i)};
            want += p[j] / total * x;
            size += p[j] / total * std::fabs(x);
        }
        const double got = double{out.get(token, q_head, i)};
        worst = std::max(worst, std::isfinite(got) ? std::fabs(got - want) : INFINITY);
        sizes += size;
    }
    return worst == 0 ? 0 : worst / (sizes / out.dim());
}

}  // namespace test
