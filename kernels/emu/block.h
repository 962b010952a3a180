// Runs a grid block by block, a block as fibers. A fiber runs until it waits at a collective; the scheduler then runs
// the others, in one of three orders. A block in which all fibers wait and none can go on is a deadlock: abort.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "fiber.h"

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Every collective knows where it was called: lanes that meet in different places are a bug of the kernel.
#define EMU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

enum class State : uint8_t { Runs, InWarp, InBlock, Spins, Done };

// Warps run in ascending or descending order, each as far ahead of the others as barriers let it; or all threads in a new
// random order each round. Blocks likewise.
enum class Order : uint8_t { Ascending, Descending, Random };

struct PendingCopy {
    void* to;
    const void* from;
    unsigned bytes;
};

// Lines of so many bytes in shared memory, whose 16-byte chunks are swizzled: the address's bits from 4 on with those from 7 on,
// within the mask.
struct SharedLines {
    const uint8_t* at = nullptr;
    uint32_t line = 0, mask = 0;
};

// A matrix product of a warp group under way: its result of f32 or s32, n tiles of it, and what it is made of: A and B of s8 in shared
// memory, 64 by 32 and 32 by 8 n, or A of f16 in registers, and B of 16 by 8 n.
struct GroupMma {
    float* sums;
    int32_t* counts;
    int n_tiles;
    SharedLines a_lines;
    uint32_t a[4];
    SharedLines b;
    bool add;
    bool follows = false;  // one whose result it goes on with
    uint32_t before[32] = {};
    uint64_t seen = 0;  // a hash of the matrices in shared memory when it began
    const char* file = nullptr;
    int line = 0;
    void* result() const { return counts != nullptr ? static_cast<void*>(counts) : sums; }
};

// Of the four warps of a group.
struct GroupMeeting {
    unsigned here = 0, round = 0;
    int line = 0;
};

struct Thread {
    State state;
    unsigned id;
    dim3 index;
    bool vote = false;  // of __syncthreads_or
    bool waited;        // for the launch before
    // The collective it waits in.
    const void* collective;
    uint32_t mask;
    void* payload;
    const char* file;
    int line;
    // cp.async of this thread: the open group and the committed ones, oldest first.
    std::vector<PendingCopy> open;
    std::vector<std::vector<PendingCopy>> groups;
    // Products of its warp group, oldest first, and where each committed lot of them ends.
    std::vector<GroupMma> products;
    std::vector<size_t> product_groups;
    Context context;
    char* stack = nullptr;
};

struct MBarrier {
    unsigned count, pending;
    uint64_t expected;
    unsigned phase;
    std::vector<PendingCopy> copies;
};

struct Block {
    std::vector<Thread> threads;
    std::map<void*, MBarrier> barriers;
    std::map<unsigned, GroupMeeting> meetings;
    dim3 block_dim, grid_dim, index;
    unsigned live = 0, current = 0;
    // Of the whole launch: whether a thread spoke of the launches before and behind it, whether one waited for the one before or
    // left that to others, and whether one ended without either; which, as (block, thread).
    bool overlaps = false, waits = false, leaves = false, unwaited = false;
    std::pair<dim3, unsigned> first_unwaited;
    std::function<void()> kernel;
    Context scheduler;
    // Exactly as large as asked for, so that AddressSanitizer sees what lies beyond.
    uint8_t* shared = nullptr;
    size_t shared_bytes = 0;
};

inline Block*& block() {
    static thread_local Block* b = nullptr;
    return b;
}

inline Thread& me() { return block()->threads[block()->current]; }

[[noreturn]] inline void die(const char* why) {
    Block& b = *block();
    std::fprintf(stderr, "emu: %s in block (%u,%u,%u), thread %u\n", why, b.index.x, b.index.y, b.index.z, b.current);
    int shown = 0;
    for (auto& t : b.threads) {
        if (t.state == State::Runs || t.state == State::Done) continue;
        std::fprintf(stderr, "  thread %u waits, mask %08x, at %s:%d\n", t.id, t.mask, t.file, t.line);
        if (++shown == 6) break;
    }
    std::abort();
}

inline void yield() { switch_context(me().context, block()->scheduler, false); }

inline void thread_main() {
    Block& b = *block();
    arrived_on_new_stack(b.scheduler);
    b.kernel();
    Thread& t = me();
    if (!t.open.empty() || !t.groups.empty()) die("a thread ends with copies under way");
    if (!t.products.empty()) die("a thread ends with matrix products under way");
    if (!t.waited && !b.unwaited) b.unwaited = true, b.first_unwaited = {b.index, t.id};
    if (b.live == 1) {
        for (auto& barrier : b.barriers) if (!barrier.second.copies.empty()) die("a block ends with bulk copies under way");
    }
    t.state = State::Done;
    b.live--;
    switch_context(t.context, b.scheduler, true);
    std::abort();
}

// Launches run one after the other here, so that neither call has anything to do. But all threads of a kernel that overlaps
// with others must wait, or none: `launch` looks at the end.
inline void start_next_launch() { block()->overlaps = true; }
inline void wait_for_previous_launch() { block()->overlaps = block()->waits = me().waited = true; }
inline void leave_waiting_to_others() { block()->leaves = me().waited = true; }

inline void barrier(const char* file, int line) {
    Thread& t = me();
    Block& b = *block();
    if (b.live != b.threads.size()) die("__syncthreads after a thread has exited");
    t.state = State::InBlock;
    t.file = file;
    t.line = line;
    t.mask = ~0u;
    for (auto& other : b.threads) {
        if (other.state != State::InBlock) return yield();
    }
    for (auto& other : b.threads) {
        if (other.line != line || std::strcmp(other.file, file) != 0) die("threads at different __syncthreads");
    }
    for (auto& other : b.threads) other.state = State::Runs;
}

