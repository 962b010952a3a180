// One test source for both worlds: nvcc and a device, or g++ and the emulator (DQ_EMU). Buffers, launches, schedule
// orders; and the check that counts.
#pragma once
#ifdef DQ_EMU
#include "../emu/emu.h"
#else
#include <cuda_runtime.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace rt {

#ifdef DQ_EMU

inline emu::Launch& how() {
    static emu::Launch launch;
    return launch;
}

// Exactly as large as asked for, so that AddressSanitizer guards its ends.
template <class T> class Buffer {
  public:
    explicit Buffer(size_t n) : n_(n), data_(static_cast<T*>(std::aligned_alloc(256, (n * sizeof(T) + 255) / 256 * 256 + 256))) {
        // The end of the buffer is the end of the allocation, up to the alignment of 16 that kernels may rely on.
        std::memset(data_, 0xA5, n * sizeof(T));
#if EMU_ASAN
        __asan_poison_memory_region(data_ + n, (n * sizeof(T) + 255) / 256 * 256 + 256 - n * sizeof(T));
#endif
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { put(v); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    T* get() const { return data_; }
    void put(const std::vector<T>& v) { if (!v.empty()) std::memcpy(data_, v.data(), v.size() * sizeof(T)); }
    std::vector<T> take() const { return std::vector<T>(data_, data_ + n_); }

  private:
    size_t n_;
    T* data_;
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared, const Params& params) {
    emu::Launch l = how();
    l.grid = grid;
    l.block = dim3(threads);
    l.shared_bytes = shared;
    emu::launch(l, [&] { kernel(params); });
}
inline void sync() {}

#else

inline void check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) { std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e)); std::exit(1); }
}
template <class T> class Buffer {
  public:
    explicit Buffer(size_t n) : n_(n) {
        check(cudaMalloc(&data_, n * sizeof(T) + 16), "cudaMalloc");
        check(cudaMemset(data_, 0xA5, n * sizeof(T)), "cudaMemset");
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { put(v); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }
    T* get() const { return data_; }
    void put(const std::vector<T>& v) { check(cudaMemcpy(data_, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "put"); }
    std::vector<T> take() const {
        std::vector<T> v(n_);
        check(cudaMemcpy(v.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "take");
        return v;
    }

  private:
    size_t n_;
    T* data_ = nullptr;
};

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared, const Params& params) {
    if (shared > 48 * 1024) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory");
    }
    kernel<<<grid, threads, shared>>>(params);
    check(cudaGetLastError(), "launch");
}
inline void sync() { check(cudaDeviceSynchronize(), "kernel"); }

#endif

inline int& failures() { static int n = 0; return n; }
inline int& passes() { static int n = 0; return n; }
// `value` at most `limit`; NaN never passes.
inline void expect(const std::string& what, double value, double limit) {
    if (value <= limit) { passes()++; return; }
    failures()++;
    std::printf("FAIL %s: %.3g, limit %.3g\n", what.c_str(), value, limit);
}
inline int report(const char* name) {
    std::printf("%s: %d passed, %d failed\n", name, passes(), failures());
    return failures() != 0;
}

}  // namespace rt
