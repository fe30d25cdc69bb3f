"""The dense product: few rows on the compiled path, many on torch's, both beside float64."""

import pytest
import torch

from workbench.kernels import cpu, dense


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 40])
@pytest.mark.parametrize("inputs", [96, 50])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equals_float64_in_every_dtype(rows: int, inputs: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(30, inputs, generator=rng).bfloat16(), torch.randn(30, generator=rng).bfloat16()
    x = torch.randn(rows, 1, inputs, generator=rng).to(dtype)
    want = x.double() @ weight.double().mT + bias.double()
    got = dense.linear(x, weight, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=2**-7 if dtype == torch.bfloat16 else 1e-4,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-4,
    )


def test_few_rows_take_the_compiled_path_and_gradients_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from workbench.kernels.cpu import products

    calls: list[int] = []
    original = products.linear
    monkeypatch.setattr(products, "linear", lambda x, *rest: calls.append(len(x)) or original(x, *rest))
    weight = torch.randn(30, 32).bfloat16()
    x = torch.randn(5, 32).bfloat16()
    if cpu.unavailable():
        pytest.skip("no compiled path here")
    dense.linear(x[:2], weight)
    dense.linear(x, weight)
    assert calls == [2]
    leaf = x[:2].clone().requires_grad_()
    dense.linear(leaf, weight).sum().backward()
    assert calls == [2]
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(2, 32), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("rows", [24, 40])
@pytest.mark.parametrize("chunk", [96 * 2880, 40 * 96])
@pytest.mark.parametrize("with_bias", [True, False])
def test_many_rows_in_float32_equal_float64(
    rows: int, chunk: int, number_of_threads: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on processors that multiply bfloat16 slowly; the outputs are taken a few at a time."""
    if cpu.unavailable():
        pytest.skip("bfloat16 is widened beside the compiled kernels only")
    monkeypatch.setattr(cpu, "_widens", lambda: True)
    monkeypatch.setattr(dense, "_CHUNK", chunk)
    rng = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(208, 96, generator=rng).bfloat16(), torch.randn(208, generator=rng).bfloat16()
    x = torch.randn(2, rows // 2, 96, generator=rng).bfloat16()
    want = x.double() @ weight.double().mT + (bias.double() if with_bias else 0)

    def rounded_once(got: torch.Tensor) -> bool:
        return got.dtype == torch.bfloat16 and bool(((got - want).abs() <= want.abs() * 2**-8 + 1e-5).all())

    assert rounded_once(dense.linear(x, weight, bias if with_bias else None))
    assert not rounded_once(dense.linear(x, weight.roll(1, 0), bias if with_bias else None))
    assert not rounded_once(dense.linear(x, weight, None if with_bias else bias))
    gradient = x.clone().requires_grad_()
    dense.linear(gradient, weight).sum().backward()
    torch.testing.assert_close(gradient.grad, weight.sum(0).expand_as(x), rtol=0.02, atol=0.05)
