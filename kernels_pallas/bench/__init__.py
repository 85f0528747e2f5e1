"""What the kernels cost: `python -m kernels_pallas.bench`. On a chip the clock, without one the compiled schedule."""
