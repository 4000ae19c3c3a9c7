"""Settings of every test, examples in docstrings included."""

import os

# The models here are so small that a second thread of torch only waits, on a busy machine for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
