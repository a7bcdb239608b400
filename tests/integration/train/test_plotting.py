import pytest

from llamafactory_ddm.integration.train.plotting import build_figure, plot_logs


@pytest.mark.parametrize(("count", "labels"), [(1, []), (2, []), (19, []), (20, ["measured", "smoothed"])])
def test_few_points_are_not_smoothed(count, labels):
    points = [(10 * n, 5.0 - n) for n in range(1, count + 1)]
    (axes,) = build_figure(points, "eval_loss", "eval_loss of out").axes
    first, *rest = axes.lines
    assert list(zip(*first.get_data(), strict=True)) == points
    assert len(rest) == len(labels[1:])
    assert [line.get_label() for line in axes.lines if line.get_label()[0] != "_"] == labels


def test_a_plot_for_each_key(tmp_path):
    logs = [{"loss": 2.0, "step": 1}, {"eval_a/b_loss": 3.0, "step": 1}, {"loss": 1.0, "step": 2}, {"x": 1, "step": 2}]
    plot_logs(tmp_path, logs, ["loss", "eval_a/b_loss", "nll"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_eval_a_b_loss.png", "training_loss.png"]
