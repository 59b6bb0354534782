"""Multi-task decoders, one file each."""
