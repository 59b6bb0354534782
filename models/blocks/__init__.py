"""Building blocks that several decoders share."""
