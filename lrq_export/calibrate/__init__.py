"""What the floating-point model sees: recorded or synthetic inputs, and streaming statistics of every linear layer."""
