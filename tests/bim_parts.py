"""What the tests of BIM share: a small decoder, encoder maps, which output depends on which input."""

import pytest
import torch

from models.decoder import BuildContext
from models.decoders.bim import BIMConfig, BIMDecoder, BIScan
from models.ops.routes import Route
from models.ops.ss2d import S6Weights, s6_scan

STRIDES = (4, 8, 16, 32)
WIDTHS = (8, 16, 32, 64)
ROUTES = ("fwd_tf", "fwd_pf", "bwd_tf", "bwd_pf")


@pytest.fixture(autouse=True)
def exact_arithmetic():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomise(module):
    """No weight keeps a symmetric or neutral initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def bi_scan(width=6, state=4, normed=False):
    return randomise(BIScan(width, rank=2, state=state, normed=normed))


def over_tasks(scan):
    """BI-Scan as a function of maps (B, T, H, W, D)."""
    return lambda feat: scan(feat.movedim(1, 3)).movedim(3, 1)


def one_pass(scan, name):
    """The weights of a route of BI-Scan."""
    index = scan.passes.index(name)
    return S6Weights(*(weight[index:index + 1] for weight in scan.weights))


def context(tasks="abc", widths=WIDTHS, strides=STRIDES):
    return BuildContext(dict.fromkeys(tasks, 1), widths, strides, image_size=(64, 96))


def small_decoder(tasks="abc", **options):
    options = {"d_state": 4, "drop_path_rate": 0.0} | options
    return randomise(BIMDecoder(context(tasks), BIMConfig(**options)))


def encoder_maps(batch=1, height=64, width=96):
    return [torch.randn(batch, c, height // s, width // s) for c, s in zip(WIDTHS, STRIDES, strict=True)]


def dependence(function, feat, channels):
    """(tokens out, tokens in) bool: has an output token (sum of `channels`) a gradient to an input token?

    feat is (1, T, H, W, D); tokens are counted as t * L + y * W + x.
    """
    feat = feat.clone().requires_grad_()
    out = function(feat)[..., channels].sum((0, -1)).flatten()  # (T H W,)
    grads = [torch.autograd.grad(value, feat, retain_graph=True)[0] for value in out]
    return torch.stack([grad.abs().sum((0, -1)).flatten() for grad in grads]) > 0


def scan_sequence(sequence, route):
    """Scans (B, D, L) from its first to its last element with the weights of one S6 route."""
    line = [Route(1, sequence.shape[-1])]
    return s6_scan(sequence.mT.unsqueeze(2), route, line).squeeze(2).mT


def make_identity(scan):
    """Outputs read no state (rows of C are zero) and the skip gain is 1."""
    with torch.no_grad():
        scan.x_proj[:, -scan.A_log.shape[-1]:] = 0
        scan.D.fill_(1)
