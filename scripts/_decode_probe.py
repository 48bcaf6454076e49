# pyright: basic
# ruff: noqa
import sys, time
sys.argv = ["x", "probe"]
sys.path[:0] = ["src", "scripts"]
from _decode_bench import *
import numpy as np
dev = torch.device("cuda")
sms = torch.cuda.get_device_properties(dev).multi_processor_count
pool = torch.empty(18 * 2**30, dtype=torch.bfloat16, device=dev)
for part in pool.split(2**30): part.normal_()
state = torch.zeros(1 << 16, dtype=torch.int32, device=dev)


def table_batch(E, n, kind, max_kv=8192):
    lens = [n] * E
    batch, _ = batch_of(lens, max_kv, dev)
    per = -(-n // 16)
    ids = torch.arange(E * per)
    if kind == "sequential": t = ids.view(E, per)
    elif kind == "interleaved": t = ids.view(per, E).T
    else: t = ids[torch.randperm(E * per)].view(E, per)
    batch.block_table_RC[:E, :per] = (t + 1).to(torch.int32).to(dev)
    return lens, batch, E * per + 1


def regions(blocks, regime, K=8, D=128):
    per_layer = 2 * blocks * K * 16 * D
    per_layer = (per_layer + 2**20 - 1) // 2**20 * 2**20  # 2 MiB pages
    n = min(32, pool.numel() // per_layer)
    use = 2 * blocks * K * 16 * D
    all_ = [LayerKV(*pool[i * per_layer:i * per_layer + use].view(2, blocks, K, 16, D)) for i in range(n)]
    return all_ if regime == "rotate" else [all_[i % 2] for i in range(n)]


FLAT2 = {**D, "units": 4096, "block_n": 64, "stages": 3, "per": 2}
OLD = dict(old=True, programs=4)
@triton.jit
def empty(x):
    tl.store(x + tl.program_id(0), 1.0)
o = torch.empty(1 << 16, device=dev)
print("empty kernel", [round(time_graph([lambda: empty[(n,)](o, num_warps=4)] * 32), 2) for n in (1, 132, 1024, 8192)])
def plain(chunk):
    block, per, warps = 4096, 8, 8
    programs = chunk // (block * per)
    return round(time_graph([lambda x=pool[i * chunk:(i + 1) * chunk]: read_only[(programs,)](x, o, block, per, num_warps=warps) for i in range(min(32, pool.numel() // chunk))]), 1)
print("plain 32MiB", plain(2**24), "128MiB", plain(2**26), "512MiB", plain(2**28), "1GiB", plain(2**29))
for E, n in ((1, 8192), (32, 16), (32, 1024), (32, 4096), (32, 8192)):
    for kind in ("shuffled", "sequential", "interleaved"):
        if n == 16 and kind != "shuffled": continue
        lens, batch, blocks = table_batch(E, n, kind)
        q = torch.randn(E, 32, 128, device=dev).bfloat16(); out = torch.empty_like(q)
        line = f"{E:3} x {n:5} {kind:12}"
        for regime in ("rotate", "two"):
            kvs = regions(blocks, regime)
            res = []
            for name, cfg in (("old", OLD), ("flat", FLAT2), ("flatnofuse", {**FLAT2, "fuse": False})):
                res.append(f"{name} {time_graph([lambda kv=kv: one(cfg, lens, (32, 8), q, out, kv, batch, state, sms) for kv in kvs]):.1f}")
            if n > 16:
                for bn, w, st in ((16, 4, 3), (32, 4, 3), (32, 4, 1), (64, 8, 1)):
                    for order in (0, 1):
                        splits = max(2, min(n // 128, 16)) if E > 1 else 64
                        def g(kv): 
                            grid = (E, 8, splits) if order == 0 else (8, splits, E)
                            gather_read = L.gather_read[grid](kv.k_BKSD, kv.v_BKSD, o, batch.rows_E, batch.kv_len_E, batch.block_table_RC, batch.block_table_RC.stride(0), 8, splits, bn, 128, order, num_warps=w, num_stages=st)
                        res.append(f"g{bn}.{w}.{st}.{order} {time_graph([lambda kv=kv: g(kv) for kv in kvs]):.1f}")
            line += f"\n     {regime:7} " + " ".join(res)
        print(line, flush=True)
# the time line of the programs
for E, n in ((32, 1024), (32, 4096), (1, 8192)):
  for per, bn, st in ((2, 64, 3), (3, 32, 4)):
    lens, batch, blocks = table_batch(E, n, "shuffled")
    kvs = regions(blocks, "rotate")
    q = torch.randn(E, 32, 128, device=dev).bfloat16(); out = torch.empty_like(q)
    cfg = {**FLAT2, "per": per, "block_n": bn, "stages": st, "chunks": max(4, min(64, 4096 // (E * 8)))}
    times = torch.zeros(len(kvs), sms * per, 8, dtype=torch.int64, device=dev)
    L.launch(q, out, kvs[0], batch, 0.1, sms, cfg, state, times[0])
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for kv, t in zip(kvs, times): L.launch(q, out, kv, batch, 0.1, sms, cfg, state, t)
    g.replay(); g.replay(); torch.cuda.synchronize()
    t = times.cpu().numpy().astype(np.float64)
    l = t[5]
    qs = lambda x: " ".join(f"{v:8.0f}" for v in np.quantile(x, (0, .1, .5, .9, 1)))
    print(f"== {E} x {n} per {per} block {bn}")
    print("start ns        ", qs(l[:, 0] - l[:, 0].min()))
    print("prologue cycles ", qs(l[:, 2] - l[:, 1]))
    print("first tile      ", qs(l[:, 3] - l[:, 2]))
    print("4 tiles         ", qs((l[:, 4] - l[:, 3])[l[:, 4] > 0]) if (l[:, 4] > 0).any() else "")
    print("rest            ", qs((l[:, 5] - l[:, 4])[l[:, 4] > 0]) if (l[:, 4] > 0).any() else "")
    print("end ns          ", qs(l[:, 6] - l[:, 0].min()))
    print("gap to next start ns", [round(t[i + 1][:, 0].min() - t[i][:, 6].max()) for i in range(3, 8)], "per launch ns", round((t[9][:, 0].min() - t[3][:, 0].min()) / 6))
    print("programs per sm", np.unique(np.unique(l[:, 7], return_counts=True)[1], return_counts=True), "neighbour same sm", float((l[:sms, 7] == l[sms:2 * sms, 7]).mean()))
print("state", int(state.abs().sum()), "total", round(time.time() - T0, 1))
