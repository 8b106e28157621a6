"""How much training is enough: sizes of batches and numbers of steps that nobody named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fimp_sc.model.train._schedule import Schedule


def of(n_train: int, batch_size: int | None = None, *, library=None, expression=True, labeled=()) -> Schedule:
    library = np.zeros(n_train, dtype=np.int64) if library is None else library
    label = np.full(n_train, -1)
    label[list(labeled)] = 0
    data = SimpleNamespace(expression=object() if expression else None, library=library, label=label)
    return Schedule.of(data, np.arange(n_train), batch_size)


def recordings(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(
    ("n_train", "size", "parts"),
    [(1, 64, 1), (100, 64, 1), (1536, 64, 1), (3072, 128, 2), (6144, 256, 4), (10**6, 256, 4)],
)
def test_expression(n_train: int, size: int, parts: int) -> None:
    found = of(n_train)
    assert (found.batch_size, found.tiles_per_batch) == (size, parts)
    assert (found.mask_ratio, found.validations, found.patience) == ((0.0, 0.4), 0, 3)


@pytest.mark.parametrize(
    ("n_train", "more", "faster"),
    [(1, 1, 1), (4000, 1, 1), (5000, 1.5, 3.375), (6000, 2, 8), (8000, 3, 16), (10_000, 4, 16), (10**6, 4, 16)],
)
@pytest.mark.parametrize("labeled", [(), (0,)])
def test_more_cells_make_more_and_larger_steps(n_train: int, more: float, faster: float, labeled) -> None:
    found = of(n_train, labeled=labeled)
    assert (found.steps, found.patience) == (600 * more, 6 if labeled else 3)
    if labeled:
        faster = min(faster, 8)
    larger = {"lr": pytest.approx(5e-4 * faster), "lr_loadings": pytest.approx(2e-3 * faster**0.5)}
    assert found.plan == ({} if more == 1 else larger)


def test_a_foundation_model_keeps_the_usual_steps() -> None:
    data = SimpleNamespace(expression=object(), library=np.zeros(10_000, int), label=np.full(10_000, -1))
    found = Schedule.of(data, np.arange(10_000), None, pretrained=True)
    assert (found.steps, found.plan) == (600, {})


@pytest.mark.parametrize("batch_size", [1, 50, 100, 1000])
@pytest.mark.parametrize("expression", [True, False])
@pytest.mark.parametrize("library", [None, recordings(50, 150)])
def test_a_size_that_is_given_is_kept(batch_size: int, expression: bool, library) -> None:
    found = of(200, batch_size, expression=expression, library=library)
    assert found.batch_size == batch_size
    whole = not expression and library is not None
    assert found.tiles_per_batch == (1 if whole else max(batch_size // 64, 1))


@pytest.mark.parametrize(
    ("sizes", "size", "parts"),
    [
        ((100, 100), 100, 1),
        ((30, 512), 512, 1),
        ((30, 513), 64, 1),  # too large for a batch
        ((6144, 10), 256, 4),
        ((200,), 64, 1),  # one recording is cut as anything else
    ],
)
def test_recordings_are_seen_as_a_whole_where_they_fit(sizes, size: int, parts: int) -> None:
    found = of(sum(sizes), library=recordings(*sizes), expression=False)
    assert (found.batch_size, found.tiles_per_batch) == (size, parts)


def test_only_training_nodes_count() -> None:
    label = np.full(650, -1)
    label[100] = 0
    data = SimpleNamespace(expression=None, library=recordings(200, 50, 400), label=label)
    found = Schedule.of(data, np.r_[0:90, 200:250], None)
    assert found.batch_size == 90
    assert found.plan == {"lr": 2e-3}


def test_what_signals_and_images_learn_from_differs() -> None:
    found = of(100, expression=False)
    assert found.mask_ratio == (0.1, 0.6)
    assert found.plan == {"lr": 2e-3}
    assert (found.steps, found.most_epochs, found.validations, found.patience) == (800, 400, 30, 6)
    assert of(100, expression=False, labeled=[4]).plan == {"lr": 1e-3}, "labels are learned more slowly"
    assert of(100, labeled=[4]).plan == {}


def test_labels_are_learned_from_nodes_without_a_mask() -> None:
    assert of(100, labeled=(0,)).mask_cells == 0.5
    assert of(100).mask_cells == 1.0
    assert of(100, expression=False, labeled=(0,)).mask_cells == 1.0
    assert of(100, expression=False).mask_cells == 1.0


@pytest.mark.parametrize(
    ("expression", "n_batches", "epochs"),
    [
        (True, 0, 100), (True, 1, 100), (True, 6, 100), (True, 12, 50), (True, 75, 8), (True, 10_000, 8),
        (False, 1, 400), (False, 2, 400), (False, 8, 100), (False, 10_000, 8),
    ],
)  # fmt: skip
def test_epochs_make_about_so_many_steps(expression: bool, n_batches: int, epochs: int) -> None:
    assert of(100, expression=expression).epochs(n_batches) == epochs


@pytest.mark.parametrize(("expression", "epochs", "every"), [(True, 100, 1), (False, 400, 13), (False, 8, 1)])
def test_validation_is_spread_over_the_training(expression: bool, epochs: int, every: int) -> None:
    assert of(100, expression=expression).validate_every(epochs) == every
