#!/usr/bin/env bash
# Everything that needs a GPU. CI has none, so a person runs this: scripts/gpu.sh [PART ...]
# Parts: tests, kernels, flashinfer (attention beside FlashInfer's, if that is installed), bench (the whole table),
# headline (its longest row alone), steps (step time against context), memory, prefill, mixed.
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

decode() {
  run python3 -m gapless bench decode --shape "$1" --requests "$2" --prompt-len 64 --new-tokens "$3" \
    --lookahead 0 --lookahead 1 --json "${@:4}"
}

headline() {
  section "the headline: one run each, four minutes"
  decode llama-8b 32 8128 --repeat 1
}

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
      section "linear layers against torch's products"
      run python3 scripts/gpu_linear.py
      section "layers of small models: torch's products, ours, and those with weights read early"
      run python3 scripts/gpu_products.py
      ;;
    bench)
      section "host time per step on a device that does nothing"
      run python3 -m gapless bench host --json
      section "decode on random weights, lookahead 0 and 1"
      for work in "llama-8b 32 1024" "llama-1b 128 256" "llama-1b 32 512" "smollm2-135m 32 512" \
        "smollm2-135m 256 512" "smollm2-135m 1024 512"; do
        read -r shape requests new_tokens <<<"$work"
        decode "$shape" "$requests" "$new_tokens"
      done
      headline
      ;;
    headline) headline ;;
    flashinfer)
      section "attention beside FlashInfer's on the same caches"
      run python3 scripts/gpu_kernels.py --flashinfer
      ;;
    steps)
      section "step time against context, lookahead 0 and 1, with the floor"
      run python3 scripts/step_time.py -o "$OUT/step_time.json"
      ;;
    memory)
      section "memory of the graphs, and what the KV cache gets"
      run python3 scripts/gpu_memory.py
      ;;
    prefill)
      section "prompts with one new token each"
      for shape in llama-8b llama-1b smollm2-135m; do
        run python3 -m gapless bench prefill --shape "$shape" --json
      done
      ;;
    mixed)
      section "requests that arrive at random times, lookahead 0 and 1"
      run python3 -m gapless bench mixed --shape llama-8b --rate 20 --requests 400 --max-prompt-len 2048 \
        --max-new-tokens 512 --json
      run python3 -m gapless bench mixed --shape smollm2-135m --rate 200 --requests 2000 --max-prompt-len 2048 \
        --max-new-tokens 512 --json
      ;;
    *)
      echo "unknown part $part: tests, kernels, flashinfer, bench, headline, steps, memory, prefill or mixed" >&2
      exit 2
      ;;
  esac
done
exit $status
