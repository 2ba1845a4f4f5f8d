"""What a run needs, before it is paid for: memory, time, money."""

# Published: torchtitan, Llama-3-8B on 8 H100s, compiled, selective recomputation: 35% of the peak by FLOPs that are
# needed (benchmarks/llama3_h100_202412), which is about 38% by those that are executed.
UTILISATION = 0.38
