"""The native backend: CPUs and GPUs through Accelerate."""
