"""What only developers run: set-up and server, benchmarks, training, and what is written from the code."""
