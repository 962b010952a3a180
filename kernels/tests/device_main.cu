// On a device: the decode attention suite against the oracle, then times beside a device copy.
//   nvcc -std=c++17 -O3 -DDQ_HOST_OF_SM90A -gencode=arch=compute_90a,code=sm_90a kernels/tests/device_main.cu -o device_main && ./device_main
// Without DQ_HOST_OF_SM90A for any other architecture: it tells the host's half how blocks are cut.
// Arguments: "check" or "bench" for one of the two.
#include <algorithm>

#include "attend_test.cpp"
#include "encode_test.cpp"

namespace {

constexpr int N_KV = 8, GROUP = 4, D = 128;

__global__ void fill(uint32_t* words, size_t n) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull) {
        uint64_t z = (i + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        words[i] = uint32_t((z ^ (z >> 27)) * 0x94D049BB133111EBull >> 32);
    }
}
// Headers of scale about one; `mixed`: some rows of every tile in another set.
__global__ void fill_headers(uint8_t* store, size_t slots, uint32_t slot_bytes, uint32_t headers, bool mixed) {
    for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < slots * 2 * N_KV; i += gridDim.x * 256ull) {
        size_t slot = i / (2 * N_KV), h = i % (2 * N_KV);
        uint16_t set = mixed && slot % 5 == 0 ? 1 : 2;
        uint16_t* at = reinterpret_cast<uint16_t*>(store + slot * slot_bytes + headers);
        at[h] = uint16_t(0x7800 + (slot * 37 + h * 11) % 16 * 16) | set;
    }
}

// The copies of the attention kernel and nothing else, by bulk copies or by cp.async: what its pipeline could reach.
template <int STAGES, bool BULK>
__global__ void __launch_bounds__(256, 2) copies_only(const DqAttend p, float* out, uint32_t row_bytes) {
    DQ_DYNAMIC_SHARED(shared);
    const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, stride = dq::padded_row(row_bytes / 16), tile_keys = 32;
    const uint32_t tiles = p.n_kv / tile_keys, share = (tiles + p.n_splits - 1) / p.n_splits;
    const uint32_t first = blockIdx.x * share, end = min(first + share, tiles);
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + STAGES * tile_keys * stride);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) dq::barrier_init(barriers + s, 1);
        dq::barrier_init_done();
    }
    __syncthreads();
    auto copy_tile = [&](uint32_t tile) {
        const uint32_t index = (tile - first) % STAGES;
        uint8_t* stage = shared + index * tile_keys * stride;
        auto record = [&](uint32_t row) { return p.store.data + dq::slot_of(p, blockIdx.z, tile * tile_keys + row) * p.store.stride; };
        if (BULK) {
            if (tile >= end) return;
            if (threadIdx.x == 0) dq::barrier_expect(barriers + index, tile_keys * row_bytes);
            const uint32_t row = lane * 8 + warp;
            if (row < tile_keys) dq::bulk_copy(stage + row * stride, record(row), row_bytes, barriers + index);
            return;
        }
        for (uint32_t row = warp; row < tile_keys && tile < end; row += 8) {
            for (uint32_t c = lane; c < row_bytes / 16; c += 32) dq::cp_async_16(stage + row * stride + 16 * c, record(row) + 16 * c);
        }
        dq::cp_async_commit();
    };
    for (int s = 0; s < STAGES - 1; s++) copy_tile(first + s);
    float sum = 0;
    for (uint32_t tile = first; tile < end; tile++) {
        if (BULK) dq::barrier_wait(barriers + (tile - first) % STAGES, (tile - first) / STAGES & 1);
        else dq::cp_async_wait<STAGES - 2>();
        __syncthreads();
        copy_tile(tile + STAGES - 1);
        sum += shared[(tile - first) % STAGES * tile_keys * stride + threadIdx.x];
    }
    if (!BULK) dq::cp_async_wait<0>();
    if (sum == -1.0f) *out = sum;
}

