"""Figures show their arguments: the artists hold the same data, and no display is used."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tqcompressor import GroupedSpec, KroneckerSpec, LowRankSpec, MixedSpec, TQConfig, decompose, plots
from tqcompressor.compression.budget_plan import BudgetPlan, PlannedMatrix
from tqcompressor.compression.report import CompressionReport
from tqcompressor.errors import ConfigError, DtypeError, MissingDependencyError, NonFiniteError, ShapeError

pytest.importorskip("matplotlib")

SPECS = {
    "wte_2": GroupedSpec(((64, 20), (448, 6))),
    "wte": LowRankSpec(8),
    "h.0.mlp.c_fc": KroneckerSpec((2, 4), 2),
    "h.0.mlp.c_proj": MixedSpec((LowRankSpec(2), KroneckerSpec((4, 2), 1))),
    "h.1.mlp.c_fc": None,
}
SHAPES = {
    "wte": (512, 32),
    "wte_2": (512, 32),
    "h.0.mlp.c_fc": (32, 128),
    "h.0.mlp.c_proj": (128, 32),
    "h.1.mlp.c_fc": (32, 128),
}
LOST = {"wte": 0.25, "wte_2": 0.1875, "h.0.mlp.c_fc": 0.125, "h.0.mlp.c_proj": 0.0625, "h.1.mlp.c_fc": 0.0}


@pytest.fixture
def plan():
    """One matrix of every kind."""
    before = {name: shape[0] * shape[1] for name, shape in SHAPES.items()}
    matrices = tuple(
        PlannedMatrix(
            name,
            shape,
            SPECS[name],
            before[name],
            before[name] if SPECS[name] is None else SPECS[name].parameters(*shape),
            before[name],
            before[name],
            LOST[name],
            np.ones(1),
        )
        for name, shape in SHAPES.items()
    )
    config = TQConfig({name: spec for name, spec in SPECS.items() if spec is not None})
    after = sum(matrix.parameters_after for matrix in matrices) + 100
    return BudgetPlan(0.5, config, matrices, 28_772, after, "sensitivity", True)


def rows_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def markers(axes):
    """For the label of each line, its values by the name of the row."""
    names = rows_of(axes)
    return {
        line.get_label(): {names[int(y)]: x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        for line in axes.lines
    }


def drawn(figure):
    """Forces every artist to be laid out and painted, as saving does."""
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("log_scale", [False, True])
def test_every_method_has_a_marker_at_each_of_its_lost_energies(log_scale):
    methods = {"low rank": {"a": 0.5, "b": 0.25}, "Kronecker": {"b": 0.75, "c": 0.0}}
    (axes,) = drawn(plots.plot_lost_energy(methods, log_scale=log_scale)).axes
    assert rows_of(axes) == ["a", "b", "c"]
    assert markers(axes) == methods
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "rows must be read from the top"
    # A zero is on the axis, linear or logarithmic.
    assert axes.get_xscale() == ("symlog" if log_scale else "linear")
    assert axes.get_xlim()[0] <= 0


def test_lost_energies_that_are_all_positive_are_on_a_true_logarithmic_axis():
    (axes,) = plots.plot_lost_energy({"low rank": {"a": 0.5, "b": 0.001}}, log_scale=True).axes
    assert axes.get_xscale() == "log"


def test_plans_and_reports_are_methods_too(plan):
    report = CompressionReport.from_dict(
        {
            "tqcompressor": "0",
            "format_version": 2,
            "source": None,
            "effort": "fast",
            "seed": 0,
            "dtype": None,
            "matrices": [
                {
                    "name": "wte",
                    "tensor": "wte.weight",
                    "shape": [512, 32],
                    "parameters_before": 16_384,
                    "parameters_after": 4288,
                    "rank": 8,
                    "lost_energy": 0.375,
                    "seconds": 0.1,
                }
            ],
            "untouched": [],
            "parameters_before": 16_384,
            "parameters_after": 4288,
            "bytes_before": None,
            "bytes_after": None,
            "seconds": 0.1,
        }
    )
    (axes,) = plots.plot_lost_energy({"plan": plan, "report": report}).axes
    assert markers(axes) == {"plan": LOST, "report": {"wte": 0.375}}


def test_a_frontier_has_its_points_in_the_order_of_their_parameters():
    methods = {"second moment": [(0.8, 90.0), (0.5, 150.0), (0.65, 100.0)], "sensitivity": [(0.5, 120.0)]}
    (axes,) = drawn(plots.plot_frontier(methods, dense=(1.0, 80.0), quality="perplexity", log_scale=True)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["second moment"] == [[0.5, 150.0], [0.65, 100.0], [0.8, 90.0]]
    assert lines["sensitivity"] == [[0.5, 120.0]]
    assert lines["dense model"] == [[1.0, 80.0]]
    assert any(set(line.get_ydata()) == {80.0} and line.get_linestyle() == "--" for line in axes.lines)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters kept", "perplexity")
    assert axes.xaxis.get_major_formatter()(0.65) == "65%"
    assert axes.get_yscale() == "log"


def test_numbers_of_parameters_are_no_shares():
    (axes,) = plots.plot_frontier({"ours": [(81_336_388, 32.25)]}, quality="accuracy").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("parameters", "accuracy")
    assert axes.xaxis.get_major_formatter()(81_000_000) == "81M"


def map_of(axes):
    return np.asarray(axes.images[0].get_array())


def naive_block_energy(w, block):
    energy = np.zeros(block)
    for (row, column), value in np.ndenumerate(w.astype(np.float64)):
        energy[row % block[0], column % block[1]] += value**2
    return energy / energy.sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_block_energy_is_the_naive_loops_before_and_after(dtype):
    generator = np.random.default_rng(0)
    w = (generator.standard_normal((12, 16)) * generator.lognormal(size=(12, 1))).astype(dtype)
    p, q = generator.permutation(12), generator.permutation(16)
    before, after, colorbar = drawn(plots.plot_block_energy(w, (3, 4), p, q)).axes
    for axes, matrix in ((before, w), (after, w[p][:, q])):
        expected = naive_block_energy(matrix, (3, 4))
        assert map_of(axes) == pytest.approx(expected, rel=1e-9)
        numbers = {text.get_position(): text.get_text() for text in axes.texts}
        assert numbers == {(j, i): f"{share:.1%}" for (i, j), share in np.ndenumerate(expected)}
    assert before.images[0].get_clim() == after.images[0].get_clim(), "the two maps must share their colours"
    assert colorbar.get_ylabel() == "share of the energy"


def test_one_side_may_be_permuted_and_large_blocks_have_no_numbers():
    w = np.random.default_rng(1).standard_normal((32, 32))
    q = np.arange(32)[::-1].astype(np.uint16)
    before, after, _ = plots.plot_block_energy(w, (16, 16), column_permutation=q).axes
    assert map_of(after) == pytest.approx(naive_block_energy(w[:, ::-1], (16, 16)))
    assert not before.texts and not after.texts


def test_without_a_permutation_there_is_one_map():
    w = np.random.default_rng(2).standard_normal((8, 8))
    axes, _ = plots.plot_block_energy(w, (2, 2)).axes
    assert map_of(axes) == pytest.approx(naive_block_energy(w, (2, 2)))


def test_the_search_gathers_energy_in_few_entries_of_the_block():
    generator = np.random.default_rng(3)
    w = (generator.standard_normal((64, 64)) * generator.lognormal(sigma=1.5, size=(64, 1))).astype(np.float32)
    found = decompose(w, KroneckerSpec((2, 4), 2), effort="fast")
    figure = plots.plot_block_energy(w, found.spec.block, found.row_permutation, found.column_permutation)
    before, after = (np.square(map_of(axes)).sum() for axes in figure.axes[:2])
    assert after > 1.2 * before


def test_a_plan_shows_what_each_matrix_keeps_and_loses(plan):
    kept, lost = drawn(plots.plot_plan(plan)).axes
    assert rows_of(kept) == list(SHAPES)
    before, after = ([bar.get_width() for bar in container] for container in kept.containers)
    assert before == [matrix.parameters_before for matrix in plan.matrices]
    assert after == [matrix.parameters_after for matrix in plan.matrices]
    assert [text.get_text() for text in kept.texts] == [f"{a / b:.0%}" for a, b in zip(after, before, strict=True)]
    (bars,) = lost.containers
    assert [bar.get_width() for bar in bars] == list(LOST.values())
    # Five kinds, five colours, and a legend that names them.
    assert len({bar.get_facecolor() for bar in bars}) == 5
    (legend,) = plan_legends(kept.figure)
    colors = {text.get_text(): patch.get_facecolor() for text, patch in legend}
    kinds = ["low rank", "low rank by groups of rows", "Kronecker sum", "mixed sum", "stays dense"]
    assert [colors[kind] for kind in kinds] == [bar.get_facecolor() for bar in bars]
    assert lost.get_xlabel() == "lost energy (objective sensitivity)"
    assert f"{plan.parameters_after:,}" in kept.figure.get_suptitle()


@pytest.mark.parametrize(
    ("objective", "calibrated", "norm"),
    [
        ("auto", False, "Frobenius norm"),
        ("frobenius", True, "Frobenius norm"),
        ("auto", True, "norm of the calibration"),
        ("second_moment", True, "objective second_moment"),
    ],
)
def test_a_plan_says_in_which_norm_energy_is_lost(plan, objective, calibrated, norm):
    _, lost = plots.plot_plan(replace(plan, objective=objective, calibrated=calibrated)).axes
    assert lost.get_xlabel() == f"lost energy ({norm})"


def plan_legends(figure):
    return [zip(legend.get_texts(), legend.get_patches(), strict=True) for legend in figure.legends]


NOT_FINITE = np.full((4, 4), np.nan)
EYE = np.eye(4)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.plot_lost_energy({}), ConfigError, "no lost energy"),
        (lambda: plots.plot_lost_energy({"a": {}}), ConfigError, "no lost energy"),
        (lambda: plots.plot_lost_energy({"svd": {"wte": np.nan}}), NonFiniteError, "svd: wte.*got nan"),
        (lambda: plots.plot_lost_energy({"svd": {"wte": None}}), ConfigError, "svd: wte has no lost energy yet"),
        (lambda: plots.plot_frontier({"svd": []}), ConfigError, "no point"),
        (lambda: plots.plot_frontier({"svd": [(0.5, np.inf)]}), NonFiniteError, "svd: expected finite"),
        (lambda: plots.plot_frontier({"svd": [(0, 1.0)]}), ConfigError, "svd: expected positive"),
        (lambda: plots.plot_frontier({"svd": [(1, 0.0)]}, log_scale=True), ConfigError, "svd: expected positive"),
        (lambda: plots.plot_frontier({"svd": [(0.5, 9.0)]}, dense=(124e6, 8.0)), ConfigError, "got both"),
        (lambda: plots.plot_block_energy(np.ones(4), (1, 1)), ShapeError, "expected a matrix"),
        (lambda: plots.plot_block_energy(np.ones((4, 4), int), (1, 1)), DtypeError, "floating"),
        (lambda: plots.plot_block_energy(EYE, (3, 2)), ShapeError, "does not divide"),
        (lambda: plots.plot_block_energy(EYE, (0, 2)), ConfigError, "block"),
        (lambda: plots.plot_block_energy(NOT_FINITE, (2, 2)), NonFiniteError, "NaN"),
        (lambda: plots.plot_block_energy(0 * EYE, (2, 2)), ConfigError, "not zero"),
        (lambda: plots.plot_block_energy(EYE, (2, 2), [0, 1, 1, 2]), ShapeError, "row_permutation"),
        (lambda: plots.plot_block_energy(EYE, (2, 2), None, [0, 1]), ShapeError, "column_permutation"),
        (lambda: plots.plot_block_energy(EYE, (2, 2), EYE[0]), ShapeError, "row_permutation"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_without_matplotlib_the_error_says_what_to_install(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (
        lambda: plots.plot_lost_energy({"a": {"b": 0.5}}),
        lambda: plots.plot_frontier({"a": [(0.5, 1.0)]}),
        lambda: plots.plot_block_energy(EYE, (2, 2)),
        lambda: plots.plot_plan(plan),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install \"tqcompressor\[plots\]\""):
            draw()


def test_no_display_and_no_pyplot_are_needed():
    code = """
import sys
import tqcompressor.plots
assert "matplotlib" not in sys.modules
figure = tqcompressor.plots.plot_frontier({"ours": [(0.5, 2.0)]})
figure.savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code, "/dev/null"], capture_output=True, text=True, env={})
    assert run.returncode == 0, run.stderr


def test_figures_of_real_results_can_be_written(tmp_path):
    w = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)
    lost = {f"{budget:.0%}": {"w": decompose(w, budget=budget, effort="fast").lost_energy} for budget in (0.4, 0.8)}
    path = tmp_path / "lost.png"
    plots.plot_lost_energy(lost).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
