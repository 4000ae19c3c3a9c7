"""A training script for one process or several; its arguments are FOLDER OUT BATCH_SIZE."""

import sys
from pathlib import Path

from tqcompressor import TrainingConfig, distill

from helpers.distillation import RECIPE


def train(folder, out, batch_size):
    distill(
        folder / "teacher",
        RECIPE,
        text=folder / "text.txt",
        out=out,
        cache=folder / "cache",
        training=TrainingConfig(batch_size=batch_size, learning_rate=1e-3, save_steps=0.5),
        device="cpu",
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
