"""What only developers run: set-up and server, benchmarks, training, and the writer of the locales."""
