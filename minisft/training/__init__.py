"""The loss, the optimiser, the processes and the loop."""
