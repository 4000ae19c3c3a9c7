"""Runs scripts in processes forked from one that has imported what transformers and this package need of others.

A process is as fresh as any in what the tests are about: neither transformers nor this package is imported yet. The
imports that take most of the seconds, torch and its parts, are done once.

`python -m helpers.warm` reads requests, one JSON object a line, and answers each with the exit status of its process.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import types

OTHERS = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.utils.data",
    "accelerate",
    "huggingface_hub",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.metrics",
    "tokenizers",
    "tqdm.auto",
)
SECONDS = 300


def main():
    for name in OTHERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            _run(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(script, arguments, environment, folder, output):
    """Ends this process after `script`, whose output goes to the file `output`."""
    signal.alarm(SECONDS)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY)):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(compile(script, "<script>", "exec"), vars(module))
    sys.exit()


if __name__ == "__main__":
    main()
