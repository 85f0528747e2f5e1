"""metajax beside PyTorch on one NVIDIA GPU: attention, the whole train step, the selective scan."""

import os

# Both frameworks share the card in one process: JAX must not take three quarters of it at its start, which is before JAX is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
