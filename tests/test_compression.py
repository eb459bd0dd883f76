# SPDX-License-Identifier: Apache-2.0
"""Compression methods: cases computed by hand, what holds for each, and how they are named."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offsite_ray.compression import (
    COMPRESSION_METHODS,
    PackedTensor,
    Quantized,
    pack,
    parse_compression,
    quantize,
)
from offsite_ray.compression.low_rank import kept_rank, truncate, truncate_whitened
from offsite_ray.compression.pruning import prune_pattern, prune_smallest
from offsite_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = [
    "prune:0",
    "prune:0.5",
    "prune:0.99",
    "prune:2:4",
    "prune:1:3",
    *(f"quantize:{bits}" for bits in range(1, 9)),
    "low_rank:0.01",
    "low_rank:0.5",
    "low_rank:1",
    "low_rank_aware:0.5",  # without a word about the inputs, the same
    "gradient_preserving:0.5:1",
    "low_rank:0.7+prune:2:4+quantize:4",
]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Draw a matrix of a few channels, whose inputs may be more than one group of them."""
    rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 8, 128, 130, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
    matrix = torch.randn(rows, columns, generator=generator) * scale
    return matrix.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))).float()


# Pruning


@pytest.mark.parametrize(
    ("ratio", "pruned"),
    [
        (0.0, [[1, -4, 3], [2, -5, 0.5]]),
        (0.08, [[1, -4, 3], [2, -5, 0.5]]),  # 0.48 of a weight
        (0.5, [[0, -4, 3], [0, -5, 0]]),
        (0.9, [[0, 0, 0], [0, -5, 0]]),  # 5.4 of 6
    ],
)
def test_the_smallest_weights_are_pruned(ratio: float, pruned: list[list[float]]) -> None:
    weight = torch.tensor([[1, -4, 3], [2, -5, 0.5]])
    assert prune_smallest(weight, ratio).tolist() == pruned


def test_of_equal_weights_only_as_many_as_asked_are_pruned() -> None:
    weight = torch.tensor([[2.0, -1.0, 1.0], [1.0, 1.0, 0.0]])
    assert prune_smallest(weight, 0.5).tolist() == [[2, 0, 0], [1, 1, 0]]


@given(matrices(), st.floats(0, 1, exclude_max=True))
def test_pruning_leaves_what_it_does_not_prune(weight: Tensor, ratio: float) -> None:
    result = prune_smallest(weight, ratio)
    kept = result != 0
    assert torch.equal(result[kept], weight[kept])
    assert int((weight != 0).sum() - kept.sum()) <= round(ratio * weight.numel())
    assert int((result == 0).sum()) >= round(ratio * weight.numel())
    if kept.any() and not kept.all():
        assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_two_of_four_neighbours_along_the_inputs_stay() -> None:
    weight = torch.tensor([[1.0, -4, 3, 2, 5, 5, -5, 1], [0, 0, 0, 1, 8, 7, 6, 9]])
    expected = [[0, -4, 3, 0, 5, 5, 0, 0], [0, 0, 0, 1, 8, 0, 0, 9]]
    assert prune_pattern(weight, 2, 4).tolist() == expected


def test_a_last_group_of_fewer_inputs_keeps_as_many() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4, 1, 2], [4.0, 3, 2, 1, 0, 0]])
    assert prune_pattern(weight, 2, 4).tolist() == [[0, 0, 3, 4, 1, 2], [4, 3, 0, 0, 0, 0]]
    assert prune_pattern(weight[:, :5], 1, 4).tolist() == [[0, 0, 0, 4, 1], [4, 0, 0, 0, 0]]


# Quantization


@pytest.mark.parametrize(
    ("bits", "weight", "values", "scale"),
    [
        (8, [254.0, -127.0, 1.1, 0.9, 0.0], [127, -64, 1, 0, 0], 2.0),  # -63.5 rounds to even
        (4, [-14.0, 7.1, 3.0, 1.0], [-7, 4, 2, 0], 2.0),  # 1.5 and 0.5 round to even
        (3, [3.0, -1.4, -3.0], [3, -1, -3], 1.0),
        (2, [2.0, -0.9, 1.1, -2.0], [1, 0, 1, -1], 2.0),
        (1, [1.0, -3.0, 0.0, 2.0], [1, -1, 1, 1], 1.5),
    ],
)
def test_weights_are_whole_multiples_of_a_scale(
    bits: int, weight: list[float], values: list[int], scale: float
) -> None:
    quantized = quantize(torch.tensor([weight]), bits)
    assert quantized.values.tolist() == [values]
    assert quantized.scales.tolist() == [[scale]]
    assert quantized.dequantized().tolist() == [[value * scale for value in values]]


def test_each_channel_and_each_128_inputs_have_a_scale() -> None:
    weight = torch.zeros(2, 130)
    weight[0, 127], weight[0, 128], weight[1, 129] = 127.0, 254.0, -381.0
    quantized = quantize(weight, 8)
    assert quantized.scales[0].tolist() == [1.0, 2.0]
    assert quantized.scales[1, 1] == 3.0
    assert torch.equal(quantized.dequantized(), weight)
    weight[0, 128:] = torch.tensor([2.0, -4.0])
    assert quantize(weight, 1).scales[0].tolist() == [127 / 128, 3.0]  # of the two, not of 128


