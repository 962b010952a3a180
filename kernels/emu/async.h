// Copies that run beside the threads. They land as late as the rules allow, at the wait, and spoil their target until
// then; a kernel that reads too early sees the spoilt bytes.
#pragma once
#include "block.h"

namespace emu {

inline void start_copy(void* to, const void* from, unsigned bytes, unsigned alignment) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % alignment) die("a misaligned cp.async");
    std::memset(to, 0xFF, bytes);
    me().open.push_back({to, from, bytes});
}

inline void commit_copies() {
    Thread& t = me();
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}

inline void wait_copies(size_t left) {
    auto& groups = me().groups;
    while (groups.size() > left) {
        for (auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

// ---- mbarrier and bulk copies ----
// A phase ends when all arrivals are in and all announced bytes have landed. Bulk copies land when the first thread
// waits after the last arrival.

inline MBarrier& mbarrier(void* at) {
    auto found = block()->barriers.find(at);
    if (found == block()->barriers.end()) die("an mbarrier that was not initialised");
    return found->second;
}

inline void mbarrier_init(void* at, unsigned count) {
    if (reinterpret_cast<uintptr_t>(at) % 8) die("a misaligned mbarrier");
    block()->barriers[at] = MBarrier{count, count, 0, 0, {}};
}

// Arrivals that were missing before this one. Whoever has arrived is held up for some rounds, so that those who wait for that go on
// while what it does next is not there yet.
inline unsigned mbarrier_arrive(void* at, unsigned bytes = 0) {
    MBarrier& b = mbarrier(at);
    if (b.pending == 0) die("more arrivals at an mbarrier than its count");
    b.expected += bytes;
    const unsigned missing = b.pending--;
    for (int round = 0; round < 16; round++) me().state = State::Spins, yield();
    return missing;
}

inline void start_bulk_copy(void* to, const void* from, unsigned bytes, void* barrier) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) die("a misaligned bulk copy");
    std::memset(to, 0xFF, bytes);
    mbarrier(barrier).copies.push_back({to, from, bytes});
}

inline void mbarrier_wait(void* at, unsigned parity) {
    MBarrier& b = mbarrier(at);
    while ((b.phase & 1) == parity) {
        uint64_t bytes = 0;
        for (auto& copy : b.copies) bytes += copy.bytes;
        if (b.pending == 0 && bytes > b.expected) die("more bytes under way than an mbarrier expects");
        if (b.pending != 0 || bytes < b.expected) {
            me().state = State::Spins;
            yield();
            continue;
        }
        for (auto& copy : b.copies) std::memcpy(copy.to, copy.from, copy.bytes);
        b.copies.clear();
        b.expected = 0;
        b.pending = b.count;
        b.phase++;
    }
}

}  // namespace emu
