"""What benchmarks share: speed at SD1.5's size, and pictures of the bundled model with what they show."""
