"""What a run needs, before it is paid for: memory, time, money."""

# Published: torchtitan, Llama-3-8B on 8 H100s, compiled, selective recomputation: 35% of the peak, counting the FLOPs
# that are needed (benchmarks/llama3_h100_202412); about 38%, counting those that are executed.
UTILISATION = 0.38
