import torch

from omnisift.float32_product import _terms, linear_float32


def test_three_bfloat16_terms_are_the_number_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) * torch.logspace(-20, 20, 1000)
    terms = _terms(x, 3)
    assert all(term.dtype == torch.bfloat16 for term in terms)
    assert torch.equal(torch.stack(terms).double().sum(0), x.double())


def test_two_terms_are_within_2_to_the_minus_17() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first, second = _terms(x, 2)
    error = (first.double() + second.double() - x.double()).abs() / x.double().abs()
    assert float(error.max()) <= 2**-17


def test_on_a_cpu_it_is_the_plain_product() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(linear_float32(x, weight, bias), expected)
