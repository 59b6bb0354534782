"""Vehicles in space: from the network's outputs to boxes (`decoding`), and the detection score (`meter`)."""
