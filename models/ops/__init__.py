"""Numerical operators with interchangeable backends; models import them from here and nowhere deeper."""

from models.ops.dcnv3 import Kernel, dcnv3
from models.ops.routes import Route, four_routes
from models.ops.selective_scan import (
    SCAN_BACKENDS,
    count_scan_flops,
    scan_flops,
    scan_routes,
    selective_scan,
    set_scan_backend,
)
from models.ops.ss2d import S6Weights, s6_scan, ss2d_core, window_positions

__all__ = ["SCAN_BACKENDS", "Kernel", "Route", "S6Weights", "count_scan_flops", "dcnv3", "four_routes", "s6_scan",
           "scan_flops", "scan_routes", "selective_scan", "set_scan_backend", "ss2d_core", "window_positions"]
