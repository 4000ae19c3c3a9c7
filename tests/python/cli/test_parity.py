"""The command line and Python use the same names and the same defaults.

Each command is compared with the functions that it calls. What only one of the two has is in a table, with the reason.
"""

import argparse
import inspect
from dataclasses import fields, is_dataclass

import pytest
import tqcompressor
from tqcompressor import NativeModel, evaluate
from tqcompressor.cli.options import parser

# The functions of each command; of a dataclass, its fields.
COMMANDS = {
    "compress": [tqcompressor.compress_checkpoint],
    "expand": [tqcompressor.expand_checkpoint],
    "convert": [tqcompressor.convert_checkpoint],
    "calibrate": [tqcompressor.calibrate_checkpoint],
    "distill": [tqcompressor.distill, tqcompressor.TrainingConfig, tqcompressor.DistillConfig],
    "inspect": [tqcompressor.inspect, tqcompressor.plan],
    "evaluate": [evaluate.score, NativeModel.score],
    "sweep": [tqcompressor.sweep],
    "report": [tqcompressor.html_report],
    "verify": [tqcompressor.verify_checkpoint],
    "generate": [NativeModel.from_pretrained, NativeModel.generate],
}
EVERYWHERE = {
    "json": "how the result is printed",
    "debug": "how an error is printed",
    "help": "argparse's own",
}
# Options without an argument in Python.
ONLY_ON_THE_COMMAND_LINE = {
    "compress": {"recipe": "a config by its name", "heal_tokens": "distill(tokens=…)", "refine": "distill(refine=…)"},
    "expand": {},
    "convert": {},
    "calibrate": {"out": "Calibration.save(path)"},
    "distill": {"data_seed": "TrainingConfig.seed, beside distill(seed=…)"},
    "inspect": {"recipe": "a config by its name"},
    "evaluate": {
        "teacher": "a second call of score, or compare",
        "dtype": "of the model, which from_pretrained loads",
        "device": "of the model, which from_pretrained loads",
        "engine": "score or NativeModel.score",
        "threads": "of torch, or NativeModel.from_pretrained(threads=…)",
        "record": "record_evaluation(folder, comparison.to_dict())",
    },
    "sweep": {},
    "report": {},
    "verify": {},
    "generate": {"model": "the source of from_pretrained", "prompt": "one of the prompts"},
}
# Arguments without an option.
ONLY_IN_PYTHON = {
    "compress": {},
    "expand": {},
    "convert": {},
    "calibrate": {},
    "distill": {
        "tokenizer": "the checkpoint's own",
        "losses": "its fields are options",
        "training": "its fields are options",
        "cache": "$TQCOMPRESSOR_CACHE",
        "hidden_layers": "pairs of numbers, which a shell has no form for",
    },
    "inspect": {},
    "evaluate": {"tokenizer": "the checkpoint's own", "name": "the name of the checkpoint"},
    "sweep": {},
    "report": {},
    "verify": {},
    "generate": {
        "source": "the model of the command",
        "prompts": "several in one batch; the command has one",
        "streamer": "the command prints the text as it comes",
    },
}
# Options whose presence decides which of the functions is called.
OPTIONAL = {"inspect": {"budget"}}
PROGRESS = "progress"  # Bars are shown where standard error is a terminal.


def options_of(command):
    """The options of a command by their names in the result, as `(is required, default)`."""
    (commands,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return {
        action.dest: (action.required, action.default)
        for action in commands.choices[command]._actions
        if action.dest not in EVERYWHERE
    }


def arguments_of(command):
    """The arguments of a command's functions: for each the set of its `(is required, default)`."""
    found = {}
    for function in COMMANDS[command]:
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in ("self", "cls", PROGRESS):
                required = parameter.default is inspect.Parameter.empty
                found.setdefault(name, set()).add((required, None if required else parameter.default))
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_an_argument_and_the_reverse(command):
    options, arguments = options_of(command), arguments_of(command)
    only_options, only_arguments = ONLY_ON_THE_COMMAND_LINE[command], ONLY_IN_PYTHON[command]
    assert options.keys() - arguments.keys() == only_options.keys()
    assert arguments.keys() - options.keys() == only_arguments.keys()
    for name in options.keys() & arguments.keys() - OPTIONAL.get(command, set()):
        assert options[name] in arguments[name], f"{command}: {name}"


def test_no_command_is_forgotten():
    (commands,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert set(commands.choices) == set(COMMANDS)


def test_live_and_on_disk_take_the_same():
    live, on_disk = (inspect.signature(f).parameters for f in (tqcompressor.compress, tqcompressor.compress_checkpoint))
    assert live.keys() - on_disk.keys() == {"model", "refine", "refine_epochs", "tokenizer"}
    of_files = {"source", "out", "overwrite", "max_shard_size", "save_calibration", "resume"}
    # What loads the model to calibrate.
    assert on_disk.keys() - live.keys() == of_files | {"engine", "device"}
    for name in live.keys() & on_disk.keys():
        assert (live[name].default, live[name].kind) == (on_disk[name].default, on_disk[name].kind), name


def test_calibrating_takes_the_same_of_a_live_model_and_on_disk():
    live, on_disk, native = (
        inspect.signature(function).parameters
        for function in (tqcompressor.calibrate, tqcompressor.calibrate_checkpoint, NativeModel.calibrate)
    )
    assert live.keys() - on_disk.keys() == {"model", "tokenizer_or_batches", "max_memory"}
    assert on_disk.keys() - live.keys() == {"source", "engine", "dtype", "device", "threads"}
    assert native.keys() - live.keys() == {"self"}
    for name in (live.keys() & on_disk.keys()) - {"text"}:
        assert (live[name].default, live[name].kind) == (on_disk[name].default, on_disk[name].kind), name


def test_one_row_and_two_take_the_same():
    one, two = (inspect.signature(function).parameters for function in (evaluate.score, evaluate.compare))
    assert one.keys() - two.keys() == {"model", "name"} and two.keys() - one.keys() == {"student", "teacher", "names"}
    for name in one.keys() & two.keys():
        assert (one[name].default, one[name].kind) == (two[name].default, two[name].kind), name


def test_configs_are_dataclasses():
    for config in (tqcompressor.TrainingConfig, tqcompressor.DistillConfig, tqcompressor.TQConfig):
        assert is_dataclass(config) and fields(config)
