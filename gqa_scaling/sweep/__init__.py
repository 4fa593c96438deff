"""A grid of runs: planned, trained, watched, and compiled for a pod beforehand."""
