"""The mathematics of attention control: pure functions on tensors, one file a method."""
