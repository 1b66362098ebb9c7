"""What benchmarks share: speed at SD1.5's size, pictures of the bundled model with what they show, and results as files."""
