"""Adapters of low rank: their settings, which cost nothing to import, and the layers, which need the library peft."""
