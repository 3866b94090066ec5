"""What this machine has of all that lrq-export can use, and whether a package could run on it."""
