// Blocks of slots, shared by reference counts. One block number stands for the same slots in the store of every layer.
#pragma once

#include <cassert>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

namespace paged {

class BlockPool {
public:
    BlockPool(uint32_t n_blocks, uint32_t block_slots) : slots_(block_slots), users_(n_blocks), keys_(n_blocks) {
        for (uint32_t b = n_blocks; b > 0; b--) free_.push_back(static_cast<int32_t>(b - 1));
    }

    uint32_t block_slots() const { return slots_; }
    size_t n_free() const { return free_.size(); }
    size_t n_blocks() const { return users_.size(); }
    uint32_t users(int32_t block) const { return users_[static_cast<size_t>(block)]; }

    std::optional<int32_t> take() {
        if (free_.empty()) return {};
        const int32_t block = free_.back();
        free_.pop_back();
        users_[static_cast<size_t>(block)] = 1;
        return block;
    }

    void share(int32_t block) { users_[static_cast<size_t>(block)]++; }

    void drop(int32_t block) {
        auto &users = users_[static_cast<size_t>(block)];
        assert(users > 0);
        if (--users == 0) {
            withdraw(block);
            free_.push_back(block);
        }
    }

    // A full block can be found again by what it holds: a hash of all tokens up to its end.
    void publish(int32_t block, uint64_t key) {
        if (by_key_.emplace(key, block).second) keys_[static_cast<size_t>(block)] = key;
    }

    // The block is about to hold something else.
    void withdraw(int32_t block) {
        auto &key = keys_[static_cast<size_t>(block)];
        if (key) by_key_.erase(*key);
        key.reset();
    }

    std::optional<int32_t> find(uint64_t key) const {
        const auto found = by_key_.find(key);
        if (found == by_key_.end()) return {};
        return found->second;
    }

private:
    uint32_t slots_;
    std::vector<int32_t> free_;
    std::vector<uint32_t> users_;
    std::vector<std::optional<uint64_t>> keys_;
    std::unordered_map<uint64_t, int32_t> by_key_;
};

}  // namespace paged
