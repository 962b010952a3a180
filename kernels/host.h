// How work is cut and what workspace it takes: the host's half of the launches, for the C++ tests. src/cuda/launch.rs
// does the same for the library.
#pragma once
#include "attend.cuh"

namespace dq {

// Whether all planes of a record start where the fast loads want them.
template <class K, class V>
bool planes_aligned(uint32_t n_kv) {
    bool ok = true;
    uint32_t at = 0;
    auto side = [&](auto s) {
        using S = decltype(s);
        for (int p = 0; p < S::planes(); p++) {
            int t = S::tier_of_plane(p);
            uint32_t bytes = S::head_bytes(t, p - S::plane_index(t, 0));
            if (bytes % 4 == 0) ok &= at % 4 == 0;
            if (bytes % 16 == 0) ok &= at % 16 == 0;
            at += n_kv * bytes;
        }
    };
    side(K{});
    side(V{});
    return ok;
}

struct Cut {
    uint32_t heads_per_block, key_warps, n_splits, row_tiles;
};

// `blocks`: how many blocks the device runs at once. `most_warps` of a block bounds its shared memory.
inline Cut cut_attend(uint32_t n_kv_heads, uint32_t rows, uint32_t nt, uint32_t n_keys, uint32_t n_streams, uint32_t blocks, uint32_t most_warps) {
    Cut c{};
    c.heads_per_block = 1;
    for (uint32_t h = 2; h <= most_warps; h++) if (n_kv_heads % h == 0) c.heads_per_block = h;
    c.key_warps = most_warps / c.heads_per_block;
    c.row_tiles = (rows + 4 * nt - 1) / (4 * nt);
    uint32_t tiles = (n_keys + 32 * c.key_warps - 1) / (32 * c.key_warps);
    uint32_t others = n_kv_heads / c.heads_per_block * c.row_tiles * n_streams;
    uint32_t most = tiles == 0 ? 1 : tiles;
    // As many blocks as run at once, or the least whole number of waves with little idle time at the end.
    uint32_t splits = blocks / others;
    if (splits == 0) splits = 1;
    c.n_splits = splits < most ? splits : most;
    return c;
}

}  // namespace dq
