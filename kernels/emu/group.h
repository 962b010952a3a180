// Matrix products of warp groups: a warp multiplies its sixteen rows by a matrix in shared memory, beside the threads. Like copies
// they are done as late as the rules allow, at the wait; until then the result is spoilt, and no matrix may change. What fences tell the
// hardware (registers, shared memory that threads wrote) is not looked at: one that is missing is not seen here.
#pragma once
#include "warp.h"

namespace emu {

// Waits until all threads of four warps are here.
inline void meet_group(unsigned group, const char* file, int line) {
    Thread& t = me();
    GroupMeeting& meeting = block()->meetings[group];
    if (t.id / 128 != group || 128 * (group + 1) > block()->threads.size()) die("a thread of another warp group, or a group that is not whole");
    if (meeting.here > 0 && meeting.line != line) die("threads of a warp group are at different meetings");
    meeting.line = line, t.file = file, t.line = line, t.mask = ~0u;
    const unsigned round = meeting.round;
    if (++meeting.here == 128) meeting.here = 0, meeting.round++;
    while (meeting.round == round) t.state = State::Spins, yield();
}

inline const uint8_t* byte_of(const SharedLines& lines, uint32_t line, uint32_t offset) {
    const uint64_t address = uint64_t(lines.at - dynamic_shared()) + line * lines.line + offset;
    return dynamic_shared() + (address ^ (address >> 7 & lines.mask) << 4);
}

// Of all that a product of the group reads in shared memory, by whichever warp.
inline uint64_t hash_of(const GroupMma& mma) {
    uint64_t hash = 1469598103934665603ull;
    auto add = [&](const SharedLines& lines, uint32_t n, uint32_t bytes) {
        for (uint32_t i = 0; lines.at != nullptr && i < n * bytes; i++) hash = (hash ^ *byte_of(lines, i / bytes, i % bytes)) * 1099511628211ull;
    };
    add(mma.a_lines, 64, 32);
    if (mma.counts != nullptr) add(mma.b, 8 * mma.n_tiles, 32);
    else add(mma.b, 16, 16 * mma.n_tiles);
    return hash;
}

inline void run_group_mma(Lanes lanes, uint32_t mask) {
    need_full_warp(mask);
    const auto& of_all = *static_cast<GroupMma*>(lanes[0]);
    const bool whole = of_all.counts != nullptr;
    const int depth = whole ? 32 : 16;
    if (hash_of(of_all) != of_all.seen) die("a matrix of a warp group's mma has changed under way");
    static double a[16][32], b[32][8];
    for (int l = 0; l < 32; l++) {
        auto& mine = *static_cast<GroupMma*>(lanes[l]);
        if (mine.b.at != of_all.b.at || mine.a_lines.at != of_all.a_lines.at) die("lanes of a warp group's mma name different matrices");
        for (int i = 0; i < 4; i++) {
            for (int e = 0; e < 2; e++) a[(l >> 2) + 8 * (i & 1)][2 * (l & 3) + e + 8 * (i >> 1)] = read_half(mine.a[i], e);
        }
    }
    for (int row = 0; whole && row < 16; row++) {
        for (int k = 0; k < depth; k++) a[row][k] = *reinterpret_cast<const int8_t*>(byte_of(of_all.a_lines, me().id / 32 % 4 * 16 + row, k));
    }
    for (int n = 0; n < of_all.n_tiles; n++) {
        for (int k = 0; k < depth; k++) {
            for (int c = 0; c < 8; c++) {
                uint16_t half;
                if (whole) b[k][c] = *reinterpret_cast<const int8_t*>(byte_of(of_all.b, 8 * n + c, k));
                else std::memcpy(&half, byte_of(of_all.b, k, 2 * (8 * n + c)), 2), b[k][c] = half_bits_to_float(half);
            }
        }
        for (int l = 0; l < 32; l++) {
            auto& mine = *static_cast<GroupMma*>(lanes[l]);
            for (int i = 0; i < 4; i++) {
                double sum = !mine.add ? 0 : whole ? double(mine.counts[4 * n + i]) : double(mine.sums[4 * n + i]);
                for (int k = 0; k < depth; k++) sum += a[(l >> 2) + 8 * (i >> 1)][k] * b[k][2 * (l & 3) + (i & 1)];
                if (whole) mine.counts[4 * n + i] = int32_t(sum);
                else mine.sums[4 * n + i] = float(sum);
                if (whole && sum != mine.counts[4 * n + i]) die("an integer mma overflows");
            }
        }
    }
}

inline void start_group_mma(GroupMma mma, const char* file, int line) {
    Thread& t = me();
    for (const auto& lines : {mma.a_lines, mma.b}) {
        if (lines.at != nullptr && (lines.at - dynamic_shared()) % 16) die("a misaligned matrix of a warp group");
    }
    mma.file = file, mma.line = line;
    if (t.id % 32 == 0) mma.seen = hash_of(mma);
    // One behind another may go on with its result, which is there only when that one is done.
    for (auto& other : t.products) mma.follows |= other.result() == mma.result();
    if (!mma.follows) {
        std::memcpy(mma.before, mma.result(), 16 * mma.n_tiles);
        std::memset(mma.result(), 0xFF, 16 * mma.n_tiles);
    }
    t.products.push_back(mma);
}
inline void commit_group_mma() {
    Thread& t = me();
    t.product_groups.push_back(t.products.size());
}
inline void wait_group_mma(size_t left, const char* file, int line) {
    Thread& t = me();
    meet_group(t.id / 128, file, line);  // all four warps come
    const size_t groups = t.product_groups.size() > left ? t.product_groups.size() - left : 0, n = groups == 0 ? 0 : t.product_groups[groups - 1];
    for (size_t i = 0; i < n; i++) {
        auto& mma = t.products[i];
        if (!mma.follows) std::memcpy(mma.result(), mma.before, 16 * mma.n_tiles);
        meet(run_group_mma, ~0u, &mma, mma.file, mma.line);
    }
    t.products.erase(t.products.begin(), t.products.begin() + n);
    t.product_groups.erase(t.product_groups.begin(), t.product_groups.begin() + groups);
    for (auto& end : t.product_groups) end -= n;
}

}  // namespace emu
