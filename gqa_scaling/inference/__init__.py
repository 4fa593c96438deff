"""A trained model at work: decoding, and what it costs."""
