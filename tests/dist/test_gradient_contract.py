"""One optimizer step is the same update for any ranks x accumulation x micro-batch."""

import numpy as np
import pytest

from data_prep.shards import open_shards
from sft.order import FILLER, step_rows
from tests import tiny
from tests.dist.training import largest_difference, metrics, reference, train, weights

pytestmark = pytest.mark.dist

LAYOUTS = [(1, 1), (2, 1), (2, 2)]  # ranks, micro-batch; accumulation 8, 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_model, prepared, strategy):
    folder = tmp_path_factory.mktemp("contract")
    outs = {}
    for ranks, micro_batch in LAYOUTS:
        outs[ranks, micro_batch] = folder / f"{ranks}x{micro_batch}"
        train(outs[ranks, micro_batch], base_model, prepared, strategy, ranks, batch__micro_batch=micro_batch)
    return outs


def test_the_data_can_tell(prepared):
    counts = open_shards(prepared / "train").num_labels
    assert 3 * 8 < len(counts) <= 3 * 8 + 4, "step 4 of 4 is the epoch's tail, and mostly filler: a whole rank has none"
    assert counts.max() > 2 * counts.min()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_weights_equal_plain_pytorch(runs, base_model, prepared, layout):
    losses, norms, parameters = reference(base_model, prepared)
    run = metrics(runs[layout])
    np.testing.assert_allclose([line["loss"] for line in run], losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in run], norms, rtol=1e-5)
    # Adam divides by the root of the second moment: where a gradient is nearly 0, rounding shows in the weights
    assert largest_difference(weights(runs[layout]), parameters) < 1e-4


def test_layouts_equal_each_other(runs):
    first = weights(runs[LAYOUTS[0]])
    for layout in LAYOUTS[1:]:
        assert largest_difference(weights(runs[layout]), first) < 1e-4


def test_control_mean_of_means_differs(runs, base_model, prepared):
    losses, norms, parameters = reference(base_model, prepared, mean_of_means=True)
    run = metrics(runs[1, 1])
    assert abs(run[0]["loss"] - losses[0]) / losses[0] > 1e-4
    assert abs(run[0]["grad_norm"] - norms[0]) / norms[0] > 1e-3
    assert largest_difference(weights(runs[1, 1]), parameters) > 1e-2


def test_every_line_accounts_for_its_labels(runs, prepared):
    shards = open_shards(prepared / "train")
    taken = [step_rows(0, step, len(shards), 8) for step in range(4)]
    expected = [int(shards.num_labels[rows[rows != FILLER]].sum()) for rows in taken]
    assert [line["label_tokens"] for line in metrics(runs[2, 1])] == expected


def test_tied_embeddings_equal_plain_pytorch(tmp_path, prepared, strategy):
    """The gradient of the one table comes from both ends of the model."""
    tied = tiny.make_model(tmp_path / "tied", tie_word_embeddings=True)
    train(tmp_path / "run", tied, prepared, strategy, 2)
    losses, norms, parameters = reference(tied, prepared)
    np.testing.assert_allclose([line["loss"] for line in metrics(tmp_path / "run")], losses, rtol=1e-5)
    np.testing.assert_allclose([line["grad_norm"] for line in metrics(tmp_path / "run")], norms, rtol=1e-5)
    assert largest_difference(weights(tmp_path / "run"), parameters) < 1e-4
