#!/usr/bin/env bash
# Everything that needs a GPU. CI has none, so a person runs this: scripts/gpu.sh [tests] [kernels] [bench] [headline]
# Needs torch >= 2.11 with CUDA, triton and pytest in the `python3` on PATH. Results go to $OUT (default: gpu-results).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
parts=${*:-tests kernels bench}
status=0

section() { printf '\n=== %s\n' "$*"; }
run() { "$@" 2>&1 | tee -a "$OUT/log.txt" || status=1; }

for part in $parts; do
  case $part in
    tests)
      section "tests marked gpu"
      run python3 -m pytest -q -m gpu -p no:cacheprovider
      ;;
    kernels)
      section "sampler against the reference, times in a graph"
      run python3 scripts/gpu_sampler.py
      section "attention and layer kernels against the reference, times in a graph"
      run python3 scripts/gpu_kernels.py
      ;;
    bench)
      section "$(nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,driver_version --format=csv,noheader) commit $(git rev-parse --short HEAD 2>/dev/null)"
      section "host time per step on a device that does nothing"
      run python3 -m gapless bench host --context 64 --context 8192 --json
      section "decode on random weights, lookahead 0 and 1"
      for work in "smollm2-135m 32 512" "smollm2-135m 256 512" "llama-1b 128 256" "llama-8b 32 1024"; do
        read -r shape requests new_tokens <<<"$work"
        run python3 -m gapless bench decode --shape "$shape" --requests "$requests" --prompt-len 64 \
          --new-tokens "$new_tokens" --json
      done
      ;;
    headline)
      section "the headline: one run each, four minutes"
      run python3 -m gapless bench decode --shape llama-8b --requests 32 --prompt-len 64 --new-tokens 8128 \
        --repeat 1 --no-warm-up --no-trace --json
      ;;
    *) echo "unknown part $part: tests, kernels, bench or headline" >&2; exit 2 ;;
  esac
done
exit $status
