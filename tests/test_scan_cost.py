"""What the CUDA kernels of the scan cost, taken apart for three generations of GPUs without one: the bars they keep."""

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: nothing compiles the kernels")

from scripts import scan_cost
from scripts.scan_cost import CARDS, SHAPES

pytestmark = pytest.mark.skipif(scan_cost.tools() is None, reason="there is no nvdisasm: Triton is not installed")


@pytest.fixture(scope="module", params=CARDS)
def kernels(request):
    return request.param, scan_cost.costs(request.param)


def test_instructions_per_token_and_no_spills(kernels):
    architecture, found = kernels
    for name, most in (("scan_forward", 150), ("scan_backward", 480)):
        cost, resources = found[name]
        assert resources["STACK"] == 0, (architecture, name)
        assert 0 < sum(cost["main"].values()) <= most, (architecture, name)


def test_every_exponential_is_counted(kernels):
    """16 in each pass over a token's states and one for its step size, with a slope or not; states are computed one and
    a half times on the way back."""
    _, found = kernels
    exponentials = {(name, phase): counts["exponentials"] for name, (cost, _) in found.items()
                    for phase, counts in cost.items()}
    assert exponentials == {("scan_forward", "main"): 17, ("scan_forward", "span"): 17, ("scan_backward", "main"): 41,
                            ("scan_backward", "span"): 17}


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_lie_near_the_floor(kernels, shape):
    row = scan_cost.bound_row(kernels[0], shape, kernels[1])
    assert row["forward, of the floor"] <= 2.5
    assert row["both, of the floor"] <= 2.5


def test_the_longest_way_through_a_loop():
    """A branch over three instructions, a loop inside, and code behind the loop."""
    branches = {1: 5, 7: 6, 8: 0}
    names = ["FADD", "BRA", "FMUL", "FMUL", "FMUL", "MUFU.EX2", "LDS.128", "BRA", "BRA", "EXIT"]
    code = [scan_cost.Instruction(name, branches.get(i), i in branches) for i, name in enumerate(names)]
    kernel = scan_cost.Kernel(code)
    outer, inner = kernel.loops
    assert (tuple(outer), tuple(inner)) == ((0, 9), (6, 8)) and kernel.inside(outer) == [inner]
    assert kernel.way(outer) == {"arithmetic": 4, "rest": 2, "exponentials": 1}
    assert kernel.way(inner) == {"shared x4": 1, "rest": 1}