struct Timer {
    cudaEvent_t begin, end;
    cudaStream_t stream;
    Timer() {
        cudaEventCreate(&begin), cudaEventCreate(&end);
        rt::check(cudaStreamCreate(&stream), "stream");
    }
    // Median time of one call in microseconds; `calls` calls with rotating inputs are captured and replayed.
    template <class F> double median(int calls, F&& call) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        rt::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
        for (int i = 0; i < calls; i++) call(i, stream);
        rt::check(cudaStreamEndCapture(stream, &graph), "end capture");
        rt::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
        std::vector<float> times;
        for (int r = 0; r < 12; r++) {
            cudaEventRecord(begin, stream);
            rt::check(cudaGraphLaunch(exec, stream), "replay");
            cudaEventRecord(end, stream);
            rt::check(cudaEventSynchronize(end), "replayed");
            float ms;
            cudaEventElapsedTime(&ms, begin, end);
            if (r >= 2) times.push_back(ms);
        }
        cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
        std::sort(times.begin(), times.end());
        return times[times.size() / 2] * 1e3 / calls;
    }
};

double copy_bandwidth(Timer& timer) {
    size_t bytes = 4ull << 30;
    rt::Buffer<uint8_t> a(bytes), b(bytes);
    fill<<<4096, 256>>>(reinterpret_cast<uint32_t*>(a.get()), bytes / 4);
    rt::sync();
    double us = timer.median(2, [&](int, cudaStream_t s) { cudaMemcpyAsync(b.get(), a.get(), bytes, cudaMemcpyDeviceToDevice, s); });
    return 2 * bytes / us / 1e3;
}

