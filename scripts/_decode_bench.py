# pyright: basic
# ruff: noqa
import os, sys, time, json, statistics, itertools
sys.path[:0] = ["src", "scripts"]
import torch, triton, triton.language as tl
import _decode_lab as L
from gapless.attention.base import AttentionBatch, LayerKV
from gapless.attention.scenario import make_scenario
from gapless.attention.torch_reference import TorchAttention
from gapless.kernels.paged_decode import paged_decode, decode_tiles
import dataclasses

T0 = time.time()
D = L.DEFAULT
SHAPES = {  # name: (lens, heads, D, max_kv)
    "32x1k": ([1024] * 32, (32, 8), 128, 8192),
    "32x4k": ([4096] * 32, (32, 8), 128, 8192),
    "32x8k": ([8192] * 32, (32, 8), 128, 8192),
    "1x8k": ([8192], (32, 8), 128, 8192),
    "256x1k": ([1024] * 256, (32, 8), 128, 8192),
    "ragged": ([256] * 15 + [8192] + [256] * 16, (32, 8), 128, 8192),
    "odd1k": ([900 + 13 * i for i in range(32)], (32, 8), 128, 8192),
}
PARTS = ""


def configs():
    out = {}
    def add(**kw):
        c = {**D, "units": 4096, **kw}
        name = " ".join(f"{k}={c[k]}" for k in ("block_n", "warps", "stages", "per", "flat", "prefetch")) + "".join(
            f" {k}={v}" for k, v in kw.items() if k not in ("block_n", "warps", "stages", "per", "flat", "prefetch"))
        out[name] = c
    for st, per in ((3, 2), (4, 2)):
        add(block_n=64, stages=st, per=per)
    for st, per in ((3, 3), (3, 4), (4, 2), (4, 3), (5, 2)):
        add(block_n=32, stages=st, per=per)
    add(block_n=32, stages=4, per=3, warps=2)
    add(block_n=64, stages=3, per=3, flat=False, maxnreg=168)
    add(block_n=64, stages=4, per=2, flat=False)
    add(block_n=32, stages=4, per=3, flat=False)
    add(block_n=32, stages=4, per=4, flat=False, maxnreg=128)
    add(block_n=64, stages=5, per=2, prefetch=False)
    add(block_n=128, stages=3, per=1, warps=8)
    add(block_n=64, stages=6, per=1, warps=4)
    add(block_n=64, stages=6, per=1, warps=8, maxnreg=255)
    for base in (dict(block_n=32, stages=4, per=3), dict(block_n=64, stages=4, per=2)):
        for kw in (dict(fuse=False), dict(evict="evict_first"), dict(cost=0), dict(cost=3), dict(min_span=128), dict(min_span=512),
                   dict(units=1024), dict(units=8192, min_span=128)):
            add(**base, **kw)
    return out


