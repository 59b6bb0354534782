"""Our products of float32 matrices: their numbers, and how they stand in for PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import products


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    """PyTorch's products, whatever models were built before; the next model puts ours in their place again."""
    if reason := products.find_products():
        pytest.skip(reason)
    while products._kept:
        products._kept.pop()._destroy()
    products.speed_up_products.cache_clear()


def laid_out(generator, transposed, *shape):
    """Random numbers, the last axis or the one before it dense, with a gap between rows as in a part of a map."""
    *batch, rows, columns = shape
    if transposed:
        return laid_out(generator, False, *batch, columns, rows).mT
    return torch.randn(*batch, rows, columns + 3, generator=generator)[..., :columns]


SHAPES = [(1, 5, 7, 3), (2, 12, 32, 32), (3, 25, 300, 45), (2, 1, 1, 1), (1, 50, 600, 530), (2, 13, 0, 5), (0, 4, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)      # batch, rows, terms, columns
@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)])
def test_products_are_those_of_float64(shape, layout):
    """Also added to what is there, beside which nothing is written."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, terms, columns = shape
    left = laid_out(generator, layout[0], batch, rows, terms)
    right = laid_out(generator, layout[1], batch, terms, columns)
    whole = torch.full((batch, rows, columns + 2), 7.0)
    for times in (1, 2):
        out = products.multiply(left, right, whole[..., :columns], add=times == 2)
        expected = times * (left.double() @ right.double())
        # a sum of n terms of size 1 in an order of its own: each addition rounds
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=2e-7 * max(terms, 1))
    assert (whole[..., columns:] == 7).all()


@pytest.mark.parametrize("shape", [(1, 100, 500, 40), (1, 30, 500, 300), (3, 40, 60, 70)])
def test_the_number_of_threads_changes_no_bit(shape):
    batch, rows, terms, columns = shape
    left, right = torch.randn(batch, rows, terms), torch.randn(batch, terms, columns)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(products.multiply(left, right, torch.empty(batch, rows, columns)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_layers_take_our_products_with_the_same_values_and_gradients(monkeypatch):
    """One layer with and without bias (addmm, mm), and one for a batch of weights (bmm, baddbmm)."""
    calls = []
    plain = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in
              ((2, 300, 96), (80, 96), (80,), (2, 96, 80), (2, 1, 80))]

    def run(dtype):
        rows, weight, bias, weights, biases = (x.to(dtype).requires_grad_() for x in inputs)
        outputs = (F.linear(rows, weight, bias), F.linear(rows, weight), rows @ weights,
                   torch.baddbmm(biases, rows, weights))
        loss = sum(out.sin().sum() for out in outputs)
        return *outputs, *torch.autograd.grad(loss, (rows, weight, bias, weights, biases))

    library = products.replace_products()
    try:
        ours = run(torch.float32)
        assert len(calls) == 4 + 2 * 4              # a product forward, two backward, per layer
        calls.clear()
        exact = run(torch.float64)                  # stays with PyTorch
        assert not calls
    finally:
        library._destroy()
    theirs = run(torch.float32)
    assert not calls
    for own, other, right in zip(ours, theirs, exact, strict=True):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("product", [
    lambda x: torch.mm(x[0], x[0].T),                                               # small
    lambda x: torch.mm(torch.randn(40000, 64), torch.randn(64, 1)),                  # narrow
    lambda x: torch.addmm(torch.randn(200), torch.randn(200, 200), torch.randn(200, 200), beta=0.5),
    lambda x: torch.addmm(torch.randn(200), torch.randn(200, 200), torch.randn(200, 200), alpha=2),
    lambda x: torch.mm(torch.ones(200, 200, dtype=torch.int32), torch.ones(200, 200, dtype=torch.int32)),
    lambda x: torch.bmm(x, x.mT), lambda x: torch.baddbmm(x[:, :1, :1], x, x.mT, beta=0)])
def test_other_products_stay_as_they_are(product, monkeypatch):
    monkeypatch.setattr(products, "multiply", lambda *args, **kwargs: pytest.fail("not for our kernels"))
    x = torch.randn(2, 8, 8)
    state = torch.get_rng_state()
    expected = product(x)
    library = products.replace_products()
    try:
        torch.set_rng_state(state)
        assert torch.equal(product(x), expected)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.mm(torch.randn(300, 300), torch.randn(301, 300))
    finally:
        library._destroy()


@pytest.mark.parametrize(("maker", "vectors", "wanted"), [
    ("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False),
    (None, "AVX512", False)])
def test_which_processors_get_them(monkeypatch, maker, vectors, wanted):
    """Intel's have MKL's fast products; where the system names no maker, nothing is changed."""
    monkeypatch.setattr(products, "cpu_info", lambda: {} if maker is None else {"vendor_id": maker})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.mkl_is_slow() is wanted


def test_without_a_compiler_pytorchs_products_run_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(products, "load_extension", lambda *_: (None, "the compiler 'c++' was not found"))
    products.find_products.cache_clear()
    library = products.replace_products()
    try:
        x = torch.randn(200, 200)
        result, again = x @ x, x @ x
    finally:
        library._destroy()
        products.find_products.cache_clear()
    assert torch.equal(result, x @ x) and torch.equal(again, result)
    assert len(caplog.records) == 1 and "half the speed" in caplog.text and "'c++' was not found" in caplog.text


def test_sources_are_all_named():
    """Else a change of a header would not compile anything anew."""
    included = {line.split('"')[1] for line in products.SOURCES[0].read_text(encoding="ascii").splitlines()
                if line.startswith('#include "')}
    assert included == {path.name for path in products.SOURCES if path.suffix == ".h"}