@given(matrices(), st.integers(2, 8))
def test_no_weight_moves_by_more_than_half_a_scale(weight: Tensor, bits: int) -> None:
    quantized = quantize(weight, bits)
    most = 2 ** (bits - 1) - 1
    assert int(quantized.values.abs().max()) <= most
    step = quantized.scales.repeat_interleave(128, dim=1)[:, : weight.shape[1]]
    error = (quantized.dequantized() - weight).abs()
    assert bool((error <= step * (0.5 + 1e-4)).all())
    assert torch.equal(quantized.dequantized()[weight == 0], weight[weight == 0])


def test_two_values_of_four_bits_share_a_byte() -> None:
    values = torch.tensor([[-7, -1, 0, 7, 3]], dtype=torch.int8)
    packed = pack(Quantized(values=values, scales=torch.ones(1, 1)), 4)
    assert packed.tolist() == [[0xF9, 0x70, 0x03]]


@given(matrices(), st.sampled_from([4, 8]), st.booleans(), st.sampled_from(["float32", "bfloat16"]))
def test_what_is_packed_unpacks_to_what_was_quantized(
    weight: Tensor, bits: int, transposed: bool, dtype: str
) -> None:
    quantized = quantize(weight, bits)
    rows, columns = weight.shape
    tensor = PackedTensor(
        bits=bits,
        shape=(columns, rows) if transposed else (rows, columns),
        dtype=getattr(torch, dtype),
        transposed=transposed,
    )
    packed = pack(quantized, bits)
    layouts = [(part.dtype, tuple(part.shape)) for part in (packed, quantized.scales)]
    assert layouts == tensor.part_layouts
    assert tensor.nbytes == packed.nbytes + quantized.scales.nbytes
    expected = quantized.dequantized().to(tensor.dtype)
    unpacked = tensor.unpack(packed, quantized.scales)
    assert torch.equal(unpacked, expected.T if transposed else expected)
    assert tuple(unpacked.shape) == tensor.shape
    assert unpacked.is_contiguous()


# Low rank


