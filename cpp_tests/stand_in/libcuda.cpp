// A CUDA driver without a device, for tests: the part of the driver API that the library and its tests use. Kernels run
// at once, on the CPU, by the emulator of kernels/emu; streams and contexts are tokens; a stream that is captured records
// its launches, and a graph repeats them. `stand_in_fail` makes a function fail, `stand_in_device` changes the device.
#define DQ_EMU 1
#define DQ_INSTANCES_FEW 1
#include "../../kernels/entry.cu"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
       NO_BINARY = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
using Handle = void*;
constexpr int MOST_SHARED = 227 * 1024, MAX_THREADS_PER_BLOCK = 0;
using Launch = std::function<void()>;

struct Function {
    size_t params;
    void (*run)(const emu::Launch&, const void*);
};
template <class P, void (*kernel)(P)> void run(const emu::Launch& how, const void* params) {
    P p;
    std::memcpy(&p, params, sizeof p);
    emu::launch(how, [&] { kernel(p); });
}
// The library works out by itself what shared memory this one needs.
template <class K, class V, void (*kernel)(DqAttend)> void run_prefill(const emu::Launch& how, const void* params) {
    DqAttend p;
    std::memcpy(&p, params, sizeof p);
    using Tile = dq::PrefillTile<K, V>;
    auto need = [&](uint32_t query_slots) { return dq::prefill_shared_bytes<K, V>(p, Tile::WARPS, query_slots); };
    const uint32_t most = Tile::GROUPS ? dq::MOST_QUERY_SLOTS : 0;
    emu::launch(how, [&] {
        if (Tile::GROUPS && how.block.x != Tile::THREADS) emu::die("a block of warp groups that has not all its warps");
        if (how.shared_bytes != need(most) && (need(most) <= MOST_SHARED || how.shared_bytes != need(1))) emu::die("not the shared memory that attention of many queries needs");
        kernel(p);
    });
}
#define ATTENTION(suffix, d, kp, vp)                                                                                  \
    {"dq_attend_" #d "_" #kp "_" #vp "_n1" #suffix, {sizeof(DqAttend), run<DqAttend, dq_attend_##d##_##kp##_##vp##_n1##suffix>}}, \
    {"dq_attend_" #d "_" #kp "_" #vp "_n2" #suffix, {sizeof(DqAttend), run<DqAttend, dq_attend_##d##_##kp##_##vp##_n2##suffix>}}, \
    {"dq_prefill_" #d "_" #kp "_" #vp #suffix,                                                                        \
     {sizeof(DqAttend), run_prefill<dq::Side<d, kp, true>, dq::Side<d, vp, true>, dq_prefill_##d##_##kp##_##vp##suffix>}},
#define OTHERS(d, kp, vp)                                                                                             \
    ATTENTION(, d, kp, vp)                                                                                            \
    {"dq_fold_" #d "_" #kp "_" #vp, {sizeof(DqAttend), run<DqAttend, dq_fold_##d##_##kp##_##vp>}},                    \
    {"dq_fold_many_" #d "_" #kp "_" #vp, {sizeof(DqAttend), run<DqAttend, dq_fold_many_##d##_##kp##_##vp>}},          \
    {"dq_merge_" #d "_" #kp "_" #vp, {sizeof(DqAttend), run<DqAttend, dq_merge_##d##_##kp##_##vp>}},                  \
    {"dq_merge_many_" #d "_" #kp "_" #vp, {sizeof(DqAttend), run<DqAttend, dq_merge_many_##d##_##kp##_##vp>}},        \
    {"dq_encode_" #d "_" #kp "_" #vp, {sizeof(DqEncode), run<DqEncode, dq_encode_##d##_##kp##_##vp>}},                \
    {"dq_encode_few_" #d "_" #kp "_" #vp, {sizeof(DqEncode), run<DqEncode, dq_encode_few_##d##_##kp##_##vp>}},        \
    {"dq_dequantize_" #d "_" #kp "_" #vp, {sizeof(DqDequantize), run<DqDequantize, dq_dequantize_##d##_##kp##_##vp>}},
#define UNALIGNED(d, kp, vp) ATTENTION(u, d, kp, vp)

std::map<std::string, Function>& functions() {
    static std::map<std::string, Function> all = {
        DQ_INSTANCES(OTHERS) DQ_UNALIGNED_INSTANCES(UNALIGNED) {"dq_tail", {sizeof(DqAttend), run<DqAttend, dq_tail>}},
        {"dq_observe", {sizeof(DqObserve), run<DqObserve, dq_observe>}},
        {"dq_products", {sizeof(DqObserve), run<DqObserve, dq_products>}},
        {"dq_publish", {sizeof(DqPublish), run<DqPublish, dq_publish>}},
        {"dq_group_mma", {0, nullptr}}};
    return all;
}

struct Stream {
    int capture = 0;
    std::vector<Launch> recorded;
};
struct Graph {
    std::vector<Launch> launches;
};
struct State {
    std::mutex mutex;
    std::map<std::string, std::pair<int, int>> failures;  // function: calls before, code
    std::set<Stream*> streams;
    std::map<uintptr_t, size_t> memory;
    int devices = 1, version = 13000, retained = 0, has_kernels = 1;
    Stream legacy;
};
State& state() {
    static State* s = new State;
    return *s;
}
thread_local std::vector<Handle> contexts;
const Handle PRIMARY = reinterpret_cast<Handle>(0xC0DE);

// Nonzero when the test wants this call to fail.
int wanted(const char* name) {
    State& s = state();
    auto f = s.failures.find(name);
    if (f == s.failures.end() || f->second.first-- > 0) return SUCCESS;
    int code = f->second.second;
    s.failures.erase(f);
    return code;
}
#define ENTER(name)                                                                                                   \
    std::lock_guard<std::mutex> lock(state().mutex);                                                                  \
    if (int code = wanted(name)) return code
#define NEED_CONTEXT() do { if (contexts.empty() || contexts.back() != PRIMARY) return INVALID_CONTEXT; } while (0)

Stream* stream_of(Handle h) {
    State& s = state();
    if (h == nullptr) return &s.legacy;
    auto* stream = static_cast<Stream*>(h);
    return s.streams.count(stream) ? stream : nullptr;
}
int allocate(void** at, size_t bytes) {
    // The library may rely on 256 bytes; what it must not rely on is the content.
    void* p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (p == nullptr) return OUT_OF_MEMORY;
    std::memset(p, 0xA5, bytes);
    state().memory[reinterpret_cast<uintptr_t>(p)] = bytes;
    *at = p;
    return SUCCESS;
}
// A copy or a wait is no part of a capture.
int now(Stream* s) { return s == nullptr ? INVALID_HANDLE : s->capture ? CAPTURE_UNSUPPORTED : SUCCESS; }

}  // namespace

extern "C" {

// ---- What tests reach by dlsym ----

// The call of this function after `before` further ones fails with `code`.
void stand_in_fail(const char* function, int before, int code) { state().failures[function] = {before, code}; }
void stand_in_device(int devices, int version, int has_kernels) {
    state().devices = devices, state().version = version, state().has_kernels = has_kernels;
}
// Allocations and retained contexts that are left.
int stand_in_left() { return int(state().memory.size()) + state().retained; }
int stand_in_depth() { return int(contexts.size()); }

// ---- The driver ----

int cuInit(unsigned) { ENTER("cuInit"); return SUCCESS; }
int cuDriverGetVersion(int* v) { ENTER("cuDriverGetVersion"); *v = state().version; return SUCCESS; }
int cuGetErrorName(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE" : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return SUCCESS;
}
int cuDeviceGetCount(int* n) { ENTER("cuDeviceGetCount"); *n = state().devices; return SUCCESS; }
int cuDeviceGet(int* d, int ordinal) { ENTER("cuDeviceGet"); *d = ordinal; return ordinal < state().devices ? SUCCESS : INVALID_DEVICE; }
int cuDeviceGetAttribute(int* v, int attribute, int) {
    ENTER("cuDeviceGetAttribute");
    switch (attribute) {
        case 16: *v = 4; break;          // multiprocessors
        case 75: *v = 9; break;          // compute capability
        case 76: *v = 0; break;
        case 81: *v = 228 * 1024; break; // shared memory of a multiprocessor
        case 97: *v = MOST_SHARED; break; // and of a block
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(Handle* c, int) { ENTER("cuDevicePrimaryCtxRetain"); *c = PRIMARY; state().retained++; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { ENTER("cuDevicePrimaryCtxRelease"); state().retained--; return SUCCESS; }
int cuCtxPushCurrent_v2(Handle c) { contexts.push_back(c); return SUCCESS; }
int cuCtxPopCurrent_v2(Handle* c) {
    if (contexts.empty()) return INVALID_CONTEXT;
    *c = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
int cuCtxSetCurrent(Handle c) {
    if (!contexts.empty()) contexts.pop_back();
    if (c) contexts.push_back(c);
    return SUCCESS;
}
int cuCtxGetCurrent(Handle* c) { *c = contexts.empty() ? nullptr : contexts.back(); return SUCCESS; }
int cuCtxSynchronize() { ENTER("cuCtxSynchronize"); NEED_CONTEXT(); return SUCCESS; }
int cuModuleLoadData(Handle* m, const void*) {
    ENTER("cuModuleLoadData");
    NEED_CONTEXT();
    *m = &functions();
    return state().has_kernels ? SUCCESS : NO_BINARY;
}
int cuModuleUnload(Handle) { ENTER("cuModuleUnload"); return SUCCESS; }
int cuModuleGetFunction(Handle* f, Handle, const char* name) {
    ENTER("cuModuleGetFunction");
    auto found = functions().find(name);
    if (found == functions().end()) return NOT_FOUND;
    *f = &found->second;
    return SUCCESS;
}
int cuFuncGetAttribute(int* v, int attribute, Handle f) {
    ENTER("cuFuncGetAttribute");
    *v = attribute == MAX_THREADS_PER_BLOCK && f == &functions()["dq_group_mma"] ? (dq::HAS_GROUP_MMA ? 128 : 32) : 0;
    return SUCCESS;
}
int cuFuncSetAttribute(Handle, int, int) { ENTER("cuFuncSetAttribute"); return SUCCESS; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, Handle, int, size_t) { ENTER("cuOccupancy"); *n = 1; return SUCCESS; }
struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    Handle stream;
    const int* attributes;
    unsigned n_attributes;
};
int cuLaunchKernelEx(const LaunchConfig* config, Handle f, void** params, void**) {
    ENTER("cuLaunchKernel");
    NEED_CONTEXT();
    Stream* s = stream_of(config->stream);
    if (s == nullptr) return INVALID_HANDLE;
    const unsigned *grid = config->grid, *block = config->block;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || block[0] == 0) return INVALID_VALUE;
    // The only attribute that the library knows: a kernel may overlap with the one before it.
    if (config->n_attributes > 1 || (config->n_attributes == 1 && config->attributes[0] != 6)) return INVALID_VALUE;
    const Function* function = static_cast<Function*>(f);
    const char* bytes = static_cast<const char*>(params[0]);
    std::vector<char> copy(bytes, bytes + function->params);
    emu::Launch how;
    how.grid = dim3(grid[0], grid[1], grid[2]), how.block = dim3(block[0], block[1], block[2]), how.shared_bytes = config->shared;
    Launch launch = [=] { function->run(how, copy.data()); };
    if (s->capture) s->recorded.push_back(launch);
    else launch();
    return SUCCESS;
}
int cuMemAlloc_v2(uint64_t* at, size_t bytes) {
    ENTER("cuMemAlloc");
    NEED_CONTEXT();
    void* p = nullptr;
    int code = allocate(&p, bytes);
    *at = reinterpret_cast<uint64_t>(p);
    return code;
}
int cuMemFree_v2(uint64_t at) {
    ENTER("cuMemFree");
    if (!state().memory.erase(at)) return INVALID_VALUE;
    std::free(reinterpret_cast<void*>(at));
    return SUCCESS;
}
int cuMemHostAlloc(void** at, size_t bytes, unsigned) { ENTER("cuMemHostAlloc"); NEED_CONTEXT(); return allocate(at, bytes); }
int cuMemFreeHost(void* at) {
    ENTER("cuMemFreeHost");
    state().memory.erase(reinterpret_cast<uintptr_t>(at));
    std::free(at);
    return SUCCESS;
}
int cuMemHostGetDevicePointer_v2(uint64_t* at, void* host, unsigned) { *at = reinterpret_cast<uint64_t>(host); return SUCCESS; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) { ENTER("cuMemcpyHtoD"); NEED_CONTEXT(); std::memcpy(reinterpret_cast<void*>(to), from, n); return SUCCESS; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t n) { ENTER("cuMemcpyDtoH"); NEED_CONTEXT(); std::memcpy(to, reinterpret_cast<void*>(from), n); return SUCCESS; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, Handle stream) {
    ENTER("cuMemcpyHtoDAsync");
    NEED_CONTEXT();
    if (int code = now(stream_of(stream))) return code;
    std::memcpy(reinterpret_cast<void*>(to), from, n);
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, Handle stream) {
    ENTER("cuMemcpyDtoHAsync");
    NEED_CONTEXT();
    if (int code = now(stream_of(stream))) return code;
    std::memcpy(to, reinterpret_cast<void*>(from), n);
    return SUCCESS;
}
int cuStreamCreate(Handle* s, unsigned) {
    ENTER("cuStreamCreate");
    auto* stream = new Stream;
    state().streams.insert(stream);
    *s = stream;
    return SUCCESS;
}
int cuStreamDestroy_v2(Handle s) {
    ENTER("cuStreamDestroy");
    return state().streams.erase(static_cast<Stream*>(s)) ? SUCCESS : INVALID_HANDLE;  // kept, so that its address is not taken again
}
int cuStreamGetCtx(Handle s, Handle* c) { ENTER("cuStreamGetCtx"); *c = PRIMARY; return stream_of(s) ? SUCCESS : INVALID_HANDLE; }
int cuStreamIsCapturing(Handle s, int* status) {
    ENTER("cuStreamIsCapturing");
    Stream* stream = stream_of(s);
    if (stream == nullptr) return INVALID_HANDLE;
    *status = stream->capture;
    return SUCCESS;
}
int cuStreamSynchronize(Handle s) { ENTER("cuStreamSynchronize"); NEED_CONTEXT(); return now(stream_of(s)); }
int cuStreamBeginCapture_v2(Handle s, int) {
    ENTER("cuStreamBeginCapture");
    Stream* stream = stream_of(s);
    if (stream == nullptr || stream->capture) return INVALID_HANDLE;
    stream->capture = 1;
    return SUCCESS;
}
int cuStreamEndCapture(Handle s, Handle* graph) {
    ENTER("cuStreamEndCapture");
    Stream* stream = stream_of(s);
    if (stream == nullptr || !stream->capture) return INVALID_HANDLE;
    stream->capture = 0;
    *graph = new Graph{std::move(stream->recorded)};
    stream->recorded.clear();
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(Handle* exec, Handle graph, uint64_t) { *exec = new Graph(*static_cast<Graph*>(graph)); return SUCCESS; }
int cuGraphLaunch(Handle exec, Handle) {
    ENTER("cuGraphLaunch");
    for (auto& launch : static_cast<Graph*>(exec)->launches) launch();
    return SUCCESS;
}
int cuGraphExecDestroy(Handle exec) { delete static_cast<Graph*>(exec); return SUCCESS; }
int cuGraphDestroy(Handle graph) { delete static_cast<Graph*>(graph); return SUCCESS; }

}  // extern "C"