template <int KP, int VP>
void bench(const char* name, Timer& timer, double copy, bool mixed, bool brief) {
    using K = dq::Side<D, KP, true>;
    using V = dq::Side<D, VP, true>;
    constexpr int STAGES = dq::DECODE_STAGES;
    auto l = ref::layout(N_KV, D, KP, D, VP);
    std::mt19937_64 rng(3);
    DeviceFactors kf(ref::random_factors(D, N_KV, {2, 1}, rng)), vf(ref::random_factors(D, N_KV, {3, 0}, rng));
    const uint32_t most_streams = 64, most_keys = 131072;
    const size_t budget = size_t(most_streams) * most_keys * l.slot_bytes, slots = budget / l.slot_bytes;
    rt::Buffer<uint8_t> store(budget);
    fill<<<8192, 256>>>(reinterpret_cast<uint32_t*>(store.get()), budget / 4);
    fill_headers<<<8192, 256>>>(store.get(), slots, l.slot_bytes, l.k.headers, mixed);
    rt::Buffer<float> q(std::vector<float>(size_t(most_streams) * N_KV * GROUP * D, 0.05f));
    rt::Buffer<float> out(size_t(most_streams) * N_KV * GROUP * D);
    const size_t most_parts = 2048;
    rt::Buffer<uint8_t> folded(size_t(most_streams) * N_KV * DQ_MAX_TRANSFORMS * K::groups * 256);
    rt::Buffer<float> scales(size_t(most_streams) * N_KV * DQ_MAX_TRANSFORMS * 4), constants(size_t(most_streams) * N_KV * DQ_MAX_SETS * 4);
    rt::Buffer<float> partial(most_parts * 8 * N_KV * GROUP * D), partial_sums(most_parts * 8 * N_KV * GROUP * dq::SUMS);

    DqAttend p{};
    p.k = kf.params(), p.v = vf.params();
    p.q = {q.get(), uint64_t(N_KV) * GROUP * D * 4, D * 4, DQ_TYPE_F32, 0};
    p.out = {out.get(), uint64_t(N_KV) * GROUP * D * 4, D * 4, DQ_TYPE_F32, 0};
    p.n_kv_heads = N_KV, p.group = GROUP, p.n_q = 1, p.scale = 0.088f;
    p.v_transforms = 1, p.heads_per_block = 8, p.key_warps = 1, p.row_tiles = p.fold_tiles = p.fold_units = 1;
    p.folded = folded.get(), p.folded_scales = scales.get(), p.constants = constants.get();
    p.partial = partial.get(), p.partial_sums = partial_sums.get();
    const uint32_t shared = dq::attend_shared_bytes<K, V, 1, STAGES>(p);
    rt::check(cudaFuncSetAttribute(attend_kernel<K, V, 1>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    rt::check(cudaFuncSetAttribute(copies_only<STAGES, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    rt::check(cudaFuncSetAttribute(copies_only<STAGES, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    int per_sm = 0, sms = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, attend_kernel<K, V, 1>, 256, shared);
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
    std::printf("\n%s%s: %u bytes a slot, %d stages, %u bytes shared, %d blocks on each of %d SMs\n", name, mixed ? ", two sets in every tile" : "", l.slot_bytes, STAGES, shared, per_sm, sms);
    std::printf("%6s %7s %6s | %9s %9s %9s %9s | %9s %9s %7s %7s %7s\n", "batch", "keys", "splits", "bulk us", "async us", "attend us", "all us", "GB/s all", "bulk", "async", "attend", "all");

    for (uint32_t streams : {1u, 8u, 64u}) {
        for (uint32_t keys : {4096u, 8192u, 16384u, 65536u, 131072u}) {
            if (brief && keys != 16384 && keys != 65536) continue;
            size_t bytes = size_t(streams) * keys * l.slot_bytes, copies = std::max<size_t>(1, std::min<size_t>(slots / (size_t(streams) * keys), 64));
            double best = 1e30, best_attend = 0, best_bulk = 0, best_async = 0;
            uint32_t best_splits = 0, tried = 0;
            for (double waves : {1.0, 2.0, 4.0}) {
                uint32_t splits = uint32_t(waves * per_sm * sms / streams), tiles = keys / 32;
                splits = std::max(1u, std::min(splits, tiles));
                // No empty splits.
                uint32_t share = (tiles + splits - 1) / splits;
                splits = (tiles + share - 1) / share;
                if (splits == tried || splits * streams > most_parts * 8) continue;
                tried = splits;
                DqAttend a = p;
                a.n_streams = streams, a.n_kv = keys, a.n_splits = splits, a.stream_slots = keys;
                auto at = [&](int i) {
                    a.store = {store.get() + i % copies * bytes, l.slot_bytes, slots};
                    return a;
                };
                int calls = bytes > (1ull << 30) ? 4 : 20;
                dim3 grid(splits, 1, streams);
                auto attend = [&](int i, cudaStream_t s) { attend_kernel<K, V, 1><<<grid, 256, shared, s>>>(at(i)); };
                // As src/cuda/launch.rs, values without matrices.
                constexpr uint32_t AT_ONCE = dq::MERGE_AT_ONCE<V>;
                uint32_t merge_threads = 32 * std::min(16u, (splits + AT_ONCE - 1) / AT_ONCE);
                double all = timer.median(calls, [&](int i, cudaStream_t s) {
                    fold_kernel<K><<<dim3(N_KV * DQ_MAX_TRANSFORMS, streams), dq::FOLD_THREADS, dq::fold_shared_bytes<K>(p.fold_units), s>>>(at(i));
                    attend(i, s);
                    merge_kernel<V, false><<<streams * N_KV * GROUP, merge_threads, dq::merge_shared_bytes<V>(merge_threads), s>>>(at(i));
                });
                if (all < best) {
                    best = all, best_splits = splits;
                    best_attend = timer.median(calls, attend);
                    best_bulk = timer.median(calls, [&](int i, cudaStream_t s) { copies_only<STAGES, true><<<grid, 256, shared, s>>>(at(i), out.get(), l.slot_bytes); });
                    best_async = timer.median(calls, [&](int i, cudaStream_t s) { copies_only<STAGES, false><<<grid, 256, shared, s>>>(at(i), out.get(), l.slot_bytes); });
                }
            }
            auto share = [&](double us) { return 100 * bytes / us / 1e3 / copy; };
            std::printf("%6u %7u %6u | %9.1f %9.1f %9.1f %9.1f | %9.0f %8.0f%% %6.0f%% %6.0f%% %6.0f%%\n", streams, keys, best_splits, best_bulk, best_async, best_attend, best, bytes / best / 1e3, share(best_bulk), share(best_async), share(best_attend), share(best));
            std::fflush(stdout);
        }
    }
}

// A prefill chunk of `n` queries at the end of `keys` keys, paged and causal; the cost of the fold beside it.
void bench_prefill(Timer& timer, uint32_t n, uint32_t keys) {
    using S = dq::Side<D, 4, true>;
    auto l = ref::layout(N_KV, D, 4, D, 4);
    std::mt19937_64 rng(5);
    DeviceFactors kf(ref::random_factors(D, N_KV, {2, 1}, rng)), vf(ref::random_factors(D, N_KV, {3, 0}, rng));
    rt::Buffer<uint8_t> store(size_t(keys) * l.slot_bytes);
    fill<<<1024, 256>>>(reinterpret_cast<uint32_t*>(store.get()), size_t(keys) * l.slot_bytes / 4);
    fill_headers<<<1024, 256>>>(store.get(), keys, l.slot_bytes, l.k.headers, false);
    std::vector<int32_t> identity(keys / 16);
    for (size_t i = 0; i < identity.size(); i++) identity[i] = int32_t(i);
    rt::Buffer<int32_t> table(identity), lengths(std::vector<int32_t>{int32_t(keys)});
    const size_t rows = size_t(n) * N_KV * GROUP;
    const uint32_t n_tiles = (n * GROUP + 15) / 16 * 4;
    rt::Buffer<float> q(std::vector<float>(rows * D, 0.05f)), out(rows * D), partial(rows * D), sums(rows * dq::SUMS);
    rt::Buffer<uint8_t> folded(size_t(N_KV) * DQ_MAX_TRANSFORMS * n_tiles * S::groups * 256);
    rt::Buffer<float> scales(size_t(N_KV) * DQ_MAX_TRANSFORMS * n_tiles * 4), constants(size_t(N_KV) * DQ_MAX_SETS * n_tiles * 4);
    DqAttend p{};
    p.store = {store.get(), l.slot_bytes, keys};
    p.k = kf.params(), p.v = vf.params();
    p.q = {q.get(), uint64_t(N_KV) * GROUP * D * 4, D * 4, DQ_TYPE_F32, 0};
    p.out = {out.get(), uint64_t(N_KV) * GROUP * D * 4, D * 4, DQ_TYPE_F32, 0};
    p.block_table = table.get(), p.lengths = lengths.get(), p.table_stride = keys / 16, p.block_shift = 4, p.causal = 1;
    p.n_kv_heads = N_KV, p.group = GROUP, p.n_streams = 1, p.n_q = n, p.n_kv = keys, p.scale = 0.088f;
    p.v_transforms = 1, p.heads_per_block = p.key_warps = p.n_splits = 1, p.row_tiles = n_tiles / 4, p.fold_tiles = n_tiles;
    p.folded = folded.get(), p.folded_scales = scales.get(), p.constants = constants.get(), p.partial = partial.get(), p.partial_sums = sums.get();
    const uint32_t warps = dq::PrefillTile<S, S>::WARPS, shared = dq::prefill_shared_bytes<S, S>(p, warps, 1);
    rt::check(cudaFuncSetAttribute(prefill_kernel<S, S>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    auto fold = [&](int, cudaStream_t s) { fold_rows_kernel<S><<<dim3(N_KV, 49), dq::FOLD_ROWS_THREADS, dq::fold_rows_shared_bytes<S>(), s>>>(p); };
    auto attend = [&](int, cudaStream_t s) { prefill_kernel<S, S><<<dim3(1, N_KV * ((p.row_tiles + warps - 1) / warps), 1), dq::PrefillTile<S, S>::THREADS, shared, s>>>(p); };
    const unsigned merge_threads = 32 * dq::MERGE_MANY_WARPS;
    auto merge = [&](int, cudaStream_t s) { merge_kernel<S, true><<<dim3(66, N_KV), merge_threads, dq::merge_shared_bytes<S>(merge_threads), s>>>(p); };
    const double a = timer.median(5, fold), b = timer.median(5, attend), c = timer.median(5, merge);
    const double flops = 4.0 * D * N_KV * GROUP * (double(n) * keys - double(n) * (n - 1) / 2);
    std::printf("prefill, %u queries over %u keys: fold %.1f, attend %.1f, merge %.1f us; %.0f TFLOP/s in attend\n", n, keys, a, b, c, flops / b / 1e6);
}

// Encode of a chunk: K in the newest (dense) set, V about a mean.
template <int PLAN>
void bench_encode(Timer& timer, uint32_t n) {
    using K = dq::Side<D, PLAN, true>;
    using V = dq::Side<D, 4, true>;
    auto l = ref::layout(N_KV, D, PLAN, D, 4);
    std::mt19937_64 rng(4);
    DeviceFactors kf(ref::random_factors(D, N_KV, {2, 1}, rng, l.k.tiers)), vf(ref::random_factors(D, N_KV, {3, 0}, rng));
    std::vector<uint16_t> half(size_t(n) * N_KV * D);
    std::normal_distribution<double> normal;
    for (auto& x : half) x = ref::to_half(normal(rng));
    std::vector<int64_t> slots(n);
    for (uint32_t i = 0; i < n; i++) slots[i] = i;
    rt::Buffer<uint16_t> rows(half);
    rt::Buffer<int64_t> d_slots(slots);
    rt::Buffer<uint8_t> store(size_t(n) * l.slot_bytes);
    DqEncode p{};
    p.store = {store.get(), l.slot_bytes, n};
    p.k = kf.params(), p.v = vf.params();
    p.k_rows = p.v_rows = {rows.get(), N_KV * D * 2, D * 2, DQ_TYPE_F16, 0};
    p.slots = d_slots.get(), p.n = n, p.n_kv_heads = N_KV;
    const uint32_t shared = dq::encode_shared_bytes<K, V>();
    rt::check(cudaFuncSetAttribute(encode_kernel<K, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    double us = timer.median(20, [&](int, cudaStream_t s) { encode_kernel<K, V><<<dim3((n + dq::ENCODE_ROWS - 1) / dq::ENCODE_ROWS, N_KV, 2), 256, shared, s>>>(p); });
    std::printf("encode, plan %d, %u tokens: %.1f us a layer\n", PLAN, n, us);
}

}  // namespace

int main(int argc, char** argv) {
    std::string what = argc > 1 ? argv[1] : "";
    if (what != "bench") {
        std::mt19937_64 rng(1);
        const int n = sizeof CASES / sizeof *CASES;
        all_cases<128, 4, 128, 4>(rng, 0, n);
        all_cases<128, 3, 128, 3>(rng, 0, n);
        all_cases<64, 3, 64, 3>(rng, 0, n);
        run<128, 4, 128, 4, 2, true>({"wide group", 2, 7, 1, 1, 70, 2, {2, 1}, {2, 0}, 1, true, 0, false, false, 4}, rng);
        run<128, 4, 128, 4, 1, true>({"eight heads", 8, 4, 2, 1, 3000, 20, {2, 2}, {3, 0}, 1, true, 0, true, false, 8}, rng);
        prefill_cases<128, 4, 128, 4, 12>(rng, 0, 4);
        prefill_cases<128, 3, 128, 3, 8>(rng, 0, 4);
        encode_cases_short(rng);
        if (rt::report("kernels on the device")) return 1;
    }
    if (what != "check") {
        Timer timer;
        double copy = copy_bandwidth(timer);
        std::printf("device copy, bytes read and written: %.0f GB/s\n", copy);
        for (uint32_t n : {1u, 64u, 512u}) {
            bench_encode<4>(timer, n);
            bench_encode<104>(timer, n);
        }
        bench_prefill(timer, 512, 4096), bench_prefill(timer, 2048, 16384);
        bench<4, 4>("dq4", timer, copy, false, false);
        bench<3, 3>("dq3", timer, copy, false, false);
        bench<4, 4>("dq4", timer, copy, true, true);
    }
    return 0;
}
