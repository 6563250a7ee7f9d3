"""Device kernels of the low-bit linears as Python sees them: Triton references, the C library, benchmarks."""
