#!/usr/bin/env bash
# One visit to a GPU machine, about ten minutes: device tests, memory checker, kernel table, whole models, tuning. Other
# tiles, FlexAttention and kernels without quantization take longer: attention_gpu.py by itself.
#
#   benchmarks/gpu/all.sh [RESULTS]      RESULTS: folder for JSON and logs, default benchmarks/results
#
# Uses the machine's own python3 and torch; the package need not be installed. Whole models and tuning need diffusers.
set -u
cd "$(dirname "$0")/../.."
results=${1:-benchmarks/results}
mkdir -p "$results"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
workers=$(($(nproc) > 14 ? 14 : $(nproc)))

timeout 200 python3 -m pytest -q -n "$workers" -m "not slow" tests/gpu -p no:cacheprovider >"$results/device_tests.log" 2>&1
# An allocation per tensor: the checker cannot tell tensors apart that share one. A capture needs torch's own allocator.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 compute-sanitizer --tool memcheck python3 -m pytest -q -x \
    tests/gpu/test_pieces.py -p no:cacheprovider >"$results/memcheck.log" 2>&1
timeout 60 compute-sanitizer --tool memcheck python3 -m pytest -q -x tests/gpu/test_cuda_graph.py -k "replay or tables" \
    -p no:cacheprovider >>"$results/memcheck.log" 2>&1
timeout 150 python3 benchmarks/gpu/attention_gpu.py --fitting --quants fp8 --json "$results/attention_gpu.json" 2>&1 |
    tee "$results/attention_gpu.log"
timeout 180 python3 benchmarks/gpu/model_gpu.py --models 14B --sizes 720p --rounds 2 --json "$results/model_gpu.json" \
    --variants inductor fps "fps, static fp8 linears" 2>&1 | tee "$results/model_gpu.log" | grep variant
timeout 90 python3 benchmarks/gpu/tune_gpu.py --json "$results/tune_gpu.json" 2>&1 | tee "$results/tune_gpu.log" | grep Wan
timeout 90 python3 benchmarks/gpu/remainder_gpu.py --json "$results/remainder_gpu.json" >"$results/remainder_gpu.log" 2>&1
timeout 120 python3 benchmarks/gpu/profile_model.py --json "$results/profile_model.json" >"$results/profile_model.log" 2>&1

grep -hE "^(FAILED|ERROR)|passed|failed" "$results/device_tests.log" | tail -20
grep -h "ERROR SUMMARY" "$results/memcheck.log"
