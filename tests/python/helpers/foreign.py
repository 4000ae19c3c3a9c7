"""Random GPT-2 models in the layouts of other programs, and the dense models that they stand for, by numpy."""

import numpy as np
import torch

from helpers.models import tiny_model

# Of the square and the other maps of a layer, in × out.
MAPS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def dense(seed=0, **changes):
    """A model, and its tensors by name without "transformer."."""
    model = tiny_model(seed=seed, **changes)
    return model, {
        name.removeprefix("transformer."): tensor.detach().clone() for name, tensor in model.named_parameters()
    }


def kron_sum(a, b):
    return sum(np.kron(each, other) for each, other in zip(a.numpy(), b.numpy(), strict=True))


def random_factors(rng, *shapes):
    # Products of these have the deviation 0.3 of the other weights.
    rank = shapes[0][0] if len(shapes[0]) == 3 else 1
    return [torch.tensor(rng.normal(0, (0.3 / rank**0.5) ** 0.5, shape), dtype=torch.float32) for shape in shapes]


def set_dense(model, name, matrix):
    tensor = dict(model.transformer.named_parameters())[f"{name}.weight"]
    tensor.data = torch.tensor(np.ascontiguousarray(matrix), dtype=torch.float32)


def tq(block=(2, 4), rank=4, levels=(2, 2), layers=(1,), seed=0, tied=False, **changes):
    """`(tensors, dense model)` of a TQCompressedGPT-2; `levels` are the sizes of the embedding's, from within."""
    rng = np.random.default_rng(seed)
    model, tensors = dense(seed, tie_word_embeddings=tied, **changes)
    width, inner, (m2, n2) = model.config.n_embd, 4 * model.config.n_embd, block
    for layer in layers:
        for name, rows, columns, (r2, c2) in (("c_fc", width, inner, (m2, n2)), ("c_proj", inner, width, (n2, m2))):
            name = f"h.{layer}.mlp.{name}"
            a, b = random_factors(rng, (rank, columns // c2, rows // r2), (rank, r2, c2))
            p_inv, q = (torch.tensor(rng.permutation(length)) for length in (rows, columns))
            # y = (x[p_inv] K)[q]: row p_inv[i] of W is row i of K.
            matrix = kron_sum(a.transpose(1, 2), b)[np.argsort(p_inv.numpy())][:, q.numpy()]
            set_dense(model, name, matrix)
            del tensors[f"{name}.weight"]
            factors = {"A": a, "B": b, "p_inv": p_inv, "q": q, "b": tensors.pop(f"{name}.bias")}
            tensors |= {f"{name}.{which}": tensor for which, tensor in factors.items()}
    if levels:
        del tensors["wte.weight"]
        table, *factors = random_factors(
            rng, (model.config.vocab_size, width // int(np.prod(levels))), *((1, size) for size in levels)
        )
        names = ["wte" + ".embedding" * depth for depth in range(len(levels) + 1)][::-1]
        tensors[f"{names[0]}.weight"], made = table, table.numpy()
        for name, factor in zip(names[1:], factors, strict=True):
            made = np.kron(made, factor.numpy())
            p = rng.permutation(made.shape[1])
            made = made[:, p]
            tensors |= {f"{name}.B": factor, f"{name}.p": torch.tensor(p)}
        set_dense(model, "wte", made)
    return prefixed(tensors), model


def krony(split=(4, 8), rank=3, old=False, tied_head=True, layers=(0, 1), seed=0, **changes):
    """`(tensors, dense model)` of a Krony-PT; `split` is the shape `(d1, d2)` of the first factors of `c_fc`."""
    rng = np.random.default_rng(seed)
    model, tensors = dense(seed, **changes)
    width, inner, (d1, d2) = model.config.n_embd, 4 * model.config.n_embd, split
    for layer in layers:
        shapes = {"c_fc": ((d1, d2), (width // d1, inner // d2)), "c_proj": ((d2, d1), (inner // d2, width // d1))}
        for name, (first, second) in shapes.items():
            name = f"h.{layer}.mlp.{name}"
            a, b = random_factors(rng, (rank, *first), (rank, *second))
            set_dense(model, name, kron_sum(a, b))
            del tensors[f"{name}.weight"]
            tensors[f"{name}_bias"] = tensors.pop(f"{name}.bias")
            for side, factor in enumerate((a, b)):
                each = {f"{name}_{k}_{side}": factor[k] for k in range(rank)} if old else {f"{name}_{side}": factor}
                tensors |= each
    if tied_head:
        tensors["lm_head.weight"] = tensors["wte.weight"]
    return prefixed(out_by_in(tensors)), model


def out_by_in(tensors):
    """The tensors with dense maps in the orientation of `nn.Linear`."""
    maps = tuple(f"{name}.weight" for name in MAPS)
    return {name: tensor.T.contiguous() if name.endswith(maps) else tensor for name, tensor in tensors.items()}


def prefixed(tensors):
    return {name if name.startswith("lm_head") else f"transformer.{name}": tensor for name, tensor in tensors.items()}
