"""What bench_cuda's figures are held against: a device copy, a matrix product, and the best f16 attention of PyTorch.

One query of 32 heads over 8 KV heads, head_dim 128, then prompts that see all keys; medians over replays of a graph of calls whose keys
and values rotate.
Needs PyTorch with CUDA:  python3 cpp_tests/bench_f16.py
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median(times):
    return sorted(times)[len(times) // 2]


def times(call, n):
    """Milliseconds of each of n calls."""
    out = []
    for _ in range(n):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        out.append(begin.elapsed_time(end))
    return out


def graph_us(call, calls):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i)
        return median(times(graph.replay, 12)[2:]) * 1e3 / calls


a = torch.randn(1 << 31, device="cuda", dtype=torch.half)
b = torch.empty_like(a)
print(f"{torch.cuda.get_device_name()} copy GB/s {2 * a.numel() * 2 / median(times(lambda: b.copy_(a), 8)) / 1e6:.0f}")
del a, b
m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print(f"bf16 TFLOP/s {2 * 8192**3 / median(times(lambda: m @ m, 8)) / 1e9:.0f}")
del m


def best(name, q, ks, vs, calls):
    """Microseconds of the fastest backend."""
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                call = lambda i: F.scaled_dot_product_attention(q, ks[i % len(ks)], vs[i % len(vs)], enable_gqa=True)
                found[backend.name] = graph_us(call, calls)
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    print(f"f16 {name}: {min(found.values()):.1f} us", found, flush=True)


for batch in (1, 8, 64):
    for keys in (4096, 8192, 16384, 65536, 131072):
        elements = batch * keys * 8 * 128
        if elements * 4 > 60e9:
            continue
        n = max(1, min(16, int(3e8 / (elements * 4)) + 1))
        ks = [torch.randn(batch, 8, keys, 128, device="cuda", dtype=torch.half) for _ in range(n)]
        vs = [torch.randn_like(k) for k in ks]
        q = torch.randn(batch, 32, 1, 128, device="cuda", dtype=torch.half)
        best(f"{batch} x {keys}", q, ks, vs, 4 if batch * keys > 1e6 else 16)
        del ks, vs
for queries, keys in ((512, 4096), (2048, 16384)):
    k, v = (torch.randn(1, 8, keys, 128, device="cuda", dtype=torch.half) for _ in range(2))
    q = torch.randn(1, 32, queries, 128, device="cuda", dtype=torch.half)
    best(f"prompt of {queries} over {keys}", q, [k], [v], 5)
