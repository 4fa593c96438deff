"""A trained model at work: decoding, what it is worth to others, and the forms that their tools read."""
