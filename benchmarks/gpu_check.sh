#!/usr/bin/env bash
# Quire on an NVIDIA GPU: correctness first, then figures, a short table last.
#
#   benchmarks/gpu_check.sh                    everything, an hour; no part takes more than ten minutes
#   benchmarks/gpu_check.sh --quick            fewer batch sizes and requests
#   benchmarks/gpu_check.sh 8b                 correctness, then these parts of benchmarks.gpu alone
#   benchmarks/gpu_check.sh --rehearse         without a GPU: the same, small, in Triton's interpreter; no figures
#
# Needs torch, triton, transformers and what engine, kernels and schemas import, pytest besides; no network, no
# litestar, nothing installed of this repository. PYTHON says which Python, OUT where rows go, COMMIT what they are
# of, SANITIZER where compute-sanitizer is. Ends with 0 if all was right and measured, 1 if not; without correctness
# nothing is measured.
set -uo pipefail
cd "$(dirname "$0")/.."

default=python3
[ -x .venv/bin/python ] && default=.venv/bin/python
PYTHON=${PYTHON:-$default}
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export PYTHONPATH="$PWD/schemas:$PWD/kernels:$PWD/engine:$PWD/platform:$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
SANITIZER=${SANITIZER:-compute-sanitizer}
LIMIT=600

read -ra every <<<"$("$PYTHON" -m benchmarks.gpu --list)"
quick=()
parts=()
rehearse=''
for given in "$@"; do
    case "$given" in
    --quick) quick+=(--quick) ;;
    --rehearse) quick+=(--rehearse) rehearse=yes ;;
    -*) echo "error: $given is no option" >&2; echo "hint: --quick, --rehearse, or parts: exactness ${every[*]}" >&2; exit 2 ;;
    *) parts+=("$given") ;;
    esac
done
[ ${#parts[@]} -eq 0 ] && parts=("${every[@]}")

if [ -n "$rehearse" ]; then
    # a processor is slow, and its rows lie nowhere near figures
    OUT=${OUT:-$(mktemp)} LIMIT=1800
    export TRITON_INTERPRET=1
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU" >&2
    echo "hint: nvidia-smi; $PYTHON -c 'import torch; print(torch.version.cuda)'; --rehearse needs none" >&2
    exit 1
fi
OUT=${OUT:-benchmarks/results/gpu.jsonl}
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.used,memory.total --format=csv,noheader

verdicts=()
wrong=0
# attempt NAME COMMAND...: runs it within the limit, and keeps what became of it
attempt() {
    local name=$1 start=$SECONDS code
    shift
    echo "── $name"
    if [ "$1" = wait ]; then "$@"; else timeout --kill-after=10 $LIMIT "$@"; fi
    code=$?
    case $code in
    0) verdicts+=("$name: right ($((SECONDS - start)) s)") ;;
    124 | 137) verdicts+=("$name: NOT FINISHED within $LIMIT s"); wrong=1 ;;
    *) verdicts+=("$name: WRONG (exit $code)"); wrong=1 ;;
    esac
    return $code
}

tests=("$PYTHON" -m pytest -q --noconftest -c /dev/null --rootdir=. -p no:cacheprovider --import-mode=importlib)
[ -n "$rehearse" ] && tests+=(--collect-only)
before=0
[ -f "$OUT" ] && before=$(wc -l <"$OUT")
finish() {
    echo
    "$PYTHON" -m benchmarks.gpu.table "$OUT" --after "$before" || wrong=1
    printf '%s\n' "${verdicts[@]}"
    exit $wrong
}

# ── correctness ───────────────────────────────────────────────────────────────────────────────────────────
# most of their time is compiling, which is one processor's work: side by side
logs=$(mktemp -d)
names=() running=()
timing=triton_ops_tilings
for suite in tests/unit/kernels/triton_ops*.py tests/unit/engine/resident_cases.py tests/unit/engine/resident_memory.py; do
    name=$(basename "$suite" .py)
    [ "$name" = $timing ] && continue
    timeout --kill-after=10 $LIMIT "${tests[@]}" "$suite" >"$logs/$name" 2>&1 &
    names+=("$name") running+=($!)
done
for at in "${!names[@]}"; do
    attempt "${names[$at]}" wait "${running[$at]}" || cat "$logs/${names[$at]}"
    tail -n 1 "$logs/${names[$at]}"
done
rm -r "$logs"
# what measures has the card for itself
attempt $timing "${tests[@]}" tests/unit/kernels/$timing.py
attempt "greedy tokens against transformers" "$PYTHON" -m benchmarks.gpu --parts exactness --commit "$COMMIT" --out "$OUT" \
    ${quick[@]+"${quick[@]}"}
if [ $wrong -ne 0 ]; then
    finish
fi

# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────
for part in "${parts[@]}"; do
    attempt "$part" "$PYTHON" -m benchmarks.gpu --parts "$part" --commit "$COMMIT" --out "$OUT" ${quick[@]+"${quick[@]}"}
done

# ── last, for it takes longest ─────────────────────────────────────────────────────────────────────────────
if [ -z "$rehearse" ] && command -v "$SANITIZER" >/dev/null; then
    # without torch's caching, whatever lies outside of a tensor lies outside of an allocation
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 attempt "compute-sanitizer" \
        "$SANITIZER" --tool memcheck --error-exitcode 9 --target-processes all \
        "${tests[@]}" -x tests/unit/kernels/triton_ops_attention.py -k "decode or mixed or 8_bits"
else
    verdicts+=("compute-sanitizer: NOT RUN: there is no $SANITIZER${rehearse:+, and no GPU}")
fi
finish
