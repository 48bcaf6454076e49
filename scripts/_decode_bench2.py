# pyright: basic
# ruff: noqa
import sys
sys.path[:0] = ["src", "scripts"]
import _decode_lab2 as L2
WORKER = sys.argv[1:2] == ["worker"]
ARGS = sys.argv[:]
import _decode_bench as B
from _decode_bench import *
import numpy as np

FLAT2 = {**L.DEFAULT, "block_n": 64, "stages": 3, "per": 2}


def conf():
    out = {"old": dict(old=True, programs=4), "old16": dict(old=True, programs=16), "flat u1024": {**FLAT2, "units": 1024, "flat2": True}}
    def add(**kw):
        c = {**L2.DEFAULT2, **kw, "lab2": True}
        out[" ".join(f"{k[:6]}={v}" for k, v in kw.items())] = c
    for kw in (dict(warps=4, stages=3, per=2), dict(warps=4, stages=3, per=2, min_span=128), dict(warps=4, stages=3, per=2, min_span=512),
               dict(warps=4, stages=2, per=2), dict(warps=4, stages=2, per=3, maxnreg=168), dict(warps=4, stages=2, per=4, maxnreg=128),
               dict(warps=2, stages=3, per=4), dict(warps=2, stages=3, per=5, maxnreg=200), dict(warps=2, stages=4, per=3), dict(warps=2, stages=3, per=3),
               dict(warps=8, stages=3, per=1), dict(warps=8, stages=2, per=1),
               dict(warps=4, stages=2, per=2, part_n=32), dict(warps=2, stages=3, per=2, part_n=32), dict(warps=2, stages=2, per=4, part_n=32),
               dict(warps=4, stages=3, per=2, sumlate=True), dict(warps=4, stages=5, per=2, prefetch=False), dict(warps=1, stages=3, per=8),
               dict(warps=4, stages=3, per=4), dict(warps=2, stages=3, per=8)):
        add(mode=2, **kw)
    for units in (1024, 2048, 4096):
        add(mode=1, warps=4, stages=3, per=2, units=units)
    add(mode=1, warps=2, stages=3, per=4, units=2048)
    for units in (256, 512, 1024, 2048, 4096):
        add(mode=0, warps=4, stages=3, units=units)
    for units in (512, 1024, 2048):
        add(mode=0, warps=2, stages=3, units=units)
        add(mode=0, warps=4, stages=2, units=units)
    add(mode=0, warps=4, stages=3, units=2048, min_span=512)
    add(mode=0, warps=4, stages=5, units=1024, prefetch=False)
    add(mode=0, warps=8, stages=3, units=1024)
    add(mode=0, warps=4, stages=2, units=512, part_n=32)
    return out


CONF = conf()
old_one = B.one


