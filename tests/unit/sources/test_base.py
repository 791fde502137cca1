"""Views of a source, the stratified holdout, and class counts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from rayprune.sources import Limited, Schema, Subset, holdout
from rayprune.sources.base import count_classes
from rayprune.sources.memory import RowSource
from rayprune.sources.views import Relabeled
from tests.support.sources import make_source


class GroupedSource(RowSource):
    @property
    def groups(self):
        return np.array([0, 4, 7, 10])


@pytest.mark.parametrize("ids", [[0, 4], [-1]])
@pytest.mark.parametrize(
    "source",
    [make_source([0, 1, 0, 1]), Limited(make_source([0] * 9), 4), Subset(make_source([0] * 9), np.array([8, 1, 2, 3]))],
)
def test_unknown_ids_are_named(source, ids):
    with pytest.raises(ValueError, match=rf"first {ids[-1]}: valid are 0\.\.3"):
        source.take(np.array(ids))


def test_a_limit_keeps_the_first_samples():
    source = make_source([0, 1, 2, 0, 1])
    limited = Limited(source, 3)
    assert len(limited) == 3
    assert limited.labels.tolist() == [0, 1, 2]
    assert limited.fingerprint not in {source.fingerprint, Limited(source, 2).fingerprint}
    whole = Limited(source, 99)
    assert (len(whole), whole.fingerprint) == (5, source.fingerprint)
    with pytest.raises(ValueError, match=r"data\.limit is 0"):
        Limited(source, 0)


def test_a_subset_pickles_its_rows():
    source = make_source([0, 1, 2, 0, 1])
    for rows in ([1, 3, 4], [4, 1, 1]):
        again = pickle.loads(pickle.dumps(Subset(source, np.array(rows))))
        assert again.take(np.arange(3))["features"].ravel().tolist() == rows
        assert again.fingerprint == Subset(source, np.array(rows)).fingerprint
    with pytest.raises(ValueError, match="first 5"):
        Subset(source, np.array([5]))


def test_groups_are_those_of_the_remaining_rows():
    plain = make_source([0] * 10)
    source = GroupedSource(plain._open_arrays, plain.schema, plain.fingerprint, plain.labels)
    assert Limited(source, 5).groups.tolist() == [0, 4, 5]
    assert Subset(source, np.array([1, 2, 5, 9])).groups.tolist() == [0, 2, 3, 4]
    assert Subset(source, np.array([5, 1])).groups is None
    assert plain.groups is None
    assert Limited(plain, 5).groups is None


def test_relabeled_samples_keep_everything_but_their_labels():
    source = make_source([0, 1, 2, 0, 1])
    view = Relabeled(source, np.array([0, 2, 2, 0, 0]))
    assert (len(view), view.num_changed, view.schema, view.row_cost) == (5, 2, source.schema, source.row_cost)
    for each in (view, pickle.loads(pickle.dumps(view))):
        assert each.labels.tolist() == [0, 2, 2, 0, 0]
        assert each.fingerprint == view.fingerprint
        taken = each.take(np.array([4, 1, 1, 3]))
        assert taken["label"].tolist() == [0, 2, 2, 0]
        assert taken["label"].dtype == np.int64
        assert taken["features"].ravel().tolist() == [4, 1, 1, 3]
        assert each.take(np.array([], dtype=np.int64))["label"].tolist() == []
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert source.take(np.arange(5))["label"].tolist() == [0, 1, 2, 0, 1]
    assert Relabeled(Subset(source, np.array([4, 2])), np.array([0, 2])).take(np.arange(2))["label"].tolist() == [0, 2]


def test_the_fingerprint_of_relabeled_samples_depends_on_the_new_labels():
    source = make_source([0, 1, 2, 0, 1])
    variants = [[0, 2, 2, 0, 1], [0, 0, 2, 0, 1], [0, 1, 2, 0, 2], [0, 1, 2, 0, 1]]
    prints = [Relabeled(source, np.array(labels)).fingerprint for labels in variants]
    assert len(set(prints)) == 4
    assert prints[-1] == source.fingerprint


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 0, 3], [0, 1, 2, 0, -1], [0.0, 1, 2, 0, 1]])
def test_labels_that_do_not_fit_the_source_are_refused(labels):
    with pytest.raises(ValueError, match=r"give 5 integers|sample 4 gets label (3|-1), outside 0\.\.2"):
        Relabeled(make_source([0, 1, 2, 0, 1]), np.array(labels))


def test_the_fingerprint_changes_with_order_and_labels():
    prints = {
        Subset(make_source(labels), np.array(rows)).fingerprint
        for labels, rows in [([0, 1, 1], [0, 1, 2]), ([0, 1, 0], [0, 1, 2]), ([0, 1, 1], [0, 2, 1])]
    }
    assert len(prints) == 3


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.95])
def test_a_holdout_is_stratified_and_complete(fraction):
    labels = np.repeat([0, 1, 2, 3], [50, 20, 2, 1])
    source = make_source(np.random.default_rng(1).permutation(labels))
    splits = holdout(source, fraction, seed=0)
    rows = [part.take(np.arange(len(part)))["features"].ravel() for part in (splits.train, splits.validation)]
    assert sorted(np.concatenate(rows)) == list(range(73))
    assert all((np.diff(part) > 0).all() for part in rows)
    assert np.unique(splits.train.labels).tolist() == [0, 1, 2, 3]
    counts = np.bincount(splits.validation.labels, minlength=4)
    assert counts[3] == 0
    assert (np.abs(counts[:2] - fraction * np.array([50, 20])) <= 1).all()
    assert holdout(source, fraction, 0).validation.fingerprint == splits.validation.fingerprint
    assert holdout(source, fraction, 1).validation.fingerprint != splits.validation.fingerprint


def test_a_holdout_has_at_least_one_sample_but_no_whole_class():
    assert len(holdout(make_source([0, 0, 1]), 0.1, 0).validation) == 1
    assert holdout(make_source([0, 1, 2]), 0.5, 0).validation is None
    assert holdout(make_source([0, 0]), 0).validation is None
    with pytest.raises(ValueError, match=r"validation_fraction is 1\.5"):
        holdout(make_source([0, 0]), 1.5, 0)


@pytest.mark.parametrize(
    ("labels", "num_classes", "class_names", "expected"),
    [([0, 4], None, (), 5), ([0, 4], None, ("a", "b"), 2), ([0, 4], 7, ("a", "b"), 7), ([0, 5_000], 5_001, (), 5_001)],
)
def test_classes_are_counted_by_key_names_or_the_largest_label(labels, num_classes, class_names, expected):
    assert count_classes(np.array(labels), "labels", num_classes, class_names) == expected


def test_labels_that_cannot_be_classes_are_refused():
    with pytest.raises(ValueError, match="column 'y' look like ids, not labels: the largest of 2 is 5000"):
        count_classes(np.array([0, 5_000]), "column 'y'", None)
    with pytest.raises(ValueError, match=r"column 'y' holds 4294967296: labels must be below 2\*\*31"):
        count_classes(np.array([2**32]), "column 'y'", None)


def test_class_names_are_kept_if_there_is_one_per_class():
    assert Schema.for_classification("features", (3,), 2, ["a", "b"]).class_names == ("a", "b")
    assert Schema.for_classification("features", (3,), 3, ["a", "b"]).class_names == ()
    with pytest.raises(ValueError, match="num_classes is 0"):
        Schema.for_classification("features", (3,), 0)