def test_the_largest_singular_values_stay() -> None:
    weight = torch.tensor([[0.0, 3, 0], [2, 0, 0], [0, 0, -1]])
    expected = torch.tensor([[0.0, 3, 0], [2, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(truncate(weight, 2), expected)


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [
        ((4, 4), 0.5, 1),  # 16 parameters; a factor pair of rank 1 has 8
        ((4, 4), 1.0, 2),
        ((6, 3), 1.0, 2),  # 18 of 18
        ((6, 3), 0.99, 1),
        ((100, 100), 0.001, 1),
        ((4096, 11008), 0.5, 1492),
    ],
)
def test_a_ratio_is_of_parameters(shape: tuple[int, int], ratio: float, rank: int) -> None:
    assert kept_rank(torch.empty(shape, device="meta"), ratio) == rank


def test_whitening_keeps_what_the_inputs_use() -> None:
    weight, moment = torch.tensor([[3.0, 0], [0, 1]]), torch.diag(torch.tensor([1.0, 100]))
    torch.testing.assert_close(truncate(weight, 1), torch.tensor([[3.0, 0], [0, 0]]))
    whitened = truncate_whitened(weight, moment, 1)  # 1 * sqrt(100) is more than 3 * sqrt(1)
    torch.testing.assert_close(whitened, torch.tensor([[0.0, 0], [0, 1]]))


def test_whitening_is_the_best_on_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight, moment = torch.randn(5, 6, generator=generator), inputs.T @ inputs / 200

    def error(approximation: Tensor) -> float:
        return float((inputs @ (weight - approximation).T).square().sum(-1).mean())

    for rank in range(1, 5):
        # What is dropped of the outputs' own singular values: no matrix of the rank has less.
        least = torch.linalg.svdvals(inputs @ weight.T)[rank:].square().sum() / 200
        assert error(truncate_whitened(weight, moment, rank)) == pytest.approx(float(least), 1e-3)
        assert error(truncate(weight, rank)) > 1.01 * float(least)


def test_whitening_takes_inputs_that_were_never_seen() -> None:
    moment = torch.zeros(3, 3)
    moment[0, 0] = 4.0
    result = truncate_whitened(torch.eye(3), moment, 1)
    assert bool(torch.isfinite(result).all())
    assert float(result[0, 0]) == pytest.approx(1.0)
    assert bool(torch.isfinite(truncate_whitened(torch.eye(3), torch.zeros(3, 3), 1)).all())


def test_whitening_takes_moments_with_the_errors_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    # A few tokens far from the origin: the least eigenvalues are rounding, below zero too.
    inputs = torch.randn(60, 128, generator=generator) + 300
    moment = inputs.T @ inputs / len(inputs)
    assert float(torch.linalg.eigvalsh(moment.double())[0]) < -1e-6 * float(
        moment.diagonal().mean()
    )
    weight = torch.randn(32, 128, generator=generator)
    result = truncate_whitened(weight, moment, 8)
    assert bool(torch.isfinite(result).all())
    assert int(torch.linalg.matrix_rank(result)) <= 8
    with pytest.raises(DataError, match="is not finite"):
        truncate_whitened(weight, moment * math.nan, 8)


# Every method


@pytest.mark.parametrize("text", TEXTS)
@given(weight=matrices())
def test_every_method_gives_a_finite_matrix_and_leaves_the_given_one(
    text: str, weight: Tensor
) -> None:
    before, compression = weight.clone(), parse_compression(text)
    result = compression.apply(weight)
    assert result.shape == weight.shape
    assert result.dtype == torch.float32
    assert bool(torch.isfinite(result).all())
    assert torch.equal(weight, before)
    assert torch.equal(compression.apply(weight), result)
    if compression.packed_bits is not None:
        quantized = quantize(compression.before_packing(weight), compression.packed_bits)
        assert torch.equal(quantized.dequantized(), result)


# The text


def test_steps_are_taken_in_order() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    compression = parse_compression("prune:2:4 + quantize:2")
    assert compression.text == "prune:2:4+quantize:2"
    assert compression.apply(weight).tolist() == [[0, 0, 4, 4]]
    assert parse_compression("prune:0.5+prune:1:2").apply(weight).tolist() == [[0, 0, 0, 4]]


def test_a_recipe_spells_out_every_parameter() -> None:
    steps = parse_compression("low_rank:0.7+prune:2:4+quantize:8").recipe()["steps"]
    assert [{key: v for key, v in step.items() if key != "source"} for step in steps] == [
        {"method": "low_rank", "ratio": 0.7},
        {"method": "prune", "kept": 2, "group": 4},
        {"method": "quantize", "bits": 8, "group_size": 128},
    ]
    assert all("19" in step["source"] or "arXiv" in step["source"] for step in steps)
    assert parse_compression("none").recipe() == {"method": "none", "steps": []}


def test_only_four_and_eight_bits_are_packed() -> None:
    packed = {text: parse_compression(text).packed_bits for text in ("none", *TEXTS)}
    assert {text: bits for text, bits in packed.items() if bits} == {
        "quantize:4": 4,
        "quantize:8": 8,
        "low_rank:0.7+prune:2:4+quantize:4": 4,
    }


@pytest.mark.parametrize("name", sorted(COMPRESSION_METHODS))
def test_a_method_without_its_parameters_says_how_it_is_asked_for(name: str) -> None:
    for text in (name, f"{name}:", f"{name}:x", f"{name}:nan", f"{name}:-1", f"{name}:1:2:3:4"):
        with pytest.raises(ConfigError, match=rf"'{text}' is not of the form {name}:"):
            parse_compression(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prune:1", r"'prune:1' is not of the form prune:RATIO .*0 <= RATIO < 1.*prune:2:4"),
        ("prune:4:4", r"'prune:4:4' .*0 < N < M"),
        ("prune:0:4", r"'prune:0:4' .*0 < N < M"),
        ("quantize:9", r"'quantize:9' .*1 to 8"),
        ("quantize:0", r"'quantize:0' .*1 to 8"),
        ("quantize:4.0", r"'quantize:4.0' .*1 to 8"),
        ("low_rank:0", r"'low_rank:0' .*0 < RATIO <= 1"),
        ("low_rank:1.1", r"'low_rank:1.1' .*0 < RATIO <= 1"),
        ("low-rank:0.5", r"method 'low-rank'; did you mean 'low_rank'\?"),
        (
            "prun:0.5",
            r"method 'prun'; did you mean 'prune'\? \(known: gradient_preserving, low_rank, ",
        ),
        ("", r"unknown compression method ''"),
        ("prune:0.5+", r"unknown compression method ''"),
        ("none+prune:0.5", r"'none' stands alone"),
        ("gradient_preserving:0.5", r"gradient_preserving:RATIO:PRIVACY"),
        ("gradient_preserving:0.5:-1", r"0 or more"),
        ("gradient_preserving:0.5:inf", r"0 or more"),
        ("prune:0.5+gradient_preserving:0.5:1", r"put gradient_preserving first"),
        ("quantize:8+prune:0.5", r"'quantize:8\+prune:0.5' has prune behind quantize.*last"),
        ("quantize:8+quantize:4", r"quantize last"),
        ("prune:2:4+low_rank:0.5", r"low_rank behind prune, whose zeros .* leave one"),
        ("prune:0.5+prune:1:2+low_rank_aware:1", r"low_rank_aware behind prune"),
        ("gradient_preserving:0.5:1+low_rank:0.5", r"low_rank behind gradient_preserving"),
        ("prune:0.5+quantize:1", r"quantize behind prune"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_compression(text)


@pytest.mark.parametrize("text", TEXTS)
def test_what_would_fill_zeros_is_refused_behind_them(text: str) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    pruned = parse_compression("prune:2:4").apply(weight)
    fills = bool((parse_compression(text).apply(pruned)[pruned == 0] != 0).any())
    with pytest.raises(ConfigError) if fills else contextlib.nullcontext():
        parse_compression(f"prune:2:4+{text}")
