"""The runtime without torch: a GPT-2 that scores, generates and is calibrated by the extension module alone.

May import `errors`, `_core`, `utils`, `data`, `evaluate` and `calibration` (its file).
"""
