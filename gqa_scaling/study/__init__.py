"""Many runs -> a decision. No jax here."""
