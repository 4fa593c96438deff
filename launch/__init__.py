"""Where to run an experiment."""