struct Launch {
    dim3 grid, block;
    size_t shared_bytes = 0;
    Order order = Order::Ascending;
    uint64_t seed = 1;
};

inline uint64_t next_random(uint64_t& seed) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return seed >> 33;
}

inline void arrange(std::vector<unsigned>& turns, Order order, uint64_t& seed) {
    if (order != Order::Random) return;
    for (size_t i = turns.size(); i > 1; i--) std::swap(turns[i - 1], turns[next_random(seed) % i]);
}

inline std::vector<unsigned> turns_of(size_t n, Order order) {
    std::vector<unsigned> turns(n);
    for (size_t i = 0; i < n; i++) turns[i] = order == Order::Descending ? n - 1 - i : i;
    return turns;
}

inline void run_block(Block& b, Order order, uint64_t& seed) {
    b.live = b.threads.size();
    b.barriers.clear();
    b.meetings.clear();
    std::memset(b.shared, 0xCB, b.shared_bytes);
    for (unsigned i = 0; i < b.threads.size(); i++) {
        Thread& t = b.threads[i];
        t.id = i;
        t.index = dim3(i % b.block_dim.x, i / b.block_dim.x % b.block_dim.y, i / (b.block_dim.x * b.block_dim.y));
        t.state = State::Runs;
        t.waited = false;
        t.open.clear();
        t.groups.clear();
        t.products.clear();
        t.product_groups.clear();
        prepare_context(t.context, t.stack, thread_main);
    }
    auto turns = turns_of(b.threads.size(), order);
    // Rounds in which threads did nothing but poll.
    unsigned idle_rounds = 0;
    while (b.live) {
        bool ran = false, moved = false;
        arrange(turns, order, seed);
        for (size_t first = 0; first < turns.size(); first += 32) {
            for (bool again = true, polls = true; again; polls = false) {
                again = false;
                for (size_t k = first; k < first + 32 && k < turns.size(); k++) {
                    Thread& t = b.threads[turns[k]];
                    if (t.state == State::Spins && polls) t.state = State::Runs;
                    if (t.state != State::Runs) continue;
                    ran = true;
                    b.current = turns[k];
                    switch_context(b.scheduler, t.context, false);
                    again |= t.state != State::Spins && order != Order::Random;
                    moved |= t.state != State::Spins;
                }
            }
        }
        idle_rounds = moved ? 0 : idle_rounds + 1;
        if (!ran || idle_rounds > 100) die("deadlock");
    }
}

template <class Kernel>
void launch(const Launch& how, Kernel&& kernel) {
    Block b;
    block() = &b;
    b.grid_dim = how.grid;
    b.block_dim = how.block;
    b.kernel = kernel;
    b.threads.resize(how.block.x * how.block.y * how.block.z);
    for (auto& t : b.threads) t.stack = static_cast<char*>(std::aligned_alloc(64, STACK_BYTES));
    b.shared_bytes = how.shared_bytes;
    b.shared = static_cast<uint8_t*>(std::aligned_alloc(128, std::max<size_t>(128, (how.shared_bytes + 127) / 128 * 128)));
    uint64_t seed = how.seed;
    auto blocks = turns_of(size_t(how.grid.x) * how.grid.y * how.grid.z, how.order);
    arrange(blocks, how.order, seed);
    for (unsigned i : blocks) {
        b.index = dim3(i % how.grid.x, i / how.grid.x % how.grid.y, i / (how.grid.x * how.grid.y));
        run_block(b, how.order, seed);
    }
    if (b.overlaps && b.unwaited) {
        b.index = b.first_unwaited.first, b.current = b.first_unwaited.second;
        die("a thread ends without a wait for the launch before");
    }
    if (b.leaves && !b.waits) {
        b.index = dim3(), b.current = 0;  // no thread in particular
        die("all blocks leave the wait for the launch before to others");
    }
    for (auto& t : b.threads) std::free(t.stack);
    std::free(b.shared);
    block() = nullptr;
}

// threadIdx and the like, read through the running fiber.
enum class Which { Thread, Block, BlockDim, GridDim };

struct Index {
    struct Part {
        Which which;
        unsigned axis;
        operator unsigned() const {
            Block& b = *block();
            const dim3& d = which == Which::Thread ? b.threads[b.current].index
                : which == Which::Block            ? b.index
                : which == Which::BlockDim         ? b.block_dim
                                                   : b.grid_dim;
            return axis == 0 ? d.x : axis == 1 ? d.y : d.z;
        }
    };
    Part x, y, z;
    constexpr Index(Which w) : x{w, 0}, y{w, 1}, z{w, 2} {}
};

inline uint8_t* dynamic_shared() { return block()->shared; }

}  // namespace emu

static constexpr emu::Index threadIdx{emu::Which::Thread}, blockIdx{emu::Which::Block},
    blockDim{emu::Which::BlockDim}, gridDim{emu::Which::GridDim};

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define __shared__ static  // one block runs at a time

inline void __syncthreads(EMU_CALLER) { emu::barrier(file, line); }
inline int __syncthreads_or(int v, EMU_CALLER) {
    emu::me().vote = v != 0;
    emu::barrier(file, line);
    bool any = false;
    for (auto& t : emu::block()->threads) any |= t.vote;
    // Nobody may vote again before all have counted.
    emu::barrier(file, line);
    return any;
}
