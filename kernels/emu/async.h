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

}  // namespace emu
