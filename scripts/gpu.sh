#!/usr/bin/env bash
# Everything that needs a GPU. CI has none, so a person runs this: scripts/gpu.sh [tests] [kernels] [bench]
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
      section "decode on random weights, lookahead 0 and 1"
      run python3 -m gapless bench decode --shape smollm2-135m --requests 32 --prompt-len 64 --new-tokens 512 --json
      run python3 -m gapless bench decode --shape llama-8b --requests 32 --prompt-len 64 --new-tokens 1024 --json
      ;;
    *) echo "unknown part $part: tests, kernels or bench" >&2; exit 2 ;;
  esac
done
exit $status
