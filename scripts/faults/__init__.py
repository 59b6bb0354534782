"""Campaigns of faults: what a run must survive, or refuse in one sentence."""
