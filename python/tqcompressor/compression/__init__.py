"""Planning and compressing, of a live model or of a checkpoint on disk, and reports on both.

May import `errors`, `_core`, `utils`, `config`, `decomposition`, `modules`, `models` and `calibration`. Checkpoints are
compressed without torch.
"""
