// The CUDA driver as the tests use it: loaded at run time, so that the same program runs on a device, on the stand-in
// driver, and says so where there is neither.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cuda {

using Handle = void*;

struct Driver {
    void* library = nullptr;
    int (*init)(unsigned);
    int (*count)(int*);
    int (*retain)(Handle*, int);
    int (*set_current)(Handle);
    int (*get_current)(Handle*);
    int (*alloc)(uint64_t*, size_t);
    int (*release)(uint64_t);
    int (*to_device)(uint64_t, const void*, size_t);
    int (*to_host)(void*, uint64_t, size_t);
    int (*stream_create)(Handle*, unsigned);
    int (*stream_destroy)(Handle);
    int (*stream_wait)(Handle);
    int (*begin_capture)(Handle, int);
    int (*end_capture)(Handle, Handle*);
    int (*instantiate)(Handle*, Handle, uint64_t);
    int (*graph_launch)(Handle, Handle);
    // Of the stand-in only.
    void (*fail)(const char*, int, int);
    void (*device)(int, int, int);
    int (*left)();
    int (*depth)();

    template <class F> void get(F& f, const char* name) { f = reinterpret_cast<F>(dlsym(library, name)); }
    bool load() {
        library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr) return false;
        get(init, "cuInit"), get(count, "cuDeviceGetCount"), get(retain, "cuDevicePrimaryCtxRetain");
        get(set_current, "cuCtxSetCurrent"), get(get_current, "cuCtxGetCurrent");
        get(alloc, "cuMemAlloc_v2"), get(release, "cuMemFree_v2"), get(to_device, "cuMemcpyHtoD_v2"), get(to_host, "cuMemcpyDtoH_v2");
        get(stream_create, "cuStreamCreate"), get(stream_destroy, "cuStreamDestroy_v2"), get(stream_wait, "cuStreamSynchronize");
        get(begin_capture, "cuStreamBeginCapture_v2"), get(end_capture, "cuStreamEndCapture");
        get(instantiate, "cuGraphInstantiateWithFlags"), get(graph_launch, "cuGraphLaunch");
        get(fail, "stand_in_fail"), get(device, "stand_in_device"), get(left, "stand_in_left"), get(depth, "stand_in_depth");
        int n = 0;
        return init(0) == 0 && count(&n) == 0 && n > 0;
    }
};
inline Driver& driver() {
    static Driver d;
    return d;
}
inline void need(int code, const char* what) {
    if (code != 0) {
        std::printf("CUDA error %d in %s\n", code, what);
        std::exit(1);
    }
}

// Device memory with the host's values.
template <class T> class Buffer {
  public:
    explicit Buffer(size_t n) : n_(n) { need(driver().alloc(&at_, n * sizeof(T) + 16), "allocation"); }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { put(v); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { driver().release(at_); }
    T* get() const { return reinterpret_cast<T*>(at_); }
    void put(const std::vector<T>& v) { if (!v.empty()) need(driver().to_device(at_, v.data(), v.size() * sizeof(T)), "copy"); }
    std::vector<T> take() const {
        std::vector<T> v(n_);
        need(driver().to_host(v.data(), at_, n_ * sizeof(T)), "copy back");
        return v;
    }

  private:
    size_t n_;
    uint64_t at_ = 0;
};

}  // namespace cuda