def batch_of(lens, max_kv, dev, shuffled=True):
    E = len(lens)
    cols = max_kv // 16
    need = [-(-l // 16) for l in lens]
    total = sum(need)
    g = torch.Generator().manual_seed(1)
    perm = (torch.randperm(total, generator=g) + 1).to(torch.int32)
    table = torch.zeros(E + 1, cols, dtype=torch.int32)
    at = 0
    for i, n in enumerate(need):
        table[i, :n] = perm[at:at + n]; at += n
    i32 = lambda v: torch.tensor(v, dtype=torch.int32, device=dev)
    rows = list(range(E))
    return AttentionBatch(i32(rows), i32(list(range(E + 1))), i32(lens), i32(rows), i32([l - 1 for l in lens]), table.to(dev), E, 1, max_kv), total + 1


def one(cfg, lens, heads, q, out, kv, batch, state, sms):
    hd = q.shape[2]
    if cfg.get("old"):
        tiles = dataclasses.replace(decode_tiles(hd, 2, False), programs_per_processor=cfg["programs"])
        paged_decode(q, out, kv, batch, hd ** -0.5, sms, tiles)
        return
    pairs = len(lens) * heads[1]
    L.launch(q, out, kv, batch, hd ** -0.5, sms, {**cfg, "chunks": max(4, min(64, cfg["units"] // pairs))}, state)


def worker(index, count):
    dev = torch.device("cuda")
    sms = torch.cuda.get_device_properties(dev).multi_processor_count
    jobs = [(c, s) for c in ALL.values() for s in ("32x1k", "1x8k", "256x1k")]
    for i, (cfg, sname) in enumerate(jobs):
        if i % count != index: continue
        lens, heads, hd, max_kv = SHAPES[sname]
        lens = [1] * len(lens)
        batch, _ = batch_of(lens, max_kv, dev)
        batch.block_table_RC.zero_()
        kv = LayerKV(*torch.zeros(2, 4, heads[1], 16, hd, device=dev, dtype=torch.bfloat16))
        q = torch.zeros(len(lens), heads[0], hd, device=dev, dtype=torch.bfloat16)
        try:
            one(cfg, lens, heads, q, torch.empty_like(q), kv, batch, torch.zeros(1 << 16, dtype=torch.int32, device=dev), sms)
        except Exception as e:
            pass


ALL = {"old ppp 4": dict(old=True, programs=4), "old ppp 8": dict(old=True, programs=8), "old ppp 16": dict(old=True, programs=16), **configs()}


@triton.jit
def read_only(x, o, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(PER_PROGRAM):
        acc += tl.load(x + (pid * PER_PROGRAM + i) * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(o + pid, tl.sum(acc))


def time_graph(fns, replays=7):
    for f in fns[:1]: f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in fns: f()
    ts = []
    for _ in range(replays):
        a, b = torch.cuda.Event(True), torch.cuda.Event(True)
        a.record(); g.replay(); b.record(); b.synchronize()
        ts.append(a.elapsed_time(b) * 1000 / len(fns))
    return statistics.median(ts[2:])


def main():
    dev = torch.device("cuda")
    import subprocess
    n = 14
    ps = [subprocess.Popen([sys.executable, __file__, "worker", str(i), str(n)]) for i in range(n)]
    pool = torch.empty(20 * 2**30, dtype=torch.bfloat16, device=dev)  # 40 GiB
    for part in pool.split(2**30): part.normal_()
    def read_rate(chunk):
        best = 0
        for block, per, warps in ((4096, 8, 8), (8192, 8, 8), (8192, 16, 16), (16384, 4, 16), (4096, 4, 8)):
            programs = chunk // (block * per)
            o = torch.empty(programs, device=dev)
            count = max(2, min(32, pool.numel() // chunk))
            us = time_graph([lambda x=pool[i * chunk:(i + 1) * chunk]: read_only[(programs,)](x, o, block, per, num_warps=warps) for i in range(count)])
            best = max(best, chunk * 2 / us / 1000)
        return best
    for p in ps: p.wait()
    print("precompiled", round(time.time() - T0, 1), flush=True)
    bw = read_rate(2**31)
    small = {m: read_rate(m * 2**20 // 2) for m in (32, 128, 512, 1024)}
    print(torch.cuda.get_device_name(), "read 4GiB", round(bw), "by MiB", {k: round(v) for k, v in small.items()}, flush=True)
    sms = torch.cuda.get_device_properties(dev).multi_processor_count
    state = torch.zeros(1 << 16, dtype=torch.int32, device=dev)
    # correctness
    R = TorchAttention()
    bad = {}
    sc = [make_scenario([1] * len(l), l, heads=h, head_dim=d, dtype=torch.bfloat16, device=dev, max_kv=8192)
          for l, h, d in (([1, 16, 100, 1500, 4097, 40, 77, 1333] * 4, (32, 8), 128),)]
    exact = [R.attend(s.q_TND.float(), LayerKV(s.kv.k_BKSD.float(), s.kv.v_BKSD.float()), s.batch, s.q_TND.shape[2] ** -0.5) for s in sc]
    for name, cfg in ALL.items():
        for s, e in zip(sc, exact):
            out = torch.full_like(s.q_TND, float("nan"))
            try:
                outs = []
                for _ in range(3):
                    one(cfg, s.batch.kv_len_E.tolist(), (s.q_TND.shape[1], s.kv.k_BKSD.shape[1]), s.q_TND, out, s.kv, s.batch, state, sms)
                    outs.append(out.clone())
                err = float((out.float() - e).norm() / e.norm())
                if not err < 5e-3 or not all(torch.equal(o, out) for o in outs) or state.any():
                    bad[name] = err; state.zero_()
            except Exception as ex:
                bad[name] = repr(ex)[:150]
    print("checked", round(time.time() - T0, 1), "bad:", bad, flush=True)
    rows = {name: [] for name in ALL}
    for sname, (lens, heads, hd, max_kv) in SHAPES.items():
        batch, blocks = batch_of(lens, max_kv, dev)
        per_layer = 2 * blocks * heads[1] * 16 * hd
        layers = min(32, pool.numel() // per_layer)
        kvs = [LayerKV(*pool[i * per_layer:(i + 1) * per_layer].view(2, blocks, heads[1], 16, hd)) for i in range(layers)]
        q = torch.randn(len(lens), heads[0], hd, device=dev).bfloat16()
        out = torch.empty_like(q)
        nbytes = sum(lens) * 2 * heads[1] * hd * 2
        for name, cfg in ALL.items():
            try:
                us = time_graph([lambda kv=kv: one(cfg, lens, heads, q, out, kv, batch, state, sms) for kv in kvs])
            except Exception as ex:
                rows[name].append("   fail"); continue
            rows[name].append(f"{us:7.1f} {nbytes / us / 1000 / bw:4.0%}")
    print("state", int(state.abs().sum()), "time", round(time.time() - T0, 1))
    print(" " * 60, "  ".join(f"{s:>12}" for s in SHAPES))
    for name, r in rows.items():
        print(f"{name:60.60}", "  ".join(f"{x:>12}" for x in r))
    print("total", round(time.time() - T0, 1))


if __name__ == "__main__":
    if PARTS == "worker":
        worker(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