def one(cfg, lens, heads, q, out, kv, batch, state, sms, times=None):
    if cfg.get("old"):
        return old_one(cfg, lens, heads, q, out, kv, batch, state, sms)
    pairs = len(lens) * heads[1]
    chunks = max(1, min(64, cfg["units"] // pairs))
    if cfg.get("flat2"):
        return L.launch(q, out, kv, batch, q.shape[2] ** -0.5, sms, {**cfg, "chunks": chunks}, state, times)
    L2.launch2(q, out, kv, batch, q.shape[2] ** -0.5, sms, {**cfg, "chunks": chunks}, state, times)


SHAPES["32x300"] = ([300] * 32, (32, 8), 128, 8192)
ODD = {
    "smol 32x1k": ([1024] * 32, (9, 3), 64, 8192), "smol 256x512": ([512] * 256, (9, 3), 64, 8192), "qwen 64x1k": ([1024] * 64, (14, 2), 64, 8192),
    "4/1 128 32x1k": ([1024] * 32, (4, 1), 128, 8192), "256 4/4 32x1k": ([1024] * 32, (4, 4), 256, 8192), "1b 128x300": ([300] * 128, (32, 8), 64, 8192),
    "1x1k": ([1024], (32, 8), 128, 8192), "256x256": ([256] * 256, (32, 8), 128, 8192), "smol 1024x300": ([300] * 1024, (9, 3), 64, 1024),
}
ODD_CONF = {"old": CONF["old"]}
for kw in (dict(warps=4, stages=3, per=2), dict(warps=4, stages=3, per=2, part_n=32), dict(warps=4, stages=3, per=3, maxnreg=168), dict(warps=2, stages=3, per=4), dict(warps=2, stages=3, per=4, part_n=32), dict(warps=4, stages=2, per=2),
           dict(warps=2, stages=2, per=3)):
    ODD_CONF[" ".join(f"{k[:6]}={v}" for k, v in kw.items())] = {**L2.DEFAULT2, **kw, "mode": 2, "lab2": True}
for kw in (dict(warps=4, stages=3, units=1024), dict(warps=4, stages=3, units=1024, part_n=32), dict(warps=2, stages=3, units=1024)):
    ODD_CONF["mode=0 " + " ".join(f"{k[:6]}={v}" for k, v in kw.items())] = {**L2.DEFAULT2, **kw, "mode": 0, "lab2": True}
JOBS = [(c, SHAPES[s]) for c in CONF.values() for s in ("32x1k", "1x8k", "256x1k")] + [(c, s) for c in ODD_CONF.values() for s in ODD.values()]


def worker(index, count):
    dev = torch.device("cuda")
    sms = torch.cuda.get_device_properties(dev).multi_processor_count
    for i, (cfg, (lens, heads, hd, max_kv)) in enumerate(JOBS):
        if i % count != index: continue
        lens = [1] * len(lens)
        batch, _ = batch_of(lens, max_kv, dev)
        batch.block_table_RC.zero_()
        kv = LayerKV(*torch.zeros(2, 4, heads[1], 16, hd, device=dev, dtype=torch.bfloat16))
        q = torch.zeros(len(lens), heads[0], hd, device=dev, dtype=torch.bfloat16)
        try:
            one(cfg, lens, heads, q, torch.empty_like(q), kv, batch, torch.zeros(1 << 16, dtype=torch.int32, device=dev), sms)
        except Exception:
            pass


def main():
    dev = torch.device("cuda")
    import subprocess
    ps = [subprocess.Popen([sys.executable, __file__, "worker", str(i), "15"]) for i in range(15)]
    pool = torch.empty(18 * 2**30, dtype=torch.bfloat16, device=dev)
    for part in pool.split(2**30): part.normal_()
    for p in ps: p.wait()
    print("precompiled", round(time.time() - T0, 1), flush=True)
    sms = torch.cuda.get_device_properties(dev).multi_processor_count
    state = torch.zeros(1 << 16, dtype=torch.int32, device=dev)
    o = torch.empty(1 << 16, device=dev)
    def plain(chunk):
        best = 1e9
        for block, per, warps in ((4096, 8, 8), (8192, 8, 8)):
            programs = chunk // (block * per)
            best = min(best, time_graph([lambda x=pool[i * chunk:(i + 1) * chunk]: read_only[(programs,)](x, o, block, per, num_warps=warps) for i in range(min(32, pool.numel() // chunk))]))
        return best
    bw = 2**32 / plain(2**31) / 1000
    print("read", round(bw), {m: round(plain(m * 2**19), 1) for m in (32, 128, 512, 1024)})
    R = TorchAttention()
    def check(confs, lens, heads, hd):
        s = make_scenario([1] * len(lens), lens, heads=heads, head_dim=hd, dtype=torch.bfloat16, device=dev, max_kv=8192)
        e = R.attend(s.q_TND.float(), LayerKV(s.kv.k_BKSD.float(), s.kv.v_BKSD.float()), s.batch, hd ** -0.5)
        for name, cfg in confs.items():
            out = torch.full_like(s.q_TND, float("nan"))
            try:
                outs = []
                for _ in range(3):
                    one(cfg, lens, heads, s.q_TND, out, s.kv, s.batch, state, sms)
                    outs.append(out.clone()); out.fill_(float("nan"))
                err = float((outs[0].float() - e).norm() / e.norm())
                if not err < 5e-3 or not all(torch.equal(x, outs[0]) for x in outs) or state.any():
                    print("BAD", name, heads, hd, err, int(state.any())); state.zero_()
            except Exception as ex:
                print("BAD", name, heads, hd, repr(ex)[-120:].replace("\n", " "))
    lens8 = [1, 16, 100, 1500, 4097, 40, 77, 1333]
    check(CONF, lens8 * 4, (32, 8), 128)
    for h, d in (((9, 3), 64), ((14, 2), 64), ((4, 1), 128), ((4, 4), 256)): check(ODD_CONF, lens8, h, d)
    print("checked", round(time.time() - T0, 1), flush=True)
    def table(confs, shapes):
        rows = {name: [] for name in confs}
        for sname, (lens, heads, hd, max_kv) in shapes.items():
            batch, blocks = batch_of(lens, max_kv, dev)
            per_layer = 2 * blocks * heads[1] * 16 * hd
            layers = min(32, pool.numel() // per_layer)
            kvs = [LayerKV(*pool[i * per_layer:(i + 1) * per_layer].view(2, blocks, heads[1], 16, hd)) for i in range(layers)]
            q = torch.randn(len(lens), heads[0], hd, device=dev).bfloat16(); out = torch.empty_like(q)
            nbytes = sum(lens) * 2 * heads[1] * hd * 2
            for name, cfg in confs.items():
                try:
                    us = time_graph([lambda kv=kv: one(cfg, lens, heads, q, out, kv, batch, state, sms) for kv in kvs])
                    rows[name].append(f"{us:6.1f} {nbytes / us / 1000 / bw:4.0%}")
                except Exception as ex:
                    rows[name].append("fail")
        print(" " * 44, " ".join(f"{s:>13.13}" for s in shapes))
        for name, r in rows.items():
            print(f"{name:44.44}", " ".join(f"{x:>13}" for x in r))
        print("time", round(time.time() - T0, 1), flush=True)
    table(CONF, SHAPES)
    table(ODD_CONF, ODD)
    pick = {"old": CONF["old"], "m2w4": CONF["mode=2 warps=4 stages=3 per=2"], "m0w4": CONF["mode=0 warps=4 stages=3 units=512"]}
    def kinds(E, n, kind):
        lens = [n] * E
        batch, _ = batch_of(lens, 8192, dev)
        per = -(-n // 16); ids = torch.arange(E * per)
        t = ids.view(E, per) if kind == "sequential" else ids.view(per, E).T if kind == "interleaved" else ids[torch.randperm(E * per)].view(E, per)
        batch.block_table_RC[:E, :per] = (t + 1).to(torch.int32).to(dev)
        return lens, batch, E * per + 1
    for E, n in ((32, 16), (32, 1024), (32, 4096)):
        for kind in ("shuffled", "sequential", "interleaved"):
            lens, batch, blocks = kinds(E, n, kind)
            q = torch.randn(E, 32, 128, device=dev).bfloat16(); out = torch.empty_like(q)
            per_layer = 2 * blocks * 8 * 16 * 128
            stride = (per_layer + 2**20 - 1) // 2**20 * 2**20
            layers = min(32, pool.numel() // stride)
            kvs = [LayerKV(*pool[i * stride:i * stride + per_layer].view(2, blocks, 8, 16, 128)) for i in range(layers)]
            line = f"{E}x{n} {kind:12}"
            for regime, ks in (("rotate", kvs), ("two", [kvs[i % 2] for i in range(layers)])):
                line += f" | {regime} " + " ".join(f"{nm} {time_graph([lambda kv=kv: one(c, lens, (32, 8), q, out, kv, batch, state, sms) for kv in ks]):.1f}" for nm, c in pick.items())
                if n > 16:
                    for bn, w, st, order in ((16, 4, 3, 0), (32, 4, 3, 0), (32, 4, 3, 1), (16, 4, 3, 1)):
                        splits = n // 128
                        def g(kv):
                            L.gather_read[(E, 8, splits) if order == 0 else (8, splits, E)](kv.k_BKSD, kv.v_BKSD, o, batch.rows_E, batch.kv_len_E, batch.block_table_RC, batch.block_table_RC.stride(0), 8, splits, bn, 128, order, num_warps=w, num_stages=st)
                        line += f" g{bn}.{order} {time_graph([lambda kv=kv: g(kv) for kv in ks]):.1f}"
            print(line, flush=True)
    quant = lambda x: " ".join(f"{v:7.0f}" for v in np.quantile(x, (0, .1, .5, .9, 1))) if len(x) else "-"
    for E, n in ((32, 1024), (32, 4096), (1, 8192)):
        lens, batch, blocks = kinds(E, n, "shuffled")
        per_layer = 2 * blocks * 8 * 16 * 128
        kvs = [LayerKV(*pool[i * per_layer:(i + 1) * per_layer].view(2, blocks, 8, 16, 128)) for i in range(min(32, pool.numel() // per_layer))]
        q = torch.randn(E, 32, 128, device=dev).bfloat16(); out = torch.empty_like(q)
        for nm, cfg in (("flat", CONF["flat u1024"]), ("m2w4", pick["m2w4"]), ("m2w2", CONF["mode=2 warps=2 stages=3 per=4"]), ("m0w4", pick["m0w4"])):
            try:
                programs = E * 8 * max(1, min(64, cfg["units"] // (E * 8))) if cfg.get("mode") == 0 else sms * cfg["per"]
                times = torch.zeros(len(kvs), programs, 8, dtype=torch.int64, device=dev)
                one(cfg, lens, (32, 8), q, out, kvs[0], batch, state, sms, times[0]); torch.cuda.synchronize()
                g = torch.cuda.CUDAGraph()
                with torch.cuda.graph(g):
                    for kv, t in zip(kvs, times): one(cfg, lens, (32, 8), q, out, kv, batch, state, sms, t)
                g.replay(); g.replay(); torch.cuda.synchronize()
                t = times.cpu().numpy().astype(np.float64); l = t[5]
                print(f"== {nm} {E} x {n}")
                print("start ns    ", quant(l[:, 0] - l[:, 0].min()))
                print("prologue cyc", quant(l[:, 2] - l[:, 1]))
                if nm == "flat":
                    print("first tile  ", quant(l[:, 3] - l[:, 2]), "  4 tiles", quant((l[:, 4] - l[:, 3])[l[:, 4] > 0]))
                print("work cyc    ", quant(l[:, 5] - l[:, 2]))
                print("end ns      ", quant(l[:, 6] - l[:, 0].min()))
                print("gap ns", [round(t[i + 1][:, 0].min() - t[i][:, 6].max()) for i in range(3, 8)], "per launch ns", round((t[9][:, 0].min() - t[3][:, 0].min()) / 6),
                      "programs per sm", *np.unique(np.unique(l[:, 7], return_counts=True)[1], return_counts=True))
            except Exception as ex:
                print("timeline", nm, repr(ex)[-200:])
    print("state", int(state.abs().sum()), "total", round(time.time() - T0, 1))


if __name__ == "__main__":
    if WORKER: worker(int(ARGS[2]), int(ARGS[3]))
    else: main()
