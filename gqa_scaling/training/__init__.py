"""One run: optimizer, telemetry, loop."""
