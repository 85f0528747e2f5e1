"""metajax beside PyTorch on one NVIDIA GPU: attention, the whole train step, the selective scan."""

import os

# Both frameworks share the card in one process: JAX must not reserve three quarters of it; this is set before JAX is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
