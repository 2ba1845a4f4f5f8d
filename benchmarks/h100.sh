#!/usr/bin/env bash
# Measure what docs/performance.md only computes, on a host with CUDA GPUs; eight H100s are meant.
#
#     bash benchmarks/h100.sh TOKENIZER DATA [OUT]
#
# TOKENIZER is a Llama-3 folder or tokenizer.json; DATA a file of conversations that minisft reads, 15 million tokens or
# more for all rows; `pip install -e '.[test]'` comes before. The weights of Llama-3-8B are random, so no model is needed:
# speed does not depend on them. Each row is a run of 30 steps in a folder of OUT (h100-results), which needs 20 GB. A row
# that fails says so, and the next one starts; rows that are done are kept, so it may be started again after an
# interruption. At the end OUT/table.md has the rows of the results template. Not run yet: written on a machine without a
# GPU.
set -uo pipefail
: "${1:?TOKENIZER, a Llama-3 folder or tokenizer.json}" "${2:?DATA, a file of conversations}"
tokenizer=$(realpath -e "$1") && data=$(realpath -e "$2") || exit 2
out=$(realpath "${3:-h100-results}")
cd "$(dirname "$0")/.."
gpus=$(nvidia-smi --list-gpus | wc -l)
mkdir -p "$out"
{ date -u; git rev-parse HEAD; nvidia-smi; nvidia-smi topo -m; python -c \
    'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.nccl.version())'; } > "$out/machine.txt" 2>&1

cat > "$out/8b.toml" <<TOML
model = {init = "random", config = "llama-3-8b", tokenizer = "$tokenizer"}
data = {train = ["$data"], template = "llama3", seq_len = 8192, overlong = "truncate"}
train = {max_steps = 30, epochs = 100}
optim = {warmup_steps = 10}
checkpoint = {every = 0, resume = "never"}
TOML

run() {  # NAME GPUS PACKS_OF_A_STEP [--section.key value ...]
    local name=$1 ranks=$2 packs=$3
    shift 3
    grep -qs '"done"' "$out/$name/status.json" && return
    rm -rf "${out:?}/$name"
    torchrun --nproc-per-node "$ranks" train.py "$out/8b.toml" --run.dir "$out/$name" --batch.packs "$packs" "$@" \
        > "$out/$name.log" 2>&1 || echo "$name failed; the last line of $out/$name.log: $(tail -n 1 "$out/$name.log")"
    rm -rf "$out/$name/final"  # 16 GB
}

# First contact: what the GPU computes against the CPU.
python -m pytest -q -m gpu > "$out/tests.txt" 2>&1
tail -n 1 "$out/tests.txt"

ac=--parallel.activation_checkpointing
run selective "$gpus" "$gpus" $ac selective --run.profile true
run none "$gpus" "$gpus" $ac none
run full "$gpus" "$gpus" $ac full
run selective-eager "$gpus" "$gpus" $ac selective --parallel.compile false
run selective-2-packs "$gpus" $((2 * gpus)) $ac selective --batch.micro_packs 2
run selective-no-reshard "$gpus" "$gpus" $ac selective --parallel.reshard false
run selective-prefetch "$gpus" "$gpus" $ac selective --parallel.prefetch 1
run selective-accumulated "$gpus" $((4 * gpus)) $ac selective
run one-gpu-1b 1 1 --model.config llama-3.2-1b $ac full
run one-gpu-8b-savers 1 1 $ac full --optim.parameters bf16 --optim.moments bf16 --parallel.offload optimizer
run one-gpu-8b-on-host 1 1 $ac full --parallel.offload parameters

python - "$out" "$gpus" <<'PYTHON' | tee "$out/table.md"
import json, sys
from pathlib import Path
from statistics import median

print("| run | steps | tokens/s/GPU | MFU | allocated, GiB | reserved, GiB | loss of the last step |\n|---|---|---|---|---|---|---|")
for log in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl"), key=lambda log: log.stat().st_mtime):
    steps = [r for r in map(json.loads, log.read_text().splitlines()) if r["kind"] == "train"]
    if len(steps) > 10:  # those that compile and warm up are left out
        late = steps[10:]
        ranks = 1 if log.parent.name.startswith("one-gpu") else int(sys.argv[2])
        speed, mfu = median(r["tokens_per_second"] / ranks for r in late), median(r.get("mfu", 0) for r in late)
        print(f"| {log.parent.name} | {len(steps)} | {speed:,.0f} | {mfu:.1%} | {late[-1]['memory_gib']:.1f} | "
              f"{late[-1].get('memory_reserved_gib', 0):.1f} | {late[-1]['loss']:.4f} |")
PYTHON
