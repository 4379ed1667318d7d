"""Squares of inputs: what is possible, and the mean that a quantiser weighs with."""

from __future__ import annotations

import pytest
import torch

from signround.importance import Importance, InputSquares


def squares(sums: list[list[float]], counts: list[int]) -> InputSquares:
    return InputSquares(torch.tensor(sums), torch.tensor(counts))


def test_means_are_sums_over_counts_in_float32() -> None:
    found = squares([[3.0, 1.0], [5.0, 0.0]], [3, 7])
    assert torch.equal(found.means(), torch.tensor([[1.0, 1 / 3], [5 / 7, 0.0]], dtype=torch.float32))
    assert found.means().dtype == torch.float32
    assert found.unseen == []


def test_an_unseen_expert_weighs_all_inputs_alike() -> None:
    found = squares([[2.0, 4.0], [0.0, 0.0]], [2, 0])
    assert torch.equal(found.means(), torch.tensor([[1.0, 2.0], [1.0, 1.0]]))
    assert found.unseen == [1]


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([[1.0, float("nan")]], [1], "NaN or Inf"),
        ([[1.0, float("inf")]], [1], "NaN or Inf"),
        ([[1.0, -1.0]], [1], "negative sum"),
        ([[1.0, 1.0]], [0], "no token reached"),
        ([[1.0, 1.0]], [-3], "no token reached"),
        ([[1.0, 1.0]], [1, 2], r"counts must be int64 \[experts\]"),
    ],
)
def test_impossible_statistics_are_refused(sums: list[list[float]], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        squares(sums, counts)


def test_dtypes_are_checked() -> None:
    with pytest.raises(ValueError, match="sums must be float32"):
        InputSquares(torch.ones(1, 2, dtype=torch.float64), torch.tensor([1]))
    with pytest.raises(ValueError, match="counts must be int64"):
        InputSquares(torch.ones(1, 2), torch.tensor([1.0]))


def test_weights_without_a_measurement_have_no_means() -> None:
    importance = Importance({"a": squares([[2.0]], [2])}, "text", 1, 2)
    assert importance.means("b") is None
    found = importance.means("a")
    assert found is not None
    assert found.tolist() == [[1.0]]
