"""The cost of the kernels: `python -m kernels_pallas.bench`. Wall clock on a chip, or the compiled schedule without one."""
