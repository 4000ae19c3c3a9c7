"""The runtime without torch: scoring, generation and calibration of decoders by the extension module alone.

May import `errors`, `_core`, `utils`, `data`, `evaluate` and `calibration` (its file).
"""
