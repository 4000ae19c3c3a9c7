"""Which Rust file imports from which, read from the sources."""

import re
from typing import NamedTuple


class Module(NamedTuple):
    """The re-exports and uses of one source file. A path is a list of names, as written in the file."""

    re_exports: dict[str, list[str]]
    paths: list[list[str]]


def import_graph(sources):
    """The files of a crate, by their paths below `src`, each with the set of files that it imports from.

    `sources` holds their texts. A name that a module re-exports counts as an import from the file that defines it.
    Comments, test modules and files that only tests use are left out.
    """
    code = {path: without_tests(without_comments(source)) for path, source in sources.items()}
    test_only = {
        child
        for path, source in sources.items()
        for name in re.findall(r"#\[cfg\(test\)\]\s*(?:pub(?:\(\w+\))? )?mod (\w+);", without_comments(source))
        for child in (child_of(path, name, sources),)
        if child
    }
    code = {path: source for path, source in code.items() if path not in test_only}
    files = {module_path(path): path for path in code}
    modules = {module_path(path): parse(source) for path, source in code.items()}
    graph = {}
    for own, module in modules.items():
        found = {resolve(own, path, modules) for path in module.paths}
        graph[files[own]] = {files[target] for target in found if target is not None} - {files[own]}
    return graph


def without_comments(source):
    return re.sub(r"//.*", "", source)


def without_tests(source):
    """The source without items under `#[cfg(test)]`: a block up to the brace that closes it, or up to the semicolon."""
    while (start := source.find("#[cfg(test)]")) >= 0:
        end = depth = 0
        for end in range(start, len(source)):
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            if depth == 0 and source[end] in ";}":
                break
        source = source[:start] + source[end + 1 :]
    return source


def module_path(path):
    """The path of a file's module below the crate: ("permute", "search"), and () for the root."""
    parts = path.removesuffix(".rs").split("/")
    return tuple(part for part in parts if part not in ("mod", "lib"))


def child_of(path, name, sources):
    """The file of module `name`, declared in the file `path`."""
    folder = "/".join(module_path(path))
    candidates = [f"{folder}/{name}.rs", f"{folder}/{name}/mod.rs"]
    return next((path for path in (each.lstrip("/") for each in candidates) if path in sources), None)


def parse(source):
    re_exports, paths, local = {}, [], {}
    for visible, tree in re.findall(r"\b(pub(?:\(\w+\))? )?use ([^;]+);", source):
        for path, name in leaves(tree):
            (re_exports if visible else local)[name] = path
            if not visible:
                paths.append(path)
    rest = re.sub(r"\b(?:pub(?:\(\w+\))? )?use [^;]+;", "", source)
    for text in re.findall(r"\b\w+(?:::\w+)+", rest):
        head, *names = text.split("::")
        paths.append([*local.get(head, [head]), *names])
    return Module(re_exports, paths)


def leaves(tree, prefix=()):
    """Every path of a `use` tree with the name that it gets."""
    head, brace, rest = tree.partition("{")
    if not brace:
        path, _, name = head.partition(" as ")
        path = [*prefix, *re.findall(r"\w+", path)]
        if len(path) > 1 and path[-1] == "self":
            path.pop()
        return [(path, name.strip() or path[-1])]
    prefix = [*prefix, *re.findall(r"\w+", head)]
    parts, depth = [""], 0
    for letter in rest[: rest.rindex("}")]:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [leaf for part in parts if part.strip() for leaf in leaves(part, prefix)]


def resolve(own, path, modules):
    """The module that defines what `path` names when module `own` uses it; None for other crates."""
    path = list(path)
    if path[0] == "crate":
        base, path = (), path[1:]
    elif path[0] in ("self", "super"):
        base = own
        while path and path[0] in ("self", "super"):
            base = base[:-1] if path[0] == "super" else base
            path = path[1:]
    elif (*own, path[0]) in modules:
        base = own
    else:
        return None
    while path:
        if (*base, path[0]) in modules:
            base, path = (*base, path[0]), path[1:]
        elif (target := modules[base].re_exports.get(path[0], path[:1])) != path[:1]:
            return resolve(base, [*target, *path[1:]], modules)
        else:
            break
    return base
