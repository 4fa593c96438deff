"""A trained model in use: what it is worth to others, and in the form that their tools read."""
