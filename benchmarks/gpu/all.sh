#!/usr/bin/env bash
# One visit to a GPU machine, about ten minutes: device tests, memory checker, kernel table, whole models, tuning, and a
# short table last. Other tiles, FlexAttention and kernels without quantization take longer: attention_gpu.py by itself.
#
#   benchmarks/gpu/all.sh [RESULTS]      RESULTS: folder for JSON and logs, default benchmarks/results/visit
#
# Uses the machine's own python3 and torch; the package need not be installed. Whole models and tuning need diffusers.
# Ends with status 1 if a step failed or ran out of time.
set -u
root=$(realpath "$(dirname "$0")/../..")
results=$(realpath -m "${1:-$root/benchmarks/results/visit}")
mkdir -p "$results"
cd "$root"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
workers=$(($(nproc) > 14 ? 14 : $(nproc)))

# NAME LIMIT COMMAND...: run within LIMIT seconds, output to NAME.log; how it ended and when goes to all.log.
step() {
    local name=$1 limit=$2 status=0
    shift 2
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
    echo "$name: exit $status after $SECONDS s" >>"$results/all.log"
}

: >"$results/all.log"
step device_tests 220 python3 -m pytest -q -n "$workers" -m "not slow" tests/gpu -p no:cacheprovider
# An allocation per tensor: the checker cannot tell tensors apart that share one. A capture needs torch's own allocator.
step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m pytest -q -x \
    tests/gpu/test_pieces.py -p no:cacheprovider &
step memcheck_graphs 90 compute-sanitizer --tool memcheck python3 -m pytest -q -x tests/gpu/test_cuda_graph.py \
    -k "replay or tables" -p no:cacheprovider &
wait
# Alone from here on: these are timed.
cd benchmarks/gpu
step attention_gpu 150 python3 attention_gpu.py --fitting --quants fp8 --rounds 2 --json "$results/attention_gpu.json"
step model_gpu 150 python3 model_gpu.py --models 14B --sizes 720p --rounds 2 --json "$results/model_gpu.json" \
    --variants inductor fps "fps, static fp8 linears"
step tune_gpu 90 python3 tune_gpu.py --json "$results/tune_gpu.json"
step profile_model 90 python3 profile_model.py --json "$results/profile_model.json" \
    --variants inductor "fps, static fp8 linears"
step remainder_gpu 60 python3 remainder_gpu.py --rounds 3 --json "$results/remainder_gpu.json"

cat "$results/all.log"
grep -hE "^(FAILED|ERROR)|passed|failed|ERROR SUMMARY" "$results"/{device_tests,memcheck,memcheck_graphs}.log | tail -20
cat "$results/attention_gpu.log"
grep variant "$results/model_gpu.log"
grep Wan "$results/tune_gpu.log"

! grep -qv "exit 0" "$results/all.log"
