"""Settings of the whole suite, and disks that are small."""

import os
import subprocess

import pytest
from hypothesis import settings

# The same examples at every run, and no failure because the machine is busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts a small file system of its own, where that is allowed."""
    mounted = []

    def mount(options):
        place = tmp_path / f"mount{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        # Lazily: an exception's frames may still hold a file that could not be written.
        subprocess.run(["umount", "--lazy", str(place)], check=True)
