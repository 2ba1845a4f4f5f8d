"""What a run needs, before it is paid for: memory, time, money."""

# Published: torchtitan, Llama-3-8B on 8 H100s, compiled, selective recomputation: 35% of the peak, counting the FLOPs
# that are needed (benchmarks/llama3_h100_202412); about 38%, counting those that are executed.
UTILISATION = 0.38
# One GPU sends nothing. Measured on an H200 (docs/performance.md), counting executed FLOPs and leaving out the update's
# time: 50% with 1B, 52% with 8B and adapters, 61% with 8B in bf16, updated in the backward pass.
UTILISATION_ALONE = 0.50
# How much faster FP8 is than bf16, H100 and H200: 1.19-1.3 for a block of Llama-3-8B, 1.23-1.3 for its adapters.
FP8 = 1.2
