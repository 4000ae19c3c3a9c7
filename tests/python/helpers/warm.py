"""Runs scripts in processes forked from one that has imported what this package needs of others.

A process is as fresh as any in what the tests are about: this package is not imported yet, and transformers only where
a request says so. The imports that take most of the seconds, torch and its parts, are done once.

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
TRANSFORMERS = ("transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2")
SECONDS = 300


def main():
    _import(OTHERS)
    _serve(sys.stdin, sys.stdout)


def _import(names):
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _serve(requests, answers):
    with_transformers = None
    for line in requests:
        request = json.loads(line)
        if request.pop("transformers", False):
            with_transformers = with_transformers or _fork_with_transformers()
            ask, listen = with_transformers
            print(json.dumps(request), file=ask, flush=True)
            status = listen.readline().strip()
        else:
            if (child := os.fork()) == 0:
                _run(**request)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


def _fork_with_transformers():
    """Forks a process that imports transformers and serves as this one; the two ends of talking to it.

    It ends with this process, which holds the other ends.
    """
    requests, ask = os.pipe()
    listen, answers = os.pipe()
    if os.fork() == 0:
        os.close(ask)
        os.close(listen)
        _import(TRANSFORMERS)
        _serve(os.fdopen(requests), os.fdopen(answers, "w"))
        sys.exit()
    os.close(requests)
    os.close(answers)
    return os.fdopen(ask, "w"), os.fdopen(listen)


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
